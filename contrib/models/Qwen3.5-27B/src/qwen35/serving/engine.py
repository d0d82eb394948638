# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Many requests over one loaded model: rows enter and leave at any step, prompts are encoded between decoding steps.

`Qwen35Engine` is what a serving worker drives: it has no thread, no clock and no network. Each round (`step`)

1. decodes one token of every row whose prompt is encoded, in one call;
2. gives free slots of the cache to waiting requests, first come, first served;
3. encodes, in one call, the next piece of the oldest prompt that is not encoded yet, and of the next oldest that can
   share the call: at most `ctx_batch_size` rows, whose pieces all begin a prompt or all continue one, with images or
   without, because these are different submodels.

So a long prompt delays the next token of the others by one piece of `prefill_chunk_size` tokens, never by the whole
prompt, and every prompt moves up until it is the oldest. Without `prefill_chunk_size` a piece is a whole prompt.

What a request gets does not depend on its neighbours: its prompt is cut at multiples of `prefill_chunk_size` from its
own first token, every call has the compiled number of rows, whoever is in it, and its random numbers come from a
generator of its own. With one bucket a submodel, its logits in the same slot of the cache are the same to the last bit;
other slots and other buckets may sum in another order.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from .prefix_cache import Chain, PrefixCache, media_digests
from .request import FinishReason, ModelLimits, Request, StepOutput, check_request
from .runner import ModelRunner, Row
from .sampling import Sampler


@dataclass
class _RequestState:
    """A request that is not finished: waiting while it has no row, then being encoded, then decoding."""

    id: int
    request: Request
    sampler: Sampler
    row: Row | None = None
    chain: Chain | None = None
    """Its prompt as the prefix cache knows it."""


class Qwen35Engine:
    """Continuous batching over a loaded model, which it has for itself; see the module's docstring for the policy.

    With a `prefix_cache` of the same model, a prompt is continued from the last boundary it shares with an earlier one;
    a request gets the same tokens.

    Outputs are handed out once: by `step` to whoever drives the engine, or by `stream`. Under tensor parallelism on a
    CPU every rank runs the same calls, with a seed in each request that samples.

    Raises:
        ValueError: the configuration leaves no logits to sample from, or the prefix cache is another model's.
    """

    def __init__(self, model: NeuronQwen35ForCausalLM, prefix_cache: PrefixCache | None = None) -> None:
        neuron_config = model.neuron_config
        if neuron_config.on_device_sampling_config is not None and not neuron_config.output_logits:
            raise ValueError(
                "on_device_sampling_config is set and output_logits=False: a device draws all rows from one generator, "
                "and tokens would depend on neighbours; set output_logits=True or on_device_sampling_config=None"
            )
        if neuron_config.async_mode:
            raise ValueError("async_mode=True: the host samples each token before the next step; set it to False")
        if prefix_cache is not None and prefix_cache.model is not model:
            raise ValueError("prefix_cache is another model's: make it of the model that the engine gets")
        self.model, self.prefix_cache = model, prefix_cache
        self._runner, self._limits = ModelRunner(model), limits_of(model)
        self._requests: dict[int, _RequestState] = {}  # by id, in order of arrival
        self._free_slots = [*range(neuron_config.kv_cache_batch_size)]
        self._outputs: dict[int, list[StepOutput]] = {}  # not handed out yet
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is not finished, or an output was not handed out."""
        return bool(self._requests or self._outputs)

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            ValueError: it cannot run; naming every field, value and remedy, before anything has run.
        """
        check_request(request, self._limits)
        request_id, self._next_id = self._next_id, self._next_id + 1
        kept = replace(request, prompt=(*request.prompt,))
        self._requests[request_id] = _RequestState(request_id, kept, Sampler(request.sampling))
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request now; the next round may use its slot. Nothing is done to one that is finished.

        Raises:
            KeyError: no request had this id.
        """
        self._check_id(request_id)
        if request_id in self._requests:
            self._emit(self._requests[request_id], None, FinishReason.CANCELLED)

    def step(self) -> list[StepOutput]:
        """One round; returns what was not handed out yet, at most one token a request of this round, oldest first."""
        self._round()
        outputs = [output for _, outputs in sorted(self._outputs.items()) for output in outputs]
        self._outputs.clear()
        return outputs

    def stream(self, request_id: int) -> Iterator[StepOutput]:
        """The outputs of a request as they come; asking for the next one runs rounds, for all requests.

        Streams may be read in any order, and beside each other: each keeps what the others' rounds made for it.

        Raises:
            KeyError: no request had this id.
        """
        self._check_id(request_id)
        return self._follow(request_id)

    def _follow(self, request_id: int) -> Iterator[StepOutput]:
        while request_id in self._requests or request_id in self._outputs:
            if request_id not in self._outputs:
                self._round()
            yield from self._outputs.pop(request_id, ())

    def _check_id(self, request_id: int) -> None:
        if not 0 <= request_id < self._next_id:
            raise KeyError(f"request_id={request_id} was given to no request: pass what add() returned")

    def _round(self) -> None:
        if decoding := self._rows(encoded=True):
            for (row, state), logits in zip(decoding.items(), self._runner.decode([*decoding]), strict=True):
                self._choose(state, row, logits)
        waiting = [state for state in self._requests.values() if state.row is None]
        for state, slot in zip(waiting, [*self._free_slots], strict=False):
            self._start(state, slot)
        if encoding := self._rows(encoded=False):
            rows = self._runner.batch([*encoding])
            for row, logits in zip(rows, self._runner.encode(rows), strict=True):
                self._after_piece(encoding[row], row, logits)

    def _rows(self, encoded: bool) -> dict[Row, _RequestState]:
        """The requests in slots whose prompts are encoded, or are not, in order of arrival."""
        return {
            state.row: state
            for state in self._requests.values()
            if state.row is not None and (state.row.cached >= len(state.request.prompt)) == encoded
        }

    def _start(self, state: _RequestState, slot: int) -> None:
        """Give a waiting request a slot, and restore there what is known of its prompt."""
        request = state.request
        row = Row(slot, [*request.prompt], placed=self._runner.place(request.prompt, request.media))
        if self.prefix_cache is not None:
            media = media_digests(self.model.config, request.prompt, request.media)
            state.chain = self.prefix_cache.chain(request.prompt, media)
            row.cached = self.prefix_cache.restore(slot, state.chain)
        self._free_slots.remove(slot)
        state.row = row

    def _after_piece(self, state: _RequestState, row: Row, logits: torch.Tensor) -> None:
        """Store a block that a piece completed, and choose the first token of a prompt that ended with it."""
        if self.prefix_cache is not None and state.chain is not None and row.cached % self.prefix_cache.block == 0:
            self.prefix_cache.store(row.slot, state.chain, row.cached)
        if row.cached == len(state.request.prompt):
            row.placed = None
            self._choose(state, row, logits)

    def _choose(self, state: _RequestState, row: Row, logits: torch.Tensor) -> None:
        """Give a request a token from its logits [V], and end it when it is complete."""
        token = state.sampler.sample(logits)
        row.tokens.append(token)
        reason = None
        if token in state.request.eos_token_ids:
            reason = FinishReason.EOS
        elif len(row.tokens) - len(state.request.prompt) == state.request.max_new_tokens:
            reason = FinishReason.LENGTH
        self._emit(state, token, reason)

    def _emit(self, state: _RequestState, token: int | None, reason: FinishReason | None) -> None:
        self._outputs.setdefault(state.id, []).append(StepOutput(state.id, token, reason))
        if reason is not None:
            del self._requests[state.id]
            if state.row is not None:
                self._free_slots.append(state.row.slot)


def limits_of(model: NeuronQwen35ForCausalLM) -> ModelLimits:
    """What a request to this model may hold."""
    config, neuron_config = model.config, model.neuron_config
    return ModelLimits(
        vocab_size=config.vocab_size,
        seq_len=neuron_config.seq_len,
        max_prompt_tokens=neuron_config.max_context_length if config.prefill_chunk_size is None else None,
        media_names=model.get_required_kwargs(),
        check_media=model.check_media if isinstance(model, NeuronQwen35VLForCausalLM) else None,
    )
