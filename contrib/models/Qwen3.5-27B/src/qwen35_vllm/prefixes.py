# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prefix reuse: which blocks of prompts are stored, restored and dropped, decided where vLLM schedules. Needs no vLLM.

vLLM schedules a step before the device has run the one before it. So the planner decides by hashes alone what each
step restores, stores and drops, and the worker does that in the order of the steps: first it restores, into rows that
begin, then it drops, then it stores, each block right after the piece that ends with it was encoded. A step thus finds
all blocks that the planner counted on, unless a row or a copy failed. The worker then encodes what it lacks from the
prompt, and tells the planner what was not stored.

Blocks are stored inside prompts alone: a row that has answered may have taken in a token too many, because with
asynchronous scheduling a step is under way when the token that ends an answer is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen35.serving.prefix_cache import Chain, Medium, PrefixIndex, block_nbytes, chain_of

from .options import ConfigurationRefused, ServeOptions

if TYPE_CHECKING:
    from qwen35.modeling_qwen35 import NeuronQwen35ForCausalLM

MOST_DEFAULT_BYTES = 16 << 30
DEFAULT_SHARE = 8
"""By default the replicas of a machine together keep an eighth of its memory at most, and none more than 16 GiB."""


@dataclass(frozen=True)
class PrefixBudget:
    """What a replica keeps: so many blocks of so many tokens, of `block_nbytes` each."""

    block_tokens: int
    block_nbytes: int
    blocks: int


def prefix_budget(model: NeuronQwen35ForCausalLM, options: ServeOptions, replicas: int) -> PrefixBudget | None:
    """What a replica of a model, which need not be loaded, is to keep; None where nothing is kept.

    Args:
        replicas: of this machine, which share the default; 0 where it has none and only hands requests on.

    Raises:
        ConfigurationRefused: the options ask for what the model cannot have.
    """
    chunk, length = model.config.prefill_chunk_size, model.neuron_config.seq_len
    budget, block = options.prefix_cache_bytes, options.prefix_block_tokens or chunk
    if budget == 0:
        return None
    if chunk is None or block is None:
        if given := budget or options.prefix_block_tokens:
            name = "prefix_cache_bytes" if budget else "prefix_block_tokens"
            raise ConfigurationRefused(
                f"{name}={given}: prompts of up to {length} tokens are encoded in one piece, and can be restored only "
                f"where a piece ended; set prefill_chunk_size below {length}, or leave it out"
            )
        return None
    if block % chunk or block >= length:
        raise ConfigurationRefused(
            f"prefix_block_tokens={block} must be a multiple of prefill_chunk_size={chunk} below the {length} tokens "
            "of a row; set such a one, or leave it out"
        )
    size = block_nbytes(model, block)
    blocks = (_default_bytes(replicas) if budget is None else budget) // size
    if not blocks and budget is not None:
        raise ConfigurationRefused(
            f"prefix_cache_bytes={budget} holds no block: one of {block} tokens takes {size} bytes; give as many, or 0 "
            "to reuse no prefixes"
        )
    return PrefixBudget(block, size, blocks) if blocks else None


def _default_bytes(replicas: int) -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MOST_DEFAULT_BYTES, memory // DEFAULT_SHARE // max(replicas, 1))


@dataclass
class StepPlan:
    """What the worker does in a step, in this order.

    restores: blocks by request, from the first of its prompt on, for rows that begin in the step. drops: blocks whose
    memory is given back, if the worker has them. stores: by request, the block to keep once so many tokens are encoded.
    """

    restores: dict[str, list[bytes]] = field(default_factory=dict)
    drops: set[bytes] = field(default_factory=set)
    stores: dict[str, dict[int, bytes]] = field(default_factory=dict)

    @property
    def stored(self) -> list[bytes]:
        """All that is to be stored."""
        return [key for ends in self.stores.values() for key in ends.values()]


@dataclass
class _Row:
    """A row whose prompt is being encoded: its blocks, and how many of their tokens were looked at."""

    chain: Chain
    end: int


class PrefixPlanner:
    """Decides for the rows of a scheduler, each known by its request.

    Attributes:
        index: what the worker keeps once it has done all plans, unless something fails.
    """

    def __init__(self, budget: PrefixBudget) -> None:
        self.block = budget.block_tokens
        self.index = PrefixIndex(budget.blocks)
        self._chains: dict[str, Chain] = {}
        self._rows: dict[str, _Row] = {}
        self._plan = StepPlan()

    @property
    def requests(self) -> set[str]:
        """Those that something is remembered of."""
        return {*self._chains, *self._rows}

    def chain(self, request: str, prompt: Sequence[int], media: Sequence[Medium], salt: str | None) -> Chain:
        """The blocks of a request's prompt, hashed anew only when it has grown, as a streamed input does."""
        chain = self._chains.get(request)
        if chain is None or chain.tokens != len(prompt):
            chain = self._chains[request] = chain_of(prompt, self.block, media, salt)
        return chain

    def known(self, chain: Chain, tokens: int) -> list[bytes]:
        """The blocks of a prompt that can be restored into a row of `tokens`, the last of which is to be encoded."""
        return self.index.known(chain.keys[: (tokens - 1) // self.block])

    def begin(self, request: str, chain: Chain, restored: Sequence[bytes]) -> None:
        """A request gets a row, into which these blocks are restored in the step that is planned."""
        self.index.use(restored)
        if restored:
            self._plan.restores[request] = [*restored]
        self._rows[request] = _Row(chain, len(restored) * self.block)

    def encode(self, request: str, tokens: int) -> None:
        """In the step that is planned, the row of a request will have so many tokens."""
        row = self._rows.get(request)
        if row is None:
            return
        while row.end + self.block <= min(tokens, len(row.chain.keys) * self.block):
            row.end += self.block
            keys = row.chain.keys[: row.end // self.block]
            if self.index.takes(keys):
                for dropped in self.index.take(keys):
                    self._drop(dropped)
                self._plan.stores.setdefault(request, {})[row.end] = keys[-1]
            else:
                self.index.use(keys)
        if row.end == len(row.chain.keys) * self.block:
            del self._rows[request]

    def take_plan(self) -> StepPlan:
        """What was decided since this was last called."""
        plan, self._plan = self._plan, StepPlan()
        return plan

    def end(self, request: str) -> None:
        """A request is finished."""
        self._chains.pop(request, None)
        self._rows.pop(request, None)

    def lose(self, keys: Iterable[bytes]) -> None:
        """The worker has not stored these. In the meantime it may have been told to again: they are dropped."""
        for key in keys:
            self.index.discard(key)
            self._plan.drops.add(key)

    def reset(self) -> None:
        """Forget all blocks; rows that are being encoded store none."""
        self.lose([*self.index])
        self._rows.clear()

    def _drop(self, key: bytes) -> None:
        for ends in self._plan.stores.values():
            for end, planned in ends.items():
                if planned == key:  # in this very step: it is not stored at all
                    del ends[end]
                    return
        self._plan.drops.add(key)
