# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Times of two sides that ran in turn, so that other work on the machine fell on both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

PAIRS = 10
"""Pairs of runs, after one that warms both sides up."""


@dataclass(frozen=True)
class Paired:
    """Medians in milliseconds, and of the ratios of neighbouring runs the median, the least and the largest."""

    ours_ms: float
    transformers_ms: float
    ratio: float
    least: float
    largest: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Paired:
        """From (ours, transformers') in seconds."""
        ratios = [theirs / ours for ours, theirs in pairs]
        return cls(
            1e3 * statistics.median(ours for ours, _ in pairs),
            1e3 * statistics.median(theirs for _, theirs in pairs),
            statistics.median(ratios),
            min(ratios),
            max(ratios),
        )

    def __str__(self) -> str:
        return (
            f"{self.ours_ms:>9.2f} ms{self.transformers_ms:>13.2f} ms"
            f"{self.ratio:>8.2f}x ({self.least:.2f} to {self.largest:.2f})"
        )


HEADER = f"{'ours':>12}{'transformers':>16}{'ratio':>9} (spread)"
