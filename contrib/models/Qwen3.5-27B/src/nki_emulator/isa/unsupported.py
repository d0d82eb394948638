# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions that are not emulated: NeuronCore-v4 only, or random numbers. Each keeps its documented signature."""

from __future__ import annotations

from typing import Any, NoReturn

from ..enums import engine as Engine
from ..enums import reduce_cmd as ReduceCmd


def _missing(name: str, why: str) -> NoReturn:
    raise NotImplementedError(f"nki.isa.{name} is not emulated: {why}")


_V4 = "it exists on NeuronCore-v4 only, and this emulator models NeuronCore-v3"
_RANDOM = "the generator of the device is not documented to the bit"


def dropout(dst: Any, data: Any, prob: Any, name: str | None = None) -> None:
    _missing("dropout", _RANDOM)


def exponential(
    dst: Any,
    src: Any,
    max_value: Any = 0.0,
    reduce_res: Any = None,
    reduce_cmd: ReduceCmd = ReduceCmd.idle,
    reduce_init: float = 0.0,
    name: str | None = None,
) -> None:
    _missing("exponential", _V4)


def nc_matmul_mx(
    dst: Any,
    stationary: Any,
    moving: Any,
    stationary_scale: Any,
    moving_scale: Any,
    tile_position: Any = None,
    tile_size: Any = None,
    accumulate: bool | None = None,
    name: str | None = None,
) -> None:
    _missing("nc_matmul_mx", _V4)


def quantize_mx(dst: Any, src: Any, dst_scale: Any, name: str | None = None) -> None:
    _missing("quantize_mx", _V4)


def rand2(dst: Any, min: Any, max: Any, name: str | None = None) -> None:
    _missing("rand2", _V4)


def rand_get_state(dst: Any, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    _missing("rand_get_state", _RANDOM)


def rand_set_state(src_seeds: Any, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    _missing("rand_set_state", _RANDOM)


def rng(dst: Any, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    _missing("rng", _RANDOM)


def set_rng_seed(src_seeds: Any, name: str | None = None) -> None:
    _missing("set_rng_seed", _RANDOM)
