# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The DeltaNet layer: against transformers at the full width of 27B, against float64 with extreme gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.compare import assert_close
from support.full_width import check_full_width_layer
from support.models import load_neuron, random_prompts, right_padded
from support.oracle import random_reference


def test_a_full_width_layer_of_27b_equals_transformers(tmp_path: Path) -> None:
    check_full_width_layer("linear_attention", tmp_path)


def naive_gated_delta_net(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A DeltaNet layer of transformers, token by token in float64, by the formulas alone."""
    p = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    x = hidden.double()[0]
    tokens = x.shape[0]
    heads, key_heads = layer.num_v_heads, layer.num_k_heads
    key_dim, value_dim = layer.head_k_dim, layer.head_v_dim
    window = torch.cat([torch.zeros(3, p["conv1d.weight"].shape[0]).double(), x @ p["in_proj_qkv.weight"].T])
    taps = p["conv1d.weight"][:, 0]
    mixed = torch.stack([sum(window[t + i] * taps[:, i] for i in range(4)) for t in range(tokens)])
    mixed = mixed * torch.sigmoid(mixed)
    q, k, v = mixed.split([key_heads * key_dim, key_heads * key_dim, heads * value_dim], dim=-1)
    z = (x @ p["in_proj_z.weight"].T).view(tokens, heads, value_dim)
    a, b = x @ p["in_proj_a.weight"].T, x @ p["in_proj_b.weight"].T
    dt = a + p["dt_bias"]
    g = -p["A_log"].exp() * (dt.clamp(min=0) + torch.log1p(torch.exp(-dt.abs())))
    beta = torch.sigmoid(b)
    core = torch.zeros(tokens, heads, value_dim).double()
    for head in range(heads):
        source = head // (heads // key_heads)
        state = torch.zeros(key_dim, value_dim).double()
        for t in range(tokens):
            key = k[t].view(key_heads, key_dim)[source]
            key = key / torch.sqrt((key * key).sum() + 1e-6)
            query = q[t].view(key_heads, key_dim)[source]
            query = query / torch.sqrt((query * query).sum() + 1e-6) / key_dim**0.5
            state = state * torch.exp(g[t, head])
            update = (v[t].view(heads, value_dim)[head] - key @ state) * beta[t, head]
            state = state + torch.outer(key, update)
            core[t, head] = query @ state
    normed = core / torch.sqrt((core * core).mean(-1, keepdim=True) + 1e-6) * p["norm.weight"]
    return (normed * z * torch.sigmoid(z)).flatten(1) @ p["out_proj.weight"].T


@pytest.mark.parametrize("dt_shift", [0.0, 20.0, 200.0, -30.0])
def test_extreme_gates_are_finite_and_equal_to_float64(dt_shift: float, tmp_path: Path) -> None:
    # A = 16 and a large dt decay by exp(-3200) a token, a very negative dt not at all.
    reference = random_reference(num_hidden_layers=1, layer_types=["linear_attention"])
    layer = reference.model.layers[0]
    layer.linear_attn.A_log.data.fill_(torch.log(torch.tensor(16.0)))
    layer.linear_attn.dt_bias.data += dt_shift
    reference.save_pretrained(tmp_path)
    model = load_neuron(tmp_path)
    outputs: list[torch.Tensor] = []
    model.models[0].model.layers[0].linear_attn.register_forward_hook(
        lambda _module, _args, output: outputs.append(output[0])
    )
    ids, mask = right_padded(random_prompts([90]))
    model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(90).unsqueeze(0))
    with torch.no_grad():
        hidden = layer.input_layernorm(reference.model.embed_tokens(ids))
    expected = naive_gated_delta_net(layer.linear_attn, hidden)
    assert torch.isfinite(outputs[0]).all()
    # float32 against float64: the state accumulates 90 updates, relative error about 90 * 2**-24.
    assert_close(outputs[0][0, :90].double(), expected, atol=1e-5, rtol=1e-4, label=f"dt shifted by {dt_shift}")
