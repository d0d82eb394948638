# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from logits: the options, penalties, the sampler of one row, and log-probabilities.

The order is transformers': repetition penalty, further penalties, temperature, top-k, top-p, min-p.

Letters: V vocabulary, G generated tokens.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..json_files import read_object

MIN_TEMPERATURE = 1e-5
"""Below it the most likely token is taken, as in vLLM (`_SAMPLING_EPS`): float32 logits divided by less overflow."""

MAX_CONTINUATIONS = 1024
"""Of one prompt."""

_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "must be 0 (greedy) or positive"),
    "top_p": (lambda value: 0 < value <= 1, "must be in (0, 1]"),
    "min_p": (lambda value: 0 <= value <= 1, "must be in [0, 1]"),
    # Beyond these a penalised logit may leave float32's range.
    "repetition_penalty": (lambda value: 0.01 <= value <= 100, "must be in [0.01, 100]; 1 is off"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "must be in [-2, 2]; 0 is off"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "must be in [-2, 2]; 0 is off"),
}

_WHOLE_NUMBERS = {
    "top_k": (range(2**63), "must be 0 (off) or positive, a whole number"),
    # What `torch.Generator.manual_seed` takes.
    "seed": (range(-(2**63), 2**64), "must be None or a whole number of -2**63..2**64 - 1"),
}


def whole_number(value: Any) -> int | None:
    """An int, NumPy's too; None when it is none. True is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return operator.index(value)


def _finite(value: Any) -> float | None:
    """A finite real number as a float; None when it is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; temperature 0 is greedy, and top_p, top_k and min_p then do not matter.

    Args:
        temperature: divides the logits; below `MIN_TEMPERATURE` it counts as 0.
        top_p: only the most likely tokens whose probabilities sum up to it (arXiv 1904.09751); 1 keeps all.
        top_k: only so many of the most likely tokens; 0 keeps all.
        seed: makes the tokens repeatable.
        min_p: only tokens whose probability is at least this part of the largest (arXiv 2407.01082); 0 keeps all.
        repetition_penalty: divides positive logits of tokens of the prompt and the answer, and multiplies negative ones
            (arXiv 1909.05858); 1 is off.
        presence_penalty: taken from the logits of tokens of the answer; 0 is off.
        frequency_penalty: taken from them once for each time that the answer has the token; 0 is off.

    Numbers of other types, NumPy's for example, are converted.

    Raises:
        ValueError: a value is no finite number, or out of its range; all are named.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        for name, (in_range, remedy) in _NUMBERS.items():
            value = _finite(getattr(self, name))
            if value is None or not in_range(value):
                problems.append(f"{name}={reprlib.repr(getattr(self, name))}: {remedy}")
            else:
                object.__setattr__(self, name, value)
        for name, (allowed, remedy) in _WHOLE_NUMBERS.items():
            whole = whole_number(getattr(self, name))
            if whole is not None and whole in allowed:
                object.__setattr__(self, name, whole)
            elif name != "seed" or self.seed is not None:
                problems.append(f"{name}={reprlib.repr(getattr(self, name))}: {remedy}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, of what the penalties leave."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def of_continuation(self, index: int) -> SamplingOptions:
        """The options of the `index`-th continuation of a prompt: another seed, as in vLLM the one given plus index."""
        return self if self.seed is None else replace(self, seed=(self.seed + index) % 2**64)


GREEDY = SamplingOptions()
"""The most likely token, always."""


def continuation_problems(n: Any, logprobs: Any, sampling: SamplingOptions) -> Iterator[str]:
    """What is wrong with a number of continuations and of log-probabilities, a line each."""
    whole = whole_number(n)
    if whole is None or not 1 <= whole <= MAX_CONTINUATIONS:
        yield f"n={reprlib.repr(n)}: must be a whole number of 1..{MAX_CONTINUATIONS}"
    elif whole > 1 and sampling.is_greedy:
        yield f"n={whole} with temperature={sampling.temperature}: greedy answers are all the same; set a temperature"
    count = whole_number(logprobs)
    if logprobs is not None and (count is None or count < 0):
        yield f"logprobs={reprlib.repr(logprobs)}: must be None or a whole number of at least 0"


NOT_FINITE = (
    "logits are nan or infinite: the model overflowed, or what it computes on failed; try torch_dtype=float32, and "
    "check the checkpoint and the media of this prompt"
)


def require_finite(logits: torch.Tensor) -> None:
    """Check logits [V] before a token is chosen: the largest of those that are no numbers would be the first.

    Raises:
        ValueError: some are nan or infinite.
    """
    if not (finite := logits.isfinite()).all():
        raise ValueError(f"{int((~finite).sum())} of {logits.numel()} {NOT_FINITE}")


def penalized(
    logits: torch.Tensor, prompt: torch.Tensor, generated: torch.Tensor, options: SamplingOptions
) -> torch.Tensor:
    """Logits [V] as float32 with the penalties of `options`, as vLLM computes them (`apply_penalties`).

    Args:
        logits: [V], of any floating dtype; left as they are.
        prompt, generated: token ids int64, of any number. The repetition penalty is on both, the others on `generated`.
        options: the penalties.
    """
    scores = logits.to(torch.float32, copy=True)
    if options.repetition_penalty != 1:
        seen = torch.cat([prompt, generated]).unique()
        penalty, own = options.repetition_penalty, scores[seen]
        scores[seen] = torch.where(own < 0, own * penalty, own / penalty)
    tokens, counts = generated.unique(return_counts=True)
    scores[tokens] -= options.frequency_penalty * counts + options.presence_penalty
    return scores


class Sampler:
    """Chooses the tokens of one row, with random numbers of its own: neighbours and their number do not matter.

    Without a seed in its options one is drawn from PyTorch's default generator.

    Args:
        options: how.
        prompt: the ids that the answer follows, for the repetition penalty.
    """

    def __init__(self, options: SamplingOptions, prompt: Sequence[int] = ()) -> None:
        seed = int(torch.randint(2**63 - 1, ())) if options.seed is None else options.seed
        self._options, self._generator = options, torch.Generator().manual_seed(seed)
        self._prompt = torch.tensor(prompt, dtype=torch.long).unique()
        self._generated: list[int] = []
        self._warpers = None if options.is_greedy else _warpers(options)

    def sample(self, logits: torch.Tensor) -> int:
        """The next token, from finite logits [V] of any floating dtype."""
        if self._options.is_greedy:
            token = int(self._penalized(logits).argmax())
        else:
            token = int(torch.multinomial(self.probabilities(logits), 1, generator=self._generator))
        self._generated.append(token)
        return token

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What a token that is sampled from logits [V] is drawn from now, [V] float32; nothing is drawn.

        Raises:
            ValueError: the row is greedy.
        """
        if self._warpers is None:
            raise ValueError("temperature=0: a greedy row takes the largest logit; set a temperature")
        scores = self._warpers(torch.empty(1, 0, dtype=torch.long), self._penalized(logits).unsqueeze(0))
        probabilities: torch.Tensor = scores[0].softmax(dim=-1)
        return probabilities

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._options.has_penalties:
            return logits.float()
        return penalized(logits, self._prompt, torch.tensor(self._generated, dtype=torch.long), self._options)


def _warpers(options: SamplingOptions) -> Any:
    """transformers' logits processors, in its order: what top_p cuts off depends on temperature and top_k."""
    # Here, because transformers takes seconds to import, and a request that is only described does not need it.
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        warpers.append(MinPLogitsWarper(options.min_p))
    return warpers


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities that the model itself gave at a step.

    They are taken before penalties, temperature and cuts, as vLLM's default `logprobs_mode="raw_logprobs"` is.

    Args:
        chosen: of the token that was chosen.
        top: (token, log-probability) of the most likely ones, in this order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Those of a token chosen from logits [V], and of the `count` most likely."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(count, logprobs.numel()))
    return TokenLogprobs(float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


_OTHER_WAYS_OF_CHOOSING: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "penalty_alpha": 0,
    "dola_layers": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "bad_words_ids": None,
    "sequence_bias": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "guidance_scale": 1,
    "watermarking_config": None,
}
"""Fields of a generation_config.json that would change the tokens, and the values that do not."""

_TRANSFORMERS_TOP_K = 50
"""What transformers' `generate` takes where a generation_config.json has no top_k."""


def checkpoint_sampling(model_path: Path) -> SamplingOptions:
    """The sampling that a checkpoint's generation_config.json asks for, as transformers' `generate` reads it.

    Without `do_sample` it is greedy; else temperature and top_p are 1 and top_k is 50 where the file has none.

    Raises:
        FileNotFoundError: the checkpoint has no such file.
        ValueError: it cannot be read, a value is wrong, or it asks for what is not supported; all are named.
    """
    file = model_path / "generation_config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: give the sampling options instead of '--sampling checkpoint'")
    fields = {name: value for name, value in read_object(file).items() if value is not None}
    problems = [
        f"{name}={reprlib.repr(fields[name])} is not supported: remove it, or give the sampling options yourself"
        for name, neutral in _OTHER_WAYS_OF_CHOOSING.items()
        if name in fields and fields[name] != neutral
    ]
    do_sample = fields.get("do_sample", False)
    if not isinstance(do_sample, bool):
        problems.append(f"do_sample={reprlib.repr(do_sample)}: must be true or false")
    names = ["repetition_penalty", *(["temperature", "top_p", "top_k", "min_p"] if do_sample is True else [])]
    defaults = {"temperature": 1.0, "top_k": _TRANSFORMERS_TOP_K} if do_sample is True else {}
    try:
        options = SamplingOptions(**{**defaults, **{n: fields[n] for n in names if n in fields}})
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    return options
