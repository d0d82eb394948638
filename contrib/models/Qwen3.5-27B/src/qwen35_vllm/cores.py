# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which Neuron cores a replica has, where several share an instance: each takes the next `tensor_parallel_size`.

vLLM starts a process for each replica of `--data-parallel-size` and tells it its number on this machine. The Neuron
runtime takes, in NEURON_RT_VISIBLE_CORES, one core or a range (aws-neuron-sdk,
neuron-runtime/guides/configuration-guide.rst): it must be set before the runtime starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen35.hardware import DEFAULT_LNC, INSTANCES

from .options import ConfigurationRefused, ServeOptions

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

VISIBLE_CORES = "NEURON_RT_VISIBLE_CORES"
NUMBER_OF_CORES = "NEURON_RT_NUM_CORES"


def check_cores(parallel: ParallelConfig, options: ServeOptions, environment: Mapping[str, str] = os.environ) -> None:
    """Check that the replicas of this machine find cores, as far as they are known.

    Raises:
        ConfigurationRefused: there are too few, or what names them cannot be divided.
    """
    replicas, degree = parallel.data_parallel_size_local, parallel.tensor_parallel_size
    needed = f"--data-parallel-size {replicas} of --tensor-parallel-size {degree} need {replicas * degree} cores"
    visible = _visible(environment)
    if visible is not None and len(visible) < replicas * degree:
        raise ConfigurationRefused(
            f"{needed}, {VISIBLE_CORES}={environment[VISIBLE_CORES]} names {len(visible)}: name more, or lower one"
        )
    if options.instance is not None:
        cores = INSTANCES[options.instance].ranks(DEFAULT_LNC.value)
        if cores < replicas * degree:
            raise ConfigurationRefused(
                f"{needed}, instance={options.instance} has {cores} (at {DEFAULT_LNC.value} physical ones each): lower "
                "one, or name a larger instance"
            )
    if replicas > 1 and environment.get(NUMBER_OF_CORES):
        raise ConfigurationRefused(
            f"{NUMBER_OF_CORES}={environment[NUMBER_OF_CORES]} with --data-parallel-size {replicas}: each replica is "
            f"given its cores; unset it, or set {VISIBLE_CORES} to those of all"
        )


def cores_of_replica(parallel: ParallelConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """What NEURON_RT_VISIBLE_CORES must be in this replica's process; None: as it is.

    Raises:
        ConfigurationRefused: the cores that are visible to this process are too few, or badly named.
    """
    replica, degree = parallel.data_parallel_rank_local, parallel.tensor_parallel_size
    if replica is None or environment.get(NUMBER_OF_CORES):
        return None  # the only one here: the user, or the runtime, gives it what it takes
    visible = _visible(environment)
    first, last = replica * degree, (replica + 1) * degree - 1
    if visible is None:
        return f"{first}-{last}"
    if last >= len(visible):
        raise ConfigurationRefused(
            f"replica {replica} of --tensor-parallel-size {degree} needs cores {first} to {last} of those in "
            f"{VISIBLE_CORES}={environment[VISIBLE_CORES]}, which names {len(visible)}: name more"
        )
    return f"{visible[first]}-{visible[last]}"


def _visible(environment: Mapping[str, str]) -> range | None:
    """The cores that NEURON_RT_VISIBLE_CORES names; None: all."""
    text = environment.get(VISIBLE_CORES, "").strip()
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ConfigurationRefused(f"{VISIBLE_CORES}={text} must be a core, as 3, or a range, as 0-3")
    return range(int(match[1]), int(match[2] or match[1]) + 1)
