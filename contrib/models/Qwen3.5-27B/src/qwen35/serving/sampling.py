# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from logits: the options, and the sampler of one row.

Letters: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; temperature 0 is greedy, and top_p and top_k then do not matter.

    Args:
        temperature: divides the logits.
        top_p: only the most likely tokens whose probabilities sum up to it (arXiv 1904.09751); 1 keeps all.
        top_k: only so many of the most likely tokens; 0 keeps all.
        seed: makes the tokens repeatable.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or positive")


GREEDY = SamplingOptions()
"""The most likely token, always."""


class Sampler:
    """Chooses the tokens of one row, with random numbers of its own: neighbours and their number do not matter.

    Without a seed in its options one is drawn from PyTorch's default generator.
    """

    def __init__(self, options: SamplingOptions) -> None:
        seed = int(torch.randint(2**63 - 1, ())) if options.seed is None else options.seed
        self._generator = torch.Generator().manual_seed(seed)
        self._warpers = _warpers(options) if options.temperature > 0 else None

    def sample(self, logits: torch.Tensor) -> int:
        """A token from logits [V] of any floating dtype."""
        if self._warpers is None:
            return int(logits.argmax())
        scores = self._warpers(torch.empty(1, 0, dtype=torch.long), logits.float().unsqueeze(0))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))


def _warpers(options: SamplingOptions) -> Any:
    """transformers' logits processors, in its order: what top_p cuts off depends on temperature and top_k."""
    # Here, because transformers takes seconds to import, and a request that is only described does not need it.
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    return warpers
