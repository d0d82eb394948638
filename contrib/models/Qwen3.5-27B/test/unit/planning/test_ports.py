# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Ports are compared with the same model on as many ranks, and with no other."""

from __future__ import annotations

import pytest

from qwen35.planning.ports import PORTS, compare
from qwen35.planning.step import step_model_of
from support.applications import of_27b

pytestmark = pytest.mark.usefixtures("outside_any_rank")


@pytest.mark.parametrize(("tp_degree", "ports"), [(4, PORTS[:2]), (8, PORTS[2:]), (2, ())])
def test_ports_of_the_same_degree_are_compared(tp_degree: int, ports: tuple[object, ...]) -> None:
    model = of_27b(tp_degree=tp_degree)
    ours, whole = step_model_of(model), step_model_of(model, copies=tp_degree)
    found = compare(ours, whole)
    assert [each.port for each in found] == [*ports]
    for each in found:
        added = whole.decode(128).modelled - ours.decode(128).modelled if each.port.whole_deltanet else 0
        assert each.token_unexplained == pytest.approx(each.port.token - ours.decode(128).modelled - added)
        assert each.token_unexplained == pytest.approx(64 * each.layer_unexplained)
        assert each.prompt == ours.prompt(1024).modelled
