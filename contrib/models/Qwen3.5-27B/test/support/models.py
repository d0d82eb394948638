# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints in Hugging Face's layout, and our model over them; nothing here needs transformers' own model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from qwen35 import HuggingFaceGenerationAdapter, NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.weights.text_rules import conversion_plan

NO_NXDI = "the real NxDI is not importable: put the src folders of its two repositories on PYTHONPATH (see README)"

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
    linear_conv_kernel_dim=4,
    max_position_embeddings=1024,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
)


def random_weights(seed: int = 0, *, mtp: bool = False, **overrides: Any) -> dict[str, torch.Tensor]:
    """Tensors of a random checkpoint in which every weight matters: activations of order one, real gates, norms away
    from zero. NumPy's generator gives the same numbers on every machine; an MTP head does not change the others."""
    generator = np.random.default_rng(seed)

    def normal(shape: Sequence[int], std: float = 1.0) -> torch.Tensor:
        return std * torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    config = Qwen35InferenceConfig(Qwen35NeuronConfig(num_speculative_tokens=int(mtp)), **{**TINY, **overrides})
    weights: dict[str, torch.Tensor] = {}
    for rule in conversion_plan(config):
        for name, shape in rule.sources.items():
            if name.endswith("A_log"):
                weights[name] = torch.from_numpy(np.log(generator.uniform(0.01, 16.0, shape)).astype(np.float32))
            elif name.endswith("dt_bias"):
                weights[name] = normal(shape, 1.5) - 3.0  # decays from exp(-0.001) to exp(-8) a token
            elif "norm" in name:
                weights[name] = normal(shape, 0.3) + (1.0 if "linear_attn.norm" in name else 0.0)
            else:
                # Branches are half as strong as the stream they join, as in a trained model; when each layer swamps
                # what came before it, rounding grows with every one of them.
                branch = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
                fan_in = 1 if "embed_tokens" in name else shape[-1]
                weights[name] = normal(shape, (0.5 if branch else 1.0) / math.sqrt(fan_in))
            if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
                _look_for_own_keys(weights[name], config.key_dim)
    return {
        name if name.startswith(("lm_head", "mtp")) else f"model.{name}": tensor for name, tensor in weights.items()
    }


def _look_for_own_keys(weight: torch.Tensor, key_dim: int) -> None:
    """Mix the key weights into the query weights of a DeltaNet layer.

    With independent ones a query and a key are near orthogonal, and an early output, little but their product times a
    value, is near zero: the norm that follows would blow rounding up a thousandfold, in any implementation.
    """
    query, key = weight[:key_dim], weight[key_dim : 2 * key_dim]
    query.add_(key).mul_(0.5**0.5)


def save_checkpoint(path: Path, seed: int = 0, *, mtp: bool = False, **overrides: Any) -> None:
    """Write a random checkpoint with its config.json to `path`, with an MTP head if asked for."""
    path.mkdir(parents=True, exist_ok=True)
    fields = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "dtype": "float32"}
    (path / "config.json").write_text(json.dumps({**fields, **TINY, **overrides}))
    save_file(random_weights(seed, mtp=mtp, **overrides), path / "model.safetensors", metadata={"format": "pt"})


def save_heads(path: Path, head_dim: int, **overrides: Any) -> None:
    """The same with attention heads of that many dims, of which 8 are rotated."""
    rope = {**TINY["rope_parameters"], "partial_rotary_factor": 8 / head_dim}
    save_checkpoint(path, head_dim=head_dim, rope_parameters=rope, **overrides)


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
