# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""How the model launches its kernels: grid, device, arguments, and what moves data between HBM and the chip."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import nki_emulator
import nki_emulator.isa
from qwen35.kernel_selection import DeltaNetInverse, DeltaNetKernel
from qwen35.layers.kernel_launch import decode, prefill
from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.ops import chunk_gated_delta_rule
from qwen35.serving.loading import MINI_CHECKPOINT
from support.compare import assert_close
from support.kernel_cases import make_case
from support.models import load_neuron, neuron_greedy
from support.own_kernels import Launches, all_kernels, recorded_launches, small_arguments

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

LAUNCHED = [DeltaNetKernel.FUSED, DeltaNetKernel.CHUNKED, DeltaNetKernel.RECURRENT]


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("kernel", LAUNCHED)
def test_every_launch_of_the_model_has_the_grid_of_a_logical_core_and_equal_calls_compile_once(
    kernel: DeltaNetKernel, cores: int
) -> None:
    model = load_neuron(MINI_CHECKPOINT, seq_len=16, deltanet_kernel=kernel, logical_nc_config=cores)
    with recorded_launches() as launches:
        neuron_greedy(model, [[1, 2, 3]], 3)
        compiled = len(launches.compiled)
        neuron_greedy(model, [[4, 5, 6]], 3)
    assert {*launches.grids} == {(cores,)}
    # One program encodes prompts and one decodes; six layers launch each of them, several times.
    assert len(launches.compiled) == compiled == 2


@pytest.mark.parametrize("kernel", LAUNCHED)
def test_a_continued_prompt_compiles_one_program_too(kernel: DeltaNetKernel) -> None:
    case = make_case(S=8, K=128, V=128, state=True)
    with recorded_launches() as launches:
        for _ in range(2):
            prefill(kernel, DeltaNetInverse.TILED, 1, *case.tensors, case.state)
    assert len(launches.compiled) == 1


def test_a_call_with_none_compiles_every_time_in_the_record() -> None:
    launches = Launches()
    kernel = all_kernels()["deltanet_fused_chunked_layer"]
    for _ in range(2):
        launches.add(kernel, (torch.zeros(2),), {"inverse": "tiled"})
        launches.add(kernel, (torch.zeros(2), None), {})
    assert len(launches.compiled) == 3


@pytest.mark.parametrize("name", all_kernels())
def test_no_kernel_has_an_argument_that_may_be_none(name: str) -> None:
    parameters = inspect.signature(all_kernels()[name].function).parameters.values()
    assert [p.name for p in parameters if p.default is None] == []


@pytest.mark.parametrize("inverse", DeltaNetInverse)
@pytest.mark.parametrize("kernel", LAUNCHED)
def test_results_are_where_the_inputs_are_whatever_the_default_device(
    kernel: DeltaNetKernel, inverse: DeltaNetInverse
) -> None:
    case = make_case(S=8, K=128, V=128)
    expected = chunk_gated_delta_rule(*case.tensors)
    with torch.device("meta"):  # where tensors are made that name no device
        results = prefill(kernel, inverse, 2, *case.tensors, None)
    for actual, reference in zip(results, expected, strict=True):
        assert actual.device == reference.device
        assert_close(actual, reference, atol=1e-5 * float(reference.abs().max()), label=kernel.value)


def test_decoding_leaves_results_where_the_inputs_are() -> None:
    names = "qkv z a b conv_weight conv_state A_log dt_bias norm_weight recurrent_state".split()
    inputs: dict[str, Any] = dict(zip(names, small_arguments("deltanet_decode_layer"), strict=True))
    with torch.device("meta"):
        results = decode(2, **inputs, norm_eps=1e-6)
    assert {result.device.type for result in results} == {"cpu"}


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", all_kernels())
def test_no_dma_casts(name: str, dtype: torch.dtype, grid: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware descriptors move bytes, and the compiler may choose them (nki/migration/index.rst, dge_mode)."""
    casts, dma_copy = [], nki_emulator.isa.dma_copy

    def record(*, dst: Any, src: Any, **options: Any) -> None:
        if dst.dtype != src.dtype:
            casts.append(f"{src!r} to {dst!r}")
        dma_copy(dst=dst, src=src, **options)

    monkeypatch.setattr(nki_emulator.isa, "dma_copy", record)
    nki_emulator.emulate(all_kernels()[name], *small_arguments(name, dtype), grid=grid, timed=False)
    assert casts == []
