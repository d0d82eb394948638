# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Times of a loaded model's calls as a table in Markdown, beside the modelled ones where there are any.

TTFT: a prompt encoded by one row, and its likeliest token chosen on the host. TPOT: a decoding step of all rows, and
their tokens chosen. Neither has what an engine or `generate` add.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qwen35 import NeuronQwen35ForCausalLM
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.planning.step import StepModel, not_modelled, step_model_of
from qwen35.serving.compiled import depends_on
from qwen35.serving.runner import ModelRunner, Row
from qwen35.serving.speculation import Acceptance

from .integration import ON_DEVICE, encode_rows, slots_of

LENGTHS = (128, 1024, 4096, 16384, 65536, 131072)
"""Tokens of prompts."""
RUNS, STEPS = (3, 32) if ON_DEVICE else (2, 8)
"""Prompts encoded, and steps decoded, for a row of the table."""
HEADER = (
    "| prompt tokens | rows | TTFT, ms | modelled | TPOT, ms | modelled | tokens/s |\n|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Spread:
    """Of several runs, in seconds."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    def __str__(self) -> str:
        """In ms."""
        return f"{1e3 * self.median:.2f} ({1e3 * self.least:.2f} to {1e3 * self.largest:.2f})"


@dataclass(frozen=True)
class Timed:
    """A row of the table: a prompt of so many tokens, then a step of so many rows with as many each."""

    tokens: int
    rows: int
    first: Spread
    step: Spread

    def line(self, step_model: StepModel | None, chunk: int) -> str:
        """In Markdown. A prompt of more than one chunk has no modelled time."""
        first, step = "-", "-"
        if step_model is not None:
            first = f"{1e3 * step_model.prompt(self.tokens).modelled:.2f}" if self.tokens <= chunk else "-"
            step = f"{1e3 * step_model.decode(self.tokens, self.rows).modelled:.2f}"
        rate = f"{self.rows / self.step.median:.1f}"
        return f"| {self.tokens:,} | {self.rows} | {self.first} | {first} | {self.step} | {step} | {rate} |"


def modelled_with_drafts(step_model: StepModel, acceptance: Acceptance, drafts: int, context: int) -> float:
    """Modelled seconds of a token, with so many drafts a step and this acceptance; 0 where none was ever reached."""
    rates = [rate or 0.0 for rate in acceptance.conditional_rates]
    step = step_model.with_drafts([*rates, *[0.0] * (drafts - len(rates))], context)
    assert step.tokens is not None, "a step gives tokens"
    return step.modelled / step.tokens


def lengths_of(model: NeuronQwen35ForCausalLM) -> list[int]:
    """Those of `LENGTHS` that leave room for the steps, and that prompts may have."""
    neuron = model.neuron_config
    longest = neuron.seq_len - STEPS
    if model.config.prefill_chunk_size is None:
        longest = min(longest, neuron.max_context_length)
    return [length for length in LENGTHS if length <= longest]


def measure(model: NeuronQwen35ForCausalLM, text: Sequence[int], tokens: int) -> list[Timed]:
    """Time prompts of the first `tokens` tokens of a text, repeated as often as need be; one run warms up.

    Returns:
        With steps of one row, and with those of all rows; these have copies of the one prompt.
    """
    runner = ModelRunner(model)
    prompt = ([*text] * -(-tokens // len(text)))[:tokens]
    row = Row(0, [])

    def encode() -> None:
        row.tokens, row.cached = [*prompt], 0
        row.tokens.append(int(encode_rows(runner, [row]).argmax()))

    def decode(rows: Sequence[Row]) -> None:
        for each, token in zip(rows, runner.decode(rows).all_logits().argmax(dim=1).tolist(), strict=True):
            each.tokens.append(token)

    first, timed = _times(encode, RUNS), []
    for rows in sorted({1, slots_of(model)}):
        row.tokens, row.cached = row.tokens[: tokens + 1], tokens
        copies = [Row(slot, [*row.tokens], tokens) for slot in range(1, rows)]
        for each in copies:
            runner.copy_slot(row.slot, each.slot)
        timed.append(Timed(tokens, rows, first, _times(partial(decode, [row, *copies]), STEPS - 1)))
    return timed


def _times(run: Callable[[], None], count: int) -> Spread:
    run()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds)


def table(model: NeuronQwen35ForCausalLM, text: Sequence[int]) -> Iterator[str]:
    """Lines of Markdown: where it was measured, and a row for each prompt length, with one row and with all."""
    yield f"{place_of(model)}; medians of {RUNS} prompts and {STEPS - 1} steps, least to largest\n"
    reason = not_modelled(model)
    step_model = step_model_of(model) if reason is None else None
    yield HEADER
    chunk = model.config.prefill_chunk_size or model.neuron_config.max_context_length
    for tokens in lengths_of(model):
        yield from (timed.line(step_model, chunk) for timed in measure(model, text, tokens))
    yield "\nModelled: `planning/step.py`." if reason is None else f"\nNot modelled: {reason}."


def place_of(model: NeuronQwen35ForCausalLM) -> str:
    """The machine, the form and the software, in a line."""
    neuron = model.neuron_config
    dtype = str(neuron.torch_dtype).removeprefix("torch.")
    cpu = f"**CPU**{' (CPU mode of NxDI)' if NXDI_AVAILABLE else ''}, {torch.get_num_threads()} threads"
    parts = ["**Neuron device**" if ON_DEVICE else cpu]
    parts += [f"TP {neuron.tp_degree}", dtype, f"context {neuron.seq_len:,}"]
    parts += [f"{name} fp8" for name in ("weights_dtype", "kv_cache_dtype") if getattr(neuron, name) is not None]
    versions = depends_on(model)["software"]  # of this package a digest
    return ", ".join([*parts, *(f"{name} {version[:16]}" for name, version in versions.items() if version)])
