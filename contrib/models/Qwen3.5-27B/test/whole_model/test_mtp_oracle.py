# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The float64 MTP head against what vLLM's own code gave (`test/data/mtp_reference.safetensors`), and wrong ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from support.compare import assert_close
from support.mtp_oracle import (
    DecoderLayer,
    Drafts,
    HeadShape,
    MtpHead,
    Step,
    acceptance,
    conditional_acceptance,
    speculate,
    tokens_a_step,
)
from support.oracle import random_reference, reference_greedy

REFERENCE_FILE = Path(__file__).parents[1] / "data" / "mtp_reference.safetensors"
ATOL = 1e-5
"""vLLM ran in float32 and the values are of order one: it rounds by 3e-6 at most."""


@dataclass(frozen=True)
class Case:
    """Inputs [S, ...] of one sequence, and what vLLM made of them."""

    weights: Mapping[str, Tensor]
    shape: HeadShape
    io: Mapping[str, Tensor]

    @property
    def head(self) -> MtpHead:
        """With an empty cache."""
        return MtpHead(self.weights, self.shape)

    @property
    def prompt_embeddings(self) -> Tensor:
        """Of the prompt's tokens [S, D], the pictures' in place of their placeholders."""
        (table,) = (tensor for name, tensor in self.weights.items() if name.endswith("embed_tokens.weight"))
        embeddings = table[self.io["input_ids"]].double()
        if "is_image" in self.io:
            embeddings[self.io["is_image"].bool()] = self.io["vision_embeds"].double()
        return embeddings

    def next_embeddings(self, head: MtpHead) -> Tensor:
        """Of the tokens after each of the prompt's, [S, D]."""
        return torch.cat([self.prompt_embeddings[1:], head.embedding[self.io["next_token"]]])

    def outputs(
        self,
        head: MtpHead,
        embeddings: Tensor | None = None,
        hidden: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """By vLLM's names; the arguments put something wrong in a right one's place."""
        embeddings = self.next_embeddings(head) if embeddings is None else embeddings
        hidden = self.io["hidden"] if hidden is None else hidden
        positions = self.io["position_ids"] if positions is None else positions
        first = head.run(embeddings, hidden, positions, 0)
        drafts = head.draft(first[-1], positions[:, -1], len(first) - 1, len(self.io["drafts"]))
        return {
            "mtp_first_pass": first,
            "drafts": torch.tensor(drafts.tokens),
            "draft_logits": drafts.logits,
            "mtp_draft_out": drafts.outputs,
            "mtp_k_cache": head.layer.keys,
            "mtp_v_cache": head.layer.values,
        }


@pytest.fixture(params=["text", "image"])
def case(request: pytest.FixtureRequest) -> Case:
    with safe_open(REFERENCE_FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        sizes: dict[str, Any] = json.loads(file.metadata()["cfg"])
    shape = HeadShape(
        heads=sizes["heads"],
        key_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        rotary_dim=int(sizes["head_dim"] * sizes["partial"]),
        theta=sizes["theta"],
        section=tuple(sizes["section"]),
        eps=sizes["eps"],
    )
    weights = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    io = f"io.{request.param}."
    return Case(weights, shape, {n.removeprefix(io): tensor for n, tensor in tensors.items() if n.startswith(io)})


def test_it_gives_what_vllm_gives(case: Case) -> None:
    outputs = case.outputs(case.head)
    assert torch.equal(outputs.pop("drafts"), case.io["drafts"])
    for name, value in outputs.items():
        assert_close(value, case.io[name], atol=ATOL, label=name)


def test_a_prompt_in_chunks_gives_what_it_gives_whole(case: Case) -> None:
    whole, chunked = case.head, case.head
    expected = case.outputs(whole)["mtp_first_pass"]
    nexts, hidden, positions = case.next_embeddings(whole), case.io["hidden"], case.io["position_ids"]
    cuts = [0, 5, 6, 11, len(hidden)]
    parts = [chunked.run(nexts[a:b], hidden[a:b], positions[:, a:b], a) for a, b in pairwise(cuts)]
    assert_close(torch.cat(parts), expected, atol=1e-12, label="in chunks")


class WeightsAsTheyAre(MtpHead):
    """Norms of the w kind."""

    def __init__(self, tensors: Mapping[str, Tensor], shape: HeadShape) -> None:
        super().__init__({name: t - 1 if "norm" in name else t for name, t in tensors.items()}, shape)


class HiddenFirst(MtpHead):
    """The projection's halves swapped."""

    def fuse(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        both = self.layer.norm(hidden, self.of_hidden), self.layer.norm(embeddings, self.of_embedding)
        return torch.cat(both, dim=-1) @ self.fc.T


class FedBeforeItsNorm(MtpHead):
    """What is fed back is the layer's output, not the head's."""

    def finish(self, out: Tensor) -> Tensor:
        self.last = out[-1:]
        return super().finish(out)

    def fed_back(self, out: Tensor) -> Tensor:
        return self.last


def before_the_final_norm(case: Case) -> Tensor:
    """The main model's hidden states of the case [S, D] before its final norm, from its single layer."""
    names = "model.language_model."
    layer = DecoderLayer(case.weights, f"{names}layers.0.", case.shape)
    hidden = layer(case.prompt_embeddings, case.io["position_ids"], 0)
    after = layer.norm(hidden, case.weights[f"{names}norm.weight"].double())
    assert_close(after, case.io["hidden"], atol=ATOL, label="the main model's hidden states")
    return hidden


def positions_of_the_next(case: Case) -> Tensor:
    positions = case.io["position_ids"]
    return torch.cat([positions[:, 1:], positions[:, -1:] + 1], dim=1)


WRONG: Mapping[str, tuple[float, str, Callable[[Case], dict[str, Tensor]]]] = {
    "the hidden half first": (5.3, "mtp_first_pass", lambda c: c.outputs(HiddenFirst(c.weights, c.shape))),
    "w in place of 1 + w": (3.5, "mtp_first_pass", lambda c: c.outputs(WeightsAsTheyAre(c.weights, c.shape))),
    "ids that are not shifted": (4.1, "mtp_first_pass", lambda c: c.outputs(c.head, embeddings=c.prompt_embeddings)),
    "h before the final norm": (1.2, "mtp_first_pass", lambda c: c.outputs(c.head, hidden=before_the_final_norm(c))),
    "feeding back before the norm": (0.8, "mtp_draft_out", lambda c: c.outputs(FedBeforeItsNorm(c.weights, c.shape))),
}
"""What is wrong, and by how much an output is off then, at least."""


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_head_is_told_apart(what: str, case: Case) -> None:
    least, name, outputs = WRONG[what]
    assert (outputs(case)[name] - case.io[name]).abs().max() > least


def test_positions_of_the_next_tokens_are_told_apart_by_a_picture_only(case: Case) -> None:
    """A rotation is relative: between tokens of text one position late is late for all."""
    outputs = case.outputs(case.head, positions=positions_of_the_next(case))
    off = (outputs["mtp_first_pass"] - case.io["mtp_first_pass"]).abs().max()
    assert off > 0.3 if "is_image" in case.io else off < ATOL


# --- Speculative greedy decoding ------------------------------------------------------------------------------------

VOCABULARY = 160


def head_of(model: Any, seed: int) -> MtpHead:
    """A random head on a random model."""
    config = model.config.to_dict()
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    layer = {n: p.shape for n, p in model.model.layers[3].named_parameters()}  # the full-attention one
    width = config["hidden_size"]
    own = {f"layers.0.{name}": shape for name, shape in layer.items()} | {"fc.weight": (width, 2 * width)}
    own |= {f"{name}.weight": (width,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    tensors = {f"mtp.{name}": normal(*shape) for name, shape in own.items()}
    assert len(tensors) == 15
    tensors |= {name: model.state_dict()[name] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    return MtpHead(tensors, HeadShape.of(config))


class Scripted(MtpHead):
    """Drafts that are known before: those of `tokens`, by their place in the sequence."""

    def __init__(self, head: MtpHead, tokens: Mapping[int, int]) -> None:
        vars(self).update(vars(head))
        self.tokens = tokens

    def draft(self, out: Tensor, position: Tensor, slot: int, count: int) -> Drafts:
        drafts = super().draft(out, position, slot, count)
        return Drafts([self.tokens.get(slot + 2 + at, 0) for at in range(count)], drafts.logits, drafts.outputs)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("right_in_a_row", [0, 1, 2, 99])
def test_speculation_gives_the_tokens_of_plain_greedy_decoding(k: int, right_in_a_row: int) -> None:
    """After every `right_in_a_row` right drafts a wrong one."""
    model, prompt, new = random_reference(), [3, 141, 59, 26, 53, 58], 24
    expected = reference_greedy(model, [prompt], new)[0][0].tolist()
    script = {
        len(prompt) + at: (token + (at % (right_in_a_row + 1) == right_in_a_row)) % VOCABULARY
        for at, token in enumerate(expected)
    }
    for head in (head_of(model, 5), Scripted(head_of(model, 5), script)):
        found = speculate(model, head, prompt, k, new, ends=())
        assert found.tokens == expected
        assert sum(step.accepted + 1 for step in found.steps) in (new - 1, new)  # the last step may stop at a draft
        if isinstance(head, Scripted) and right_in_a_row == 99:
            assert all(step.accepted == step.counted for step in found.steps)
            assert len(found.steps) == math.ceil((new - 1) / (k + 1))


def test_nothing_counts_after_an_end_token() -> None:
    model, prompt = random_reference(), [3, 141, 59, 26, 53, 58]
    expected = reference_greedy(model, [prompt], 8)[0][0].tolist()
    end = expected[4]
    assert end not in expected[:4]
    script = {len(prompt) + at: token for at, token in enumerate(expected)}
    run = speculate(model, Scripted(head_of(model, 5), script), prompt, 2, 8, ends=[end])
    assert run.tokens == expected[:5]
    assert [(step.accepted, step.counted) for step in run.steps] == [(2, 2), (1, 1)]
    assert acceptance(run.steps, 2) == conditional_acceptance(run.steps, 2) == [1.0] * 2
    assert tokens_a_step([run]) == 4 / 2


def test_acceptance_is_counted_over_all_steps_or_over_those_that_came_so_far() -> None:
    steps = [Step([], 0, 3), Step([], 1, 3), Step([], 3, 3), Step([], 1, 1)]
    assert acceptance(steps, 3) == [3 / 4, 1 / 3, 1 / 3]
    assert conditional_acceptance(steps, 3) == [3 / 4, 1 / 2, 1]
