# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""TTFT and TPOT by prompt length and rows, as a table for the README, and tokens a second of the engine."""

from __future__ import annotations

import time

from qwen35 import Qwen35Engine, Request
from qwen35.serving.generation import TextGenerator
from qwen35.serving.prompts import token_ids
from support.integration import Report, slots_of
from support.times_table import HEADER, STEPS, lengths_of, place_of, table

TEXT = "The capital of France is Paris. The plural of mouse is mice. The opposite of hot is cold. "


def test_times_are_tabled(generator: TextGenerator, report: Report) -> None:
    lines = [*table(generator.model, token_ids(generator.tokenizer, TEXT))]
    report("Time to first token, time per output token", "\n".join(lines))
    rows = lines[lines.index(HEADER) + 1 : -1]
    assert len(rows) == len(lengths_of(generator.model)) * len({1, slots_of(generator.model)})
    assert all(line.count("|") == HEADER.splitlines()[0].count("|") for line in rows)


def test_tokens_per_second_of_the_engine(generator: TextGenerator, report: Report) -> None:
    prompt = (token_ids(generator.tokenizer, TEXT) * 128)[:128]
    engine = Qwen35Engine(generator.model)
    requests = 2 * slots_of(generator.model)
    start = time.perf_counter()
    for _ in range(requests):
        engine.add(Request(prompt, STEPS))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    seconds = time.perf_counter() - start
    assert len(outputs) == requests * STEPS
    drafts = generator.model.config.num_speculative_tokens
    report(
        "Engine",
        f"{requests} requests of 128 tokens and {STEPS} new ones, {slots_of(generator.model)} at a time, "
        f"{drafts} drafts a step: {len(outputs) / seconds:.1f} tokens/s ({place_of(generator.model)})",
    )
