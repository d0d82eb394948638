# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Launches: whole kernels written as for the device, their arguments and results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nki_emulator import NkiValidationError, costs, emulate, jit
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, assert_close, grid_data, store, tile


@jit
def tiled_matmul(lhs_t: Any, rhs: Any) -> Any:
    """``lhs_t.T @ rhs``: lhs_t [K, M], rhs [K, N], K and M multiples of 128, N of 512; result [M, N] float32."""
    k, m = lhs_t.shape
    n = rhs.shape[1]
    out = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.shared_hbm)
    for i in nl.affine_range(m // 128):
        stationary = nl.ndarray((128, k // 128, 128), dtype=lhs_t.dtype, buffer=nl.sbuf)
        for c in nl.affine_range(k // 128):
            nisa.dma_copy(dst=stationary[:, c, :], src=lhs_t[c * 128 : (c + 1) * 128, i * 128 : (i + 1) * 128])
        for j in nl.affine_range(n // 512):
            total = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
            for c in nl.affine_range(k // 128):
                moving = nl.ndarray((128, 512), dtype=rhs.dtype, buffer=nl.sbuf)
                nisa.dma_copy(dst=moving, src=rhs[c * 128 : (c + 1) * 128, j * 512 : (j + 1) * 512])
                nisa.nc_matmul(dst=total, stationary=stationary[:, c, :], moving=moving)
            evicted = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=evicted, src=total)
            nisa.dma_copy(dst=out[i * 128 : (i + 1) * 128, j * 512 : (j + 1) * 512], src=evicted)
    return out


@jit
def softmax(x: Any) -> Any:
    """Softmax over the last axis of x [R, F], R a multiple of 128."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    for r in nl.affine_range(x.shape[0] // 128):
        rows = slice(r * 128, (r + 1) * 128)
        t = nl.ndarray((128, x.shape[1]), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=t, src=x[rows])
        top = nl.ndarray((128, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=top, op=nl.maximum, data=t, axis=1, negate=True)
        total = nl.ndarray((128, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation_reduce(dst=t, op=nl.exp, data=t, reduce_op=nl.add, reduce_res=total, bias=top)
        nisa.reciprocal(dst=total, data=total)
        nisa.tensor_scalar(dst=t, data=t, op0=nl.multiply, operand0=total)
        nisa.dma_copy(dst=out[rows], src=t)
    return out


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_tiled_matmul(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    lhs_t, rhs = (rng.standard_normal(s).astype(dtype) for s in ((384, 256), (384, 1024)))
    result = emulate(tiled_matmul, lhs_t, rhs, lint=True)
    assert_close(result.outputs, lhs_t.astype(np.float64).T @ rhs.astype(np.float64), 1e-5)
    core = result.report.cores[0]
    assert core.calls["nc_matmul"] == 2 * 2 * 3
    assert core.hbm_bytes_read == lhs_t.nbytes + 2 * rhs.nbytes
    assert core.hbm_bytes_written == result.outputs.nbytes


def test_bf16_matmul_is_modelled_faster_than_float32() -> None:
    arrays = [np.zeros(s, np.float32) for s in ((512, 128), (512, 512))]
    fast = emulate(tiled_matmul, *[a.astype(BF16) for a in arrays]).report
    slow = emulate(tiled_matmul, *arrays).report
    ratio = slow.cores[0].engines["tensor"].busy_ns / fast.cores[0].engines["tensor"].busy_ns
    # Four times the cycles; the last two of the four float32 matmuls find the Tensor engine warm.
    cold = costs.TENSOR_COLD_FACTOR
    assert ratio == pytest.approx(costs.MATMUL_FP32_FACTOR * (2 * cold + 2) / (4 * cold))
    assert fast.makespan_ns < slow.makespan_ns


def test_softmax_matches_torch_and_survives_large_values() -> None:
    x = 100 * torch.randn(256, 200)
    y = softmax(x)
    assert_close(y, torch.softmax(x.double(), dim=1), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_torch_tensors_go_in_and_come_out(dtype: torch.dtype) -> None:
    x = (10 * torch.randn(8, 6)).to(dtype)
    y = jit(lambda a: store(tile(a)))(x)
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_writes_to_an_input_reach_the_caller() -> None:
    def kernel(a: Any) -> None:
        t = nl.zeros((4, 4), a.dtype)
        nisa.dma_copy(dst=a, src=t)

    contiguous, strided, other = np.ones((4, 4), BF16), np.ones((4, 8), np.float32)[:, ::2], torch.ones(4, 4)
    for array in (contiguous, strided, other):
        emulate(kernel, array)
        assert not np.asarray(array, dtype=np.float32).any()


def test_results_keep_their_structure() -> None:
    def kernel(a: Any, flag: bool) -> Any:
        assert flag
        return {"copy": store(tile(a)), "pair": (a, None, 3)}

    x = grid_data(2, 2)
    out = emulate(kernel, x, flag=True).outputs
    np.testing.assert_array_equal(out["copy"], x)
    assert out["pair"][1:] == (None, 3)


def test_a_jitted_kernel_is_a_plain_call_inside_another() -> None:
    @jit
    def inner(t: Any) -> None:
        nisa.tensor_scalar(t, t, nl.add, 1.0)

    def outer(a: Any) -> Any:
        t = tile(a)
        inner(t)
        return store(t)

    np.testing.assert_array_equal(emulate(outer, grid_data(2, 2)).outputs, grid_data(2, 2) + 1)


def test_a_list_is_no_kernel_argument() -> None:
    with pytest.raises(NkiValidationError, match=r"argument \[1, 2\]; a kernel takes tuples, not lists"):
        emulate(lambda strides: None, [1, 2])


def test_platform_target_is_refused() -> None:
    with pytest.raises(NkiValidationError, match="platform_target"):
        jit(platform_target="trn2")


def programs() -> int:
    return nl.num_programs(0)


@pytest.mark.parametrize(("lnc", "grid"), [(1, None), (1, 1), (2, 2), (2, (2,)), (None, None), (None, 2)])
def test_a_grid_of_the_configured_size_is_launched(lnc: int | None, grid: Any) -> None:
    assert emulate(programs, grid=grid, lnc=lnc).outputs == (2 if grid in (2, (2,)) else 1)


@pytest.mark.parametrize(
    ("lnc", "grid", "words"),
    [
        (2, None, r"grid \[\] has 1 program\(s\), and LNC=2 is configured; launch kernel\[2\]"),
        (1, 2, r"grid \[2\] has 2 program\(s\), and LNC=1 is configured; .*NEURON_LOGICAL_NC_CONFIG=2"),
        (None, 8, r"grid \[8\] has 8 programs; 1, or 2 with LNC=2"),
        (None, (2, 2), r"grid \[2, 2\] has 4 programs"),
        (4, 4, r"lnc=4 is configured; 1 or 2"),
    ],
)
def test_another_grid_is_refused(lnc: int | None, grid: Any, words: str) -> None:
    with pytest.raises(NkiValidationError, match=words):
        emulate(programs, grid=grid, lnc=lnc)
    assert len(emulate(programs, grid=grid, lnc=lnc, strict=False).report.cores) == np.prod(grid or 1)


def test_the_environment_says_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2")
    kernel = jit(programs)
    assert kernel[2]() == 2
    with pytest.raises(NkiValidationError, match="LNC=2 is configured"):
        kernel()
    assert emulate(programs, lnc=1).outputs == 1
