# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A step of vLLM's scheduler: rows of the model, calls of it, and the tokens that vLLM's sampler chooses.

Each step, rows that answer are decoded in one call, and prompts are encoded in pieces, as many to a call as were
compiled for. `forward` does that; `sample` chooses the tokens, once vLLM has the grammars that the tokens of the step
before allow. Both run on the device's thread.

With on-device sampling, and only requests in a step that want the most likely tokens and nothing more, the token ids
are all that is read from the device. Logits that are not read cannot be checked: else a row whose logits are no finite
numbers fails.

A call of the model that fails takes the requests with it that were in the call, because nobody knows what their slots
hold then; the others go on. See `connector` for how vLLM is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput

from qwen35.error_text import one_line
from qwen35.modeling_qwen35 import NeuronQwen35ForCausalLM
from qwen35.serving.runner import ModelRunner, Row, RowOutputs
from qwen35.serving.sampling import require_finite

from .batch_sampler import BatchSampler
from .device_thread import Failures, StepOutput
from .request_rows import RequestRows, ScheduledRequest
from .request_rules import NO_PROMPT_LOGPROBS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

LONGEST_ERROR = 500
"""Characters of a failure that is logged."""

logger = init_logger(f"vllm.{__name__}")


class StepRunner:
    """Runs the steps of a scheduler over a loaded model, which it has for itself.

    Args:
        vllm_config: of this engine.
        model: loaded, with a slot for each of max_num_seqs requests.

    Raises:
        ValueError: the model has fewer slots, or its configuration leaves no logits to sample from.
    """

    def __init__(self, vllm_config: VllmConfig, model: NeuronQwen35ForCausalLM) -> None:
        slots, needed = model.neuron_config.kv_cache_batch_size, vllm_config.scheduler_config.max_num_seqs
        if slots < needed:
            raise ValueError(
                f"max_num_seqs={needed} exceeds the kv_cache_batch_size={slots} that the model was compiled with: "
                f"pass --max-num-seqs {slots}, or compile with as many"
            )
        self._runner = ModelRunner(model)
        self._sampler = BatchSampler(vllm_config)
        self.rows = RequestRows(slots, self._runner.clear_slot)
        self._step: _Step | None = None

    def forward(self, scheduled: SchedulerOutput) -> None:
        """Call the model for what a step schedules; `sample` goes on from there."""
        requests = [request for request in self.rows.update(scheduled) if request.failure is None]
        sampling = [request for request in requests if request.samples]
        on_device = self._runner.device_is_greedy and self._sampler.on_device([r.state for r in sampling])
        step = self._step = _Step(scheduled, sampling, on_device)
        if decoding := [request for request in sampling if request.is_encoded]:
            self._call(step, self._runner.decode, decoding)
        chunk = self._runner.chunk
        while encoding := {r.slot_row: r for r in requests if r.failure is None and r.has_piece(chunk)}:
            batch = self._runner.batch([*encoding])
            self._call(step, self._runner.encode, [encoding[row] for row in batch])

    def sample(self, grammar: GrammarOutput | None) -> StepOutput:
        """Choose the tokens of the step that was called last."""
        step, self._step = self._step, None
        assert step is not None, "a step is sampled once, after its forward"
        sampling = {request.state.req_id: request for request in step.sampling if request.failure is None}
        order = self._sampler.hold([request.state for request in sampling.values()])
        tokens: list[list[int]] = []
        logprobs = None
        if order and step.tokens_only:
            tokens = [[step.tokens[request_id]] for request_id in order]
        elif order:
            logits = torch.stack([step.logits[request_id] for request_id in order]).float()
            sampled = self._sampler.sample(logits, step.scheduled, grammar)
            tokens = sampled.sampled_token_ids.tolist()
            logprobs = None if sampled.logprobs_tensors is None else sampled.logprobs_tensors.tolists()
        for request_id, (token,) in zip(order, tokens, strict=True):
            sampling[request_id].take(token)
        # In this order: vLLM finds the log-probabilities of a request by its place.
        others = [request_id for request_id in step.scheduled.num_scheduled_tokens if request_id not in sampling]
        ids = [*order, *others]
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[*tokens, *([] for _ in others)],
            logprobs=logprobs,
            prompt_logprobs_dict={
                request_id: gathered
                for request_id, request in sampling.items()
                if (gathered := _gathered_prompt_logprobs(request)) is not None
            },
        )
        return StepOutput(output, self._new_failures(step.scheduled))

    def idle(self, scheduled: SchedulerOutput) -> StepOutput:
        """A step that schedules nothing, and tells which requests are finished."""
        self.rows.update(scheduled)
        return StepOutput(ModelRunnerOutput(req_ids=[], req_id_to_index={}), self._new_failures(scheduled))

    def _new_failures(self, scheduled: SchedulerOutput) -> Failures:
        """The failed requests that vLLM is to be told of with the output of this step: each once.

        vLLM looks for the blocks of tokens that a request had before the step. A request that fails in its first step
        has none, and is told with its second, or whatever step comes next.
        """
        told: Failures = {}
        for request_id, request in self.rows.requests.items():
            before = request.granted - scheduled.num_scheduled_tokens.get(request_id, 0)
            if request.failure is not None and not request.is_reported and before > 0:
                request.is_reported = True
                told[request_id] = request.state.block_ids
        return told

    def _call(
        self,
        step: _Step,
        run: Callable[[Sequence[Row], bool], RowOutputs],
        requests: Sequence[ScheduledRequest],
    ) -> None:
        """Run the rows of some requests, and keep what the step needs of the outputs."""
        try:
            outputs = run([request.slot_row for request in requests], step.tokens_only)
        except Exception as error:
            self._fail(requests, error)
            return
        for i, request in enumerate(requests):
            try:
                self._keep(step, request, outputs, i)
            except Exception as error:
                self._fail([request], error)

    def _keep(self, step: _Step, request: ScheduledRequest, outputs: RowOutputs, i: int) -> None:
        """Keep what a call gave its i-th row: logprobs of a prompt, and what the next token is chosen from."""
        if outputs.logits is not None:
            require_finite(outputs.logits[i])  # of a piece within a prompt, too: what it leaves behind is no better
        if request.prompt_logprobs is not None:
            request.prompt_logprobs += self._prompt_logprobs(request, outputs, i)
        if not (request.is_encoded and request.samples):
            return
        if step.tokens_only:
            assert outputs.tokens is not None, "a device that is greedy gives its tokens"
            step.tokens[request.state.req_id] = int(outputs.tokens[i])
            return
        step.logits[request.state.req_id] = outputs.all_logits()[i]

    def _prompt_logprobs(self, request: ScheduledRequest, outputs: RowOutputs, i: int) -> list[LogprobsTensors]:
        """Those of the tokens of a prompt that follow the tokens of a piece.

        Raises:
            ValueError: the model was not compiled for them; vLLM refuses such a request before it is queued.
        """
        if not outputs.prompt_logits:
            raise ValueError(NO_PROMPT_LOGPROBS)
        logits, row = outputs.prompt_logits[i], request.slot_row
        following = row.tokens[row.cached - len(logits) + 1 : row.cached + 1]
        count = request.params.prompt_logprobs
        assert count is not None
        return [self._sampler.prompt_logprobs(logits[: len(following)], following, count)] if following else []

    def _fail(self, requests: Sequence[ScheduledRequest], error: Exception) -> None:
        for request in requests:
            request.failure = one_line(f"{type(error).__name__}: {error}", LONGEST_ERROR)
            logger.error("request %s ends with an error: %s", request.state.req_id, request.failure, exc_info=error)


@dataclass
class _Step:
    """What is known of a step between its two halves.

    Args:
        scheduled: what the scheduler decided.
        sampling: the requests that get a token.
        tokens_only: whether the device's tokens are taken, and no logits read.
        tokens: what the device chose, by request.
        logits: [V] by request.
    """

    scheduled: SchedulerOutput
    sampling: list[ScheduledRequest]
    tokens_only: bool
    tokens: dict[str, int] = field(default_factory=dict)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)


def _gathered_prompt_logprobs(request: ScheduledRequest) -> LogprobsTensors | None:
    """Those of a whole prompt, once, with the first token of the answer; None where there are none to give."""
    pieces, request.prompt_logprobs = request.prompt_logprobs, None
    if not pieces:
        return None
    ids, logprobs, ranks = (torch.cat([piece[i] for piece in pieces]) for i in range(3))
    return LogprobsTensors(ids, logprobs, ranks)
