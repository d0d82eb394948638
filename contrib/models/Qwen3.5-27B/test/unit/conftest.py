# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from qwen35.nxdi import NXDI_AVAILABLE
from support.models import NO_NXDI
from support.ranks import RankPool


@pytest.fixture(
    params=[
        pytest.param("stand-ins", marks=pytest.mark.skipif(NXDI_AVAILABLE, reason="the real NxDI is importable")),
        pytest.param("NxDI", marks=[pytest.mark.nxdi, pytest.mark.skipif(not NXDI_AVAILABLE, reason=NO_NXDI)]),
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    """Which classes the model is built on in this process: a test that asks for this runs on either."""
    return str(request.param)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(tp)`: the ranks of a degree, started when first asked for."""
    pools: dict[int, RankPool] = {}

    def get(size: int) -> RankPool:
        if size not in pools:
            pools[size] = RankPool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture
def outside_any_rank(backend: str) -> None:
    """On NxDI `to_cpu`, of any test before, leaves the process a rank, which cannot take the shapes of another."""
    if NXDI_AVAILABLE:
        from neuronx_distributed.parallel_layers import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
