# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding with drafts over the runner, and checkpoints whose MTP head is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen35 import NeuronQwen35ForCausalLM
from qwen35.serving.runner import ModelRunner, Row

from .models import save_checkpoint

Doctor = Callable[[int, Row], None]
"""Gets the number of a row and the row, before each step, and may change its drafts."""


@dataclass
class Decoded:
    """Tokens of each row without its prompt, how many drafts each step of it accepted, and the steps of all."""

    tokens: list[list[int]]
    accepted: list[list[int]] = field(default_factory=list)
    steps: int = 0


def encode(runner: ModelRunner, rows: Sequence[Row]) -> None:
    """Encode whole prompts, and append to each the greedy token that follows."""
    waiting = [*rows]
    while waiting:
        batch = runner.batch(waiting)
        for row, logits in zip(batch, runner.encode(batch).all_logits(), strict=True):
            if row.cached == len(row.tokens):
                row.tokens.append(int(logits.argmax()))
                waiting.remove(row)


def decode_plainly(model: NeuronQwen35ForCausalLM, rows: Sequence[Row], new: int) -> list[list[int]]:
    """Greedy tokens of each row, one a step."""
    runner, prompts = ModelRunner(model), [len(row.tokens) for row in rows]
    encode(runner, rows)
    for _ in range(new - 1):
        for row, logits in zip(rows, runner.decode(rows).all_logits(), strict=True):
            row.tokens.append(int(logits.argmax()))
    return [row.tokens[length:] for row, length in zip(rows, prompts, strict=True)]


def decode_with_drafts(
    model: NeuronQwen35ForCausalLM,
    rows: Sequence[Row],
    new: int,
    doctor: Doctor = lambda number, row: None,
    two_programs: Callable[[int], bool] = lambda step: False,
) -> Decoded:
    """The same with drafts, until each row has `new` tokens or more; `two_programs` says so for each step."""
    runner, prompts = ModelRunner(model), [len(row.tokens) for row in rows]
    encode(runner, rows)
    runner.draft(rows)
    decoded = Decoded([], [[] for _ in rows])
    while active := [i for i, row in enumerate(rows) if len(row.tokens) < prompts[i] + new]:
        for i in active:
            doctor(i, rows[i])
        batch = [rows[i] for i in active]
        if two_programs(decoded.steps):
            verified = zip(runner.verify(batch), batch, strict=True)
            following = [_greedy(logits.argmax(dim=1).tolist(), row.drafts) for logits, row in verified]
            for row, own in zip(batch, following, strict=True):
                row.tokens += own
            runner.draft(batch)
        else:
            following = [tokens for tokens in runner.speculate(batch) if tokens is not None]
            for row, own in zip(batch, following, strict=True):
                row.tokens += own
        for i, own in zip(active, following, strict=True):
            decoded.accepted[i].append(len(own) - 1)
        decoded.steps += 1
    decoded.tokens = [row.tokens[length : length + new] for row, length in zip(rows, prompts, strict=True)]
    return decoded


def _greedy(chosen: list[int], drafts: Sequence[int]) -> list[int]:
    """The model's own choices up to the first that is not the draft of it."""
    right = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
    return chosen[: right + 1]


def save_markov_checkpoint(path: Path, seed: int = 0, branch: float = 0.0, **overrides: Any) -> None:
    """A checkpoint whose next token depends on the last one alone, and whose MTP head knows it."""
    save_checkpoint(path, seed, mtp=True, **overrides)
    let_head_foretell(path, branch)


def let_head_foretell(path: Path, branch: float) -> None:
    """Let the MTP head of a random checkpoint foretell what follows the last token, were it alone.

    The decoder's branches are scaled by `branch`; at 0 the head is always right. fc takes the embedding through, and
    the head's layer adds nothing.
    """
    weights = load_file(path / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):  # none of the vision encoder's
            tensor *= 0.0 if name.startswith("mtp") else branch
    hidden = weights["mtp.norm.weight"].numel()
    weights["mtp.fc.weight"] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1)
    weights["mtp.pre_fc_norm_embedding.weight"] = torch.zeros(hidden)
    final_norm = next(name for name in ("model.norm.weight", "model.language_model.norm.weight") if name in weights)
    weights["mtp.norm.weight"] = weights[final_norm].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
