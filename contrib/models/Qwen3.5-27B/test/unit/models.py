# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints, the transformers oracle, and our model over the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35 import HuggingFaceGenerationAdapter, NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig  # noqa: E402

TINY = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    max_position_embeddings=1024,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
)


def random_reference(seed: int = 0, **overrides: Any) -> Qwen3_5ForCausalLM:
    """A transformers model whose every weight matters: activations of order one, real gates, norms away from zero."""
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**TINY, **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(p: torch.Tensor, std: float) -> None:
        p.data.copy_(std * torch.randn(p.shape, generator=generator))

    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.copy_(torch.log(0.01 + 15.99 * torch.rand(parameter.shape, generator=generator)))
        elif name.endswith("dt_bias"):
            normal(parameter, 1.5)
            parameter.data -= 3.0  # decays from exp(-0.001) to exp(-8) a token
        elif "norm" in name:
            normal(parameter, 0.3)
            parameter.data += 1.0 if "linear_attn.norm" in name else 0.0
        elif parameter.dim() >= 2:
            # Branches are half as strong as the stream they join, as in a trained model; when each layer swamps what
            # came before it, rounding grows with every one of them.
            branch = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
            fan_in = 1 if "embed_tokens" in name else parameter.shape[-1]
            normal(parameter, (0.5 if branch else 1.0) / math.sqrt(fan_in))
    for module in model.modules():
        if hasattr(module, "in_proj_qkv"):
            _look_for_own_keys(module)
    return model


def _look_for_own_keys(layer: Any) -> None:
    """Mix the key weights into the query weights of a DeltaNet layer.

    With independent ones a query and a key are near orthogonal, and an early output, little but their product times a
    value, is near zero: the norm that follows would blow rounding up a thousandfold, in any implementation.
    """
    for weight in (layer.in_proj_qkv.weight, layer.conv1d.weight):
        query, key = weight.data[: layer.key_dim], weight.data[layer.key_dim : 2 * layer.key_dim]
        query.add_(key).mul_(0.5**0.5)


def save_reference(path: Path, seed: int = 0, **overrides: Any) -> Qwen3_5ForCausalLM:
    """Write a random checkpoint in Hugging Face's layout to `path` and return the model."""
    model = random_reference(seed, **overrides)
    model.save_pretrained(path)
    return model


def load_neuron(path: Path, **neuron_options: Any) -> NeuronQwen35ForCausalLM:
    """Our model on this process's rank."""
    options = {"torch_dtype": torch.float32, "on_cpu": True, "seq_len": 128, **neuron_options}
    options.setdefault("max_context_length", options["seq_len"])
    config = Qwen35InferenceConfig.from_pretrained(path, neuron_config=Qwen35NeuronConfig(**options))
    model = NeuronQwen35ForCausalLM(str(path), config)
    model.to_cpu()
    return model


def random_prompts(lengths: Sequence[int], vocab_size: int = TINY["vocab_size"], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def right_padded(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [B, S]."""
    length = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[pad] * (length - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts])
    return ids, mask


def neuron_greedy(
    model: NeuronQwen35ForCausalLM, prompts: Sequence[Sequence[int]], steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, steps] and the logits [B, steps, V] they were chosen from, as one right-padded batch."""
    ids, mask = right_padded(prompts)
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None
    output = adapter.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=steps, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        ),
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


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
