# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated grouped-query attention of every fourth layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .configuration_qwen35 import Qwen35InferenceConfig
from .norms import Qwen35RMSNorm
from .nxdi import ColumnParallelLinear, NeuronAttentionBase
from .rope import Qwen35RotaryEmbedding, apply_partial_rotary


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
        self.gate_proj = ColumnParallelLinear(
            config.hidden_size,
            self.num_heads * self.tp_degree * self.head_dim,
            bias=False,
            gather_output=False,
            dtype=config.neuron_config.torch_dtype,
        )
        self._gate: torch.Tensor | None = None

    def prep_qkv_tensors(
        self, position_ids: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # NxDI's forward hands the hidden states to this hook only; the gate waits here for the output projection.
        self._gate = self.gate_proj(hidden_states)
        return super().prep_qkv_tensors(position_ids, hidden_states, *args, **kwargs)

    def get_o_proj(self) -> Callable[..., torch.Tensor]:
        o_proj, gate, self._gate = super().get_o_proj(), self._gate, None
        assert gate is not None, "the output projection is asked for before the queries were made"

        def gated_o_proj(attention_output: torch.Tensor, adapter_ids: Any = None) -> torch.Tensor:
            return o_proj(attention_output * torch.sigmoid(gate), adapter_ids=adapter_ids)

        return gated_o_proj

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
