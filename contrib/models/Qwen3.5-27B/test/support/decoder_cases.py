# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What transformers says of a few prompts, recorded, so that it can be compared where its `qwen3_5` is missing.

The real NxDI needs transformers 4, which does not have the model. `tools/record_decoder_reference.py` writes the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import load_tokenizer

from .models import TINY, random_prompts, save_checkpoint

REFERENCE_FILE = Path(__file__).parents[1] / "data" / "decoder_reference.safetensors"
STEPS = 12
# One to three tokens: fewer than the conv window; 40: more than a chunk.
LENGTHS = (1, 3, 17, 40)


@dataclass(frozen=True)
class Case:
    """A checkpoint and its prompts; `overrides` of TINY, or None for the mini."""

    name: str
    overrides: dict[str, Any] | None
    seed: int = 0

    def checkpoint(self, scratch: Path) -> Path:
        """Directory of the checkpoint, written below `scratch` if it is a random one."""
        if self.overrides is None:
            return MINI_CHECKPOINT
        save_checkpoint(scratch / self.name, self.seed, **self.overrides)
        return scratch / self.name

    def prompts(self) -> list[list[int]]:
        if self.overrides is None:
            tokenizer = load_tokenizer(MINI_CHECKPOINT)
            texts = [
                "The",
                "The capital of Japan is",
                "3 + 4 =",
                "The capital of France is Paris. The capital of Italy is",
            ]
            return [tokenizer(text)["input_ids"] for text in texts]
        return random_prompts(LENGTHS, self.overrides.get("vocab_size", TINY["vocab_size"]), self.seed)


CASES = (
    Case("mini", None),
    Case("untied", {}, seed=1),
    Case(
        "tied",
        dict(
            tie_word_embeddings=True,
            num_hidden_layers=6,
            vocab_size=97,
            num_attention_heads=4,
            num_key_value_heads=1,
            linear_num_key_heads=2,
            linear_num_value_heads=6,
            linear_conv_kernel_dim=3,
        ),
        seed=2,
    ),
)


def recorded(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' greedy tokens [rows, STEPS] and the logits [rows, STEPS, V] they are the largest of."""
    return recorded_tensors(case.name)


def recorded_tensors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by name; "vision-language" are the rows of `vl_cases.EXAMPLE`."""
    tensors = load_file(REFERENCE_FILE)
    return tensors[f"{name}.tokens"], tensors[f"{name}.logits"]
