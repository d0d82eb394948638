# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The multi-token prediction head in float64, written from its formula, and plain speculative greedy decoding.

With h_p the main model's hidden state at position p after its final norm, and x_{p+1} the token that follows:

    u_p = fc(cat(norm_e(embed(x_{p+1})), norm_h(h_p)))
    h'_p = norm(layer(u_p at position p))        the head's output; lm_head(h'_p) are the logits of x_{p+2}

`layer` is a full-attention decoder layer with keys and values of its own. To draft further, the drafted token and h'_p
stand for x_{p+2} and h_{p+1}. Nothing here imports what it is held against.

Letters: S tokens, D hidden, H heads, Hk key heads, P head dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEDIA = ("image", "video")


@dataclass(frozen=True)
class HeadShape:
    """What the shapes of the tensors do not say."""

    heads: int
    key_heads: int
    head_dim: int
    rotary_dim: int
    theta: float
    section: tuple[int, int, int]
    """Frequencies of time, height and width (mrope_section)."""
    eps: float

    @classmethod
    def of(cls, text_config: Mapping[str, Any]) -> HeadShape:
        """From the fields of a checkpoint's text config."""
        rope = text_config["rope_parameters"]
        time, height, width = rope["mrope_section"]
        return cls(
            heads=text_config["num_attention_heads"],
            key_heads=text_config["num_key_value_heads"],
            head_dim=text_config["head_dim"],
            rotary_dim=int(text_config["head_dim"] * rope["partial_rotary_factor"]),
            theta=rope["rope_theta"],
            section=(time, height, width),
            eps=text_config["rms_norm_eps"],
        )


class DecoderLayer:
    """A full-attention decoder layer of one sequence; its keys and values [S, Hk, P], rotated, in `keys`, `values`."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, shape: HeadShape) -> None:
        self.weights = {n.removeprefix(prefix): t.double() for n, t in tensors.items() if n.startswith(prefix)}
        self.shape = shape
        self.keys = self.values = torch.zeros(0, shape.key_heads, shape.head_dim, dtype=torch.float64)

    def __call__(self, x: Tensor, positions: Tensor, slot: int) -> Tensor:
        """[S, D] of `x` [S, D] at rotary `positions` [3, S].

        Keys and values go to `slot` and after it; what was there goes.
        """
        x = x + self._attention(self.norm(x, self.weights["input_layernorm.weight"]), positions, slot)
        y = self.norm(x, self.weights["post_attention_layernorm.weight"])
        gate, up = self._project("mlp.gate_proj", y), self._project("mlp.up_proj", y)
        return x + self._project("mlp.down_proj", gate * torch.sigmoid(gate) * up)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of the 1 + w kind over the last axis."""
        return x / (x.square().mean(-1, keepdim=True) + self.shape.eps).sqrt() * (1 + weight)

    def _project(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _attention(self, x: Tensor, positions: Tensor, slot: int) -> Tensor:
        shape, length = self.shape, len(x)
        both = self._project("self_attn.q_proj", x).view(length, shape.heads, 2, shape.head_dim)
        query, gate = both[:, :, 0], both[:, :, 1]
        key = self._project("self_attn.k_proj", x).view(length, shape.key_heads, shape.head_dim)
        value = self._project("self_attn.v_proj", x).view(length, shape.key_heads, shape.head_dim)
        query = self.rotate(self.norm(query, self.weights["self_attn.q_norm.weight"]), positions)
        key = self.rotate(self.norm(key, self.weights["self_attn.k_norm.weight"]), positions)
        assert slot <= len(self.keys), f"slot {slot} leaves a gap after the {len(self.keys)} slots that are filled"
        self.keys, self.values = torch.cat([self.keys[:slot], key]), torch.cat([self.values[:slot], value])
        outputs = torch.empty(length, shape.heads, shape.head_dim, dtype=torch.float64)
        for token in range(length):
            for head in range(shape.heads):
                of = head // (shape.heads // shape.key_heads)
                scores = self.keys[: slot + token + 1, of] @ query[token, head] / math.sqrt(shape.head_dim)
                outputs[token, head] = torch.softmax(scores, dim=0) @ self.values[: slot + token + 1, of]
        return self._project("self_attn.o_proj", (outputs * torch.sigmoid(gate)).flatten(1))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Interleaved mRoPE of `x` [S, heads, P] on its first `rotary_dim` numbers: frequency i turns by the height of
        `positions` [3, S] where i % 3 == 1, by the width where i % 3 == 2, each within its section, else by the time.
        """
        half = self.shape.rotary_dim // 2
        angles = torch.empty(len(x), half, dtype=torch.float64)
        for i in range(half):
            axis = i % 3 if i < 3 * self.shape.section[i % 3] else 0
            angles[:, i] = positions[axis].double() * self.shape.theta ** (-i / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class MtpHead:
    """The head of one sequence.

    Args:
        tensors: of the checkpoint by their names there, of which `mtp.*`, `lm_head.weight` and the embedding are read.
        shape: of the decoder layer.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shape: HeadShape) -> None:
        own = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("mtp.")}
        self.layer = DecoderLayer(own, "mtp.layers.0.", shape)
        self.fc, self.final = own["mtp.fc.weight"], own["mtp.norm.weight"]
        self.of_embedding, self.of_hidden = (
            own["mtp.pre_fc_norm_embedding.weight"],
            own["mtp.pre_fc_norm_hidden.weight"],
        )
        (self.embedding,) = (t.double() for name, t in tensors.items() if name.endswith("embed_tokens.weight"))
        self.lm_head = tensors["lm_head.weight"].double() if "lm_head.weight" in tensors else self.embedding

    def run(self, next_embeddings: Tensor, hidden: Tensor, positions: Tensor, slot: int) -> Tensor:
        """One pass over the tokens at `slot` and after it.

        Args:
            next_embeddings: [S, D] of the tokens at slot + 1 and after it.
            hidden: [S, D] of the tokens at `slot` and after it, after the final norm.
            positions: [3, S] of those, for the rotation alone.

        Returns [S, D] float64, after the head's own norm.
        """
        u = self.fuse(next_embeddings.double(), hidden.double())
        return self.finish(self.layer(u, positions, slot))

    def fuse(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """The input of the layer [S, D]."""
        both = self.layer.norm(embeddings, self.of_embedding), self.layer.norm(hidden, self.of_hidden)
        return torch.cat(both, dim=-1) @ self.fc.T

    def finish(self, out: Tensor) -> Tensor:
        """The head's output of what the layer gives, each [S, D]."""
        return self.layer.norm(out, self.final)

    def logits(self, out: Tensor) -> Tensor:
        """[S, V] of [S, D]."""
        return out @ self.lm_head.T

    def draft(self, out: Tensor, position: Tensor, slot: int, count: int) -> Drafts:
        """`count` greedy drafts.

        Args:
            out: [D], the head's output at `slot`, the last one that was run.
            position: [3], of that slot.
        """
        outs, logits, tokens = [out], [self.logits(out)], [int(self.logits(out).argmax())]
        for step in range(1, count):
            embedding, where = self.embedding[tokens[-1:]], (position + step)[:, None]
            outs.append(self.run(embedding, self.fed_back(outs[-1][None]), where, slot + step)[0])
            logits.append(self.logits(outs[-1]))
            tokens.append(int(logits[-1].argmax()))
        return Drafts(tokens, torch.stack(logits), torch.stack(outs))

    def fed_back(self, out: Tensor) -> Tensor:
        """What stands for the main model's hidden state in the next step: the head's output [S, D]."""
        return out


@dataclass(frozen=True)
class Drafts:
    """Drafted tokens with their logits [k, V] and the head's outputs [k, D] that gave them, float64."""

    tokens: list[int]
    logits: Tensor
    outputs: Tensor


# --- Speculative greedy decoding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What transformers' model made of a sequence: embeddings and hidden states after the final norm, each [S, D],
    rotary positions [3, S], and the likeliest next token after each."""

    embeddings: Tensor
    hidden: Tensor
    positions: Tensor
    likeliest: list[int]


@dataclass(frozen=True)
class Step:
    """One verification: what was drafted, how many of it were accepted, and how many had a chance to be.

    Drafts after an accepted end token, or past the tokens asked for, have none and count nowhere.
    """

    drafts: list[int]
    accepted: int
    counted: int


@dataclass(frozen=True)
class Speculation:
    """Greedy tokens, the end token among them, and the steps that gave all but the first."""

    tokens: list[int]
    steps: list[Step]


@torch.no_grad()
def see(model: Any, ids: Sequence[int], **media: Tensor) -> Seen:
    """One pass of transformers' model, text-only or vision-language, over a whole sequence without padding or cache.

    `media` are the model's arguments of the images and videos among `ids`: pixels and grids.
    """
    inputs = {"input_ids": torch.tensor([ids]), **media}
    if media:
        images, videos = (inputs["input_ids"] == getattr(model.config, f"{kind}_token_id") for kind in MEDIA)
        inputs["mm_token_type_ids"] = images.int() + 2 * videos.int()
    text = getattr(model.model, "language_model", model.model)
    with _recorded(text.rotary_emb) as rotary, _recorded(text.norm) as norm:
        likeliest = model(**inputs, use_cache=False).logits[0].argmax(-1).tolist()
    (((embeddings, positions), _),) = rotary
    ((_, hidden),) = norm
    return Seen(embeddings[0], hidden[0], positions[:, 0], likeliest)


@contextmanager
def _recorded(module: torch.nn.Module) -> Iterator[list[tuple[tuple[Tensor, ...], Tensor]]]:
    """The positional arguments and the output of each call of `module`."""
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = []
    hook = module.register_forward_hook(lambda _, arguments, output: calls.append((arguments, output)))
    try:
        yield calls
    finally:
        hook.remove()


def speculate(
    model: Any,
    head: MtpHead,
    prompt: Sequence[int],
    k: int,
    max_new_tokens: int,
    ends: Collection[int],
    **media: Tensor,
) -> Speculation:
    """Decode greedily with `k` drafts a step over transformers' model, until an end token or `max_new_tokens`.

    Plain: every verification encodes the whole sequence again. `media` as for `see`.
    """
    seen, run = see(model, prompt, **media), 0
    tokens, steps = [seen.likeliest[-1]], []
    while tokens[-1] not in ends and len(tokens) < max_new_tokens:
        known = len(prompt) + len(tokens) - 1  # tokens whose successor is known and that the model has seen
        nexts = torch.cat([seen.embeddings[run + 1 : known].double(), head.embedding[tokens[-1:]]])
        outs = head.run(nexts, seen.hidden[run:known], seen.positions[:, run:known], run)
        drafts = head.draft(outs[-1], seen.positions[:, known - 1], known - 1, k).tokens
        seen, run = see(model, [*prompt, *tokens, *drafts], **media), known
        answers = seen.likeliest[known:]
        accepted = next((at for at, draft in enumerate(drafts) if draft != answers[at]), k)
        given = answers[: min(accepted + 1, max_new_tokens - len(tokens))]
        given = given[: next((at + 1 for at, token in enumerate(given) if token in ends), None)]
        tokens += given
        stops = tokens[-1] in ends or len(tokens) == max_new_tokens
        counted = min(k, len(given)) if stops else k
        steps.append(Step(drafts, min(accepted, counted), counted))
    return Speculation(tokens, steps)


def acceptance(steps: Iterable[Step], k: int) -> list[float]:
    """By position, the share of drafts that were accepted of those that counted, whatever became of the ones before."""
    steps = list(steps)
    return [sum(s.accepted > at for s in steps) / sum(s.counted > at for s in steps) for at in range(k)]


def conditional_acceptance(steps: Iterable[Step], k: int) -> list[float]:
    """By position, the share of drafts that were accepted of those that counted and had all before them accepted."""
    steps = list(steps)
    reached = [[s for s in steps if s.counted > at and s.accepted >= at] for at in range(k)]
    return [sum(s.accepted > at for s in at_position) / len(at_position) for at, at_position in enumerate(reached)]


def tokens_a_step(runs: Iterable[Speculation]) -> float:
    """Of all runs together. The first token of a run is that of its prompt, and no step's."""
    runs = list(runs)
    return sum(len(run.tokens) - 1 for run in runs) / sum(len(run.steps) for run in runs)
