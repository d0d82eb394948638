# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model's `forward` for a loop that takes a token of each row a step, such as transformers', with drafts behind it.

The loop chooses a token from the logits of a step and gives it to the next. When that is the draft which was verified,
its logits are there already; else the row's tokens are taken in, drafts made and verified. So the loop, with whatever
processors and random numbers it has, gives the tokens it gives without drafts, in fewer calls of the model.

Letters: B rows, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..phase import phase_of
from .runner import ModelRunner, Row
from .sampling import NOT_FINITE
from .speculation import Acceptance


@dataclass
class _Step:
    """A step of one row: its n drafts, and logits [n + 1, V] after these, or the tokens that a program chose."""

    drafts: list[int]
    logits: torch.Tensor | None = None
    chosen: list[int] = field(default_factory=list)


@dataclass(eq=False)  # a sequence is itself, whatever it holds
class _Sequence:
    """A row, its steps that the loop has not come to the end of, and the tokens it took of the first of them."""

    row: Row
    steps: deque[_Step] = field(default_factory=deque)
    taken: list[int] = field(default_factory=list)
    last: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Logits [V] that it was given last."""
    begun: bool = False
    """Whether tokens were drafted since its prompt."""
    ends: bool = False
    """Whether the loop ends it with the token that it chose last."""
    ended: bool = False


class DraftedForward:
    """Stands in for `NeuronQwen35ForCausalLM.forward` in `generate`, over one batch of rows after the other.

    Attributes:
        acceptance: of all drafts since `begin`, without those after the end of a row.
    """

    def __init__(self, model: NeuronQwen35ForCausalLM) -> None:
        self._model, self._runner = model, ModelRunner(model)
        self._sequences: list[_Sequence] = []
        self._takes_largest = False
        self.acceptance = Acceptance()
        self.__signature__ = inspect.signature(model.forward)  # transformers refuses arguments that it does not have

    def begin(self) -> None:
        """Before a new answer of all rows."""
        self.acceptance = Acceptance()

    def expect(self, takes_largest: bool) -> None:
        """Whether the loop takes the largest logit of every step and looks at no other: steps are then one program."""
        self._takes_largest = takes_largest

    def end(self, rows: Sequence[bool]) -> None:
        """Once the loop has chosen a token for each row: which of them it ended; it pads these from then on."""
        for sequence, ends in zip(self._sequences, rows, strict=True):
            sequence.ends = sequence.ends or ends

    def finish(self, tokens: Sequence[int]) -> None:
        """After a batch: the last token of each row, which no step gets; it counts for the drafts of the last step."""
        for sequence, token in zip(self._sequences, tokens, strict=True):
            self._take(sequence, token)
            self._end(sequence)

    def __call__(
        self,
        input_ids: torch.Tensor,
        seq_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's: prompts input_ids [B, S], then the token [B, 1] after each; `logits` [B, 1, V].

        Where the largest is taken, the logits of a step are 1 at the token that the program chose, and 0 elsewhere.
        """
        if phase_of(position_ids, attention_mask).encodes_prompts:
            return self._encode(input_ids, seq_ids, attention_mask, position_ids, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast  # takes seconds: only a call needs it

        for sequence, token in zip(self._sequences, input_ids[:, -1].tolist(), strict=True):
            self._take(sequence, token)
        running = [sequence for sequence in self._sequences if not sequence.ended]
        if any(not sequence.steps for sequence in running):
            self._run(running)
        for sequence in running:
            sequence.last = self._next_logits(sequence)
        return CausalLMOutputWithPast(logits=torch.stack([each.last for each in self._sequences]).unsqueeze(1))

    def _encode(
        self, input_ids: torch.Tensor, seq_ids: Any, mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = self._model(input_ids, seq_ids, mask, *args, **kwargs)
        real = torch.ones_like(input_ids) if mask is None else mask
        slots = range(len(input_ids)) if seq_ids is None else seq_ids.tolist()
        self._sequences = []
        for slot, ids, of_row, logits in zip(slots, input_ids, real, outputs.logits[:, -1], strict=True):
            tokens = ids[of_row.bool()].tolist()
            row = Row(slot, tokens, cached=len(tokens))
            if isinstance(self._model, NeuronQwen35VLForCausalLM):
                row.rope_delta = int(self._model.rope_deltas[slot])
            self._sequences.append(_Sequence(row, last=logits))
        return outputs

    def _take(self, sequence: _Sequence, token: int) -> None:
        """The loop has chosen a token for a row; where it is not the one that a program chose, the row is over."""
        if sequence.ended:
            return
        if not sequence.steps:  # after the prompt
            sequence.row.tokens.append(token)
            sequence.ended = sequence.ends
            return
        step = sequence.steps[0]
        if step.logits is not None:
            sequence.row.tokens.append(token)
        elif token != step.chosen[len(sequence.taken)]:
            self._end(sequence)
            return
        sequence.taken.append(token)
        if sequence.ends:
            self._end(sequence)
        elif len(sequence.taken) > len(step.drafts) or token != step.drafts[len(sequence.taken) - 1]:
            self._count(sequence)

    def _end(self, sequence: _Sequence) -> None:
        if sequence.taken:
            self._count(sequence, ended=True)
        sequence.ended = True

    def _count(self, sequence: _Sequence, ended: bool = False) -> None:
        """Count the first step of a row, which the loop is done with."""
        self.acceptance.add(sequence.steps.popleft().drafts, sequence.taken, ended)
        sequence.taken = []

    def _next_logits(self, sequence: _Sequence) -> torch.Tensor:
        step, place = sequence.steps[0], len(sequence.taken)
        if step.logits is not None:
            return step.logits[place]
        logits = torch.zeros(self._model.config.vocab_size)
        logits[step.chosen[place]] = 1
        return logits

    def _run(self, running: Sequence[_Sequence]) -> None:
        """A step of the rows that need one; where programs choose, of others too, which then need none for longer."""
        if self._takes_largest:
            k, seq_len = self._model.config.num_speculative_tokens, self._model.neuron_config.seq_len
            self._speculate(
                [
                    each
                    for each in running
                    if len(each.row.tokens) <= seq_len
                    and sum(len(step.chosen) for step in each.steps) - len(each.taken) <= k
                ]
            )
            return
        needing = [sequence for sequence in running if not sequence.steps]
        rows = [sequence.row for sequence in needing]
        self._runner.draft(rows)
        for sequence, logits in zip(needing, self._runner.verify(rows), strict=True):
            sequence.steps.append(_Step(sequence.row.drafts, logits))

    def _speculate(self, sequences: Sequence[_Sequence]) -> None:
        if fresh := [sequence for sequence in sequences if not sequence.begun]:
            self._runner.draft([sequence.row for sequence in fresh])
            for sequence in fresh:
                sequence.begun = True
        drafts = [sequence.row.drafts for sequence in sequences]
        results = self._runner.speculate([sequence.row for sequence in sequences])
        for sequence, own, chosen in zip(sequences, drafts, results, strict=True):
            if chosen is None:
                raise ValueError(f"row {self._sequences.index(sequence)}: some {NOT_FINITE}")
            sequence.row.tokens += chosen
            sequence.steps.append(_Step(own, chosen=chosen))
