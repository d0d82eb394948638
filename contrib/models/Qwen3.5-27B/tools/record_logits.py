# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Record transformers' logits of fixed prompts over a checkpoint, on a machine with less memory than it has bytes.

The modules are transformers' own (>= 5), one at a time: each decoder layer is read, run over all prompts and freed. The
prompts run in float32 and, with the matrices rounded to fp8, once more, which are the references; and in bfloat16, to
know what rounding does (`support/recorded_logits.py`). In memory are one layer in float32 beside its mapped file, and
the activations.

    python tools/record_logits.py --model DIR --output FILE

Without arguments: the mini, to where the tests read it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[1] / "test"
sys.path.insert(0, str(TESTS))

from qwen35.fp8_form import is_fp8_matrix  # noqa: E402
from qwen35.json_files import read_object  # noqa: E402
from qwen35.serving.loading import MINI_CHECKPOINT  # noqa: E402
from qwen35.weights.checkpoint import CheckpointReader  # noqa: E402
from qwen35.weights.fp8 import quantise_per_channel  # noqa: E402
from support.recorded_logits import (  # noqa: E402
    BFLOAT16,
    FLOAT32,
    FP8,
    EncodedPrompt,
    RecordedPrompt,
    Recording,
    checkpoint_digest,
    encode_prompts,
)

MINI_RECORDING = TESTS / "data" / "mini_logits.safetensors"
HEAD_ROWS = 8192
"""Rows of the output head that are multiplied at a time: 168 MB of 27B's in float32."""
DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FP8: torch.float32}
"""Of weights and activations, by form."""
IMAGE = 1
"""transformers' mm_token_type_ids of a token that stands for a piece of an image; of text it is 0."""


class LayerwiseModel:
    """transformers' model of a checkpoint, of which no weight is in memory until its module runs.

    Args:
        directory: the checkpoint.
        form: a key of `DTYPES`.

    Raises:
        ValueError: transformers is too old, or the checkpoint is quantised or of another architecture.
        CheckpointError: its files are missing or corrupt.
    """

    def __init__(self, directory: Path, form: str = FLOAT32) -> None:
        fields = read_object(directory / "config.json")
        architecture = next(iter(fields.get("architectures") or []), None)
        if not hasattr(transformers, "Qwen3_5ForCausalLM"):
            raise ValueError(f"transformers {transformers.__version__} has no qwen3_5: record with transformers >= 5")
        if architecture not in ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"):
            raise ValueError(f"{directory}: architectures={architecture!r}: name a checkpoint of Qwen3.5")
        if fields.get("quantization_config"):
            raise ValueError(f"{directory}: its weights are quantised: record the bf16 checkpoint that it was made of")
        self.reader, self.form, self.dtype = CheckpointReader(directory), form, DTYPES[form]
        config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            self.model: Any = getattr(transformers, architecture)._from_config(config, dtype=self.dtype).eval()
        self.text: Any = getattr(self.model.model, "language_model", self.model.model)
        # Its frequencies are no weights, and were computed on the meta device.
        self.text.rotary_emb = type(self.text.rotary_emb)(self.text.config)
        self.layers = [*self.text.layers]
        self._names = {module: name for name, module in self.model.named_modules()}
        self._hidden: list[torch.Tensor] = []  # of each prompt [1, S, hidden_size], before the next layer
        self._arguments: list[list[Mapping[str, Any]]] = []  # of each prompt, what each layer gets beside it

    @torch.no_grad()
    def begin(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Embed the prompts, with their pictures, and note what the model gives its layers, by calling it."""
        takes_pictures = any(prompt.media for prompt in prompts)
        embedding = self.text.embed_tokens
        # Looked up in the mapped file, and then cast: the table in float32 would be larger than a layer.
        embedding.weight = nn.Parameter(self._tensor(f"{self._names[embedding]}.weight"), requires_grad=False)
        cast = embedding.register_forward_hook(lambda module, inputs, output: output.to(self.dtype))
        if takes_pictures:
            encoder = self.model.model.visual
            real = type(encoder)._from_config(self.model.config.vision_config, dtype=self.dtype).eval()
            real.load_state_dict(self._weights(self._names[encoder]), assign=True)
            self.model.model.visual = real
        layers, norm = self.text.layers, self.text.norm
        self.text.norm = nn.Identity()
        for prompt in prompts:
            noted: list[Mapping[str, Any]] = []
            self.text.layers = nn.ModuleList(_Noting(noted) for _ in layers)
            ids = torch.tensor([prompt.ids])
            media = dict(prompt.media)
            if media:
                media["mm_token_type_ids"] = IMAGE * (ids == self.model.config.image_token_id).int()
            self._hidden.append(self.model.model(input_ids=ids, use_cache=False, **media).last_hidden_state)
            self._arguments.append(noted)
        self.text.layers, self.text.norm = layers, norm
        cast.remove()
        embedding.to("meta")
        if takes_pictures:
            self.model.model.visual.to("meta")
        self.reader.close()

    @torch.no_grad()
    def run_layer(self, number: int) -> None:
        """Read a decoder layer, run it over all prompts, and free it."""
        layer = self.layers[number]
        layer.load_state_dict(self._weights(self._names[layer]), assign=True)
        for prompt, arguments in enumerate(self._arguments):
            self._hidden[prompt] = layer(self._hidden[prompt], **arguments[number])
        layer.to("meta")
        self.reader.close()

    @torch.no_grad()
    def logits(self, scored: Sequence[range]) -> list[torch.Tensor]:
        """Logits [P, V] in `dtype` of each prompt's positions, after all layers."""
        norm, head = self.text.norm, self.model.lm_head
        norm.load_state_dict(self._weights(self._names[norm]), assign=True)
        hidden = torch.cat([norm(own[0, [*rows]]) for own, rows in zip(self._hidden, scored, strict=True)])
        name = f"{self._names[head]}.weight"
        if name not in self.reader and self.model.config.get_text_config().tie_word_embeddings:
            name = f"{self._names[self.text.embed_tokens]}.weight"
        weight = self._tensor(name)
        pieces = [F.linear(hidden, rows.to(self.dtype)) for rows in weight.split(HEAD_ROWS)]
        self.reader.close()
        return [*torch.cat(pieces, dim=1).split([len(rows) for rows in scored])]

    def _weights(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a module by their names within it, as it computes with them."""
        prefix = f"{module}."
        names = [name for name in self.reader if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._rounded(name, self._tensor(name)).to(self.dtype) for name in names}

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self.form != FP8 or not is_fp8_matrix(name):
            return tensor
        weight, scale = quantise_per_channel(name, tensor)
        return weight.float().mul_(scale)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.reader:
            raise ValueError(f"{self.reader.directory}: it has no {name}, which transformers' model needs")
        return self.reader[name]


class _Noting(nn.Module):
    """In the place of a decoder layer: passes on what it gets, and notes what it gets beside it."""

    def __init__(self, noted: list[Mapping[str, Any]]) -> None:
        super().__init__()
        self._noted = noted

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self._noted.append(arguments)
        return hidden_states


@dataclass(frozen=True)
class Recorder:
    """A checkpoint, and the prompts to be recorded of it."""

    checkpoint: Path
    prompts: Sequence[EncodedPrompt]

    def logits(self, form: str, progress: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
        """Logits [P, V] of each prompt in a form; `progress` is called after each layer."""
        model = LayerwiseModel(self.checkpoint, form)
        model.begin(self.prompts)
        for number in range(len(model.layers)):
            model.run_layer(number)
            progress()
        return model.logits([prompt.scored for prompt in self.prompts])

    def record(self) -> Recording:
        """All forms, one after the other.

        Raises:
            ValueError: the checkpoint gives logits that are nan or infinite.
        """
        layers = len(LayerwiseModel(self.checkpoint).layers)
        with tqdm(total=len(DTYPES) * layers, unit="layer") as bar:
            logits = {}
            for form in DTYPES:
                bar.set_description(form)
                logits[form] = self.logits(form, bar.update)
                for prompt, own in zip(self.prompts, logits[form], strict=True):
                    if not own.isfinite().all():
                        raise ValueError(
                            f"{self.checkpoint}: logits of the prompt {prompt.name!r} in {form} are nan or infinite; "
                            "its files are corrupt, download them again"
                        )
        recorded = {
            prompt.name: RecordedPrompt.of(prompt, {form: own[i] for form, own in logits.items()})
            for i, prompt in enumerate(self.prompts)
        }
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return Recording(checkpoint_digest(self.checkpoint), versions, recorded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MINI_CHECKPOINT, metavar="DIR", help="a checkpoint (the mini)")
    parser.add_argument("--output", type=Path, default=MINI_RECORDING, metavar="FILE", help=f"({MINI_RECORDING})")
    args = parser.parse_args()
    if args.output.resolve() == MINI_RECORDING and args.model.resolve() != MINI_CHECKPOINT.resolve():
        parser.error(f"--model {args.model} without --output: name a file, the default one is the mini's")
    folder = next(path for path in args.output.resolve().parents if path.exists())
    if args.output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--output {args.output} cannot be written; name a file in a directory of yours")
    try:
        recording = Recorder(args.model, encode_prompts(args.model)).record()
        recording.save(args.output)
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"record_logits: {error}") from error
    print(f"{args.output}: {args.output.stat().st_size / 1e3:,.0f} kB, {len(recording.prompts)} prompts")
    for form in (BFLOAT16, FP8):
        print(f"{form} against {FLOAT32}: {recording.errors(form, [*recording.prompts])}")


if __name__ == "__main__":
    main()
