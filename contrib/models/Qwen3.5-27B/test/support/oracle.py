# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""transformers' own model over the random checkpoints: what the decoder is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .models import TINY, random_weights, save_checkpoint
from .vl_cases import Row, media, options, types

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig  # noqa: E402


def random_reference(seed: int = 0, **overrides: Any) -> Qwen3_5ForCausalLM:
    """The model over `random_weights`."""
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**TINY, **overrides})).eval()
    missing, unexpected = model.load_state_dict(random_weights(seed, **overrides), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if overrides.get("tie_word_embeddings") else set())
    return model


def transformers_model(path: Path) -> Any:
    """transformers' model over the checkpoint at `path`, text-only or vision-language, in float32."""
    config = transformers.AutoConfig.from_pretrained(path)
    return getattr(transformers, config.architectures[0]).from_pretrained(path, dtype=torch.float32).eval()


def save_reference(path: Path, seed: int = 0, **overrides: Any) -> Qwen3_5ForCausalLM:
    """Write a random checkpoint to `path` and return transformers' model over it."""
    save_checkpoint(path, seed, **overrides)
    return random_reference(seed, **overrides)


@torch.no_grad()
def reference_greedy(model: Any, prompts: Sequence[Sequence[int]], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of transformers, each prompt alone and unpadded."""
    model.generation_config.eos_token_id = None
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=steps, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            ),
        )
        tokens.append(output.sequences[0, len(prompt) :])
        logits.append(torch.stack(output.logits, dim=1)[0])
    return torch.stack(tokens), torch.stack(logits)


@torch.no_grad()
def vl_reference_greedy(model: Any, row: Row, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [steps] and logits [steps, V] of a row with images and videos, alone and unpadded."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([row.ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types(ids),
        generation_config=options(steps),
        **media([row]),
    )
    return output.sequences[0, ids.shape[1] :], torch.stack(output.logits, dim=1)[0]
