# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Beginnings of prompts that were encoded before: states at block boundaries with the keys and values up to them.

A prompt that begins like an earlier one is continued from the last boundary that both share. A DeltaNet state is the
sum of everything before it, so that it can be restored only where it was stored: at the end of a block. Keys and values
are kept block by block. A block is known by a hash over its tokens and images and all blocks before it.

Which blocks are kept (`PrefixIndex`) is decided by their hashes alone, so that another scheduler can decide it ahead of
whoever has the slots (`BlockStore`); `PrefixCache` does both at once.

Blocks are in host memory. On a device they are read from and written to the buffers that the programs update in place,
those of all ranks of this process; on a CPU a process has the module of its own rank.

Letters: P positions, E head dim.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..memory.counting import rank_module

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


def chain_of(tokens: Sequence[int], block: int, media: Sequence[Medium] = (), salt: str | None = None) -> Chain:
    """The blocks of a prompt, hashed once for all calls about it.

    Args:
        tokens: of the prompt.
        block: tokens of a block.
        media: counted with the block where their placeholders begin, and so with all that follow.
        salt: prompts of another salt, or of none, share no block with this one.
    """
    keys: list[bytes] = []
    before = b"" if salt is None else hashlib.sha256(b"salt " + salt.encode(errors="surrogatepass")).digest()
    for start in range(0, len(tokens) - block + 1, block):
        content = hashlib.sha256(before)
        content.update(torch.tensor(tokens[start : start + block], dtype=torch.int64).numpy().tobytes())
        for medium in media:
            if start <= medium.start < start + block:
                content.update(medium.start.to_bytes(8, "little") + medium.digest)
        keys.append(before := content.digest())
    return Chain(len(tokens), tuple(keys))


class PrefixIndex:
    """Which blocks are kept, by their keys: at most `capacity`, the least recently used dropped for new ones."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def known(self, keys: Sequence[bytes]) -> list[bytes]:
        """The longest beginning of a chain's blocks that is kept."""
        return [*itertools.takewhile(self._keys.__contains__, keys)]

    def use(self, keys: Sequence[bytes]) -> None:
        """These blocks of a chain, from its first on, are used: they are the last to be dropped."""
        # The first block last, so that of a chain the end is dropped first: without its beginning it is of no use.
        for key in reversed(keys):
            if key in self._keys:
                self._keys.move_to_end(key)

    def takes(self, keys: Sequence[bytes]) -> bool:
        """Whether the last of these blocks, the first of a chain, is to be kept, and is not yet.

        Not when a block before it is not kept, so that it could never be restored, or when there is no room for it
        together with those before it.
        """
        *before, key = keys
        return key not in self._keys and len(self.known(before)) == len(before) and len(keys) <= self.capacity

    def take(self, keys: Sequence[bytes]) -> list[bytes]:
        """Keep the last of these blocks, which `takes` says is to be kept; returns what is dropped for it."""
        self._keys[keys[-1]] = None
        self.use(keys)
        return [self._keys.popitem(last=False)[0] for _ in range(len(self._keys) - self.capacity)]

    def discard(self, key: bytes) -> None:
        """Keep a block no more, if it was kept."""
        self._keys.pop(key, None)


@dataclass(frozen=True)
class Block:
    """What a slot of the caches held, on all ranks of this process, when a block of its prompt had been encoded."""

    states: list[torch.Tensor]  # at the end of the block, as SlotViews has them
    key_values: list[torch.Tensor]  # K and V of each head of each attention layer, [block, E]


class BlockStore:
    """Blocks of one model by key, in host memory, read from the slots of its caches and written to them.

    Args:
        model: loaded. Nobody else writes to it while a block is read: a step in flight (`async_mode`) would.
        block_tokens: a multiple of the model's `prefill_chunk_size`, which is the default.

    Attributes:
        block: tokens of a block.
        block_nbytes: bytes of a block.

    Raises:
        ValueError: the model has no `prefill_chunk_size`, or is asynchronous; or block_tokens is no multiple of it.
    """

    def __init__(self, model: NeuronQwen35ForCausalLM, block_tokens: int | None = None) -> None:
        self.block = checked_block_tokens(model.config.prefill_chunk_size, block_tokens)
        if model.neuron_config.async_mode:
            raise ValueError("async_mode=True: a step in flight still writes what would be read; set it to False")
        self.model = model
        self.block_nbytes = _nbytes(*self._slot_views(0), self.block)
        self._blocks: dict[bytes, Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: object) -> bool:
        return key in self._blocks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return len(self._blocks) * self.block_nbytes

    def read(self, slot: int, key: bytes, encoded: int) -> None:
        """Keep the last block of what a slot holds right after the first `encoded` tokens, whole blocks, were encoded.

        Raises:
            ValueError: these tokens are no whole blocks.
        """
        if not encoded or encoded % self.block:
            raise ValueError(f"{encoded} tokens are not whole blocks of {self.block}: store at the end of a block")
        states, heads = self._slot_views(slot)
        views = [head[encoded - self.block : encoded] for head in heads]
        self._blocks[key] = Block([_to_host(entry) for entry in states], [_to_host(view) for view in views])

    def write(self, slot: int, keys: Sequence[bytes]) -> int:
        """Write the blocks of a prompt to a slot, from its first on, as long as they are kept; returns their tokens.

        The slot then holds exactly what encoding these tokens would have left there.
        """
        blocks = [self._blocks[key] for key in itertools.takewhile(self._blocks.__contains__, keys)]
        if blocks:
            states, heads = self._slot_views(slot)
            for entry, kept in zip(states, blocks[-1].states, strict=True):
                entry.copy_(kept)
            for i, block in enumerate(blocks):
                for head, kept in zip(heads, block.key_values, strict=True):
                    head[i * self.block : (i + 1) * self.block].copy_(kept)
        return len(blocks) * self.block

    def drop(self, key: bytes) -> None:
        """Give the memory of a block back, if it is kept."""
        self._blocks.pop(key, None)

    def _slot_views(self, slot: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(states, K and V of each head [P, E]) of a slot on every rank of this process, as views.

        Each is one run of memory, so that a copy to or from a device is one transfer.
        """
        layout = self.model.cache_layout
        views = [layout.slot(entries, slot) for entries in self.model.cache_entries()]
        return [s for view in views for s in view.states], [kv for view in views for kv in view.key_values]


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
        self._store = BlockStore(model, block_tokens)
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes={budget_bytes}: must be at least 0, which keeps nothing")
        self.model, self.budget_bytes = model, budget_bytes
        self.block = self._store.block
        self._index = PrefixIndex(budget_bytes // self._store.block_nbytes)

    @property
    def blocks(self) -> int:
        """How many blocks are kept."""
        return len(self._store)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self._store.nbytes

    def chain(self, tokens: Sequence[int], media: Sequence[Medium] = ()) -> Chain:
        """The blocks of a prompt, hashed once for all calls about it."""
        return chain_of(tokens, self.block, media)

    def restore(self, slot: int, chain: Chain) -> int:
        """Write the longest known beginning of a prompt to a slot; returns its tokens, 0 when nothing is known.

        At least one token is left to encode, because the logits of the last token are kept nowhere. The slot then holds
        exactly what encoding these tokens would have left there.
        """
        known = self._index.known(chain.keys[: (chain.tokens - 1) // self.block])
        restored = self._store.write(slot, known)
        self._index.use(known)
        return restored

    def store(self, slot: int, chain: Chain, encoded: int) -> None:
        """Keep what a slot holds right after the first `encoded` tokens, a whole number of blocks, were encoded.

        Does nothing when the block is kept already, when a block before it is not, so that it could never be restored,
        or when the budget does not hold it together with those before it.

        Raises:
            ValueError: these tokens are no whole blocks.
        """
        if not encoded or encoded % self.block:
            raise ValueError(f"{encoded} tokens are not whole blocks of {self.block}: store at the end of a block")
        keys = chain.keys[: encoded // self.block]
        if self._index.takes(keys):
            self._store.read(slot, keys[-1], encoded)
            for dropped in self._index.take(keys):
                self._store.drop(dropped)
        else:
            self._index.use(keys)


def checked_block_tokens(prefill_chunk_size: int | None, block_tokens: int | None) -> int:
    """Tokens of a block, by default those of a chunk.

    Raises:
        ValueError: there are no chunks, or block_tokens is no multiple of them.
    """
    if prefill_chunk_size is None:
        raise ValueError("prefill_chunk_size is not set: prompts are restored where a chunk ended; set it")
    if block_tokens is not None and (block_tokens < 1 or block_tokens % prefill_chunk_size):
        raise ValueError(f"block_tokens={block_tokens}: must be a multiple of prefill_chunk_size={prefill_chunk_size}")
    return prefill_chunk_size if block_tokens is None else block_tokens


def block_nbytes(model: NeuronQwen35ForCausalLM, block_tokens: int) -> int:
    """Bytes of a block of a model that need not be loaded, of all its ranks; counted on the meta device."""
    manager: Any = rank_module(model).kv_mgr
    views = model.cache_layout.slot([*manager.past_key_values], 0)
    return model.neuron_config.tp_degree * _nbytes(views.states, views.key_values, block_tokens)


def _nbytes(states: Sequence[torch.Tensor], heads: Sequence[torch.Tensor], block: int) -> int:
    return sum(state.nbytes for state in states) + sum(head[:block].nbytes for head in heads)


def _to_host(view: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(view, device="cpu").copy_(view)
