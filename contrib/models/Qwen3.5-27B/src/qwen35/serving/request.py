# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is asked of the engine, what it gives back, and what makes a request one that cannot run.

Letters: S tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from .sampling import GREEDY, SamplingOptions


class FinishReason(str, Enum):
    """Why a request gets no more tokens."""

    EOS = "eos"  # its last token is one of its eos_token_ids
    LENGTH = "length"  # it has max_new_tokens
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Args:
        prompt: token ids.
        max_new_tokens: tokens to give at most.
        sampling: its seed makes the tokens repeatable; without one it is drawn from PyTorch's default generator.
        eos_token_ids: tokens that end the answer; the one that did is its last.
        media: pixels and grids of the images and videos, in the order of their placeholders, under the names that the
            checkpoint's processor gives them.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingOptions = GREEDY
    eos_token_ids: Collection[int] = ()
    media: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOutput:
    """The next token of a request, and why it was the last; a cancelled request ends without one."""

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class ModelLimits:
    """What a loaded model takes of a request.

    Args:
        vocab_size: token ids are below it.
        seq_len: tokens of a prompt and its answer together, at most.
        max_prompt_tokens: tokens of a prompt, at most; None where prompts are encoded in chunks.
        media_names: names under which it takes media; empty for a model of text.
        check_media: raises ValueError when media, by name, do not match a prompt [1, S] int64.
    """

    vocab_size: int
    seq_len: int
    max_prompt_tokens: int | None = None
    media_names: Sequence[str] = ()
    check_media: Callable[..., None] | None = None


def check_request(request: Request, limits: ModelLimits) -> None:
    """Check that a request can run, before anything is computed for it.

    Raises:
        ValueError: it cannot; naming every field, value and remedy.
    """
    problems = [*_prompt_problems(request, limits), *_media_problems(request, limits)]
    if problems:
        raise ValueError("this request cannot run: " + "; ".join(problems))


def _prompt_problems(request: Request, limits: ModelLimits) -> Iterator[str]:
    length, new, vocab = len(request.prompt), request.max_new_tokens, limits.vocab_size
    if length == 0:
        yield "prompt is empty: give at least one token to continue"
    if bad := [token for token in (*request.prompt, *request.eos_token_ids) if not 0 <= token < vocab]:
        yield f"token {bad[0]} of prompt or eos_token_ids is not in 0..{vocab - 1}: use the checkpoint's tokenizer"
    if new < 1:
        yield f"max_new_tokens={new}: must be at least 1"
    if length + new > limits.seq_len:
        yield (
            f"a prompt of {length} tokens and max_new_tokens={new} exceed seq_len={limits.seq_len}: shorten the "
            "prompt, lower max_new_tokens or raise seq_len"
        )
    longest = limits.max_prompt_tokens
    if longest is not None and length > longest:
        yield f"a prompt of {length} tokens exceeds max_context_length={longest}: raise it, or set prefill_chunk_size"


def _media_problems(request: Request, limits: ModelLimits) -> Iterator[str]:
    if unknown := sorted(request.media.keys() - {*limits.media_names}):
        names = ", ".join(limits.media_names) or "none, or load NeuronQwen35VLForCausalLM"
        yield f"media has {', '.join(unknown)}, which this model does not take: pass {names}"
    elif request.media and request.prompt and limits.check_media is not None:
        try:
            limits.check_media(torch.tensor([[*request.prompt]]), **request.media)
        except ValueError as error:
            yield f"media: {error}"
