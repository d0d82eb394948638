# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A step of vLLM's scheduler: rows of the model, calls of it, and the tokens that vLLM's sampler chooses.

Each step, rows that answer are decoded in one call, and prompts are encoded in pieces, as many to a call as were
compiled for. `forward` does that; `sample` chooses the tokens, once vLLM has the grammars that the tokens of the step
before allow. Both run on the device's thread.

With on-device sampling, and only requests in a step that want the most likely tokens and nothing more, the token ids
are all that is read from the device. Logits that are not read cannot be checked: else a row whose logits are no finite
numbers fails.

With drafts (`--speculative-config`), rows that answer get one token and one for each draft that foretold it. The drafts
are the worker's own: the scheduler has places for them, and learns from the tokens how many were right. Where all rows
want the most likely token and nothing more, one program verifies, chooses and drafts. Else `forward` verifies, `sample`
has vLLM's sampler choose each token as if there were no drafts, with those before it said, and drafts what follows.

Rows that begin are restored, and blocks of prompts stored, as the step's plan says (see `prefixes`). What is stored
must be known to be finite: in a step that stores, the logits of pieces are read. A block whose copy fails is not
stored; a row that cannot be written ends as one whose work fails.

A call of the model that fails takes the requests with it that were in the call, because nobody knows what their slots
hold then; the others go on. See `connector` for how vLLM is told.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from vllm.logger import init_logger
from vllm.v1.outputs import DraftTokenIds, LogprobsLists, LogprobsTensors, ModelRunnerOutput

from qwen35.error_text import one_line
from qwen35.modeling_qwen35 import NeuronQwen35ForCausalLM
from qwen35.modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from qwen35.serving.prefix_cache import BlockStore
from qwen35.serving.runner import ModelRunner, Row, RowOutputs
from qwen35.serving.sampling import NOT_FINITE, require_finite
from qwen35.serving.speculation import foretold

from .batch_sampler import BatchSampler
from .connector import budget_of, plan_of
from .device_thread import Failures, StepOutput
from .draft_counts import up_to_end
from .prefixes import StepPlan
from .request_rows import RequestRows, ScheduledRequest
from .request_rules import NO_PROMPT_LOGPROBS
from .row_media import MediaEncoder
from .row_metrics import RowStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

LONGEST_ERROR = 500
"""Characters of a failure that is logged."""

_Outputs = TypeVar("_Outputs")

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
        self._drafts_tokens = model.config.num_speculative_tokens > 0
        self._max_model_len = vllm_config.model_config.max_model_len
        self.rows = RequestRows(slots, self._runner.clear_slot)
        self._media = MediaEncoder(model) if isinstance(model, NeuronQwen35VLForCausalLM) else None
        budget = budget_of(vllm_config)
        self.prefixes = None if budget is None else BlockStore(model, budget.block_tokens)
        self._step: _Step | None = None

    def forward(self, scheduled: SchedulerOutput) -> None:
        """Call the model for what a step schedules; `sample` goes on from there."""
        plan = plan_of(scheduled)
        requests = self.rows.update(scheduled)
        self._restore(plan, requests)
        self._place_media(scheduled, requests)
        requests = [request for request in requests if request.failure is None]
        sampling = [request for request in requests if request.samples]
        on_device = self._runner.device_is_greedy and self._sampler.on_device([r.state for r in sampling])
        step = self._step = _Step(scheduled, plan, sampling, on_device)
        if decoding := [request for request in sampling if request.is_encoded]:
            if self._drafts_tokens:
                self._verify(step, decoding)
            else:
                self._call(lambda rows: self._runner.decode(rows, on_device), decoding, partial(self._keep, step))
        chunk, unread = self._runner.chunk, on_device and not plan.stores
        while encoding := {r.slot_row: r for r in requests if r.failure is None and r.has_piece(chunk)}:
            batch = [encoding[row] for row in self._runner.batch([*encoding])]
            self._call(lambda rows: self._runner.encode(rows, unread), batch, partial(self._keep, step))

    def sample(self, grammar: GrammarOutput | None) -> StepOutput:
        """Choose the tokens of the step that was called last, and draft those that may follow."""
        step, self._step = self._step, None
        assert step is not None, "a step is sampled once, after its forward"
        for request in step.sampling:
            request.take(step.tokens.get(request.state.req_id, ()))
        logprobs = self._choose(step, grammar)
        chosen_here = [each for each in step.sampling if each.failure is None and each.state.req_id in step.logits]
        if self._drafts_tokens and chosen_here:
            self._call(self._runner.draft, chosen_here, lambda request, drafts, i: None)
        sampling = {request.state.req_id: request for request in step.sampling if request.failure is None}
        others = [request_id for request_id in step.scheduled.num_scheduled_tokens if request_id not in sampling]
        ids = [*sampling, *others]
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[*(self._given(step, request) for request in sampling.values()), *([] for _ in others)],
            logprobs=_in_order([logprobs.get(request_id, []) for request_id in ids]),
            prompt_logprobs_dict={
                request_id: gathered
                for request_id, request in sampling.items()
                if (gathered := _gathered_prompt_logprobs(request)) is not None
            },
        )
        return StepOutput(output, self._new_failures(step.scheduled), self._lost(step.plan), self._row_stats())

    def drafts(self) -> DraftTokenIds:
        """What is drafted for each request: of the step that was called last, if it is not sampled yet."""
        rows = {
            request_id: request.row
            for request_id, request in self.rows.requests.items()
            if request.row is not None and request.failure is None
        }
        return DraftTokenIds([*rows], [[*row.drafts] for row in rows.values()])

    def idle(self, scheduled: SchedulerOutput) -> StepOutput:
        """A step that schedules nothing, and tells which requests are finished."""
        plan = plan_of(scheduled)
        requests = self.rows.update(scheduled)
        self._restore(plan, requests)
        self._place_media(scheduled, requests)
        output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
        return StepOutput(output, self._new_failures(scheduled), self._lost(plan), self._row_stats())

    def _restore(self, plan: StepPlan, requests: Sequence[ScheduledRequest]) -> None:
        """Let rows that begin hold what is known of their prompts, then give back the memory of what is dropped."""
        if self.prefixes is None:
            return
        for request in requests:
            if keys := plan.restores.get(request.state.req_id):
                try:
                    request.slot_row.cached = self.prefixes.write(request.slot_row.slot, keys)
                except Exception as error:
                    self._fail([request], error)
        for key in plan.drops:
            self.prefixes.drop(key)

    def _store(self, plan: StepPlan, request: ScheduledRequest) -> None:
        """Keep the block that a piece has completed, if it is to be kept."""
        row = request.slot_row
        key = plan.stores.get(request.state.req_id, {}).get(row.cached)
        if self.prefixes is None or key is None:
            return
        try:
            self.prefixes.read(row.slot, key, row.cached)
        except Exception as error:
            logger.warning("a prefix of %d tokens is not kept: %s", row.cached, one_line(str(error)), exc_info=error)

    def _lost(self, plan: StepPlan) -> list[bytes]:
        """What was to be stored, and is not."""
        return [key for key in plan.stored if self.prefixes is None or key not in self.prefixes]

    def _place_media(self, scheduled: SchedulerOutput, requests: Sequence[ScheduledRequest]) -> None:
        """Encode the images and videos that a step schedules; one that fails takes its request with it alone."""
        if self._media is None:
            return
        self._media.drop(scheduled.free_encoder_mm_hashes)
        for request in requests:
            if request.state.mm_features and request.failure is None and not request.is_encoded:
                try:
                    self._media.place(request, scheduled.scheduled_encoder_inputs.get(request.state.req_id, ()))
                except Exception as error:
                    self._fail([request], error)

    def forget_media(self) -> None:
        """Forget what was encoded, but for what the rows hold."""
        if self._media is not None:
            self._media.drop_all()

    def _given(self, step: _Step, request: ScheduledRequest) -> list[int]:
        """The tokens of a request that vLLM gets and counts."""
        return up_to_end(step.scheduled, request.state, step.tokens[request.state.req_id], self._max_model_len)

    def _row_stats(self) -> RowStats:
        in_use = self.rows.slots - len(self.rows.free_slots)
        return RowStats.of(self.rows.slots, in_use, 0 if self.prefixes is None else self.prefixes.nbytes)

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

    def _verify(self, step: _Step, decoding: Sequence[ScheduledRequest]) -> None:
        """Decode with the drafts that the step has places for; a program of its own chooses for greedy requests alone.

        vLLM counts a step's drafts from the places, and lets no row grow past max_model_len by them.
        """
        for request in decoding:
            places = len(step.scheduled.scheduled_spec_decode_tokens.get(request.state.req_id, ()))
            request.slot_row.drafts = request.slot_row.drafts[:places]
        if self._sampler.on_device([request.state for request in decoding]):
            self._call(self._runner.speculate, decoding, partial(_keep_chosen, step))
        else:
            self._call(self._runner.verify, decoding, partial(_keep_verified, step))

    def _choose(self, step: _Step, grammar: GrammarOutput | None) -> dict[str, list[LogprobsTensors]]:
        """Choose tokens from the logits of a step, of each request as many as its drafts foretold, and one more.

        Returns:
            The log-probabilities by request, one a token, where some are wanted.
        """
        rows = {r.state.req_id: r for r in step.sampling if r.failure is None and r.state.req_id in step.logits}
        logprobs: dict[str, list[LogprobsTensors]] = {request_id: [] for request_id in rows}
        if rows and grammar is not None:
            self._constrain(step, rows, grammar)
        place = 0
        while rows:
            # The batch holds the rows of this place alone, so that no other's generator moves on.
            order = self._sampler.hold([request.state for request in rows.values()])
            sampled = self._sampler.sample(torch.stack([step.logits[name][place] for name in order]).float())
            for i, (request_id, tokens) in enumerate(zip(order, sampled.sampled_token_ids.tolist(), strict=True)):
                rows[request_id].take(tokens)
                step.tokens.setdefault(request_id, []).extend(tokens)
                if (tensors := sampled.logprobs_tensors) is not None:
                    logprobs[request_id].append(LogprobsTensors(*(tensor[i : i + 1] for tensor in tensors[:3])))
            rows = {
                name: request
                for name, request in rows.items()
                if foretold(request.slot_row.drafts, place, step.tokens[name][place])
            }
            place += 1
        return logprobs

    def _constrain(self, step: _Step, rows: Mapping[str, ScheduledRequest], grammar: GrammarOutput) -> None:
        """Keep the tokens that the grammars allow after each row and each of its drafts, as far as these obey them."""
        order = self._sampler.hold([request.state for request in rows.values()])
        places = {name: step.scheduled.scheduled_spec_decode_tokens.get(name, ()) for name in order}
        # A place without a logit of its own, because there was no such draft, is nobody's.
        padded = [
            torch.nn.functional.pad(own := step.logits[name], (0, 0, 0, len(places[name]) + 1 - len(own)))
            for name in order
        ]
        logits = torch.cat(padded).float()
        self._sampler.constrain(logits, step.scheduled, grammar)
        for name, own in zip(order, logits.split([len(each) for each in padded]), strict=True):
            step.logits[name] = own
            if name in grammar.structured_output_request_ids:
                # vLLM has checked those alone that it has in place of -1; after these the logits are not constrained.
                checked = sum(1 for _ in itertools.takewhile(lambda token: token >= 0, places[name]))
                rows[name].slot_row.drafts = rows[name].slot_row.drafts[:checked]

    def _call(
        self,
        run: Callable[[Sequence[Row]], _Outputs],
        requests: Sequence[ScheduledRequest],
        keep: Callable[[ScheduledRequest, _Outputs, int], None],
    ) -> None:
        """Run the rows of some requests, and keep what the step needs of the outputs of the i-th."""
        try:
            outputs = run([request.slot_row for request in requests])
        except Exception as error:
            self._fail(requests, error)
            return
        for i, request in enumerate(requests):
            try:
                keep(request, outputs, i)
            except Exception as error:
                self._fail([request], error)

    def _keep(self, step: _Step, request: ScheduledRequest, outputs: RowOutputs, i: int) -> None:
        """Keep what a call gave its i-th row: logprobs of a prompt, and what the next token is chosen from."""
        if outputs.logits is not None:
            require_finite(outputs.logits[i])  # of a piece within a prompt, too: what it leaves behind is no better
        self._store(step.plan, request)
        if request.prompt_logprobs is not None:
            request.prompt_logprobs += self._prompt_logprobs(request, outputs, i)
        if request.is_encoded:
            request.slot_row.placed = None
        if not (request.is_encoded and request.samples):
            return
        if step.tokens_only:
            assert outputs.tokens is not None, "a device that is greedy gives its tokens"
            step.tokens[request.state.req_id] = [int(outputs.tokens[i])]
            return
        step.logits[request.state.req_id] = outputs.all_logits()[i : i + 1]

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
        plan: what of prompts is restored and stored.
        sampling: the requests that get tokens.
        tokens_only: whether the device's tokens are taken, and no logits read.
        tokens: what the device chose, and what was chosen here since, by request.
        logits: [n + 1, V] by request, after its last token and its n drafts.
    """

    scheduled: SchedulerOutput
    plan: StepPlan
    sampling: list[ScheduledRequest]
    tokens_only: bool
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)


def _keep_chosen(step: _Step, request: ScheduledRequest, chosen: Sequence[list[int] | None], i: int) -> None:
    """Keep the tokens that a program chose for its i-th row.

    Raises:
        ValueError: they were chosen from no finite numbers.
    """
    tokens = chosen[i]
    if tokens is None:
        raise ValueError(f"some {NOT_FINITE}")
    step.tokens[request.state.req_id] = tokens


def _keep_verified(step: _Step, request: ScheduledRequest, logits: Sequence[torch.Tensor], i: int) -> None:
    """Keep the logits [n + 1, V] of the i-th row, up to those that are no finite numbers: they may not be needed.

    Raises:
        ValueError: the first are not finite.
    """
    own = logits[i]
    require_finite(own[0])
    finite = sum(1 for _ in itertools.takewhile(bool, own.isfinite().all(dim=1).tolist()))
    request.slot_row.drafts = request.slot_row.drafts[: finite - 1]
    step.logits[request.state.req_id] = own[:finite]


def _in_order(logprobs: Sequence[Sequence[LogprobsTensors]]) -> LogprobsLists | None:
    """Those of requests in this order, one a token; None where there are none."""
    tokens = [tensors for own in logprobs for tensors in own]
    if not tokens:
        return None
    # As wide as the widest: a later token's batch may have nobody left who wants as many.
    width = max(tensors.logprobs.shape[1] for tensors in tokens)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(each.logprob_token_ids, (0, width - each.logprobs.shape[1])) for each in tokens])
    values = [pad(each.logprobs, (0, width - each.logprobs.shape[1]), value=-torch.inf) for each in tokens]
    ranks = torch.cat([each.selected_token_ranks for each in tokens])
    counts = itertools.accumulate((len(own) for own in logprobs), initial=0)
    return LogprobsTensors(ids, torch.cat(values), ranks).tolists([*counts])


def _gathered_prompt_logprobs(request: ScheduledRequest) -> LogprobsTensors | None:
    """Those of a whole prompt, once, with the first token of the answer; None where there are none to give."""
    pieces, request.prompt_logprobs = request.prompt_logprobs, None
    if not pieces:
        return None
    ids, logprobs, ranks = (torch.cat([piece[i] for piece in pieces]) for i in range(3))
    return LogprobsTensors(ids, logprobs, ranks)
