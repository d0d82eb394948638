# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The calls of the model over rows of a batch: pieces of prompts, and the tokens that follow them.

A runner knows nothing of requests, queues or sampling: whoever schedules gives it rows and gets logits. Prompts are cut
at multiples of `prefill_chunk_size` from their own first token, so that the pieces of one do not depend on the rows
beside it, nor on how many of its tokens a scheduler gives at a time, as long as it gives whole chunks.

With `num_speculative_tokens` rows have drafts: `draft` after a prompt, then either `speculate` for a step of greedy
rows, one program; or `verify` and, once the caller has chosen what follows, `draft`. `decode` still takes one token,
and makes the drafts of its rows void.

Letters: B rows of a call, S tokens of a row in it, V vocabulary, k drafts of a row at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM, PlacedMedia
from ..phase import Phase, Submodel


class Placed(Protocol):
    """What images and videos add to a whole prompt: a `PlacedMedia` of one row, or what gives its columns."""

    @property
    def rope_deltas(self) -> torch.Tensor: ...

    def columns(self, start: int, width: int) -> PlacedMedia: ...


@dataclass(eq=False)  # a row is itself, whatever it holds
class Row:
    """A sequence in a slot of the caches.

    Args:
        slot: its row of the caches.
        tokens: the ids to be cached: the prompt, or as much of it as is to be encoded now, and what was sampled.
        cached: how many of them the slot has taken in; the runner counts on.
        placed: what images and videos add to the whole prompt, until it is encoded.
        drafts: guesses of the tokens after `tokens`, once the prompt is encoded; the runner makes them, and a caller
            may cut them short.
    """

    slot: int
    tokens: list[int]
    cached: int = 0
    placed: Placed | None = None
    drafts: list[int] = field(default_factory=list)
    rope_delta: int = field(init=False)
    """What is added to the index of a token after the prompt: its rotary position. 0 after a prompt of text."""

    def __post_init__(self) -> None:
        self.rope_delta = 0 if self.placed is None else int(self.placed.rope_deltas)

    @property
    def submodel(self) -> Submodel:
        """What encodes its next piece; a call has pieces of one submodel."""
        phase = Phase.CONTINUATION if self.cached else Phase.CONTEXT_ENCODING
        return Submodel(phase, with_media=self.placed is not None)


@dataclass(frozen=True)
class CallInputs:
    """Arguments of the application's `forward`.

    input_ids, position_ids [B, S] int64, 0 at padding; seq_ids [B] int64, the slots; attention_mask [B, cached tokens]
    int64 of rows that are cached, else [B, S]; rope_deltas [B] int64, `Row.rope_delta`; placed, the columns of S tokens
    of rows with media.
    """

    phase: Phase
    input_ids: torch.Tensor
    seq_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    rope_deltas: torch.Tensor
    placed: PlacedMedia | None = None


def next_piece(row: Row, chunk: int) -> list[int]:
    """The tokens from those cached to the next multiple of `chunk`, or to the last one there is."""
    return row.tokens[row.cached : (row.cached // chunk + 1) * chunk]


def encoding_inputs(rows: Sequence[Row], chunk: int) -> CallInputs:
    """A call that encodes the next piece of each row, right-padded to the longest.

    Raises:
        ValueError: the rows are for several submodels, or a row has no token left to encode.
    """
    pieces = [next_piece(row, chunk) for row in rows]
    if len({row.submodel for row in rows}) > 1 or not all(pieces):
        state = ", ".join(
            f"slot {row.slot}: {row.cached} of {len(row.tokens)} cached, {row.submodel.tag}" for row in rows
        )
        raise ValueError(f"rows cannot share a call ({state}): pass rows of one submodel, each with tokens to encode")
    phase = rows[0].submodel.phase
    cached, lengths = _column([row.cached for row in rows]), _column([len(piece) for piece in pieces])
    width = int(lengths.max())
    index = torch.arange(width)
    placed = [row.placed.columns(row.cached, width) for row in rows if row.placed is not None]
    return CallInputs(
        phase=phase,
        input_ids=torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces]),
        seq_ids=_slots(rows),
        attention_mask=_ones_before(cached) if phase.reads_cache else _ones_before(lengths, width),
        position_ids=torch.where(index < lengths, cached + index, 0),
        rope_deltas=_rope_deltas(rows),
        placed=PlacedMedia.stack(placed) if placed else None,
    )


def decoding_inputs(rows: Sequence[Row]) -> CallInputs:
    """A call that takes in the one token of each row that follows those cached."""
    cached = _column([row.cached for row in rows])
    return CallInputs(
        phase=Phase.TOKEN_GENERATION,
        input_ids=_column([row.tokens[row.cached] for row in rows]),
        seq_ids=_slots(rows),
        attention_mask=_ones_before(cached),
        position_ids=cached,
        rope_deltas=_rope_deltas(rows),
    )


@dataclass(frozen=True)
class RowOutputs:
    """What a call gives for its rows, in their order.

    Args:
        logits: [B, V] of any floating dtype, after the last token of each row; None when they were not read.
        tokens: [B], the most likely next ones, as the device chose them; None when it chooses none.
        prompt_logits: those after every token of each row's piece, [S, V] a row; empty unless they were compiled.
    """

    logits: torch.Tensor | None
    tokens: torch.Tensor | None = None
    prompt_logits: tuple[torch.Tensor, ...] = ()

    def all_logits(self) -> torch.Tensor:
        """The logits [B, V] of a call that read them."""
        assert self.logits is not None, "the call was not one for tokens alone"
        return self.logits


def drafting_inputs(phase: Phase, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> CallInputs:
    """A call of a program with drafts: of each row these tokens, which follow those cached."""
    cached, lengths = _column([row.cached for row in rows]), _column([len(own) for own in tokens])
    width = int(lengths.max())
    index = torch.arange(width)
    return CallInputs(
        phase=phase,
        input_ids=torch.tensor([[*own, *[0] * (width - len(own))] for own in tokens]),
        seq_ids=_slots(rows),
        attention_mask=_ones_before(cached),
        position_ids=torch.where(index < lengths, cached + index, 0),
        rope_deltas=_rope_deltas(rows),
    )


class ModelRunner:
    """Calls a loaded model; after a call its rows are cached so far, after an error they are as they were.

    Raises:
        ValueError: the configuration leaves no logits on the host, or queues steps whose rows nobody knows yet.
    """

    def __init__(self, model: NeuronQwen35ForCausalLM) -> None:
        neuron_config = model.neuron_config
        sampling = neuron_config.on_device_sampling_config
        if sampling is not None and not neuron_config.output_logits:
            raise ValueError(
                "on_device_sampling_config is set and output_logits=False: a device draws all rows from one generator, "
                "and tokens would depend on neighbours; set output_logits=True or on_device_sampling_config=None"
            )
        if neuron_config.async_mode:
            raise ValueError("async_mode=True: the host samples each token before the next step; set it to False")
        self.model = model
        self.chunk: int = model.config.prefill_chunk_size or neuron_config.max_context_length
        """Tokens of a prompt in one piece, at most."""
        self.device_is_greedy: bool = sampling is not None and (sampling.dynamic or not sampling.do_sample)
        """Whether the device chooses the most likely tokens: it is asked for top_k=1, or compiled without draws."""

    def place(self, prompt: Sequence[int], media: Mapping[str, torch.Tensor]) -> PlacedMedia | None:
        """Encode the images and videos of a whole prompt on the host; None when there are none.

        Raises:
            ValueError: media and placeholders do not match.
        """
        if not media:
            return None
        assert isinstance(self.model, NeuronQwen35VLForCausalLM), "the model takes media"
        return self.model.place(torch.tensor([[*prompt]]), **media)

    def batch(self, rows: Sequence[Row]) -> list[Row]:
        """The first row and the next ones that can share its call of `encode`, as many as were compiled for."""
        return [row for row in rows if row.submodel == rows[0].submodel][: self.model.neuron_config.ctx_batch_size]

    def encode(self, rows: Sequence[Row], tokens_only: bool = False) -> RowOutputs:
        """Encode the next piece of each row.

        Args:
            rows: as `batch` takes them together.
            tokens_only: leave the logits on the device, and read the tokens that it chose, if it chooses.

        Raises:
            ValueError: the rows are for several submodels, or a row has no token left to encode.
        """
        sizes = [len(next_piece(row, self.chunk)) for row in rows]
        return self._run(rows, encoding_inputs(rows, self.chunk), sizes, tokens_only)

    def decode(self, rows: Sequence[Row], tokens_only: bool = False) -> RowOutputs:
        """Take in the next token of each row; `tokens_only` as in `encode`."""
        for row in rows:
            row.drafts = []
        return self._run(rows, decoding_inputs(rows), [1] * len(rows), tokens_only)

    def speculate(self, rows: Sequence[Row]) -> list[list[int] | None]:
        """Take in the next token of each row and the drafts that are the model's own greedy choices; draft anew.

        Returns:
            Of each row the tokens that follow, one more than were drafted right, for the caller to append; None where
            the logits of one of them are nan or infinite, and nothing of the row may be used any further.
        """
        inputs = drafting_inputs(Phase.SPECULATION, rows, self._to_verify(rows))
        chosen, accepted, drafts = (output.tolist() for output in self._run_drafting(inputs))
        results: list[list[int] | None] = []
        for row, own, right, new in zip(rows, chosen, accepted, drafts, strict=True):
            if right < 0:
                results.append(None)
                continue
            row.cached += right + 1
            self._set_drafts(row, new, len(row.tokens) + right + 1)
            results.append(own[: right + 1])
        return results

    def verify(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Logits [S, V] of each row: of what follows its next token, and each of its drafts.

        Nothing is taken in. The caller appends to `row.tokens` the drafts that it accepts and the token after them,
        then calls `draft`.
        """
        tokens = self._to_verify(rows)
        (logits,) = self._run_drafting(drafting_inputs(Phase.VERIFICATION, rows, tokens))
        return [own[: len(verified)] for own, verified in zip(logits, tokens, strict=True)]

    def draft(self, rows: Sequence[Row]) -> list[list[int]]:
        """Take in what is not cached of each row but its last token, and draft what follows.

        That is what was accepted of the tokens that `verify` went through last, or nothing after a prompt.

        Returns:
            The drafts of each row, which it also has.
        """
        tokens = [row.tokens[row.cached :] for row in rows]
        (drafts,) = self._run_drafting(drafting_inputs(Phase.DRAFT, rows, tokens))
        for row, own, new in zip(rows, tokens, drafts.tolist(), strict=True):
            row.cached += len(own) - 1
            self._set_drafts(row, new, len(row.tokens))
        return [row.drafts for row in rows]

    def _to_verify(self, rows: Sequence[Row]) -> list[list[int]]:
        """The next token of each row and its drafts."""
        return [[*row.tokens[row.cached :], *row.drafts] for row in rows]

    def _set_drafts(self, row: Row, drafts: Sequence[int], tokens: int) -> None:
        """Keep as many as the slot has room for, after so many tokens."""
        row.drafts = [*drafts[: max(self.model.neuron_config.seq_len - tokens, 0)]]

    def _run_drafting(self, inputs: CallInputs) -> list[torch.Tensor]:
        media = {"rope_deltas": inputs.rope_deltas} if isinstance(self.model, NeuronQwen35VLForCausalLM) else {}
        return self.model.run_drafting(
            inputs.phase, inputs.input_ids, inputs.seq_ids, inputs.attention_mask, inputs.position_ids, **media
        )

    def copy_slot(self, source: int, target: int) -> None:
        """Let one slot hold what another holds."""
        layout = self.model.cache_layout
        for entries in self.model.cache_entries():
            for copied, view in zip(layout.slot(entries, source), layout.slot(entries, target), strict=True):
                for old, new in zip(copied, view, strict=True):
                    new.copy_(old)

    def clear_slot(self, slot: int) -> None:
        """Let a slot hold zeros; see the model's `clear_slot`."""
        self.model.clear_slot(slot)

    def _run(self, rows: Sequence[Row], inputs: CallInputs, sizes: Sequence[int], tokens_only: bool) -> RowOutputs:
        # A slot may have been restored, or have held another prompt: the model is told, and remembers nothing.
        with_media = isinstance(self.model, NeuronQwen35VLForCausalLM)
        media = {"placed": inputs.placed, "rope_deltas": inputs.rope_deltas} if with_media else {}
        outputs = self.model(
            inputs.input_ids,
            inputs.seq_ids,
            inputs.attention_mask,
            inputs.position_ids,
            phase=inputs.phase,
            tokens_only=tokens_only and self.device_is_greedy,
            **media,
        )
        for row, size in zip(rows, sizes, strict=True):
            row.cached += size
        tokens = outputs.tokens.view(len(rows)) if self.device_is_greedy else None
        if outputs.logits is None:
            return RowOutputs(None, tokens)
        if not self.model.config.output_prompt_logits or inputs.phase is Phase.TOKEN_GENERATION:
            return RowOutputs(outputs.logits[:, -1], tokens)
        pieces = tuple(logits[:size] for logits, size in zip(outputs.logits, sizes, strict=True))
        return RowOutputs(torch.stack([piece[-1] for piece in pieces]), tokens, pieces)


def _slots(rows: Sequence[Row]) -> torch.Tensor:
    """seq_ids [B]."""
    return torch.tensor([row.slot for row in rows])


def _rope_deltas(rows: Sequence[Row]) -> torch.Tensor:
    """[B] int64."""
    return torch.tensor([row.rope_delta for row in rows])


def _column(numbers: Sequence[int]) -> torch.Tensor:
    """[B, 1] int64."""
    return torch.tensor(numbers).unsqueeze(1)


def _ones_before(lengths: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """[B, width] int64, 1 before lengths [B, 1]; as wide as the longest when no width is given."""
    return (torch.arange(int(lengths.max()) if width is None else width) < lengths).long()
