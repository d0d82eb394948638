# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A layer of 27B at its full width, ours beside transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwen35.configuration_qwen35 import QWEN35_PRESETS
from support.compare import assert_close
from support.models import load_neuron, random_prompts, right_padded
from support.oracle import save_reference


def check_full_width_layer(layer_type: str, path: Path) -> None:
    """Compare the mixer of a layer with transformers': on a prompt of 130 tokens, and on the token that follows.

    Args:
        layer_type: "linear_attention" or "full_attention".
        path: a directory for the random checkpoint of one such layer.
    """
    reference = save_reference(path, **full_width([layer_type]))
    model = load_neuron(path, seq_len=160)
    name = "linear_attn" if layer_type == "linear_attention" else "self_attn"
    outputs: list[torch.Tensor] = []
    getattr(model.models[0].model.layers[0], name).register_forward_hook(
        lambda _module, _args, output: outputs.append(output[0])
    )
    ids, mask = right_padded(random_prompts([130], vocab_size=64))
    positions = torch.arange(131).unsqueeze(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions[:, :130]).logits
    next_id = logits[:, -1].argmax(-1, keepdim=True)
    model(input_ids=next_id, attention_mask=mask, position_ids=positions[:, 130:])

    expected: list[torch.Tensor] = []
    getattr(reference.model.layers[0], name).register_forward_hook(
        lambda _module, _args, output: expected.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        reference(torch.cat([ids, next_id], dim=1), use_cache=False)
    # Outputs are sums of 6,144 terms of order one.
    assert_close(outputs[0][:, :130], expected[0][:, :130], atol=2e-5, rtol=1e-4, label=f"{layer_type}, prompt")
    assert_close(outputs[1], expected[0][:, 130:], atol=2e-5, rtol=1e-4, label=f"{layer_type}, next token")


def full_width(layer_types: list[str]) -> dict[str, Any]:
    """The text config of 27B with these layers only, and a small vocabulary and MLP, which are not compared."""
    preset = dict(QWEN35_PRESETS["27B"])
    rope_fields = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    return {
        "rope_parameters": {"rope_type": "default"} | {name: preset.pop(name) for name in rope_fields},
        **preset,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "vocab_size": 64,
        "intermediate_size": 64,
    }
