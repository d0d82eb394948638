# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions on virtual registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks, costs
from ..context import current
from ..enums import engine as Engine
from ..errors import fail
from ..registers import VirtualRegister

_DOC = f"{checks.ISA}, register_load"
_COST = costs.Cost(float(costs.MIN_ISSUE_CYCLES / costs.SYNC_GHZ), float(costs.ACCESS_LATENCY_CYCLES / costs.SYNC_GHZ))


def register_alloc(x: int | None = None) -> VirtualRegister:
    """A new register, holding ``x`` if given."""
    return VirtualRegister(None if x is None else int(x))


def register_move(dst: VirtualRegister, src: int | VirtualRegister) -> None:
    """``dst = src`` for a constant or another register."""
    _register("register_move", "dst", dst).value = int(src)


def register_load(dst: VirtualRegister, src: Any) -> None:
    """Load the single element of a tensor in HBM or SBUF."""
    target, source = _register("register_load", "dst", dst), _one("register_load", "src", src)
    target.value = int(source.read().reshape(-1)[0])
    current().record("register_load", Engine.sync, _COST, [source], [], None)


def register_store(dst: Any, src: VirtualRegister) -> None:
    """Store a register into the single element of a tensor in HBM or SBUF."""
    target, source = _one("register_store", "dst", dst), _register("register_store", "src", src)
    target.write(np.full(target.shape, source.value, dtype=np.int64))
    current().record("register_store", Engine.sync, _COST, [], [target], None)


def _register(call: str, operand: str, value: Any) -> VirtualRegister:
    if not isinstance(value, VirtualRegister):
        fail(call, f"{operand} is a {type(value).__name__}", "it must come from nisa.register_alloc", _DOC)
    return value


def _one(call: str, operand: str, value: Any) -> Any:
    t = checks.tensor(call, operand, value)
    if checks.strict() and t.buffer not in checks.DMA_SPACES:
        fail(call, f"{operand} {t!r}", "it must be in HBM or SBUF", _DOC)
    if t.size != 1:
        fail(call, f"{operand} has shape {list(t.shape)}", "it has exactly one element", _DOC)
    return t
