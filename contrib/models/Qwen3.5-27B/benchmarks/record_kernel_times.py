#!/usr/bin/env python3
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Write the modelled times of the kernels that `qwen35 plan` explains a step with: `planning/kernel_times.json`.

They come from `nki_emulator` and were not measured on a device. Run it again when a kernel or the timing model changes;
a test fails until then. It takes some minutes. Sizes are explained in `qwen35.planning.kernel_times`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from bench_kernels import HEADS, attention, decoding, deltanet
from qwen35.cli.kernels import KernelCase, KernelName
from qwen35.planning.kernel_times import TIMES, TimedKernel

HEADS_PER_KEY = 3
"""Value heads per key head in 27B."""

KEY_HEADS = 4
"""Of a rank of 27B at TP=4; sizes of more than their value heads are recorded as rows of the batch."""


def cases() -> Iterator[tuple[TimedKernel, int, int]]:
    """Kernel, tokens and size of every row."""
    for size in (6, 12, 48, 96, 192):
        yield TimedKernel.DECODE, 1, size
    for kernel in (TimedKernel.VERIFY, TimedKernel.COMMIT):
        yield from ((kernel, tokens, size) for tokens in (2, 4, 8) for size in (6, 12, 96))
    yield from ((TimedKernel.FUSED, tokens, size) for tokens in (128, 256, 512, 1024, 2048) for size in (6, 12, 48))
    yield from ((TimedKernel.LOOPED, tokens, size) for tokens in (512, 1024, 2048) for size in (6, 12, 48))
    yield from ((TimedKernel.ATTENTION_PROMPT, tokens, HEADS) for tokens in (128, 256, 512, 1024, 2048))
    yield from ((TimedKernel.ATTENTION_CACHED, 1, size) for size in (1024, 4096, 8192, 32768, 131072))
    yield from ((TimedKernel.ATTENTION_CACHED, tokens, size) for tokens in (4, 8) for size in (1024, 4096, 8192, 32768))


def modelled_us(kernel: TimedKernel, tokens: int, size: int) -> float:
    """Modelled microseconds of a launch of two cores in bfloat16, emulated."""
    if kernel is TimedKernel.ATTENTION_PROMPT:
        return attention(tokens).modelled_us
    if kernel is TimedKernel.ATTENTION_CACHED:
        return decoding(1, size, tokens).modelled_us
    key_heads = min(KEY_HEADS, size // HEADS_PER_KEY)
    heads = key_heads * HEADS_PER_KEY
    case = KernelCase(KernelName(kernel.value), batch=size // heads, tokens=tokens, heads=heads, key_heads=key_heads)
    return deltanet(case).modelled_us


def main() -> None:
    rows = [[*case, round(modelled_us(*case), 2)] for case in cases()]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = (
        '{\n "what": "modelled by nki_emulator, not measured: kernel, tokens, size, us",\n'
        f' "command": "benchmarks/record_kernel_times.py",\n "rows": [\n  {lines}\n ]\n}}\n'
    )
    written = TIMES.with_suffix(".json.tmp")
    written.write_text(text)
    os.replace(written, TIMES)


if __name__ == "__main__":
    main()
