# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Whole kernels, written as for the device: tiled matmul, softmax, convenience calls, and the import hook."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nki_emulator
from nki_emulator import emulate, jit
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, assert_close


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
    assert ratio == pytest.approx(4)
    assert fast.makespan_ns < slow.makespan_ns


def test_softmax_matches_torch_and_survives_large_values() -> None:
    x = 100 * torch.randn(256, 200)
    y = softmax(x)
    assert_close(y, torch.softmax(x.double(), dim=1), 1e-6)


CONVENIENCE = {
    "add": (lambda x, y: nl.add(x, y), lambda x, y: x + y),
    "constant on the left": (lambda x, y: nl.subtract(1.0, x), lambda x, y: 1 - x),
    "divide": (lambda x, y: nl.divide(x, y), lambda x, y: x / y),
    "mod": (lambda x, y: nl.mod(x, 0.7), lambda x, y: np.mod(x, np.float32(0.7))),
    "power": (lambda x, y: nl.power(x, 2.0), lambda x, y: x**2),
    "where": (lambda x, y: nl.where(nl.greater(x, y), x, 0.0), lambda x, y: np.where(x > y, x, 0)),
    "mean": (lambda x, y: nl.mean(x, axis=1, keepdims=True), lambda x, y: x.mean(1, keepdims=True)),
    "var": (lambda x, y: nl.var(x, axis=1, keepdims=True), lambda x, y: x.var(1, keepdims=True)),
    "min": (lambda x, y: nl.min(x, axis=1, keepdims=True), lambda x, y: x.min(1, keepdims=True)),
    "softmax": (lambda x, y: nl.softmax(x), lambda x, y: torch.softmax(torch.from_numpy(x), 1).numpy()),
    "floor": (lambda x, y: nl.floor(x), lambda x, y: np.floor(x)),
    "matmul": (lambda x, y: nl.add(nl.matmul(x, y, transpose_x=True), 0.0), lambda x, y: x.T @ y),
    "matmul plain": (lambda x, y: nl.add(nl.matmul(x, y), 0.0), lambda x, y: x @ y),
    "full": (lambda x, y: nl.add(x, nl.full((40, 40), 3.0, nl.float32)), lambda x, y: x + 3),
    "identity": (lambda x, y: nl.add(x, nl.shared_identity_matrix(40, nl.float32)), lambda x, y: x + np.eye(40)),
    "rms_norm": (
        lambda x, y: nl.rms_norm(x, y, axis=1, n=40),
        lambda x, y: x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * y,
    ),
}


@pytest.mark.parametrize("name", CONVENIENCE)
def test_convenience_calls(name: str) -> None:
    call, formula = CONVENIENCE[name]
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((40, 40)).astype(np.float32) for _ in range(2))

    def kernel(a: Any, b: Any) -> Any:
        value = call(nl.load(a), nl.load(b))
        out = nl.ndarray(value.shape, value.dtype, buffer=nl.shared_hbm)
        nl.store(out, value)
        return out

    assert_close(emulate(kernel, x, y).outputs, formula(x, y), 1e-5)


def test_a_file_that_imports_nki_runs_unmodified(tmp_path: Path) -> None:
    (tmp_path / "add.py").write_text(
        textwrap.dedent(
            """
            import nki
            import nki.isa as nisa
            import nki.language as nl
            import nki.typing as nt
            from nki.isa.constants import dge_mode, oob_mode

            @nki.jit
            def add(x: nt.tensor[128, 4], y):
                out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
                a = nl.ndarray(x.shape, dtype=x.dtype)
                b = nl.ndarray(x.shape, dtype=x.dtype)
                nisa.dma_copy(dst=a, src=x, dge_mode=dge_mode.none, oob_mode=oob_mode.error)
                nisa.dma_copy(dst=b, src=y)
                nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.add)
                nisa.dma_copy(dst=out, src=a)
                return out
            """
        )
    )
    program = (
        "import nki_emulator, numpy as np; assert nki_emulator.install(); assert nki_emulator.install();"
        "from add import add; x = np.ones((128, 4), np.float32); assert (add(x, x) == 2).all(); print('ran')"
    )
    source = Path(nki_emulator.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{source}:{tmp_path}"},
        check=False,
    )
    assert run.stdout.strip() == "ran", run.stderr


def test_nki_objects_get_an_initialiser_as_from_the_compiler() -> None:
    class Plain(nl.NKIObject):
        rows: int
        columns: int = 4

        def __post_init__(self) -> None:
            self.size = (self.rows or 0) * self.columns

    assert Plain(3).size == 12
    assert Plain(columns=2).rows is None
    with pytest.raises(TypeError, match="has fields"):
        Plain(depth=1)
