#!/usr/bin/env python3
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Modelled times of the kernels for a rank of the 27B model at TP=4: 12 value and 4 key heads, two cores.

They come from `nki_emulator` and were not measured on a device; errors are of real arithmetic, against float64. The
launch is what a kernel that is launched by itself takes on top; inside a compiled program it is assumed to be nothing.
The HBM bound is all inputs and outputs, each once, at 0.36 TB/s a core. The latency bound is what loads, stores and the
longest chain of dependent instructions take at least. The Tensor bound, of attention over prompts, is the matmuls of
the visible tiles of 128 x 128 scores, without transposes. `ratio` is the modelled time over the largest bound.
`core-us` is the modelled time of the launch times its cores, over batch x heads x chunks of 128 tokens: what one core
spends on 128 tokens of one head. Decoding has no chunks, so its `core-us` is per head and step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import ml_dtypes
import numpy as np
import torch

import nki_emulator
from nki_emulator import costs
from qwen35.cli.kernels import KernelCase, KernelName, measure
from qwen35.kernel_selection import DeltaNetInverse
from qwen35.nki_kernels.attention_continuation import attention_continuation
from qwen35.nki_kernels.attention_decode import attention_decode
from qwen35.nki_kernels.attention_prefill import attention_prefill
from qwen35.nki_kernels.recurrent import deltanet_recurrent_fwd_state
from qwen35.ops import cached_attention

CHUNK = 128

HEADS = 6
"""Query heads of a rank; they share one key-value head."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are modelled.

    Attributes:
        cores: of the launch.
        pieces: batch x heads x chunks of 128 tokens; in decoding, batch x heads.
        modelled_us, launch_us: of the kernel, and what launching it by itself adds.
        hbm_bound_us, latency_bound_us: least times.
        error: largest absolute error over the largest magnitude, against float64.
        tensor_bound_us: least time of the matmuls; 0 where they are not counted.
    """

    cores: int
    pieces: int
    modelled_us: float
    launch_us: float
    hbm_bound_us: float
    latency_bound_us: float
    error: float
    tensor_bound_us: float = 0.0

    @property
    def core_us(self) -> float:
        """Microseconds of one core for one piece."""
        return self.modelled_us * self.cores / self.pieces

    @property
    def bound_ratio(self) -> float:
        """Modelled time over the largest bound."""
        return self.modelled_us / max(self.hbm_bound_us, self.latency_bound_us, self.tensor_bound_us)


def deltanet(case: KernelCase) -> Row:
    """A kernel of the DeltaNet layers, as `qwen35 kernels` measures it."""
    figures = measure(case)[0]
    return Row(
        cores=case.cores,
        pieces=case.batch * case.heads * -(-case.tokens // CHUNK),
        modelled_us=figures.modelled_us,
        launch_us=figures.launch_us,
        hbm_bound_us=figures.hbm_bound_us,
        latency_bound_us=figures.latency_bound_us,
        error=figures.max_error,
    )


def recurrent(tokens: int) -> Row:
    """The gated delta rule token by token, of one head."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((tokens, 128), dtype=np.float32) for _ in range(3))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (q * 128**-0.5, k, v))
    g, beta = -rng.random((tokens, 1), dtype=np.float32), rng.random((tokens, 1), dtype=np.float32)
    initial = rng.standard_normal((128, 128), dtype=np.float32)

    state, output = initial.astype(np.float64), np.empty((tokens, 128))
    for t in range(tokens):
        query, key, value = (x[t].astype(np.float64) for x in (q, k, v))
        state *= np.exp(np.float64(g[t]))
        state += np.outer(key, np.float64(beta[t]) * (value - key @ state))
        output[t] = query @ state
    inputs = (q, k, v, g, beta, initial)
    return _emulated(deltanet_recurrent_fwd_state, inputs, (output, state), cores=2, pieces=-(-tokens // CHUNK))


def attention(tokens: int) -> Row:
    """Causal attention of 6 query heads and 1 key-value head of 256."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((1, n, tokens, 256), dtype=np.float32).astype(ml_dtypes.bfloat16) for n in (HEADS, 1, 1)
    )
    wide = [torch.from_numpy(x.astype(np.float64)) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).numpy()
    row = _emulated(attention_prefill, (q, k, v), (expected,), cores=2, pieces=HEADS * -(-tokens // CHUNK))
    chunks = tokens // CHUNK
    return replace(row, tensor_bound_us=_tensor_us(HEADS * chunks * (chunks + 1) // 2))


def decoding(rows: int, cached: int, tokens: int = 1) -> Row:
    """Attention of 6 query heads and 1 key-value head of 256 to full caches: `tokens` new ones for each of `rows`."""
    inputs = _cached_inputs(rows, cached, tokens)
    expected = cached_attention(*(x.double() for x in inputs), torch.full((rows,), cached)).numpy()
    arguments = (*inputs, torch.full((rows,), cached, dtype=torch.int32), cached)
    return _emulated(attention_decode, arguments, (expected,), cores=2, pieces=rows * HEADS)


def continuation(tokens: int, cached: int) -> Row:
    """The same heads, a chunk of a prompt after `cached` tokens; the error is that of its first and last 32 tokens."""
    q, k, v, k_cache, v_cache = _cached_inputs(1, cached, tokens)
    row_values = torch.tensor([cached], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    checked = (slice(0, 32), slice(tokens - 32, tokens))
    for part in checked:
        before = [torch.cat((x, y[:, :, : part.start]), 2) for x, y in ((k_cache, k), (v_cache, v))]
        new = (x[:, :, part].double() for x in (q, k, v))
        expected[:, :, part] = cached_attention(*new, *(x.double() for x in before), row_values[0] + part.start)
    arguments = (q, k, v, k_cache, v_cache, *row_values, cached)
    chunks = tokens // CHUNK
    pieces, tiles = HEADS * chunks, HEADS * (chunks * cached // CHUNK + chunks * (chunks + 1) // 2)
    row = _emulated(attention_continuation, arguments, (expected.numpy(),), cores=2, pieces=pieces, checked=checked)
    return replace(row, tensor_bound_us=_tensor_us(tiles))


def _cached_inputs(rows: int, cached: int, tokens: int) -> list[torch.Tensor]:
    """q, k, v of the new tokens and the caches of keys and values, in bfloat16."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, length, 256) for heads, length in ((HEADS, tokens), *2 * [(1, tokens)], *2 * [(1, cached)])]
    return [torch.randn(shape, generator=rng).bfloat16() for shape in shapes]


def _tensor_us(tiles: int) -> float:
    """Matmuls of so many tiles of 128 queries and 128 keys, on two cores: 2 x 128 columns of scores, 256 of P V."""
    return tiles / 2 * 512 / costs.TENSOR_GHZ / 1e3


def _emulated(
    kernel: Callable[..., Any],
    inputs: tuple[Any, ...],
    expected: tuple[np.ndarray, ...],
    *,
    cores: int,
    pieces: int,
    checked: tuple[slice, ...] = (slice(None),),
) -> Row:
    """A launch of ``kernel`` against what it is to return, of which the ``checked`` parts of axis 2 are compared."""
    result = nki_emulator.emulate(kernel, *inputs, grid=cores)
    report = result.report
    outputs = result.outputs if isinstance(result.outputs, tuple) else (result.outputs,)
    moved = sum(x.nbytes for x in (*inputs, *outputs) if not isinstance(x, int))
    wide = [x.double().numpy() if isinstance(x, torch.Tensor) else x.astype(np.float64) for x in outputs]
    errors = [
        max(np.abs(x[..., part, :] - y[..., part, :]).max() for part in checked) / np.abs(y).max()
        for x, y in zip(wide, expected, strict=True)
    ]
    return Row(
        cores=cores,
        pieces=pieces,
        modelled_us=report.makespan_ns / 1e3,
        launch_us=report.launch_ns / 1e3,
        hbm_bound_us=moved / (cores * costs.HBM_BYTES_PER_NS) / 1e3,
        latency_bound_us=report.latency_bound_ns / 1e3,
        error=float(max(errors)),
    )


FUSED, LOOPED, CHUNKED = KernelName.FUSED, KernelName.LOOPED, KernelName.CHUNKED
DECODE, VERIFY, COMMIT = KernelName.DECODE, KernelName.VERIFY, KernelName.COMMIT
PLAIN = DeltaNetInverse.PLAIN

CASES: dict[str, Callable[[], Row]] = {
    "context encoding, 128 tokens": lambda: deltanet(KernelCase(FUSED, tokens=128)),
    "context encoding, 256 tokens": lambda: deltanet(KernelCase(FUSED, tokens=256)),
    "context encoding, 512 tokens": lambda: deltanet(KernelCase(FUSED, tokens=512)),
    "the same 512, plain inverse": lambda: deltanet(KernelCase(FUSED, tokens=512, inverse=PLAIN)),
    "context encoding, 1024 tokens": lambda: deltanet(KernelCase(FUSED, tokens=1024)),
    "context encoding, 2048 tokens": lambda: deltanet(KernelCase(FUSED, tokens=2048)),
    "looped, 1024 tokens": lambda: deltanet(KernelCase(LOOPED, tokens=1024)),
    "looped, 2048 tokens": lambda: deltanet(KernelCase(LOOPED, tokens=2048)),
    "1 head, 1 core, 128 tokens": lambda: deltanet(KernelCase(FUSED, tokens=128, heads=1, key_heads=1, cores=1)),
    "1 head, 1 core, 256 tokens": lambda: deltanet(KernelCase(FUSED, tokens=256, heads=1, key_heads=1, cores=1)),
    "1 head, 1 core, 512 tokens": lambda: deltanet(KernelCase(FUSED, tokens=512, heads=1, key_heads=1, cores=1)),
    "chunk step, 128 tokens": lambda: deltanet(KernelCase(CHUNKED, tokens=CHUNK)),
    "the same step, plain inverse": lambda: deltanet(KernelCase(CHUNKED, tokens=CHUNK, inverse=PLAIN)),
    "decode layer, batch 1": lambda: deltanet(KernelCase(DECODE, batch=1)),
    "decode layer, batch 8": lambda: deltanet(KernelCase(DECODE, batch=8)),
    "verify 4 tokens, batch 1": lambda: deltanet(KernelCase(VERIFY, batch=1, tokens=4)),
    "verify 4 tokens, batch 8": lambda: deltanet(KernelCase(VERIFY, batch=8, tokens=4)),
    "commit of 4 tokens, batch 1": lambda: deltanet(KernelCase(COMMIT, batch=1, tokens=4)),
    "commit of 4 tokens, batch 8": lambda: deltanet(KernelCase(COMMIT, batch=8, tokens=4)),
    "recurrent, 1 head, 128 tokens": lambda: recurrent(128),
    "attention, 512 tokens": lambda: attention(512),
    "attention, 1024 tokens": lambda: attention(1024),
    "attention, 2048 tokens": lambda: attention(2048),
    **{f"decode, 1 row, {n} cached": partial(decoding, 1, n) for n in (4096, 8192, 32768)},
    "decode, 8 rows, 4096 cached": lambda: decoding(8, 4096),
    "verify 4 tokens, 32768 cached": lambda: decoding(1, 32768, tokens=4),
    **{f"continue {n} on 8192 cached": partial(continuation, n, 8192) for n in (512, 1024, 2048)},
    "continue 1024 on 65536 cached": lambda: continuation(1024, 65536),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Modelled times of the kernels, 27B at TP=4.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    rows = {name: make() for name, make in CASES.items()}
    if args.json:
        results = [
            {"name": name, "core_us": row.core_us, "bound_ratio": row.bound_ratio} | asdict(row)
            for name, row in rows.items()
        ]
        print(json.dumps({"modelled": True, "rows": results}))
        return
    print("bfloat16; 12 value and 4 key heads, or 6 query heads and 1 key-value head; 2 cores, unless said otherwise")
    print("all times modelled, none measured on a device")
    print(
        f"{'kernel':30} {'modelled us':>12} {'core-us':>8} {'launch us':>10} {'HBM bound us':>13} "
        f"{'latency bound us':>17} {'Tensor bound us':>16} {'ratio':>6} {'error':>8}"
    )
    for name, row in rows.items():
        print(
            f"{name:30} {row.modelled_us:12.2f} {row.core_us:8.2f} {row.launch_us:10.2f} {row.hbm_bound_us:13.2f} "
            f"{row.latency_bound_us:17.2f} "
            f"{row.tensor_bound_us:16.2f} {row.bound_ratio:6.2f} {row.error:8.1e}"
        )
    print("core-us: modelled time x cores / (batch x heads x chunks of 128 tokens); in decoding, of one step")


if __name__ == "__main__":
    main()
