# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Layer by layer against transformers, and single layers at the full width of 27B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.configuration_qwen35 import QWEN35_PRESETS
from support.compare import assert_close
from support.models import load_neuron, random_prompts, right_padded
from support.oracle import random_reference, save_reference


def test_every_layer_gives_what_transformers_layer_gives(tmp_path: Path) -> None:
    reference = save_reference(tmp_path, num_hidden_layers=8)
    model = load_neuron(tmp_path)
    outputs: list[torch.Tensor] = []
    module = model.models[0].model
    for layer in module.layers:
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
    prompt = random_prompts([70])
    ids, mask = right_padded(prompt)
    model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(70).unsqueeze(0))
    with torch.no_grad():
        # hidden_states: the embedding, each layer's input, and last the normalised output of the last layer.
        expected = reference.model(ids, output_hidden_states=True).hidden_states
    for i, output in enumerate(outputs[:-1]):
        # Of order one to five, and rounding grows with depth.
        assert_close(output[:, :70], expected[i + 1], atol=1e-5 * (i + 1), rtol=2e-5, label=f"output of layer {i}")
    assert_close(module.norm(outputs[-1])[:, :70], expected[-1], atol=1e-4, rtol=0, label="final norm")


def full_width(layer_types: list[str]) -> dict[str, Any]:
    """27B with one layer and a small vocabulary and MLP, which these tests do not look at."""
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


@pytest.mark.parametrize("layer_type", ["linear_attention", "full_attention"])
def test_a_full_width_layer_of_27b_equals_transformers(layer_type: str, tmp_path: Path) -> None:
    reference = save_reference(tmp_path, **full_width([layer_type]))
    model = load_neuron(tmp_path, seq_len=160)
    layer = model.models[0].model.layers[0]
    mixer = layer.linear_attn if layer_type == "linear_attention" else layer.self_attn
    outputs = []
    mixer.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
    ids, mask = right_padded(random_prompts([130], vocab_size=64))
    positions = torch.arange(131).unsqueeze(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions[:, :130]).logits
    next_id = logits[:, -1].argmax(-1, keepdim=True)
    model(input_ids=next_id, attention_mask=mask, position_ids=positions[:, 130:])

    expected: list[torch.Tensor] = []
    theirs = reference.model.layers[0]
    (theirs.linear_attn if layer_type == "linear_attention" else theirs.self_attn).register_forward_hook(
        lambda _module, _args, output: expected.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        reference(torch.cat([ids, next_id], dim=1), use_cache=False)
    # Outputs are sums of 6,144 terms of order one.
    assert_close(outputs[0][:, :130], expected[0][:, :130], atol=2e-5, rtol=1e-4, label=f"{layer_type}, prompt")
    assert_close(outputs[1], expected[0][:, 130:], atol=2e-5, rtol=1e-4, label=f"{layer_type}, next token")


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
