# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What fp8 costs: no more than correct rounding does, and a test that tells correct rounding from wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import bench_fp8
from bench_fp8 import Rounding
from qwen35.serving.loading import MINI_CHECKPOINT
from support.applications import needs_stand_ins
from support.fp8_cases import quantise_rows

pytestmark = needs_stand_ins

ALLOWED = 1.2
"""Times what correct rounding per channel costs."""


def per_channel(weight: torch.Tensor) -> torch.Tensor:
    """Correct rounding, by NumPy."""
    return torch.mul(*quantise_rows(weight))


def whole_matrix(weight: torch.Tensor) -> torch.Tensor:
    return rounded(weight, weight.abs().max().expand(len(weight), 1), ml_dtypes.float8_e4m3fn, 240)


def e5m2(weight: torch.Tensor) -> torch.Tensor:
    return rounded(weight, weight.abs().amax(1, keepdim=True), ml_dtypes.float8_e5m2, 57344)


def rounded(weight: torch.Tensor, largest: torch.Tensor, dtype: type, most: float) -> torch.Tensor:
    scale = largest.numpy() / np.float32(most)
    return torch.from_numpy((weight.numpy() / scale).astype(dtype).astype(np.float32) * scale)


@pytest.fixture(scope="module")
def cost_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rounding]:
    """cost_of(name of a checkpoint, rounding of a matrix): what it costs; None is the package's own, kept in fp8."""
    scratch, found = tmp_path_factory.mktemp("fp8"), {}
    bench_fp8.write_heavy_tailed(scratch / "heavy")
    paths = {"heavy": scratch / "heavy", "mini": MINI_CHECKPOINT}
    prompts = {"heavy": bench_fp8.prompts_of(paths["heavy"])[:64], "mini": bench_fp8.prompts_of(MINI_CHECKPOINT)[:32]}
    exact = {name: bench_fp8.last_logits(path, prompts[name]) for name, path in paths.items()}

    def cost(name: str, way: Callable[[torch.Tensor], torch.Tensor] | None) -> Rounding:
        if (name, way) not in found:
            directory: Path = scratch / str(len(found))
            bench_fp8.rounded(paths[name], directory, way or bench_fp8.per_channel)
            found[name, way] = bench_fp8.cost(paths[name], directory, prompts[name], exact[name])
            if way is None:
                kept = bench_fp8.last_logits(paths[name], prompts[name], weights_dtype="fp8")
                found[name, way] = dataclasses.replace(
                    found[name, way], divergence=bench_fp8.divergence(kept, exact[name])
                )
        return found[name, way]

    return cost


def excess(found: Rounding, correct: Rounding) -> list[str]:
    """In what it costs more than it may."""
    pairs = {
        "error of the matrices": (found.error, correct.error),
        "error of the worst row": (found.worst_row, correct.worst_row),
        "KL": (found.divergence.kl, correct.divergence.kl),
        "changed tokens": (found.divergence.changed, correct.divergence.changed),
    }
    return [f"{name} {a:.4g}, correct {b:.4g}" for name, (a, b) in pairs.items() if a > ALLOWED * b]


@pytest.mark.parametrize("name", ["heavy", "mini"])
def test_weights_in_fp8_cost_what_correct_rounding_per_channel_costs(
    name: str, cost_of: Callable[..., Rounding]
) -> None:
    correct = cost_of(name, per_channel)
    assert excess(cost_of(name, None), correct) == []
    # e4m3 has 3 bits after the first: a relative error of at most 2^-4, 2^-4 / sqrt(3) at the worst mean, 0.026 usual.
    assert 0.02 < correct.error < 0.03 and correct.worst_row < 0.036


@pytest.mark.parametrize(("name", "wrong"), [("heavy", whole_matrix), ("heavy", e5m2)])
def test_a_scale_for_a_whole_matrix_and_e5m2_cost_more(
    name: str, wrong: Callable[[torch.Tensor], torch.Tensor], cost_of: Callable[..., Rounding]
) -> None:
    assert excess(cost_of(name, wrong), cost_of(name, per_channel)) != []


def test_a_divergence_is_that_of_two_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = bench_fp8.divergence(q.log() + 3.0, p.log())
    assert found.kl == pytest.approx(0.25 * np.log(2)) and found.changed == 1.0
    assert bench_fp8.divergence(p.log(), p.log()) == bench_fp8.Divergence(pytest.approx(0.0), 0.0)


@pytest.mark.slow
def test_states_do_not_drift_and_a_cache_in_fp8_costs_less_than_the_weights_over_4096_tokens() -> None:
    states, logits = bench_fp8.long_context(MINI_CHECKPOINT)
    fp8_states, fp8_logits = bench_fp8.long_context(MINI_CHECKPOINT, weights_dtype="fp8")
    _, kv_logits = bench_fp8.long_context(MINI_CHECKPOINT, kv_cache_dtype="fp8")
    distances = bench_fp8.drift(fp8_states, states)
    assert list(distances) == list(range(512, 4097, 512))
    early, late = (sum(list(distances.values())[half]) for half in (slice(0, 4), slice(4, 8)))
    # The rule forgets: an error that a token brings fades with what it wrote. If it added up it would grow by half.
    assert late < 1.2 * early, distances
    of_weights, of_cache = (bench_fp8.divergence(found, logits) for found in (fp8_logits, kv_logits))
    assert of_cache.kl < 0.1 * of_weights.kl and of_cache.changed <= of_weights.changed, (of_weights, of_cache)
