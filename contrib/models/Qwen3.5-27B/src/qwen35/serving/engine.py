# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Many requests over one loaded model: rows enter and leave at any step, prompts are encoded between decoding steps.

`Qwen35Engine` is what a serving worker drives: it has no thread, no clock and no network. Each round (`step`)

1. decodes one token of every row whose prompt is encoded, in one call;
2. gives free lines of the cache to waiting requests, first come, first served;
3. encodes, in one call, the next piece of the oldest prompt that is not encoded yet, and of the next oldest that can
   share the call: at most `ctx_batch_size` rows, whose pieces all begin a prompt or all go on, with images or without,
   because these are different submodels.

So a long prompt delays the next token of the others by one piece of `prefill_chunk_size` tokens, never by the whole
prompt, and every prompt moves up until it is the oldest. Without `prefill_chunk_size` a piece is a whole prompt.

What a request gets does not depend on its neighbours: its prompt is cut at multiples of `prefill_chunk_size` from its
own first token, every call has the compiled number of rows, whoever is in it, and its random numbers come from a
generator of its own. With one bucket a submodel, its logits on the same line of the cache are the same to the last bit;
other lines and other buckets may sum in another order.

Letters: B rows of a call, S tokens of a row in it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM, PlacedMedia
from .generation import SamplingOptions
from .prefix_cache import Chain, PrefixCache, media_digests


class FinishReason(str, Enum):
    """Why a request gets no more tokens."""

    EOS = "eos"  # its last token is one of its eos_token_ids
    LENGTH = "length"  # it has max_new_tokens
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Args:
        prompt: token ids.
        max_new_tokens: tokens to give at most.
        sampling: its seed makes the tokens repeatable; without one it is drawn from PyTorch's default generator.
        eos_token_ids: tokens that end the answer; the one that did is its last.
        media: pixels and grids of the images and videos, in the order of their placeholders, under the names that the
            checkpoint's processor gives them.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    eos_token_ids: Collection[int] = ()
    media: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOutput:
    """The next token of a request, and why it was the last; a cancelled request ends without one."""

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None


class _Row:
    """A request on its way: waiting (no line), being encoded, or decoding."""

    def __init__(self, request_id: int, request: Request) -> None:
        self.id, self.request, self.prompt = request_id, request, [*request.prompt]
        self.line: int | None = None
        self.cached = 0  # tokens that the line's state and keys have taken in
        self.tokens: list[int] = []
        self.placed: PlacedMedia | None = None
        self.chain: Chain | None = None
        sampling = request.sampling
        seed = int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed
        self.generator = torch.Generator().manual_seed(seed)
        # In transformers' order: what is cut off by top_p depends on temperature and top_k.
        self.warpers = LogitsProcessorList()
        if sampling.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self.warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self.warpers.append(TopPLogitsWarper(sampling.top_p))

    @property
    def encoded(self) -> bool:
        return self.cached >= len(self.prompt)

    @property
    def kind(self) -> tuple[bool, bool]:
        """Rows whose next pieces are of one kind can share a call."""
        return self.cached > 0, self.placed is not None

    def sample(self, logits: torch.Tensor) -> int:
        """A token from logits [1, V]."""
        scores = self.warpers(torch.empty(1, 0, dtype=torch.long), logits)
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))


class Qwen35Engine:
    """Continuous batching over a loaded model, which it has for itself; see the module's docstring for the policy.

    With a `prefix_cache` of the same model, a prompt goes on from the last boundary it shares with an earlier one; a
    request gets the same tokens.

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
        self._rows: dict[int, _Row] = {}  # by id, in order of arrival
        self._free = [*range(neuron_config.kv_cache_batch_size)]
        self._outputs: dict[int, list[StepOutput]] = {}  # not handed out yet
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is not finished, or an output was not handed out."""
        return bool(self._rows or self._outputs)

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            ValueError: it cannot run; naming every field, value and remedy, before anything has run.
        """
        problems = [*self._problems(request)]
        if problems:
            raise ValueError("this request cannot run: " + "; ".join(problems))
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._rows[request_id] = _Row(request_id, request)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request now; the next round may use its line. Nothing is done to one that is finished.

        Raises:
            KeyError: no request had this id.
        """
        self._check_id(request_id)
        if request_id in self._rows:
            self._emit(self._rows[request_id], None, FinishReason.CANCELLED)

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
        while request_id in self._rows or request_id in self._outputs:
            if request_id not in self._outputs:
                self._round()
            yield from self._outputs.pop(request_id, ())

    def _check_id(self, request_id: int) -> None:
        if not 0 <= request_id < self._next_id:
            raise KeyError(f"request_id={request_id} was given to no request: pass what add() returned")

    def _problems(self, request: Request) -> Iterator[str]:
        """What keeps a request from running, one line each."""
        neuron_config, vocab = self.model.neuron_config, self.model.config.vocab_size
        length, new = len(request.prompt), request.max_new_tokens
        if length == 0:
            yield "prompt is empty: give at least one token to continue"
        if bad := [token for token in (*request.prompt, *request.eos_token_ids) if not 0 <= token < vocab]:
            yield f"token {bad[0]} of prompt or eos_token_ids is not in 0..{vocab - 1}: use the checkpoint's tokenizer"
        if new < 1:
            yield f"max_new_tokens={new}: must be at least 1"
        if length + new > neuron_config.seq_len:
            yield (
                f"a prompt of {length} tokens and max_new_tokens={new} exceed seq_len={neuron_config.seq_len}: shorten "
                "the prompt, lower max_new_tokens or raise seq_len"
            )
        longest = neuron_config.max_context_length
        if self.model.config.prefill_chunk_size is None and length > longest:
            yield (
                f"a prompt of {length} tokens exceeds max_context_length={longest}: raise it, or set prefill_chunk_size"
            )
        if unknown := sorted(request.media.keys() - {*self.model.get_required_kwargs()}):
            yield (
                f"media has {', '.join(unknown)}, which {type(self.model).__name__} does not take: pass "
                f"{', '.join(self.model.get_required_kwargs()) or 'none, or load NeuronQwen35VLForCausalLM'}"
            )
        elif request.media and length:
            try:
                self._vision_model.check_media(torch.tensor([[*request.prompt]]), **request.media)
            except ValueError as error:
                yield f"media: {error}"

    @property
    def _vision_model(self) -> NeuronQwen35VLForCausalLM:
        assert isinstance(self.model, NeuronQwen35VLForCausalLM), "the model takes images"
        return self.model

    def _round(self) -> None:
        if decoding := [row for row in self._rows.values() if row.encoded]:
            self._decode(decoding)
        waiting = [row for row in self._rows.values() if row.line is None]
        for row, line in zip(waiting, [*self._free], strict=False):
            if row.request.media:
                row.placed = self._vision_model.place(torch.tensor([row.prompt]), **row.request.media)
            row.line = line
            self._free.remove(line)
            if self.prefix_cache is not None:
                media = media_digests(self.model.config, row.prompt, row.request.media)
                row.chain = self.prefix_cache.chain(row.prompt, media)
                row.cached = self.prefix_cache.take_up(line, row.chain)
        if encoding := [row for row in self._rows.values() if row.line is not None and not row.encoded]:
            together = [row for row in encoding if row.kind == encoding[0].kind]
            self._encode(together[: self.model.neuron_config.ctx_batch_size])

    def _decode(self, rows: list[_Row]) -> None:
        """The next token of each row."""
        cached = torch.tensor([[row.cached] for row in rows])
        ids = torch.tensor([[row.tokens[-1]] for row in rows])
        logits = self.model(ids, _lines(rows), _mask(cached, int(cached.max())), cached).logits[:, -1]
        for row in rows:
            row.cached += 1
        self._choose(rows, logits)

    def _encode(self, rows: list[_Row]) -> None:
        """The next piece of each row's prompt; the first new token of a prompt that ends with it."""
        chunk = self.model.config.prefill_chunk_size or self.model.neuron_config.max_context_length
        pieces = [row.prompt[row.cached : row.cached + chunk] for row in rows]
        cached = torch.tensor([[row.cached] for row in rows])
        lengths = torch.tensor([[len(piece)] for piece in pieces])
        # A later piece of a single token would be a decoding step for the model, and beside a longer one not.
        width = max(int(lengths.max()), 2)
        ids = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces])
        index = torch.arange(width)
        positions = torch.where(index < lengths, cached + index, 0)
        placed = [row.placed.columns(row.cached, width) for row in rows if row.placed is not None]
        mask = _mask(cached, int(cached.max())) if rows[0].cached else _mask(lengths, width)
        media = {"placed": PlacedMedia.stack(placed)} if placed else {}
        logits = self.model(ids, _lines(rows), mask, positions, **media).logits[:, -1]
        for row, piece in zip(rows, pieces, strict=True):
            row.cached += len(piece)
            if self.prefix_cache is not None and row.cached % self.prefix_cache.block == 0:
                assert row.line is not None and row.chain is not None, "it was encoded there"
                self.prefix_cache.put_down(row.line, row.chain, row.cached)
        ended = [i for i, row in enumerate(rows) if row.encoded]
        for i in ended:
            rows[i].placed = None
        self._choose([rows[i] for i in ended], logits[ended])

    def _choose(self, rows: list[_Row], logits: torch.Tensor) -> None:
        """Give each row a token from its logits [B, V], and end those that are complete."""
        greedy = logits.argmax(dim=-1).tolist()
        for i, row in enumerate(rows):
            token = row.sample(logits[i : i + 1].float()) if row.warpers else greedy[i]
            row.tokens.append(token)
            reason = None
            if token in row.request.eos_token_ids:
                reason = FinishReason.EOS
            elif len(row.tokens) == row.request.max_new_tokens:
                reason = FinishReason.LENGTH
            self._emit(row, token, reason)

    def _emit(self, row: _Row, token: int | None, reason: FinishReason | None) -> None:
        self._outputs.setdefault(row.id, []).append(StepOutput(row.id, token, reason))
        if reason is not None:
            del self._rows[row.id]
            if row.line is not None:
                self._free.append(row.line)


def _lines(rows: list[_Row]) -> torch.Tensor:
    """seq_ids [B]."""
    return torch.tensor([row.line for row in rows])


def _mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """[B, width] int64, 1 before lengths [B, 1]."""
    return (torch.arange(width) < lengths).long()
