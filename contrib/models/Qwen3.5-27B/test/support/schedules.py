# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random schedules of requests to an engine, which must give each what it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from qwen35 import FinishReason, NeuronQwen35ForCausalLM, PrefixCache, Qwen35Engine, Request, StepOutput
from qwen35.serving.sampling import SamplingOptions

Case = tuple[list[int], SamplingOptions]
"""A prompt, and how tokens are chosen after it."""

CACHE_BYTES = 1 << 17  # some blocks, so that there is something to drop


@dataclass(frozen=True)
class Arrival:
    """A request of a schedule, `pause` rounds after the last; its `eos_at`-th token alone is one that ends it."""

    case: int
    pause: int
    max_new_tokens: int
    eos_at: int | None
    cancel_after: int | None

    def request(self, cases: Sequence[Case], alone: list[list[int]]) -> Request:
        prompt, sampling = cases[self.case]
        eos = () if self.eos_at is None else (alone[self.case][self.eos_at],)
        return Request(prompt, self.max_new_tokens, sampling, eos)

    def expected(self, alone: list[list[int]]) -> tuple[list[int], FinishReason]:
        tokens = alone[self.case]
        end = len(tokens) if self.eos_at is None else tokens.index(tokens[self.eos_at]) + 1
        if end <= self.max_new_tokens and self.eos_at is not None:
            return tokens[:end], FinishReason.EOS
        return tokens[: self.max_new_tokens], FinishReason.LENGTH


def schedules(cases: int, steps: int) -> st.SearchStrategy[list[Arrival]]:
    """Two to ten arrivals, of some cases that have `steps` tokens each."""
    arrival = st.builds(
        Arrival,
        case=st.integers(0, cases - 1),
        pause=st.integers(0, 3),
        max_new_tokens=st.sampled_from([1, 2, 3, 5, steps, steps, steps]),
        eos_at=st.none() | st.integers(0, steps - 1),
        cancel_after=st.sampled_from([None] * 8 + [0, 1, 3, 6]),
    )
    return st.integers(2, 10).flatmap(lambda size: st.lists(arrival, min_size=size, max_size=size))


def schedules_agree(
    model: NeuronQwen35ForCausalLM,
    cases: Sequence[Case],
    alone: list[list[int]],
    schedule: list[Arrival],
    cached: bool,
) -> Qwen35Engine:
    """Run a schedule, with a prefix cache if asked for; `alone` are the tokens of each case by itself."""
    chunks = model.config.prefill_chunk_size is not None
    engine = Qwen35Engine(model, PrefixCache(model, CACHE_BYTES) if cached and chunks else None)
    outputs: list[list[StepOutput]] = [[] for _ in schedule]
    cancels: list[tuple[int, int]] = []  # (round, request)
    rounds = 0

    def one_round() -> None:
        nonlocal rounds
        for request_id in [request_id for when, request_id in cancels if when == rounds]:
            engine.cancel(request_id)
        made = engine.step()
        tokens = [output.request_id for output in made if output.token is not None]
        most = model.config.num_speculative_tokens + 1
        assert all(tokens.count(i) <= most for i in tokens), f"a round gives a request {most} tokens at most"
        for output in made:
            outputs[output.request_id].append(output)
        rounds += 1

    for i, arrival in enumerate(schedule):
        for _ in range(arrival.pause):
            one_round()
        assert engine.add(arrival.request(cases, alone)) == i
        if arrival.cancel_after is not None:
            cancels.append((rounds + arrival.cancel_after, i))
    while engine.has_work:
        one_round()

    for i, arrival in enumerate(schedule):
        tokens, reason = arrival.expected(alone)
        got = [output.token for output in outputs[i] if output.token is not None]
        ends = [output.finish_reason for output in outputs[i]]
        assert not any(ends[:-1]), f"request {i} continues after its end: {ends}"
        if ends[-1] is FinishReason.CANCELLED and arrival.cancel_after is not None:
            assert got == tokens[: len(got)] and len(got) < len(tokens), f"request {i}"
        else:
            assert (got, ends[-1]) == (tokens, reason), f"request {i}"
    return engine
