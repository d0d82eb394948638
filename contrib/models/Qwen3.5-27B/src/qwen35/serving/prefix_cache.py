# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Beginnings of prompts that were encoded before: states at block boundaries with the keys and values up to them.

A prompt that begins like an earlier one is continued from the last boundary that both share. A DeltaNet state is the
sum of everything before it, so that it can be restored only where it was stored: at the end of a block. Keys and values
are kept block by block. A block is known by a hash over its tokens and images and all blocks before it.

Blocks are in host memory. On a device they are read from and written to the buffers that the programs update in place,
those of all ranks of this process; on a CPU a process has the module of its own rank.

Letters: P positions, E head dim.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from ..configuration_qwen35 import Qwen35InferenceConfig
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM


@dataclass(frozen=True)
class Medium:
    """An image or a video: the index of its first placeholder in the prompt, and a digest of its pixels and grid."""

    start: int
    digest: bytes


def digest_of(pixels: torch.Tensor, grid_thw: torch.Tensor) -> bytes:
    """What tells one image from another: its patches, as the encoder gets them, their dtype and shape, and its grid."""
    content = hashlib.sha256(grid_thw.contiguous().numpy().tobytes())
    content.update(f"{pixels.dtype} {[*pixels.shape]}".encode())
    content.update(pixels.contiguous().view(torch.uint8).numpy().data)
    return content.digest()


def media_digests(
    config: Qwen35InferenceConfig, prompt: Sequence[int], media: Mapping[str, torch.Tensor]
) -> list[Medium]:
    """The images and videos of a prompt, from what the processor gives: pixels and grids by name."""
    found = []
    for pixels_name, grids_name, token_name in (
        ("pixel_values", "image_grid_thw", "image_token_id"),
        ("pixel_values_videos", "video_grid_thw", "video_token_id"),
    ):
        if grids_name not in media:
            continue
        grids, merge = media[grids_name], config.vision_config["spatial_merge_size"] ** 2  # type: ignore[index]
        placeholders = [i for i, token in enumerate(prompt) if token == getattr(config, token_name)]
        patches = grids.prod(dim=1).tolist()
        first = 0
        for pixels, grid in zip(media[pixels_name].split(patches), grids, strict=True):
            found.append(Medium(placeholders[first], digest_of(pixels, grid)))
            first += len(pixels) // merge
    return found


class Chain(NamedTuple):
    """A prompt as a cache knows it."""

    tokens: int
    keys: tuple[bytes, ...]  # a hash for each whole block, over it and all before it


@dataclass(frozen=True)
class Block:
    """What a slot of the caches held, on all ranks of this process, when a block of its prompt had been encoded."""

    states: list[torch.Tensor]  # recurrent and conv of each DeltaNet layer at the end of the block
    key_values: list[torch.Tensor]  # K and V of each head of each attention layer, [block, E]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.states, *self.key_values))


class PrefixCache:
    """Blocks of encoded prompts of one model, the least recently used dropped beyond a budget.

    Args:
        model: loaded. Nobody else writes to it while the cache reads: a step in flight (`async_mode`) would.
        budget_bytes: host memory for all blocks, of all ranks of this process.
        block_tokens: a multiple of the model's `prefill_chunk_size`, which is the default. A block has one copy of the
            states however many tokens it has: larger ones keep more tokens in the budget, and copy less.

    Raises:
        ValueError: the model has no `prefill_chunk_size`, or is asynchronous; block_tokens is no multiple of it; or the
            budget is negative.
    """

    def __init__(self, model: NeuronQwen35ForCausalLM, budget_bytes: int, block_tokens: int | None = None) -> None:
        chunk = model.config.prefill_chunk_size
        if chunk is None:
            raise ValueError("prefill_chunk_size is not set: prompts are restored where a chunk ended; set it")
        if block_tokens is not None and (block_tokens < 1 or block_tokens % chunk):
            raise ValueError(f"block_tokens={block_tokens}: must be a multiple of prefill_chunk_size={chunk}")
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes={budget_bytes}: must be at least 0, which keeps nothing")
        if model.neuron_config.async_mode:
            raise ValueError("async_mode=True: a step in flight still writes what would be read; set it to False")
        self.model, self.budget_bytes = model, budget_bytes
        self.block: int = chunk if block_tokens is None else block_tokens
        self.nbytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # least recently used first

    @property
    def blocks(self) -> int:
        """How many blocks are kept."""
        return len(self._blocks)

    def chain(self, tokens: Sequence[int], media: Sequence[Medium] = ()) -> Chain:
        """The blocks of a prompt, hashed once for all calls about it."""
        keys: list[bytes] = []
        for start in range(0, len(tokens) - self.block + 1, self.block):
            content = hashlib.sha256(keys[-1] if keys else b"")
            content.update(torch.tensor(tokens[start : start + self.block], dtype=torch.int64).numpy().tobytes())
            for medium in media:
                if start <= medium.start < start + self.block:
                    content.update(medium.start.to_bytes(8, "little") + medium.digest)
            keys.append(content.digest())
        return Chain(len(tokens), tuple(keys))

    def restore(self, slot: int, chain: Chain) -> int:
        """Write the longest known beginning of a prompt to a slot; returns its tokens, 0 when nothing is known.

        At least one token is left to encode, because the logits of the last token are kept nowhere. The slot then holds
        exactly what encoding these tokens would have left there.
        """
        usable = chain.keys[: (chain.tokens - 1) // self.block]
        known = [*itertools.takewhile(self._blocks.__contains__, usable)]
        if known:
            states, heads = self._slot_views(slot)
            for entry, kept in zip(states, self._blocks[known[-1]].states, strict=True):
                entry.copy_(kept)
            for i, key in enumerate(known):
                for head, kept in zip(heads, self._blocks[key].key_values, strict=True):
                    head[i * self.block : (i + 1) * self.block].copy_(kept)
        self._touch(known)
        return len(known) * self.block

    def store(self, slot: int, chain: Chain, encoded: int) -> None:
        """Keep what a slot holds right after the first `encoded` tokens, a whole number of blocks, were encoded.

        Does nothing when the block is kept already, when a block before it is not, so that it could never be restored,
        or when the budget does not hold it together with those before it.

        Raises:
            ValueError: these tokens are no whole blocks.
        """
        if not encoded or encoded % self.block:
            raise ValueError(f"{encoded} tokens are not whole blocks of {self.block}: store at the end of a block")
        *before, key = chain.keys[: encoded // self.block]
        if key not in self._blocks and all(earlier in self._blocks for earlier in before):
            states, heads = self._slot_views(slot)
            views = [head[encoded - self.block : encoded] for head in heads]
            size = sum(view.nbytes for view in (*states, *views))
            if size + sum(self._blocks[earlier].nbytes for earlier in before) <= self.budget_bytes:
                self._blocks[key] = Block([_to_host(entry) for entry in states], [_to_host(view) for view in views])
                self.nbytes += size
        self._touch([*before, key])
        while self.nbytes > self.budget_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def _touch(self, keys: Sequence[bytes]) -> None:
        # The first block last, so that of a chain the end is dropped first: without its beginning it is of no use.
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _slot_views(self, slot: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(states, K and V of each head [P, E]) of a slot on every rank of this process, as views.

        Each is one run of memory, so that a copy to or from a device is one transfer.
        """
        layout = self.model.cache_layout
        views = [layout.slot(entries, slot) for entries in self.model.cache_entries()]
        return [s for view in views for s in view.states], [kv for view in views for kv in view.key_values]


def _to_host(view: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(view, device="cpu").copy_(view)
