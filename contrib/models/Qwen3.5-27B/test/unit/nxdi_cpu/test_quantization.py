# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Layers with fp8 weights, and which layers `convert` replaces, on NxD and on the stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qwen35.nxdi import (
    NXDI_AVAILABLE,
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    convert,
    get_default_per_channel_custom_qconfig_dict,
)
from support.compare import assert_close

pytestmark = pytest.mark.usefixtures("lone_rank")


def settings(**changed: Any) -> dict[str, Any]:
    return {**get_default_per_channel_custom_qconfig_dict(), "quantized_dtype": torch.float8_e4m3fn, **changed}


def tree(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def column(inputs: int = 64, outputs: int = 96, **options: Any) -> ColumnParallelLinear:
    return ColumnParallelLinear(inputs, outputs, bias=False, gather_output=False, **options)


def row(inputs: int = 96, outputs: int = 64) -> RowParallelLinear:
    return RowParallelLinear(inputs, outputs, bias=False, input_is_parallel=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_by_the_weight_and_scales_the_product(dtype: torch.dtype) -> None:
    module = tree(wide=column(dtype=dtype), narrow=row())
    convert(module, settings(), inplace=True)
    x = torch.randn(2, 5, 64).to(dtype)
    for layer, inputs in ((module.wide, x), (module.narrow, torch.randn(2, 5, 96).to(dtype))):
        assert layer.weight.dtype == torch.float8_e4m3fn and layer.scale.shape == (layer.weight.shape[0], 1)
        layer.weight.data = torch.randn(layer.weight.shape).to(torch.float8_e4m3fn)
        layer.scale.data = torch.rand(layer.scale.shape) + 0.5
        whole = layer.weight.double() * layer.scale.double()
        expected = inputs.double() @ whole.T
        found = layer(inputs)
        assert found.dtype == dtype
        tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5  # of the product, then of the scaled one
        assert_close(found, expected, atol=tolerance * expected.abs().max().item(), label="output")


def test_names_are_looked_for_in_whole_paths_and_quantised_layers_are_left_alone() -> None:
    module = tree(
        head=column(),
        mlp=tree(gate_proj=column(), gate=column(), down_proj=row()),
        layers=tree(**{"1": tree(x=column()), "10": tree(x=column())}),
        table=ParallelEmbedding(8, 4),
    )
    convert(module, settings(), inplace=True, modules_to_not_convert=["head", "mlp.gate", "layers.1"])
    plain = {name for name, p in module.named_parameters() if p.dtype == torch.float32 and name.endswith("weight")}
    # As NxD does: "mlp.gate" keeps gate_proj too, and "layers.1" layer 10.
    assert plain == {
        "head.weight", "mlp.gate_proj.weight", "mlp.gate.weight", "layers.1.x.weight", "layers.10.x.weight",
        "table.weight",
    }  # fmt: skip
    before = dict(module.named_modules())
    convert(module, settings(), inplace=True, modules_to_not_convert=["head", "mlp.gate", "layers.1"])
    assert dict(module.named_modules()) == before


@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxD implements more")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"quantized_dtype": torch.int8}, "only float8_e4m3fn"),
        ({"quantization_type": "per_tensor_symmetric"}, "only per_channel_symmetric"),
        ({"activation_quantization_type": "dynamic"}, "activation_quantization_type='dynamic'"),
    ],
)
def test_what_the_stand_ins_do_not_compute_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        convert(tree(x=column()), settings(**changed), inplace=True)


@pytest.mark.skipif(NXDI_AVAILABLE, reason="a lone rank pads nothing")
def test_rows_that_pad_a_layer_to_whole_ranks_have_scales_too() -> None:
    from nxdi_cpu.parallel_state import as_rank

    with as_rank(0, 4):
        module = convert(tree(x=column(64, 30, pad=True)), settings(), inplace=True)
    assert module.x.weight.shape == (8, 64)
    state = {"x.weight": torch.ones(30, 64).to(torch.float8_e4m3fn), "x.scale": torch.ones(30, 1)}
    module.x.preshard_hook(state, "x.weight")
    assert state["x.weight"].shape == (32, 64) and state["x.scale"].shape == (32, 1)
    assert not state["x.scale"][30:].any()
