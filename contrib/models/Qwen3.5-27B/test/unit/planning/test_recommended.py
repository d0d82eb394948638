# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The recommended configurations of 27B fit where they are recommended, and can be compiled."""

from __future__ import annotations

from typing import Any

import pytest

from qwen35.memory.programs import walk_buckets
from qwen35.planning.plan import preset_application, recommended_layout
from qwen35.planning.recommended import FIRST_CACHE_BUCKET, FIRST_PROMPT_BUCKET, RECOMMENDED
from qwen35.planning.work import work_of
from support.applications import needs_stand_ins, of_27b

pytestmark = needs_stand_ins


@pytest.mark.parametrize("entry", RECOMMENDED.values(), ids=RECOMMENDED)
def test_each_fits_its_instance_with_a_gigabyte_to_spare(entry: Any) -> None:
    assert recommended_layout(entry.name).headroom > 1e9
    assert entry.replicas >= 1 and entry.name.startswith(entry.instance.name)


@pytest.mark.parametrize("entry", RECOMMENDED.values(), ids=RECOMMENDED)
def test_the_programs_of_each_are_far_from_too_long_for_the_compiler(entry: Any) -> None:
    for program in walk_buckets(preset_application("27B", entry.neuron_config()), slice(-1, None)):
        assert program.matmuls <= 1.2e6, program


def test_the_shortest_buckets_wait_for_the_weights() -> None:
    work = work_of(of_27b())
    assert work.ttft(FIRST_PROMPT_BUCKET, FIRST_PROMPT_BUCKET) < 1.1 * work.ttft(1, 1)
    assert work.tpot(FIRST_CACHE_BUCKET) < 1.01 * work.tpot(0)


def test_every_instance_and_degree_has_one() -> None:
    covered = {(entry.instance.name, entry.tp_degree) for entry in RECOMMENDED.values()}
    assert covered == {("trn2.3xlarge", 4), *(("trn2.48xlarge", tp) for tp in (4, 8, 16))}


def test_fp8_makes_room_for_more_sequences_on_the_smallest_instance() -> None:
    sequences = {entry.name: (entry.seq_len, entry.batch) for entry in RECOMMENDED.values()}
    assert sequences["trn2.3xlarge-fp8"][0] == 262144 and sequences["trn2.3xlarge-fp8"][1] >= 2
    for fp8, plain in (("fp8", ""), ("fp8-batch", "-batch"), ("fp8-kv", "-fp8")):
        of_fp8, of_plain = sequences[f"trn2.3xlarge-{fp8}"], sequences[f"trn2.3xlarge{plain}"]
        assert of_fp8[0] == of_plain[0] and of_fp8[1] > of_plain[1]
