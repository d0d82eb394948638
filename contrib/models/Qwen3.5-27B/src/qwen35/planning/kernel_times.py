# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Modelled times of the NKI kernels, as recorded in `kernel_times.json`: none was measured on a device.

`benchmarks/record_kernel_times.py` runs the kernels in the emulator and writes the file: a plan need not. Shapes
are those of a rank at LNC=2 in bfloat16. A time between recorded ones is interpolated, by size, then by tokens.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

TIMES = Path(__file__).with_name("kernel_times.json")


class TimedKernel(str, Enum):
    """The kernels whose times are recorded, with what their sizes count."""

    DECODE = "decode"  # a DeltaNet layer, one token a row; size: rows x value heads of a rank
    VERIFY = "verify"  # the same for several tokens a row; size: rows x value heads
    COMMIT = "commit"  # its state after those accepted; size: rows x value heads
    FUSED = "fused"  # the delta rule of a prompt; size: rows x value heads
    LOOPED = "looped"  # the same with a loop; size: rows x value heads
    ATTENTION_PROMPT = "attention-prompt"  # size: rows x query heads of a rank
    ATTENTION_CACHED = "attention-cached"  # decoding and verification; size: rows x KV heads of a rank x positions


class RecordedTime(NamedTuple):
    """A row of the file; `tokens` are those of a row of the batch."""

    kernel: TimedKernel
    tokens: int
    size: int
    microseconds: float


@cache
def recorded_times() -> tuple[RecordedTime, ...]:
    """All rows, by kernel, tokens and size."""
    rows = json.loads(TIMES.read_text())["rows"]
    return tuple(sorted(RecordedTime(TimedKernel(kernel), *numbers) for kernel, *numbers in rows))


def kernel_seconds(kernel: TimedKernel, tokens: int, size: int) -> float:
    """Modelled seconds of a launch.

    Smaller sizes and fewer tokens than those recorded take as long as the smallest; beyond the largest the time goes on
    as between the last two, or in proportion where there is one.
    """
    rows = [row for row in recorded_times() if row.kernel is kernel]
    lengths = sorted({row.tokens for row in rows})
    by_tokens = [
        _interpolated(size, [(row.size, row.microseconds) for row in rows if row.tokens == length])
        for length in lengths
    ]
    return _interpolated(tokens, list(zip(lengths, by_tokens, strict=True))) / 1e6


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """y at x on the line through points of growing x."""
    if x <= points[0][0]:
        return points[0][1]
    if len(points) == 1:
        return points[0][1] * x / points[0][0]
    upper = min(bisect_left([point[0] for point in points], x), len(points) - 1)
    (x0, y0), (x1, y1) = points[upper - 1 : upper + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
