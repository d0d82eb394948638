# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the integration suite runs on, how it compares, and what it reports.

It is told by the environment (`Settings`):

QWEN35_MODEL_PATH       a Hugging Face checkpoint (default: the mini that ships with the package)
QWEN35_COMPILED_PATH    what `qwen35 compile` wrote of it; on a Neuron device tests are skipped without it
QWEN35_RECORDED_LOGITS  what `tools/record_logits.py` wrote of it (default, of the mini alone: test/data)
QWEN35_REPORT           a file to write: tables of times in Markdown, and how far logits are from transformers'

On a device one model has all of the memory, so that a run tests one compiled form. `compile_command` has everything
that tests ask for but fp8; what a form lacks is skipped, with the command that makes one which has it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig
from qwen35.configuration_qwen35_vl import Qwen35VLInferenceConfig
from qwen35.json_files import read_object
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.planning.recommended import device_neuron_config
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, load_compiled_config
from qwen35.serving.runner import ModelRunner, Row
from qwen35.weights.checkpoint import CheckpointReader, is_mtp

ON_DEVICE = NXDI_AVAILABLE and os.environ.get("NXD_CPU_MODE") != "1"
"""Whether models run on a Neuron device: else on a CPU, with the stand-ins or in the real NxDI's CPU mode."""

MINI_RECORDING = Path(__file__).resolve().parents[1] / "data" / "mini_logits.safetensors"
ROWS, DRAFTS = 4, 3
SEQ_LEN, CHUNK = 1536, 256
"""Of what is loaded on a CPU: the recorded long prompt of 1,500 tokens comes in six chunks."""
FP8_ENVIRONMENT = ("XLA_HANDLE_SPECIAL_SCALAR=1", "UNSAFE_FP8FNCAST=1")
"""What fp8 needs to be compiled and to run on a device, see docs/checkpoints.md."""
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""By dtype, how near two logits are so that another order of summation may choose the other one: in bfloat16 two of the
steps in which logits from 16 to 32 are counted; in float32 50 times what the mini's are off."""

Report = Callable[[str, str], None]
"""Adds a text in Markdown under a heading to the report; texts of one heading stand together."""


@dataclass(frozen=True)
class Settings:
    """What is tested."""

    model: Path = MINI_CHECKPOINT
    compiled: Path | None = None
    recording: Path | None = None
    report: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Those that the module's docstring lists.

        Raises:
            ValueError: one names what is not there; all of them are named.
        """
        names = {
            "model": "QWEN35_MODEL_PATH",
            "compiled": "QWEN35_COMPILED_PATH",
            "recording": "QWEN35_RECORDED_LOGITS",
            "report": "QWEN35_REPORT",
        }
        given = {field: Path(environment[name]) for field, name in names.items() if environment.get(name)}
        remedies = {
            "model": (lambda path: (path / "config.json").exists(), "name the directory of a checkpoint"),
            "compiled": (lambda path: (path / "neuron_config.json").exists(), "name what 'qwen35 compile' wrote"),
            "recording": (lambda path: path.is_file(), "name what tools/record_logits.py wrote"),
            "report": (lambda path: path.absolute().parent.is_dir(), "name a file in a directory that is there"),
        }
        problems = [
            f"{names[field]}={path}: {remedies[field][1]}"
            for field, path in given.items()
            if not remedies[field][0](path)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        settings = cls(**given)
        if settings.recording is None and settings.is_mini:
            return replace(settings, recording=MINI_RECORDING)
        return settings

    @property
    def is_mini(self) -> bool:
        """Whether the checkpoint is the mini, which knows little, but that for sure."""
        return self.model.resolve() == MINI_CHECKPOINT.resolve()

    def compile_command(self, **options: str | bool) -> str:
        """The command that compiles what all tests but those of fp8 run on, with further options."""
        name = f"compiled-{self.model.resolve().name}" + "".join(f"-{value}" for value in options.values())
        parts = [*FP8_ENVIRONMENT] if "fp8" in options.values() else []
        parts += ["qwen35", "compile", name, "--model", str(self.model), "--instance", "trn2.3xlarge"]
        parts += ["--tp", "4", "--seq-len", "8192", "--batch", str(ROWS), "--vision", "--speculate", str(DRAFTS)]
        for option, value in options.items():
            parts += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
        return shlex.join(parts)

    def load(self, weights_dtype: str | None = None) -> TextGenerator:
        """What is compiled; on a CPU, where nothing is, a model of the same form.

        Args:
            weights_dtype: of the latter.
        """
        if self.compiled is not None:
            return TextGenerator.load(self.model, load_compiled_config(self.compiled), self.compiled)
        if ON_DEVICE:
            pytest.skip(f"set QWEN35_COMPILED_PATH to what this writes: {self.compile_command()}")
        with CheckpointReader(self.model) as reader:
            drafts = DRAFTS if any(map(is_mtp, reader)) else 0
        neuron_config = device_neuron_config(
            None,
            1,
            SEQ_LEN,
            ROWS,
            prompt_bucket=CHUNK,
            on_cpu=True,
            num_speculative_tokens=drafts,
            weights_dtype=weights_dtype,
        )
        takes_pictures = bool(read_object(self.model / "config.json").get("vision_config"))
        config_cls = Qwen35VLInferenceConfig if takes_pictures else Qwen35InferenceConfig
        return TextGenerator.load(self.model, config_cls.from_pretrained(self.model, neuron_config=neuron_config))


def slots_of(model: NeuronQwen35ForCausalLM) -> int:
    """Rows that a decoding step may have."""
    slots: int = model.neuron_config.tkg_batch_size
    return slots


def encode_rows(runner: ModelRunner, rows: Sequence[Row]) -> torch.Tensor:
    """Encode whole prompts, as many a call as were compiled for; logits [B, V] after their last tokens, float32."""
    ended: dict[Row, torch.Tensor] = {}
    while waiting := [row for row in rows if row not in ended]:
        batch = runner.batch(waiting)
        for row, logits in zip(batch, runner.encode(batch).all_logits(), strict=True):
            if row.cached == len(row.tokens):
                ended[row] = logits.float()
    return torch.stack([ended[row] for row in rows])


Media = Mapping[str, torch.Tensor]
"""Pixels and grids of a prompt, by the names that its processor gives them."""


def greedy(
    model: NeuronQwen35ForCausalLM, prompts: Sequence[Sequence[int]], new: int, media: Sequence[Media] = ()
) -> tuple[list[list[int]], torch.Tensor]:
    """`new` greedy tokens of each prompt, decoded together without drafts, and the logits [B, new, V] they are of.

    media: of each prompt, unless none has any.
    """
    runner = ModelRunner(model)
    rows = [
        Row(slot, [*prompt], placed=runner.place(prompt, own))
        for slot, (prompt, own) in enumerate(zip(prompts, media or [{}] * len(prompts), strict=True))
    ]
    logits = [encode_rows(runner, rows)]
    for _ in range(new - 1):
        for row, own in zip(rows, logits[-1], strict=True):
            row.tokens.append(int(own.argmax()))
        logits.append(runner.decode(rows).all_logits().float())
    stacked = torch.stack(logits, dim=1)
    return [own.argmax(dim=1).tolist() for own in stacked], stacked


def require_same_up_to_ties(
    tokens: Sequence[int], expected: Sequence[int], logits: torch.Tensor, dtype: torch.dtype
) -> None:
    """Check that tokens are those expected, or leave them where two logits are as near as `TIE` says.

    Args:
        expected: greedy tokens; logits: [n, V] that they were chosen from.
    """
    both = zip(tokens, expected, strict=False)
    first = next((i for i, (own, other) in enumerate(both) if own != other), None)
    if first is None:
        assert len(tokens) <= len(expected), f"{len(tokens)} tokens, of {len(expected)} expected ones"
        return
    own, other = tokens[first], expected[first]
    apart = float(logits[first, other] - logits[first, own])
    assert apart <= TIE[dtype], (
        f"token {first} is {own}, expected {other}, whose logit is {apart:.3g} larger: more than {TIE[dtype]}"
    )
