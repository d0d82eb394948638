# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Many requests over one loaded model: rows enter and leave at any step, prompts are encoded between decoding steps.

`Qwen35Engine` is what a serving worker drives: it has no thread, no clock and no network. Each round (`step`)

1. decodes every row whose prompt is encoded: one token of each, in one call; or, where the model drafts tokens, one to
   k + 1 of each, in one call when all rows take the most likely token, else in two (`modeling_qwen35_mtp`);
2. gives free slots of the cache to waiting requests, first come, first served;
3. encodes, in one call, the next piece of the oldest prompt that is not encoded yet, and of the next oldest that can
   share the call: at most `ctx_batch_size` rows, whose pieces all begin a prompt or all continue one, with images or
   without, because these are different submodels.

So a long prompt delays the next token of the others by one piece of `prefill_chunk_size` tokens, never by the whole
prompt, and every prompt moves up until it is the oldest. Without `prefill_chunk_size` a piece is a whole prompt.

A request that fails ends alone: with `FinishReason.ERROR` and what failed. When its own work on the host fails, its
media, its sampling, restoring or storing its prefix, no other notices; when a call of the model fails, so do the rows
in it, because nobody knows what their slots hold then, and it is not tried again. Logits that are no finite numbers are
a failure of their row. Nothing of a failed row is kept for others: no block of the call that failed is stored, and its
slot is cleared before the next request gets it.

The n continuations of a request share its media, and its prompt: the first encodes it, and what its slot then holds is
copied to those that have a slot by then. Others encode it themselves when their turn comes.

What a request gets does not depend on its neighbours: its prompt is cut at multiples of `prefill_chunk_size` from its
own first token, every call has the compiled number of rows, whoever is in it, and its random numbers come from a
generator of its own. With one bucket a submodel, its logits in the same slot of the cache are the same to the last bit;
other slots and other buckets may sum in another order. Drafts change none of its tokens (`speculation`), and they are
its own too.

Letters: V vocabulary, k drafts of a row at most, n drafts of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ..error_text import shown
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM, PlacedMedia
from .prefix_cache import Chain, PrefixCache, media_digests
from .request import FinishReason, ModelLimits, Request, StepOutput, checked_request
from .runner import ModelRunner, Row
from .sampling import NOT_FINITE, Sampler, TokenLogprobs, logprobs_of, require_finite, whole_number
from .speculation import Acceptance, accept
from .text_stream import StopStrings

_Result = TypeVar("_Result")

LONGEST_ERROR = 500
"""Characters of a failure that a request is told."""


@dataclass
class _Prompt:
    """What the continuations of a request share: its media on the host, and its prompt as the prefix cache knows it."""

    request: Request
    is_prepared: bool = False
    placed: PlacedMedia | None = None
    chain: Chain | None = None


@dataclass(eq=False)  # a sequence is itself, whatever it holds
class _Sequence:
    """A continuation that is not finished: waiting while it has no row, then being encoded, then decoding."""

    id: int
    """Of its request."""
    index: int
    prompt: _Prompt
    sampler: Sampler
    text: StopStrings | None = None
    """Of a request with stop strings."""
    row: Row | None = None

    @property
    def request(self) -> Request:
        return self.prompt.request

    @property
    def slot_row(self) -> Row:
        """Its row, which it has."""
        assert self.row is not None, "it has a slot"
        return self.row

    @property
    def is_encoded(self) -> bool:
        """Whether it has a slot that holds its whole prompt."""
        return self.row is not None and self.row.cached >= len(self.request.prompt)

    @property
    def missing(self) -> int:
        """How many tokens it may get yet."""
        request = self.request
        return len(request.prompt) + request.max_new_tokens - len(self.slot_row.tokens)

    @property
    def is_plain(self) -> bool:
        """Whether it gets the most likely tokens and nothing of their logits, so that a program may choose them."""
        sampling = self.request.sampling
        return sampling.is_greedy and not sampling.has_penalties and self.request.logprobs is None


class Qwen35Engine:
    """Continuous batching over a loaded model, which it has for itself; see the module's docstring for the policy.

    With a `prefix_cache` of the same model, a prompt is continued from the last boundary it shares with an earlier one;
    a request gets the same tokens.

    Outputs are handed out once: by `step` to whoever drives the engine, or by `stream`. Neither raises what fails for a
    request; an interrupt (KeyboardInterrupt, SystemExit) passes through them, and ends the requests whose step it cut
    off as a failure does. Under tensor parallelism on a CPU every rank runs the same calls, with a seed in each request
    that samples.

    Args:
        model: loaded.
        prefix_cache: of this model.
        tokenizer: for requests with stop strings.

    Raises:
        ValueError: the configuration leaves no logits to sample from, or the prefix cache is another model's.
    """

    def __init__(
        self, model: NeuronQwen35ForCausalLM, prefix_cache: PrefixCache | None = None, tokenizer: Any = None
    ) -> None:
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
        self.model, self.prefix_cache, self.tokenizer = model, prefix_cache, tokenizer
        self._runner = ModelRunner(model)
        self._limits = replace(limits_of(model), takes_stop=tokenizer is not None)
        self._slots = neuron_config.kv_cache_batch_size
        self._drafts_tokens = model.config.num_speculative_tokens > 0
        self.acceptance = Acceptance()
        """Of all drafts so far, without those after the end of an answer."""
        self._sequences: list[_Sequence] = []  # in order of arrival
        self._dirty_slots = {*range(self._slots)}  # of rows that failed, here or under whoever ran the model before
        self._outputs: dict[int, list[StepOutput]] = {}  # not handed out yet
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is not finished, or an output was not handed out."""
        return bool(self._sequences or self._outputs)

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            ValueError: it cannot run; naming every field, value and remedy, before anything has run.
        """
        prompt = _Prompt(checked_request(request, self._limits))
        request = prompt.request
        samplers = [Sampler(request.sampling.of_continuation(i), request.prompt) for i in range(request.n)]
        texts = [StopStrings(self.tokenizer, request.stop) if request.stop else None for _ in samplers]
        request_id, self._next_id = self._next_id, self._next_id + 1
        pairs = zip(samplers, texts, strict=True)
        self._sequences += [_Sequence(request_id, i, prompt, *pair) for i, pair in enumerate(pairs)]
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request now, with all its continuations; the next round may use its slots.

        Nothing is done to one that is finished.

        Raises:
            KeyError: no request had this id.
        """
        self._check_id(request_id)
        unfinished = self._unfinished(request_id)
        with _EndsOnFailure(self, unfinished):
            for sequence in unfinished:
                self._emit(sequence, StepOutput(request_id, None, FinishReason.CANCELLED, sequence.index))

    def step(self) -> list[StepOutput]:
        """One round; returns what was not handed out yet, oldest first.

        A round makes at most one token a continuation; where tokens are drafted, at most one more than drafts.
        """
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
        while request_id in self._outputs or self._unfinished(request_id):
            if request_id not in self._outputs:
                self._round()
            yield from self._outputs.pop(request_id, ())

    def _check_id(self, request_id: int) -> None:
        number = whole_number(request_id)
        if number is None or not 0 <= number < self._next_id:
            raise KeyError(f"request_id={shown(request_id)} was given to no request: pass what add() returned")

    def _unfinished(self, request_id: int) -> list[_Sequence]:
        return [sequence for sequence in self._sequences if sequence.id == request_id]

    def _round(self) -> None:
        if decoding := [sequence for sequence in self._sequences if sequence.is_encoded]:
            if self._drafts_tokens:
                self._speculate(decoding)
            else:
                self._call(self._runner.decode, decoding, self._choose)
        self._start_waiting()
        if encoding := self._encoding():
            rows = self._runner.batch([*encoding])
            self._call(self._runner.encode, [encoding[row] for row in rows], self._after_piece)
            if self._drafts_tokens:
                self._draft([each for each in self._sequences if each.is_encoded and each not in decoding])

    def _speculate(self, sequences: Sequence[_Sequence]) -> None:
        """Decode with drafts: in one program when it may choose all tokens, else the host chooses between two."""
        for sequence in sequences:
            row = sequence.slot_row
            row.drafts = row.drafts[: sequence.missing - 1]
        if all(sequence.is_plain for sequence in sequences):
            drafts = {sequence.slot_row.slot: sequence.slot_row.drafts for sequence in sequences}
            self._call(
                self._runner.speculate,
                sequences,
                lambda sequence, tokens: self._take_chosen(sequence, drafts[sequence.slot_row.slot], tokens),
            )
            return
        self._call(self._runner.verify, sequences, self._accept)
        self._draft([sequence for sequence in sequences if sequence in self._sequences])

    def _draft(self, sequences: Sequence[_Sequence]) -> None:
        """Take in what these have accepted, and draft what follows."""
        if sequences:
            self._call(self._runner.draft, sequences, lambda sequence, drafts: None)

    def _take_chosen(self, sequence: _Sequence, drafts: Sequence[int], tokens: Sequence[int] | None) -> None:
        """Give a sequence what a program has chosen for it; None where its logits were no numbers."""
        if tokens is None:
            raise ValueError(f"some {NOT_FINITE}")
        given = []
        for token in tokens:
            given.append(token)
            self._take(sequence, token)
            if sequence not in self._sequences:
                break
        self.acceptance.add(drafts, given, ended=sequence not in self._sequences)

    def _accept(self, sequence: _Sequence, logits: torch.Tensor) -> None:
        """Give a sequence tokens chosen from the logits [n + 1, V] of n drafts, as long as these foretold them."""
        drafts, given = sequence.slot_row.drafts, []
        for token, own in accept(drafts, logits, lambda own: self._sample(sequence, own)):
            given.append(token)
            self._take(sequence, token, own)
            if sequence not in self._sequences:
                break
        self.acceptance.add(drafts, given, ended=sequence not in self._sequences)

    def _encoding(self) -> dict[Row, _Sequence]:
        """Who encodes, of the continuations of each request the first that has a slot and is not encoded."""
        first: dict[int, _Sequence] = {}
        for sequence in self._sequences:
            if sequence.row is not None and not sequence.is_encoded:
                first.setdefault(sequence.id, sequence)
        return {sequence.slot_row: sequence for sequence in first.values()}

    def _call(
        self,
        run: Callable[[Sequence[Row]], Iterable[_Result]],
        sequences: Sequence[_Sequence],
        after: Callable[[_Sequence, _Result], None],
    ) -> None:
        """Run the rows of some sequences, and do `after` with what that gives for each."""
        unfinished = [*sequences]
        with _EndsOnFailure(self, unfinished):
            results = run([sequence.slot_row for sequence in sequences])
            for sequence, result in zip(sequences, results, strict=True):
                with _EndsOnFailure(self, [sequence]):
                    after(sequence, result)
                unfinished.remove(sequence)  # last, so that an interrupt before it leaves no row half done

    def _fail(self, sequence: _Sequence, message: str) -> None:
        if sequence not in self._sequences:
            return
        if sequence.row is not None:
            self._dirty_slots.add(sequence.row.slot)
        self._emit(sequence, StepOutput(sequence.id, None, FinishReason.ERROR, sequence.index, error=message))

    def _start_waiting(self) -> None:
        used = {sequence.row.slot for sequence in self._sequences if sequence.row is not None}
        free = [slot for slot in range(self._slots) if slot not in used]
        for sequence in [sequence for sequence in self._sequences if sequence.row is None]:
            if not free:
                return
            with _EndsOnFailure(self, [sequence]):
                self._start(sequence, free[0])
            if sequence.row is not None:
                del free[0]

    def _start(self, sequence: _Sequence, slot: int) -> None:
        """Give a waiting sequence a slot, and restore there what is known of its prompt."""
        prompt = sequence.prompt
        self._prepare(prompt)
        row = sequence.row = Row(slot, [*prompt.request.prompt], placed=prompt.placed)
        if slot in self._dirty_slots:
            self._runner.clear_slot(slot)
            self._dirty_slots.remove(slot)
        if self.prefix_cache is not None and prompt.chain is not None:
            row.cached = self.prefix_cache.restore(slot, prompt.chain)

    def _prepare(self, prompt: _Prompt) -> None:
        """Encode the media of a prompt on the host, once, and hash it for the prefix cache."""
        if prompt.is_prepared:
            return
        request = prompt.request
        prompt.placed = self._runner.place(request.prompt, request.media)
        if self.prefix_cache is not None:
            media = media_digests(self.model.config, request.prompt, request.media)
            prompt.chain = self.prefix_cache.chain(request.prompt, media)
        prompt.is_prepared = True

    def _after_piece(self, sequence: _Sequence, logits: torch.Tensor) -> None:
        """Store a block that a piece completed, and choose the first tokens of a prompt that ended with it."""
        require_finite(logits)
        row, chain = sequence.slot_row, sequence.prompt.chain
        if self.prefix_cache is not None and chain is not None and row.cached % self.prefix_cache.block == 0:
            self.prefix_cache.store(row.slot, chain, row.cached)
        if not sequence.is_encoded:
            return
        followers = [other for other in self._unfinished(sequence.id) if other.row is not None and not other.is_encoded]
        for each in (sequence, *followers):
            with _EndsOnFailure(self, [each]):
                if each is not sequence:
                    self._runner.copy_slot(row.slot, each.slot_row.slot)
                    each.slot_row.cached = row.cached
                each.slot_row.placed = None
                self._choose(each, logits)

    def _choose(self, sequence: _Sequence, logits: torch.Tensor) -> None:
        """Give a sequence a token from its logits [V]."""
        self._take(sequence, self._sample(sequence, logits), logits)

    def _sample(self, sequence: _Sequence, logits: torch.Tensor) -> int:
        require_finite(logits)
        return sequence.sampler.sample(logits)

    def _take(self, sequence: _Sequence, token: int, logits: torch.Tensor | None = None) -> None:
        """Give a sequence a token, chosen from logits [V] where it may want to know, and end it when it is complete."""
        request, row = sequence.request, sequence.slot_row
        logprobs: TokenLogprobs | None = None
        if request.logprobs is not None and logits is not None:
            logprobs = logprobs_of(logits, token, request.logprobs)
        row.tokens.append(token)
        text, stops = None, sequence.text
        if stops is not None:
            text = stops.push(token)
        reason = None
        if stops is not None and stops.stopped:
            reason = FinishReason.STOP
        elif token in request.eos_token_ids:
            reason = FinishReason.EOS
        elif len(row.tokens) - len(request.prompt) == request.max_new_tokens:
            reason = FinishReason.LENGTH
        if stops is not None and text is not None and reason is not None:
            text += stops.flush()
        self._emit(sequence, StepOutput(sequence.id, token, reason, sequence.index, logprobs, text=text))

    def _emit(self, sequence: _Sequence, output: StepOutput) -> None:
        outputs = self._outputs.setdefault(sequence.id, [])
        if output.finish_reason is None:
            outputs.append(output)
            return
        # An interrupt may have come here before, between the two steps: then only the second is left to do.
        if not any(earlier.index == sequence.index and earlier.finish_reason is not None for earlier in outputs):
            outputs.append(output)
        self._sequences.remove(sequence)


class _EndsOnFailure:
    """End these sequences of an engine, as many as there are by then, when what is done for them fails.

    A class, not a generator: in the frames that `contextlib` puts between, an interrupt would end nothing.
    """

    def __init__(self, engine: Qwen35Engine, sequences: Collection[_Sequence]) -> None:
        self._engine, self._sequences = engine, sequences

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            return False
        message = " ".join(f"{type(error).__name__}: {error}".split())
        message = message if len(message) <= LONGEST_ERROR else f"{message[:LONGEST_ERROR]}..."
        for sequence in [*self._sequences]:
            self._engine._fail(sequence, message)
        return isinstance(error, Exception)  # an interrupt, which too may leave a step half done, passes through


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
