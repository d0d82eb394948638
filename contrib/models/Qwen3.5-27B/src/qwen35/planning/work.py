# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank computes and moves, and the least times that follow: rooflines.

A time is the larger of products over peak arithmetic and bytes over peak bandwidth; collectives, launches and waits
can only add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from ..hardware import rank_bandwidth, rank_flops
from ..layers.cache import Qwen35CacheManager
from ..memory.counting import count_weights, count_whole_deltanet, rank_module
from ..nxdi import NeuronBaseForCausalLM


@dataclass(frozen=True)
class Drafting:
    """What drafting with the MTP head adds to `Work`, from the shapes of its parameters and cache."""

    drafts: int
    """Tokens drafted a step; the last accepted token is verified with them."""
    token_flops: int
    """Per token: 2 for each weight of the MTP head's matrices."""
    pair_flops: int
    """Per token and token it attends to, in the MTP head's layer."""
    weight_bytes: int
    """Read for every draft: the MTP head and the output head."""
    token_bytes: int
    """Per token in the MTP head's KV cache."""
    kv_cache: int
    """Bytes of that cache, all slots."""


def tokens_per_step(acceptance: Sequence[float]) -> float:
    """Expected tokens of a step whose i-th draft is accepted with probability `acceptance[i]` once those before it are.

    The token after the accepted ones comes from the main model: 1 + a1 + a1 a2 + ...
    """
    return 1.0 + sum(accumulate(acceptance, mul))


@dataclass(frozen=True)
class Work:
    """What a rank computes and moves, from the shapes of its parameters and caches. The times are modelled."""

    token_flops: int
    """Per token: 2 for each weight of the layers' matrices, and three products with the state of each DeltaNet head."""
    pair_flops: int
    """Per token and token it attends to: the products with its key and its value, in all attention layers."""
    head_flops: int
    """Per sequence and step: the output head, of the last token alone."""
    weight_bytes: int
    """Read by every program: all but the embedding, of which a token needs one row."""
    state_bytes: int
    """Per sequence: recurrent and conv state, read and written."""
    token_bytes: int
    """Per token in the KV cache."""
    flops_per_second: float
    bytes_per_second: float
    drafting: Drafting | None
    """None where no tokens are drafted."""

    def ttft(self, tokens: int, chunk: int, rows: int = 1) -> float:
        """Least seconds for `rows` prompts of `tokens` each, encoded at most `chunk` tokens at a time."""
        seconds = 0.0
        for start in range(0, tokens, chunk):
            length = min(chunk, tokens - start)
            pairs = length * start + length * (length + 1) // 2
            flops = length * self.token_flops + pairs * self.pair_flops + self.head_flops
            seconds += self._seconds(rows * flops, start + length, rows)
        return seconds

    def tpot(self, context: int, rows: int = 1) -> float:
        """Least seconds for a token of each of `rows` sequences that have `context` tokens in the cache."""
        flops = self.token_flops + context * self.pair_flops + self.head_flops
        return self._seconds(rows * flops, context, rows)

    def verification(self, context: int, rows: int = 1) -> float:
        """Least seconds to verify the drafts of `rows` sequences that have `context` tokens in the cache.

        Raises:
            ValueError: no tokens are drafted.
        """
        drafts = self._drafting.drafts
        tokens, pairs = drafts + 1, (drafts + 1) * context + drafts * (drafts + 1) // 2
        flops = tokens * (self.token_flops + self.head_flops) + pairs * self.pair_flops
        return self._seconds(rows * flops, context + drafts, rows)

    def draft(self, context: int, rows: int = 1) -> float:
        """Least seconds to draft: a pass over the tokens just verified, then one over each draft but the last.

        Raises:
            ValueError: no tokens are drafted.
        """
        head, seconds = self._drafting, 0.0
        for tokens in (head.drafts + 1, *[1] * (head.drafts - 1)):
            flops = tokens * (head.token_flops + context * head.pair_flops) + self.head_flops
            moved = head.weight_bytes + rows * context * head.token_bytes
            seconds += max(rows * flops / self.flops_per_second, moved / self.bytes_per_second)
        return seconds

    def step(self, context: int, rows: int = 1) -> float:
        """Least seconds of a step that verifies what the last one drafted, and drafts again."""
        return self.verification(context, rows) + self.draft(context, rows)

    def break_even(self, acceptance: Sequence[float], context: int, most: int) -> int:
        """Most sequences, up to `most`, with which a token takes no longer with drafts than without; 0 if none."""
        tokens = tokens_per_step(acceptance)
        pays = (rows for rows in range(most, 0, -1) if self.step(context, rows) <= tokens * self.tpot(context, rows))
        return next(pays, 0)

    @property
    def _drafting(self) -> Drafting:
        if self.drafting is None:
            raise ValueError("num_speculative_tokens=0 drafts nothing: set it to 1 or more")
        return self.drafting

    def _seconds(self, flops: int, cached: int, rows: int) -> float:
        moved = self.weight_bytes + rows * (2 * self.state_bytes + cached * self.token_bytes)
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


def work_of(model: NeuronBaseForCausalLM, copies: int = 1) -> Work:
    """What a rank computes and moves, with `copies` of DeltaNet's heads over all ranks: 1 or `tp_degree`."""
    module: Any = rank_module(model)
    config, neuron = model.config, model.neuron_config
    weights = count_weights(module)
    deltanet = weights.deltanet if copies == 1 else count_whole_deltanet(module)
    cache: Qwen35CacheManager = module.kv_mgr
    states = [cache.layer_state(i) for i in config.linear_attention_layers]
    key_values = [entry for i in config.full_attention_layers for entry in cache.layer_state(i)]
    products = sum(
        parameter.numel() * (copies if ".linear_attn." in name else 1)
        for name, parameter in module.layers.named_parameters()
        if parameter.dim() == 2 and not name.endswith(".scale")
    )
    return Work(
        token_flops=2 * products + 6 * copies * sum(recurrent[0].numel() for recurrent, _ in states),
        pair_flops=4 * sum(module.layers[i].self_attn.gate_proj.weight.shape[0] for i in config.full_attention_layers),
        head_flops=2 * module.lm_head.weight.numel(),
        weight_bytes=weights.total - weights.embedding - weights.mtp - weights.deltanet + deltanet,
        state_bytes=copies * sum(recurrent[0].nbytes + conv[0].nbytes for recurrent, conv in states),
        token_bytes=sum(entry[0, :, 0].nbytes for entry in key_values),
        flops_per_second=rank_flops(neuron.logical_nc_config, neuron.torch_dtype),
        bytes_per_second=rank_bandwidth(neuron.logical_nc_config),
        drafting=_drafting_of(module) if config.num_speculative_tokens else None,
    )


def _drafting_of(module: Any) -> Drafting:
    config, head, key_values = module.config, module.mtp, module.kv_mgr.layer_state(module.config.num_hidden_layers)
    mtp_bytes = sum(parameter.nbytes for parameter in head.parameters())
    return Drafting(
        drafts=config.num_speculative_tokens,
        token_flops=2 * sum(p.numel() for n, p in head.named_parameters() if p.dim() == 2 and not n.endswith(".scale")),
        pair_flops=4 * head.layers[0].self_attn.gate_proj.weight.shape[0],
        weight_bytes=mtp_bytes + module.lm_head.weight.nbytes,
        token_bytes=sum(entry[0, :, 0].nbytes for entry in key_values),
        kv_cache=sum(entry.nbytes for entry in key_values),
    )
