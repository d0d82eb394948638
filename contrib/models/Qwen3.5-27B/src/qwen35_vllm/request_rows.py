# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The rows of the requests that vLLM schedules: who has which slot of the caches, and what may be encoded of a prompt.

vLLM's scheduler counts tokens: it gives a request some of its prompt in a step, as its token budget allows, then one
token a step, and a place for each draft. What it gives is kept until it makes a whole piece, up to the next multiple of
the compiled chunk from the request's own first token, or to the end of the prompt. So the pieces of a prompt, and with
them its tokens, do not depend on the budget or on the other requests in a step.

A request that the scheduler preempts loses its row. When it is resumed, it gets another, and its prompt and what it
answered so far are encoded as one prompt.

Images and videos (`CachedRequestState.mm_features`) come to a row with `row_media`. Not here yet, but with a place in
`_start`: rows that are restored from earlier prompts (`num_computed_tokens` of a new row to `Row.cached`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from qwen35.serving.runner import Row, next_piece


@dataclass(eq=False)  # a request is itself, whatever it holds
class ScheduledRequest:
    """A request that is not finished.

    Args:
        state: what vLLM's batch knows of it: its prompt, its options, its generator, its answer so far.
        row: its tokens and its slot; None while it is preempted.
        prompt_end: tokens that are encoded in pieces; those after it are decoded one by one.
        granted: tokens that the scheduler has given it since it has this row, drafts that were rejected among them: how
            many tokens it has by now, its row knows.
        prompt_logprobs: of the pieces encoded so far; None when none are wanted, or none any more.
        failure: why it cannot go on.
        is_reported: whether vLLM has been told.
    """

    state: CachedRequestState
    row: Row | None = None
    prompt_end: int = 0
    granted: int = 0
    prompt_logprobs: list[LogprobsTensors] | None = None
    failure: str | None = None
    is_reported: bool = False

    @property
    def params(self) -> SamplingParams:
        """How its tokens are chosen; pooling is refused before."""
        assert self.state.sampling_params is not None
        return self.state.sampling_params

    @property
    def slot_row(self) -> Row:
        """Its row, which it has while it is scheduled."""
        assert self.row is not None, "it is scheduled"
        return self.row

    @property
    def is_encoded(self) -> bool:
        """Whether its slot holds all of its prompt."""
        return self.row is not None and self.row.cached >= self.prompt_end

    @property
    def samples(self) -> bool:
        """Whether the step gives it tokens: the scheduler has given it its whole prompt."""
        return self.row is not None and self.granted >= self.prompt_end

    def has_piece(self, chunk: int) -> bool:
        """Whether the next piece of its prompt is granted whole."""
        row = self.slot_row
        return not self.is_encoded and self.granted >= row.cached + len(next_piece(row, chunk))

    def take(self, tokens: Sequence[int]) -> None:
        """Let it go on with tokens that were chosen."""
        self.slot_row.tokens += tokens
        self.state.output_token_ids += tokens  # the list that vLLM's batch has, for penalties and bad words


@dataclass
class RequestRows:
    """All requests that are not finished, by id, and the slots that they have.

    Args:
        slots: of the caches; the scheduler runs no more requests at a time.
        clear_slot: lets a slot hold zeros.
    """

    slots: int
    clear_slot: Callable[[int], None]
    requests: dict[str, ScheduledRequest] = field(default_factory=dict)
    _dirty: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._dirty = {*range(self.slots)}  # whoever ran the model before may have left what is no number

    @property
    def free_slots(self) -> list[int]:
        """Those that no request has, in ascending order."""
        used = {request.row.slot for request in self.requests.values() if request.row is not None}
        return [slot for slot in range(self.slots) if slot not in used]

    def update(self, scheduled: SchedulerOutput) -> list[ScheduledRequest]:
        """Take in a step; returns the requests that it schedules."""
        for request_id in scheduled.finished_req_ids:
            if request := self.requests.pop(request_id, None):
                self._end_row(request)
        for request_id in scheduled.preempted_req_ids or ():
            if request := self.requests.get(request_id):
                self._end_row(request)
        for new in scheduled.scheduled_new_reqs:
            if request := self.requests.pop(new.req_id, None):  # of an input that is streamed: it begins anew
                self._end_row(request)
            self.requests[new.req_id] = request = ScheduledRequest(_state(new))
            self._start(request, new.num_computed_tokens)
        cached = scheduled.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in cached.resumed_req_ids:
                request = self.requests[request_id]
                self._end_row(request)
                # What was chosen in a step that the scheduler threw away is chosen again.
                del request.state.output_token_ids[cached.num_output_tokens[i] :]
                request.state.block_ids = cached.new_block_ids[i] or request.state.block_ids
                self._start(request, cached.num_computed_tokens[i])
        return [*self._grant(scheduled.num_scheduled_tokens)]

    def _grant(self, tokens: dict[str, int]) -> Iterator[ScheduledRequest]:
        for request_id, count in tokens.items():
            request = self.requests[request_id]
            request.granted += count
            yield request

    def _start(self, request: ScheduledRequest, granted: int) -> None:
        """Give a request a slot, and all its tokens so far to encode there."""
        slot = self.free_slots[0]
        if slot in self._dirty:
            self.clear_slot(slot)
            self._dirty.remove(slot)
        state = request.state
        request.row = Row(slot, [*(state.prompt_token_ids or ()), *state.output_token_ids])
        request.prompt_end, request.granted = len(request.row.tokens), granted
        request.failure, request.is_reported = None, False  # what was preempted is tried again
        # Those of a prompt are wanted with the first token of the answer.
        wants = request.params.prompt_logprobs is not None and not state.output_token_ids
        request.prompt_logprobs = [] if wants else None

    def _end_row(self, request: ScheduledRequest) -> None:
        if request.row is not None and request.failure is not None:
            self._dirty.add(request.row.slot)
        request.row = None


def _state(new: NewRequestData) -> CachedRequestState:
    """What vLLM's batch is given of a request."""
    params = new.sampling_params
    assert params is not None, "the worker supports the task 'generate' alone"
    generator = None
    if params.sampling_type == SamplingType.RANDOM_SEED:
        assert params.seed is not None
        generator = torch.Generator().manual_seed(params.seed)
    return CachedRequestState(
        req_id=new.req_id,
        prompt_token_ids=new.prompt_token_ids,
        mm_features=new.mm_features,
        sampling_params=params,
        generator=generator,
        block_ids=new.block_ids,
        num_computed_tokens=0,
        output_token_ids=[],
    )
