# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the soak of the server makes of its samples: growth of memory with its confidence, and the memory itself."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from serving_process import ServingProcess
from soak_vllm import growth, quantile, student_t


def samples(slope: float, noise: float, seed: int, minutes: float = 20) -> list[dict[str, float]]:
    """Every two seconds, MB that grow by `slope` an hour."""
    draw = random.Random(seed)
    times = [2.0 * i for i in range(int(30 * minutes))]
    return [{"at": at, "resident_mb": 1500 + slope * at / 3600 + draw.gauss(0, noise)} for at in times]


@pytest.mark.parametrize(("freedom", "known"), [(5, 2.571), (8, 2.306), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_quantiles_of_student_s_t_are_those_of_the_tables(freedom: int, known: float) -> None:
    assert student_t(freedom) == pytest.approx(known, rel=2e-3)  # what is left out of the expansion, at 5


@pytest.mark.parametrize("slope", [0.0, 45.0, -30.0])
def test_growth_is_found_within_its_confidence(slope: float) -> None:
    found = [growth(samples(slope, 5, seed), 300) for seed in range(200)]
    inside = sum(abs(fitted - slope) <= half for fitted, half in found)
    assert 180 <= inside, f"{inside} of 200 intervals of 95% hold the slope"  # 3.2 standard deviations below 190
    assert max(half for _, half in found) < 40, "an interval that tells nothing"


def test_the_warm_up_and_the_prefix_cache_are_no_growth() -> None:
    flat = samples(0, 0.1, seed=1)
    for sample in flat:
        sample["resident_mb"] += min(sample["at"], 290.0)
        cached = 20e6 * sample["at"] / 60
        sample["resident_mb"] += cached / 1e6
        sample["qwen35_prefix_cache_bytes"] = cached
    slope, half = growth(flat, 300)
    assert abs(slope) < 1 and half < 1, "with either, it would be hundreds"


def test_quantiles_are_of_the_values() -> None:
    assert quantile([*range(101)], 50) == 50 and quantile([*range(101)], 99) == 99


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_children_of_children_counts() -> None:
    hold = "import sys; held = b'x' * 60_000_000; print('ready', flush=True); sys.stdin.read()"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        of_both = ServingProcess(process.pid, "").resident_megabytes()
        process.communicate("")
    assert 60 < of_both < 60 + 200
    assert ServingProcess(os.getpid(), "").resident_megabytes() > 10
