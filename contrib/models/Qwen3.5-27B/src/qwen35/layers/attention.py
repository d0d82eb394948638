# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated grouped-query attention of every fourth layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..fp8_form import FP8
from ..kernel_selection import select_attention
from ..nxdi import FlashAttentionStrategy, NeuronAttentionBase
from ..phase import Phase
from .cache import KeyValue, as_kept
from .linear import column_parallel
from .norms import Qwen35RMSNorm
from .rope import Qwen35RotaryEmbedding, apply_partial_rotary

PRIOR_SCORES = 2048 * 1024
"""Most scores per head in memory at once while a chunk of a prompt attends to cached tokens: 8 MB in float32."""


class _RunningSoftmax:
    """softmax(q k^T) v over blocks of keys (arXiv 2205.14135, algorithm 1): largest score, sum and product so far.

    query [B, M, G, S, E], scaled; keys and values [B, M, P, E]; masks broadcast to [B, M, G, S, P]. The first block
    must leave every query a key.
    """

    def __init__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> None:
        self.query = query
        scores = self._scores(keys, mask)
        self.largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(self.largest).exp_()  # in place: on a CPU fresh memory costs as much as the arithmetic
        self.total, self.product = weights.sum(-1, keepdim=True), self._product(weights, values)

    def add(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> None:
        scores = self._scores(keys, mask)
        largest = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        weights, decay = scores.sub_(largest).exp_(), (self.largest - largest).exp()
        self.largest = largest
        self.total = self.total * decay + weights.sum(-1, keepdim=True)
        self.product = self.product * decay + self._product(weights, values)

    def result(self) -> torch.Tensor:
        return self.product / self.total

    def _scores(self, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(self.query, keys.unsqueeze(2).transpose(3, 4)).float()
        return torch.where(mask, scores, torch.finfo(scores.dtype).min)

    def _product(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.matmul(weights.to(values.dtype), values.unsqueeze(2)).float()


class RecentTokens(NamedTuple):
    """Tokens that attention sees, cached or not: keys and values [B, M, S, E], and which are real [B, 1, 1, S]."""

    key_value: KeyValue
    mask: torch.Tensor


class NeuronQwen35Attention(NeuronAttentionBase):
    """NxDI's attention with normed queries and keys, a partial rotary embedding and an output gate.

    out = o_proj(softmax(q k^T / sqrt(head_dim)) v * sigmoid(gate)), where the checkpoint's q_proj holds query and gate.
    """

    rotary_emb: Qwen35RotaryEmbedding

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_emb=Qwen35RotaryEmbedding(config.rotary_dim, config.rope_theta, config.mrope_section or ()),
            rms_norm_eps=config.rms_norm_eps,
            q_layernorm=Qwen35RMSNorm(config.head_dim, config.rms_norm_eps),
            k_layernorm=Qwen35RMSNorm(config.head_dim, config.rms_norm_eps),
            num_cores_per_group=config.num_cores_per_group,
        )
        self.gate_proj = column_parallel(config, config.hidden_size, self.num_heads * self.tp_degree * self.head_dim)
        self._gate: torch.Tensor | None = None
        self.rounds_cache: bool = config.neuron_config.kv_cache_quant
        self.choice, self.cores = select_attention(config), config.neuron_config.logical_nc_config
        if self.choice.any_kernel:
            from . import kernel_launch  # loads NKI or its emulator

            self.launches = kernel_launch

    def prep_qkv_tensors(
        self, position_ids: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # NxDI's forward passes the hidden states to this hook only: keep the gate until the output projection.
        self._gate = self.gate_proj(hidden_states)
        return super().prep_qkv_tensors(position_ids, hidden_states, *args, **kwargs)

    def key_values(self, rotary_position_ids: torch.Tensor, hidden_states: torch.Tensor) -> KeyValue:
        """Keys and values [B, M, S, E] of hidden states [B, S, D], for a caller that needs no attention of them."""
        _, key, value, *_ = self.prep_qkv_tensors(rotary_position_ids, hidden_states, None)
        self._gate = None
        return KeyValue(key, value)

    def get_o_proj(self) -> Callable[..., torch.Tensor]:
        o_proj, gate, self._gate = super().get_o_proj(), self._gate, None
        assert gate is not None, "get_o_proj comes after prep_qkv_tensors in NxDI's forward"

        def gated_o_proj(attention_output: torch.Tensor, adapter_ids: Any = None) -> torch.Tensor:
            return o_proj(attention_output * torch.sigmoid(gate), adapter_ids=adapter_ids)

        return gated_o_proj

    def perform_prefill(
        self, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, q_len: int, bsz: int, attention_mask: torch.Tensor
    ) -> Any:
        """NxDI's, or by a kernel, which knows the causal mask alone: prompts are padded on the right."""
        if not self.choice.encodes(q_len):
            return super().perform_prefill(Q, K, V, q_len, bsz, attention_mask)
        return self.launches.attend_prompt(self.cores, Q, K, V), FlashAttentionStrategy.NONE

    def attention_tokengen(  # type: ignore[override] # our decoder loop always passes the phase
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_value: tuple[torch.Tensor, torch.Tensor],
        active_mask: torch.Tensor | None,
        *,
        phase: Phase,
        seq_len: int | None = None,
        seq_ids: torch.Tensor | None = None,
        recent: RecentTokens | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """NxDI's for one token per row, or a kernel's; for several that follow those cached, in blocks of the cache.

        With a running softmax: Q [B, N, S, E], K and V [B, M, S, E], masks [B, 1, 1, P] and [1, 1, S, S] ->
        [B, N, S, E].

        Scores of all cached tokens at once would be the largest activation by far: 1.6 GB per layer for 2,048 new
        tokens on 32K cached ones at 6 heads per rank.

        Args:
            seq_len: P. A kernel gets the caches whole, and reads that many positions; None where it gets none.
            seq_ids: [B], the slots of the rows.
            recent: tokens that come between those cached and these, and are in no cache.
        """
        if seq_len is not None and self.choice.reads_cache(phase, seq_len):
            assert seq_ids is not None, "NxDI's decoder loop passes both"
            return self._attend_by_kernel(Q, K, V, position_ids, past_key_value, phase, seq_len, seq_ids)
        if not phase.continues:
            attended: torch.Tensor = super().attention_tokengen(
                Q, K, V, attention_mask, position_ids, past_key_value, active_mask, **kwargs
            )
            return attended
        assert active_mask is not None, "the new tokens see each other through it"
        kv_heads, groups = K.shape[1], Q.shape[1] // K.shape[1]
        query = Q.unflatten(1, (kv_heads, groups)) * self.head_dim**-0.5  # [B, M, G, S, E]
        if self.rounds_cache and phase is Phase.VERIFICATION:
            # A step of one token sees itself as it is, and what comes before it as it is kept.
            own = torch.eye(Q.shape[2], dtype=torch.bool, device=Q.device)
            state = _RunningSoftmax(query, K, V, (active_mask & own).unsqueeze(2))
            keys, values = (as_kept(new, FP8).to(new.dtype) for new in (K, V))
            state.add(keys, values, (active_mask & ~own).unsqueeze(2))
        else:
            state = _RunningSoftmax(query, K, V, active_mask.unsqueeze(2))
        if recent is not None:
            state.add(*recent.key_value, recent.mask.unsqueeze(2))
        block = max(PRIOR_SCORES // Q.shape[2], 1)
        for start in range(0, past_key_value[0].shape[2], block):
            keys, values = (part[:, :, start : start + block] for part in past_key_value)
            state.add(keys, values, attention_mask[..., start : start + block].unsqueeze(2))
        return state.result().flatten(1, 2).to(Q.dtype)

    def _attend_by_kernel(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        position_ids: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        phase: Phase,
        bucket: int,
        seq_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Attention to the cache by the kernel of a phase; what comes before the first token of a row is in it."""
        lengths = position_ids[:, 0].int()
        if phase is Phase.CONTINUATION:
            slots = seq_ids.clamp(0, self.neuron_config.kv_cache_batch_size - 1).int()  # of padding, any
            return self.launches.continue_cached(self.cores, Q, K, V, *caches, lengths, slots, bucket)
        return self.launches.attend_cached(self.cores, Q, K, V, *caches, lengths, bucket)

    def apply_rotary_embedding(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        position_ids: torch.Tensor,
        cos_cache: torch.Tensor | None,
        sin_cache: torch.Tensor | None,
        use_polar_compatible_rope: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if cos_cache is None or sin_cache is None:
            cos_cache, sin_cache = self.rotary_emb(V, position_ids)
        Q = apply_partial_rotary(Q, cos_cache, sin_cache)
        K = apply_partial_rotary(K, cos_cache, sin_cache)
        return Q, K, cos_cache, sin_cache
