# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Replicas of an instance get cores of their own, next to one another; too few are refused. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35_vllm.cores import check_cores, cores_of_replica
from qwen35_vllm.options import ConfigurationRefused, ServeOptions


def parallel(replicas: int = 1, degree: int = 4, replica: int | None = None) -> Any:
    """What is read of vLLM's ParallelConfig."""
    return SimpleNamespace(
        data_parallel_size_local=replicas, tensor_parallel_size=degree, data_parallel_rank_local=replica
    )


def cores(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return [*range(int(first), int(last or first) + 1)]


@given(degree=st.integers(1, 16), replicas=st.integers(1, 16), first=st.integers(0, 64), spare=st.integers(0, 8))
def test_each_core_has_one_replica(degree: int, replicas: int, first: int, spare: int) -> None:
    last = first + degree * replicas - 1
    for environment in ({"NEURON_RT_VISIBLE_CORES": f"{first}-{last + spare}"}, {}):
        check_cores(parallel(replicas, degree), ServeOptions(), environment)
        given = [cores(cores_of_replica(parallel(replicas, degree, i), environment) or "") for i in range(replicas)]
        assert all(len(of_one) == degree for of_one in given)
        start = first if environment else 0
        assert [core for of_one in given for core in of_one] == [*range(start, start + degree * replicas)]


def test_a_single_replica_has_what_the_user_gave_it() -> None:
    assert cores_of_replica(parallel(), {"NEURON_RT_VISIBLE_CORES": "8-15"}) is None
    check_cores(parallel(), ServeOptions(), {"NEURON_RT_NUM_CORES": "4"})
    assert cores_of_replica(parallel(1, 4, 0), {"NEURON_RT_NUM_CORES": "4"}) is None


@pytest.mark.parametrize(
    ("replicas", "options", "environment", "told"),
    [
        (1, {}, {"NEURON_RT_VISIBLE_CORES": "0-1"}, "need 4 cores, NEURON_RT_VISIBLE_CORES=0-1 names 2: name more"),
        (2, {}, {"NEURON_RT_VISIBLE_CORES": "0-6"}, "need 8 cores, NEURON_RT_VISIBLE_CORES=0-6 names 7"),
        (2, {"instance": "trn2.3xlarge"}, {}, "instance=trn2.3xlarge has 4 (at 2 physical ones each): lower"),
        (2, {}, {"NEURON_RT_NUM_CORES": "4"}, "NEURON_RT_NUM_CORES=4 with --data-parallel-size 2"),
        (1, {}, {"NEURON_RT_VISIBLE_CORES": "0,1,2,3"}, "NEURON_RT_VISIBLE_CORES=0,1,2,3 must be a core, as 3, or a"),
        (1, {}, {"NEURON_RT_VISIBLE_CORES": "7-4"}, "must be a core"),
        (1, {}, {"NEURON_RT_VISIBLE_CORES": "9" * 99}, "must be a core"),
    ],
)
def test_too_few_cores_are_refused(replicas: int, options: Any, environment: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigurationRefused) as refused:
        check_cores(parallel(replicas), ServeOptions(**options), environment)
    assert told in str(refused.value)


def test_a_replica_whose_cores_are_not_visible_is_refused() -> None:
    with pytest.raises(ConfigurationRefused, match="replica 1 of --tensor-parallel-size 4 needs cores 4 to 7"):
        cores_of_replica(parallel(1, 4, 1), {"NEURON_RT_VISIBLE_CORES": "0-6"})


@pytest.mark.parametrize(("instance", "replicas"), [("trn2.3xlarge", 1), ("trn2.48xlarge", 16)])
def test_an_instance_has_room_for_so_many(instance: str, replicas: int) -> None:
    check_cores(parallel(replicas), ServeOptions(instance=instance), {})
    with pytest.raises(ConfigurationRefused):
        check_cores(parallel(replicas + 1), ServeOptions(instance=instance), {})
