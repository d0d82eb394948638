# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders share, and how many processes run the tests.

Where the sources of NxDI are on the path, the tests run on them instead of on the stand-ins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from support import neuron_shells

neuron_shells.install()  # before qwen35 is imported

from qwen35.nxdi import NXDI_AVAILABLE  # noqa: E402
from qwen35.serving.loading import MINI_CHECKPOINT  # noqa: E402
from support.models import NO_NXDI, load_neuron  # noqa: E402
from support.ranks import RankPool  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One process where NxDI is importable: a model takes all of a device. Else xdist's default, one per core."""
    return 0 if NXDI_AVAILABLE else None


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


@pytest.fixture
def lone_rank(backend: str) -> None:
    """NxD's layers ask for their group; loading a model on a CPU makes one of this process alone."""
    if NXDI_AVAILABLE:
        load_neuron(MINI_CHECKPOINT)


@pytest.fixture
def library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations with mlp_kernel="nki" pass without nki-library, for tests of what does not launch its kernel."""
    monkeypatch.setattr("qwen35.kernel_selection.library_problem", lambda: None)


@pytest.fixture
def nki_as_before() -> Iterator[None]:
    """What is imported as `nki` meanwhile, for nki-library, is forgotten afterwards: other tests see none."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "nki"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "nki"]:
        del sys.modules[name]
    sys.modules.update(before)
