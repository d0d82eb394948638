#!/usr/bin/env python3
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Modelled times of the DeltaNet kernels for a rank of the 27B model at TP=4: 12 value and 4 key heads, two cores.

They come from `nki_emulator` and were not measured on a device; errors are of real arithmetic, against float64. The
launch is what a kernel that is launched by itself takes on top; inside a compiled program it is assumed to be nothing.
The latency bound is what loads, stores and the longest chain of dependent instructions take at least; `ratio` is the
modelled time over the larger of the two bounds.
`core-us` is the modelled time of the launch times its cores, over batch x value heads x chunks of 128 tokens: what one
core spends on 128 tokens of one head. Decoding has no chunks, so its `core-us` is per head and step.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from qwen35.cli.kernels import KernelCase, KernelFigures, KernelName, as_json, measure
from qwen35.kernel_selection import DeltaNetInverse

CHUNK = 128

CASES = {
    **{f"context encoding, {n} tokens": KernelCase(KernelName.FUSED, tokens=n) for n in (128, 256, 512)},
    "the same 512, plain inverse": KernelCase(KernelName.FUSED, tokens=512, inverse=DeltaNetInverse.PLAIN),
    **{f"context encoding, {n} tokens": KernelCase(KernelName.FUSED, tokens=n) for n in (1024, 2048)},
    **{f"looped, {n} tokens": KernelCase(KernelName.LOOPED, tokens=n) for n in (1024, 2048)},
    "chunk step, 128 tokens": KernelCase(KernelName.CHUNKED, tokens=CHUNK),
    "the same step, plain inverse": KernelCase(KernelName.CHUNKED, tokens=CHUNK, inverse=DeltaNetInverse.PLAIN),
    "decode layer, batch 1": KernelCase(KernelName.DECODE, batch=1),
    "decode layer, batch 8": KernelCase(KernelName.DECODE, batch=8),
    "verify 4 tokens, batch 1": KernelCase(KernelName.VERIFY, batch=1, tokens=4),
    "verify 4 tokens, batch 8": KernelCase(KernelName.VERIFY, batch=8, tokens=4),
    "commit of 4 tokens, batch 1": KernelCase(KernelName.COMMIT, batch=1, tokens=4),
    "commit of 4 tokens, batch 8": KernelCase(KernelName.COMMIT, batch=8, tokens=4),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    case: KernelCase
    figures: KernelFigures

    @property
    def core_us(self) -> float:
        """Modelled microseconds of one core for one head and 128 tokens, or for one head and decoding step."""
        chunks = -(-self.case.tokens // CHUNK)
        return self.figures.modelled_us * self.case.cores / (self.case.batch * self.case.heads * chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description="Modelled times of the DeltaNet kernels, 27B at TP=4.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    rows = [Row(name, case, measure(case)[0]) for name, case in CASES.items()]
    if args.json:
        results = [
            {"name": row.name, "core_us": row.core_us, "bound_ratio": row.figures.bound_ratio}
            | as_json(row.case, row.figures)
            for row in rows
        ]
        print(json.dumps({"modelled": True, "rows": results}))
        return
    print("12 value heads, 4 key heads, bfloat16, 2 cores; all times modelled, none measured on a device")
    print(
        f"{'kernel':30} {'modelled us':>12} {'core-us':>8} {'launch us':>10} {'HBM bound us':>13} "
        f"{'latency bound us':>17} {'ratio':>6} {'error':>8}"
    )
    for row in rows:
        figures = row.figures
        print(
            f"{row.name:30} {figures.modelled_us:12.2f} {row.core_us:8.2f} {figures.launch_us:10.2f} "
            f"{figures.hbm_bound_us:13.2f} {figures.latency_bound_us:17.2f} {figures.bound_ratio:6.2f} "
            f"{figures.max_error:8.1e}"
        )
    print("core-us: modelled time x cores / (batch x value heads x chunks of 128 tokens); in decoding, of one step")


if __name__ == "__main__":
    main()
