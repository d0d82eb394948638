# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Who has which slot after each step that vLLM's scheduler decides, and what of a prompt may be encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from qwen35_vllm.request_rows import RequestRows

pytestmark = pytest.mark.vllm

CHUNK = 4


class Rows:
    """Rows of three slots, and the slots that were cleared."""

    def __init__(self) -> None:
        self.cleared: list[int] = []
        self.rows = RequestRows(3, self.cleared.append)

    def step(
        self,
        granted: Mapping[str, int],
        new: Mapping[str, Sequence[int]] | None = None,
        resumed: Mapping[str, int] | None = None,
        finished: Sequence[str] = (),
        preempted: Sequence[str] | None = (),
        **params: Any,
    ) -> list[str]:
        """A step; new has prompts by id, resumed the tokens that were answered by then. The ids it schedules."""
        resumed = resumed or {}
        step = SchedulerOutput.make_empty()
        step.num_scheduled_tokens = dict(granted)
        step.finished_req_ids = {*finished}
        step.preempted_req_ids = None if preempted is None else {*preempted}
        step.scheduled_new_reqs = [
            NewRequestData(
                req_id=request_id,
                prompt_token_ids=[*prompt],
                mm_features=[],
                sampling_params=SamplingParams(**params),
                pooling_params=None,
                block_ids=([7],),
                num_computed_tokens=0,
                lora_request=None,
            )
            for request_id, prompt in (new or {}).items()
        ]
        cached = [request_id for request_id in granted if request_id not in (new or {})]
        step.scheduled_cached_reqs = CachedRequestData(
            req_ids=cached,
            resumed_req_ids={*resumed},
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[([9],) if request_id in resumed else None for request_id in cached],
            num_computed_tokens=[0] * len(cached),
            num_output_tokens=[resumed.get(request_id, 0) for request_id in cached],
        )
        return [request.state.req_id for request in self.rows.update(step)]

    def slots(self) -> dict[str, int | None]:
        return {name: request.row and request.row.slot for name, request in self.rows.requests.items()}


def test_requests_get_the_first_free_slots_and_leave_them_when_they_are_finished() -> None:
    rows = Rows()
    assert rows.step({"a": 1, "b": 1}, {"a": [1], "b": [2]}) == ["a", "b"]
    assert rows.slots() == {"a": 0, "b": 1}
    assert rows.step({"b": 1, "c": 1, "d": 1}, {"c": [3], "d": [4]}, finished=["a"]) == ["b", "c", "d"]
    assert rows.slots() == {"b": 1, "c": 0, "d": 2}
    rows.step({}, finished=["b", "c", "d", "never seen"])
    assert rows.slots() == {} and rows.rows.free_slots == [0, 1, 2]


def test_a_prompt_has_a_piece_when_a_whole_chunk_or_its_end_is_granted() -> None:
    rows = Rows()
    rows.step({"a": 3}, {"a": [*range(9)]})
    request = rows.rows.requests["a"]
    found = []
    for tokens in (0, 1, 3, 2):  # three before
        rows.step({"a": tokens})
        found.append((request.has_piece(CHUNK), request.samples))
        while request.has_piece(CHUNK):
            request.slot_row.cached = min(request.slot_row.cached // CHUNK * CHUNK + CHUNK, 9)
    assert found == [(False, False), (True, False), (False, False), (True, True)]
    assert request.is_encoded
    request.take([5, 6])
    assert request.state.output_token_ids == [5, 6] and request.slot_row.tokens == [*range(9), 5, 6]
    rows.step({"a": 1})
    assert request.samples and not request.has_piece(CHUNK)


def test_a_preempted_request_leaves_its_slot_and_encodes_its_answer_when_it_is_resumed() -> None:
    rows = Rows()
    rows.step({"a": 2, "b": 1, "c": 1}, {"a": [1, 2], "b": [3], "c": [4]}, temperature=1, seed=3)
    request = rows.rows.requests["a"]
    generator = request.state.generator
    request.slot_row.cached = 2
    request.take([5, 6])
    rows.step({"d": 1}, {"d": [8]}, preempted=["a"])
    assert rows.slots() == {"a": None, "b": 1, "c": 2, "d": 0}
    rows.step({"a": 3}, resumed={"a": 2}, finished=["b"])
    row = request.slot_row
    assert (row.slot, row.tokens, row.cached, request.prompt_end, request.granted) == (1, [1, 2, 5, 6], 0, 4, 3)
    assert request.state.output_token_ids == [5, 6] and request.state.block_ids == ([9],)
    assert request.state.generator is generator, "its draws go on"
    assert not request.samples
    rows.step({"a": 1})
    assert request.samples and request.has_piece(CHUNK)


def test_tokens_that_the_scheduler_threw_away_are_forgotten() -> None:
    rows = Rows()
    rows.step({"a": 1}, {"a": [1]})
    rows.rows.requests["a"].take([5, 6])
    rows.step({"a": 2}, resumed={"a": 1}, preempted=["a"])
    assert rows.rows.requests["a"].slot_row.tokens == [1, 5]


def test_a_request_that_is_resumed_without_word_of_its_preemption_leaves_its_slot() -> None:
    rows = Rows()
    rows.step({"a": 1, "b": 1, "c": 1}, {"a": [1], "b": [2], "c": [3]}, preempted=None)
    rows.step({"b": 1}, resumed={"b": 0}, preempted=None)
    assert rows.slots() == {"a": 0, "b": 1, "c": 2}


def test_an_input_that_goes_on_begins_anew_in_a_row() -> None:
    rows = Rows()
    rows.step({"a": 2}, {"a": [1, 2]})
    rows.step({"a": 3}, {"a": [1, 2, 3]})
    assert rows.slots() == {"a": 0} and rows.rows.requests["a"].slot_row.tokens == [1, 2, 3]


def test_slots_are_cleared_before_the_first_use_and_after_a_failure() -> None:
    rows = Rows()
    rows.step({"a": 1, "b": 1}, {"a": [1], "b": [2]})
    assert rows.cleared == [0, 1]
    rows.rows.requests["b"].failure = "it overflowed"
    rows.step({"c": 1, "d": 1}, {"c": [3], "d": [4]}, finished=["a", "b"])
    assert rows.cleared == [0, 1, 1]


def test_a_failed_request_that_was_preempted_is_tried_again() -> None:
    rows = Rows()
    rows.step({"a": 1}, {"a": [1]})
    request = rows.rows.requests["a"]
    request.failure, request.is_reported = "it overflowed", True
    rows.step({}, preempted=["a"])
    rows.step({"a": 1}, resumed={"a": 0})
    assert request.failure is None and not request.is_reported and rows.cleared == [0, 0]


@pytest.mark.parametrize(("seed", "others"), [(3, 3), (None, None)])
def test_a_seed_makes_a_generator_of_the_request(seed: int | None, others: int | None) -> None:
    rows = Rows()
    rows.step({"a": 1}, {"a": [1]}, seed=seed, temperature=1)
    generator = rows.rows.requests["a"].state.generator
    assert (None if generator is None else generator.initial_seed()) == others


def test_logprobs_of_a_prompt_are_wanted_until_an_answer_begins() -> None:
    rows = Rows()
    rows.step({"a": 1, "b": 1}, {"a": [1], "b": [2]}, prompt_logprobs=2)
    rows.rows.requests["b"].take([4])
    rows.step({}, preempted=["a", "b"])
    rows.step({"a": 1, "b": 2}, resumed={"a": 0, "b": 1})
    assert {name: request.prompt_logprobs for name, request in rows.rows.requests.items()} == {"a": [], "b": None}
