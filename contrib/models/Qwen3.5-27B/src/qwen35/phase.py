# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a call does with its tokens, and which submodel that takes: decided here and nowhere else.

The application derives the phase of a call from its positions, once, where a call enters. From there on it is passed
along: a submodel is made for one phase, gives it to its module, and the module to its layers and to the cache. None of
them compares a shape, a position or a tag to find out.

Letters: B rows, S tokens per row.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch


class Phase(Enum):
    """What is done with the tokens of a call."""

    CONTEXT_ENCODING = "context_encoding"  # they begin prompts: no state and no keys come before them
    CONTINUATION = "continuation"  # they are the next tokens of prompts whose beginnings are in the cache
    TOKEN_GENERATION = "token_generation"  # one new token per row
    SPECULATION = (
        "speculation"  # the next token of each row and drafts of those after it: verified, accepted, drafted anew
    )
    VERIFICATION = "verification"  # the same tokens, of which the host will accept a part
    DRAFT = "draft"  # what the host accepted is taken in, and the tokens after it are drafted

    @property
    def encodes_prompts(self) -> bool:
        """Whether the tokens are of prompts, padded on the right to a common length."""
        return self in (Phase.CONTEXT_ENCODING, Phase.CONTINUATION)

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafts of the MTP head: rows have some of them, padded on the right."""
        return self in (Phase.SPECULATION, Phase.VERIFICATION, Phase.DRAFT)

    @property
    def continues(self) -> bool:
        """Whether the tokens of a row, several, see what is cached and each other, from left to right."""
        return self in (Phase.CONTINUATION, Phase.VERIFICATION)

    @property
    def reads_cache(self) -> bool:
        """Whether keys, values and states of earlier tokens are read."""
        return self is not Phase.CONTEXT_ENCODING


def phase_of(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None) -> Phase:
    """The phase of a call with positions [B, S]: prompts begin at position 0.

    Where attention_mask is [B, S], too, it tells where the tokens of a left-padded prompt begin.

    Raises:
        ValueError: there are no positions; or some rows begin a prompt and others do not, calls of different submodels.
    """
    if position_ids is None:
        raise ValueError("position_ids is None: NxDI's forward needs them; the prompt's count from 0")
    first = position_ids[:, 0]
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        first_real = position_ids.gather(1, first_tokens(attention_mask)).squeeze(1)
        no_token = (attention_mask == 0).all(dim=1)  # of a prompt, then; `align_tokens` refuses it
        first = torch.where(no_token, 0, torch.minimum(first, first_real))
    begins = first == 0
    if begins.any() and not begins.all():
        raise ValueError(
            f"position_ids start at {first.tolist()}: rows that begin a prompt, at 0, and other rows are for different "
            "submodels; pass them in calls of their own"
        )
    if begins.any():
        return Phase.CONTEXT_ENCODING
    return Phase.TOKEN_GENERATION if position_ids.shape[1] == 1 else Phase.CONTINUATION


def first_tokens(attention_mask: torch.Tensor) -> torch.Tensor:
    """The column [B, 1] of the first real token of each row of attention_mask [B, S]."""
    return (attention_mask > 0).int().argmax(dim=1, keepdim=True)


def mask_of_prompts(position_ids: torch.Tensor) -> torch.Tensor:
    """The attention mask [B, S] of prompts that come without one: a token's position is at least its column.

    NxDI infers the same, but for prompts of one token: it takes those for steps, and of nothing cached masks all.
    """
    return (position_ids >= torch.arange(position_ids.shape[1], device=position_ids.device)).to(position_ids.dtype)


def real_tokens(position_ids: torch.Tensor, phase: Phase) -> torch.Tensor | None:
    """Where the tokens of a call are real, [B, S] bool, from their positions [B, S]; None where all are.

    Only the first token of a row may be real at position 0: the submodels give that position to padding.
    """
    if phase is Phase.TOKEN_GENERATION:
        return None
    first = torch.arange(position_ids.shape[1], device=position_ids.device) == 0
    return (position_ids > 0) | first


def cached_before(position_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Which of the first `length` places of a cache are before the first token of each row: [B, length] bool."""
    return torch.arange(length, device=position_ids.device) < position_ids[:, :1]


class Submodel(NamedTuple):
    """Which compiled submodel runs a call."""

    phase: Phase
    with_media: bool = False
    """Whether prompts come with embeddings of images or videos."""

    @property
    def tag(self) -> str:
        """Its name in NxDI, which knows two of them: `context_encoding_model` and `token_generation_model`."""
        return f"{'vision_' if self.with_media else ''}{self.phase.value}_model"


_SUBMODELS = {kind.tag: kind for phase in Phase for kind in (Submodel(phase), Submodel(phase, with_media=True))}


def submodel_of(tag: str) -> Submodel:
    """The submodel that has this tag in NxDI.

    Raises:
        KeyError: no submodel of this package has it.
    """
    return _SUBMODELS[tag]
