# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens accepted of drafts have the joint distribution of tokens sampled one by one, computed here outright.

The model is a table: logits for every beginning of at most three tokens of a vocabulary of three. Its joint
distribution over four tokens is a product of conditionals, each with the filters and penalties written out. 20,000
answers are compared with it by a chi-squared test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import pytest
import torch

from qwen35.serving.sampling import Sampler, SamplingOptions
from qwen35.serving.speculation import Acceptance, accept

V, TOKENS, DRAWS, K = 3, 4, 20_000, 3
PROMPT = [2, 0]
Prefix = tuple[int, ...]
Rule = Callable[[Sequence[int], torch.Tensor, Sampler], Iterable[int]]

ALL_FILTERS = SamplingOptions(
    temperature=0.8,
    top_p=0.97,
    min_p=0.02,
    top_k=3,
    repetition_penalty=1.3,
    presence_penalty=0.3,
    frequency_penalty=0.4,
)
OPTIONS = {
    "plain": SamplingOptions(temperature=1.0),
    "temperature and top-k": SamplingOptions(temperature=1.3, top_k=2),
    "top-p and min-p": SamplingOptions(temperature=1.0, top_p=0.7, min_p=0.2),
    "penalties": SamplingOptions(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5),
}


def table(seed: int = 0) -> dict[Prefix, torch.Tensor]:
    """Logits [V] after every beginning; after some of them one token is most likely by far."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for length in range(TOKENS) for p in itertools.product(range(V), repeat=length)]
    return {prefix: 1.5 * torch.randn(V, generator=generator) for prefix in prefixes}


def conditional(logits: torch.Tensor, prefix: Prefix, options: SamplingOptions) -> torch.Tensor:
    """p [V] of the next token, float64: penalties, temperature, top-k, top-p, min-p, as their papers say."""
    scores = logits.double().clone()
    for token in {*PROMPT, *prefix}:
        scores[token] *= options.repetition_penalty ** (-1 if scores[token] > 0 else 1)
    for token in prefix:
        scores[token] -= options.frequency_penalty
    for token in {*prefix}:
        scores[token] -= options.presence_penalty
    p = (scores / options.temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    if options.top_k:
        p[order[options.top_k :]] = 0
        p /= p.sum()
    kept, mass = [], 0.0
    for token in order:
        if mass < options.top_p:
            kept.append(token)
        mass += float(p[token])
    p[[token for token in order if token not in kept]] = 0
    p /= p.sum()
    p[p < options.min_p * p.max()] = 0
    return p / p.sum()


def joint(logits: dict[Prefix, torch.Tensor], options: SamplingOptions) -> dict[Prefix, float]:
    """The probability of each answer of TOKENS tokens that has one."""
    answers = {(): 1.0}
    for _ in range(TOKENS):
        answers = {
            (*prefix, token): probability * float(p[token])
            for prefix, probability in answers.items()
            for p in [conditional(logits[prefix], prefix, options)]
            for token in range(V)
            if p[token] > 0
        }
    return answers


def drafted(logits: dict[Prefix, torch.Tensor], prefix: Prefix, kind: str) -> list[int]:
    """Drafts of a head that is right (what the model finds most likely), wrong (least likely), or first right."""
    drafts: list[int] = []
    for i in range(min(K, TOKENS - 1 - len(prefix))):
        own = logits[(*prefix, *drafts)]
        right = kind == "right" or (kind == "first right" and i == 0)
        drafts.append(int(own.argmax() if right else own.argmin()))
    return drafts


class Remembering(Sampler):
    """Looks up what it has computed before: an answer is then some draws from a few distributions."""

    known: ClassVar[dict[Any, torch.Tensor]] = {}

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        key = (self._options, (*self._generated,), (*logits.tolist(),))
        if key not in self.known:
            self.known[key] = super().probabilities(logits)
        return self.known[key]


def answers_by(rule: Rule, logits: dict[Prefix, torch.Tensor], options: SamplingOptions, kind: str) -> list[Prefix]:
    torch.manual_seed(3)
    found = []
    drafts = {prefix: drafted(logits, prefix, kind) for prefix in logits}
    verified = {
        prefix: torch.stack([logits[(*prefix, *own[:i])] for i in range(len(own) + 1)])
        for prefix, own in drafts.items()
    }
    for _ in range(DRAWS):
        sampler, answer = Remembering(options, PROMPT), ()
        while len(answer) < TOKENS:
            own, rows = drafts[answer], verified[answer]
            answer = (*answer, *rule(own, rows, sampler))
        found.append(answer)
    return found


def right_rule(drafts: Sequence[int], rows: torch.Tensor, sampler: Sampler) -> Iterable[int]:
    return [token for token, _ in accept(drafts, rows, sampler.sample)]


def takes_likely_drafts(drafts: Sequence[int], rows: torch.Tensor, sampler: Sampler) -> Iterable[int]:
    """Wrong: it accepts a draft with its probability, and then draws a rejected one again from all tokens."""
    given = []
    for i, own in enumerate(rows):
        token = sampler.sample(own)
        if i < len(drafts) and token != drafts[i]:
            sampler._generated.pop()
            token = sampler.sample(own)
            given.append(token)
            break
        given.append(token)
    return given


def excess(found: list[Prefix], expected: dict[Prefix, float]) -> float:
    """How many standard deviations chi-squared is above its mean; answers that are rare are counted as one."""
    counts = {answer: 0 for answer in expected}
    for answer in found:
        counts[answer] += 1  # a KeyError is an answer that cannot be
    common = {answer: p for answer, p in expected.items() if p * DRAWS >= 5}
    cells = [(counts[answer], p) for answer, p in common.items()]
    cells.append((DRAWS - sum(n for n, _ in cells), 1 - sum(p for _, p in cells)))
    chi = sum((n - DRAWS * p) ** 2 / (DRAWS * p) for n, p in cells if p > 1e-9)
    freedom = len(cells) - 1
    return (chi - freedom) / (2 * freedom) ** 0.5


LARGEST_EXCESS = 4.0
"""A right rule is above it once in 10,000 seeds; the seed is fixed."""


def test_all_filters_with_right_drafts_give_the_exact_joint_distribution() -> None:
    logits = table()
    assert abs(sum(joint(logits, ALL_FILTERS).values()) - 1) < 1e-9
    assert excess(answers_by(right_rule, logits, ALL_FILTERS, "right"), joint(logits, ALL_FILTERS)) < LARGEST_EXCESS


def test_a_wrong_rule_is_found() -> None:
    logits = table()
    found = answers_by(takes_likely_drafts, logits, OPTIONS["plain"], "right")
    assert excess(found, joint(logits, OPTIONS["plain"])) > 10 * LARGEST_EXCESS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["right", "wrong", "first right"])
@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL_FILTERS], ids=[*OPTIONS, "all filters"])
def test_any_drafts_give_the_exact_joint_distribution(options: SamplingOptions, kind: str) -> None:
    for seed in range(3):
        logits = table(seed)
        assert excess(answers_by(right_rule, logits, options, kind), joint(logits, options)) < LARGEST_EXCESS


def test_a_seed_gives_the_tokens_it_gives_without_drafts() -> None:
    logits = table()
    for seed in range(50):
        options = SamplingOptions(temperature=1.0, frequency_penalty=0.5, seed=seed)
        plain, answer = Sampler(options, PROMPT), ()
        for _ in range(TOKENS):
            answer = (*answer, plain.sample(logits[answer]))
        sampler, other = Sampler(options, PROMPT), ()
        while len(other) < TOKENS:
            own = drafted(logits, other, "right")
            rows = torch.stack([logits[(*other, *own[:i])] for i in range(len(own) + 1)])
            other = (*other, *right_rule(own, rows, sampler))
        assert other == answer


def test_drafts_are_accepted_up_to_the_first_that_is_not_chosen() -> None:
    logits = torch.eye(4)[[2, 0, 3, 1]]

    def greedy(own: torch.Tensor) -> int:
        return int(own.argmax())

    def tokens(drafts: list[int]) -> list[int]:
        return [token for token, _ in accept(drafts, logits[: len(drafts) + 1], greedy)]

    assert tokens([]) == [2]
    assert tokens([2]) == [2, 0]
    assert tokens([2, 1, 3]) == [2, 0]
    assert tokens([2, 0, 3]) == [2, 0, 3, 1]
    assert tokens([3, 0, 3]) == [2]


def test_acceptance_is_counted_by_place() -> None:
    acceptance = Acceptance()
    assert acceptance.tokens_per_step == 0
    for drafts, given in (([7, 8, 9], [7, 8, 9, 1]), ([7, 8, 9], [7, 1]), ([7], [1]), ([], [1])):
        acceptance.add(drafts, given)
    assert acceptance == Acceptance(steps=4, tokens=8, drafted=[3, 2, 2], reached=[3, 2, 1], accepted=[2, 1, 1])
    assert acceptance.tokens_per_step == 2.0
    assert acceptance.rates == [2 / 3, 1 / 2, 1 / 2]
    assert acceptance.conditional_rates == [2 / 3, 1 / 2, 1.0]
    both = Acceptance()
    both.add([5], [5, 6])
    both.join(acceptance)
    assert both == Acceptance(steps=5, tokens=10, drafted=[4, 2, 2], reached=[4, 2, 1], accepted=[3, 1, 1])


def test_drafts_after_the_end_of_an_answer_are_not_counted() -> None:
    acceptance = Acceptance()
    acceptance.add([7, 8, 9], [7, 8], ended=True)  # 8 ends the answer
    acceptance.add([7, 8, 9], [7, 1], ended=True)  # 1 does
    assert acceptance == Acceptance(steps=2, tokens=4, drafted=[2, 2], reached=[2, 2], accepted=[2, 1])
