# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which drafts of a row are accepted, and how often they are.

Letters: V vocabulary, n drafts of a row.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch


def foretold(drafts: Sequence[int], place: int, token: int) -> bool:
    """Whether the draft at this place (from 0) is the token that was chosen there: then the next one may be chosen."""
    return [*drafts[place : place + 1]] == [token]


def accept(
    drafts: Sequence[int], logits: torch.Tensor, choose: Callable[[torch.Tensor], int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Choose the tokens that follow a row, as without drafts, for as long as the drafts foretold them.

    Each is chosen from its own logits just as a step of one token would, and a draft is accepted when it is what was
    chosen. A draft d is a point, so that this is the rule of speculative sampling (arXiv 2211.17192, section 2.3): d is
    accepted with its probability p(d), and else the token is drawn from p without d. Greedy rows, random numbers and
    penalties need no rule of their own: the tokens are, one by one, those of a row without drafts.

    Args:
        drafts: n token ids, the first of which guesses what follows the row.
        logits: [n + 1, V], the model's after the row, and after each draft.
        choose: gives the next token of the row from logits [V], and counts it as said.

    Yields:
        (token, logits [V] that it was chosen from), 1 to n + 1 times; a caller may stop before.
    """
    for i, own in enumerate(logits):
        token = choose(own)
        yield token, own
        if not foretold(drafts, i, token):
            return


@dataclass
class Acceptance:
    """How often drafts were accepted, by their place in a step.

    steps, tokens: of all rows, and given in these. drafted[i]: steps that verified an i-th draft (from 0). reached[i]:
    of these, those that accepted all drafts before it; accepted[i]: and it too.
    """

    steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, drafts: Sequence[int], given: Sequence[int], ended: bool = False) -> None:
        """Count a step of one row that gave these tokens; where they end it, drafts of what follows are not counted."""
        drafted = min(len(drafts), len(given)) if ended else len(drafts)
        accepted = sum(itertools.takewhile(bool, map(operator.eq, drafts, given)))
        self.steps += 1
        self.tokens += len(given)
        for counts in self._by_place():
            counts.extend([0] * (drafted - len(counts)))
        for i in range(drafted):
            self.drafted[i] += 1
            self.reached[i] += i <= accepted
            self.accepted[i] += i < accepted

    def __str__(self) -> str:
        def shares(rates: Sequence[float | None]) -> str:
            return ", ".join("-" if rate is None else f"{100 * rate:.0f}%" for rate in rates) or "none"

        return (
            f"{self.tokens_per_step:.2f} tokens a step; drafts accepted, by place: {shares(self.rates)} of all steps, "
            f"{shares(self.conditional_rates)} of those that accepted the drafts before"
        )

    def join(self, other: Acceptance) -> None:
        """Count what another counted, too."""
        self.steps += other.steps
        self.tokens += other.tokens
        for counts, more in zip(self._by_place(), other._by_place(), strict=True):
            counts.extend([0] * (len(more) - len(counts)))
            for i, count in enumerate(more):
                counts[i] += count

    def _by_place(self) -> tuple[list[int], list[int], list[int]]:
        return self.drafted, self.reached, self.accepted

    @property
    def tokens_per_step(self) -> float:
        """0 before the first step."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def rates(self) -> list[float]:
        """By place, the part of the steps with such a draft that accepted it, as vLLM reports it."""
        return [part / whole for part, whole in zip(self.accepted, self.drafted, strict=True)]

    @property
    def conditional_rates(self) -> list[float | None]:
        """By place, the part of those that had accepted all drafts before it; None where none had."""
        return [part / whole if whole else None for part, whole in zip(self.accepted, self.reached, strict=True)]
