# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What vLLM's metrics count of steps with drafts: those that were made, up to the end of an answer.

vLLM's scheduler counts the places that it gave a request in a step as drafts, less those that a step says are invalid,
and all its tokens but the last as accepted ones; only then it looks where the answer ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_input_batch import CachedRequestState


def discount_padding(scheduled: SchedulerOutput) -> None:
    """Leave out places for drafts that nobody made: in the first step of a request.

    vLLM gives one whose prompt is a single token such places, so that all requests of the step are of one length.
    """
    places = scheduled.scheduled_spec_decode_tokens
    cached = scheduled.scheduled_cached_reqs
    started = {new.req_id for new in scheduled.scheduled_new_reqs} | {*cached.resumed_req_ids}
    _discount(scheduled, {request_id: len(places[request_id]) for request_id in started & places.keys()})


def up_to_end(
    scheduled: SchedulerOutput, state: CachedRequestState, tokens: list[int], max_model_len: int
) -> list[int]:
    """Leave out what a step gives a request after the end of its answer.

    Args:
        state: of the request, whose answer has these tokens already.
        tokens: of the step, one for each accepted draft and one more.

    Returns:
        The tokens that vLLM is to have. One after the end stays, as the last of them does not count as a draft.
    """
    answered = len(state.output_token_ids) - len(tokens)
    assert state.sampling_params is not None and state.prompt_token_ids is not None
    end = end_of_answer(state.sampling_params, len(state.prompt_token_ids), answered, tokens, max_model_len)
    if end is None or end == len(tokens) - 1:  # the last is no draft: those of the step were all before the end
        return tokens
    places = len(scheduled.scheduled_spec_decode_tokens[state.req_id])
    _discount(scheduled, {state.req_id: places - (end + 1)})
    return tokens[: end + 2]


def end_of_answer(
    params: SamplingParams, prompt: int, answered: int, tokens: list[int], max_model_len: int
) -> int | None:
    """Which of these tokens is the last of an answer, as the scheduler will find; None where none is.

    It ends answers at stop tokens and lengths. What else ends one (strings, repetitions) is found later than here.

    Args:
        prompt: tokens of the prompt.
        answered: tokens of the answer before these.
    """
    for i, token in enumerate(tokens):
        length = answered + i + 1
        if length < params.min_tokens:
            continue
        if token == params.eos_token_id or token in (params.stop_token_ids or ()):
            return i
        if length >= (params.max_tokens or max_model_len) or prompt + length >= max_model_len:
            return i
    return None


def _discount(scheduled: SchedulerOutput, drafts: dict[str, int]) -> None:
    if drafts:
        scheduled.num_invalid_spec_tokens = {**(scheduled.num_invalid_spec_tokens or {}), **drafts}
