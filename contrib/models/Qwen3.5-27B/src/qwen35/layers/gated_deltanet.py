# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated DeltaNet layer, three of every four (arXiv 2412.06464).

Letters: B batch, S tokens, D hidden; of this rank: H value heads, Hk key heads, K key dim, V value dim, W conv kernel,
Ch = 2 Hk K + H V conv channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..configuration_qwen35 import DeltaNetKernel, Qwen35InferenceConfig
from ..nxdi import (
    BaseParallelLinear,
    ColumnParallelLinear,
    NeuronAttentionBaseOutput,
    RowParallelLinear,
    get_tensor_model_parallel_size,
    set_tensor_model_parallel_attributes,
)
from ..ops import causal_conv, chunk_gated_delta_rule, decay_and_beta, recurrent_gated_delta_rule
from .norms import Qwen35GatedRMSNorm

MAX_DECODE_TOKENS = 8
"""Most tokens of one decoding launch; enough to verify what a draft model speculates."""


class HeadShardedParameter(BaseParallelLinear):
    """A bare parameter whose rows are split over the ranks; NxD splits only parameters of its own linear layers."""

    def __init__(self, rows: int, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_size()
        self.weight = nn.Parameter(torch.empty(rows // ranks, *shape, dtype=dtype), requires_grad=False)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1, ranks)


class NeuronGatedDeltaNet(nn.Module):
    """Linear attention over a recurrent state, sharded by head: a rank owns whole value heads and their key heads."""

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_size()
        dtype = config.neuron_config.torch_dtype
        self.kernel, self.cores = config.resolve_deltanet_kernel(), config.neuron_config.logical_nc_config
        if self.kernel is not DeltaNetKernel.TORCH:
            from .kernel_launch import decode, prefill  # loads NKI or the emulator

            self.launch_decode, self.launch_prefill = decode, prefill
        self.key_head_dim, self.value_head_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim, self.value_dim = config.key_dim // ranks, config.value_dim // ranks
        self.num_value_heads = config.linear_num_value_heads // ranks

        def column(rows: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(config.hidden_size, rows, bias=False, gather_output=False, dtype=dtype)

        # Fused so that a rank reads its hidden states once; the rows lie rank by rank, [q | k | v | z] in each.
        self.in_proj_qkvz = column(config.conv_dim + config.value_dim)
        self.in_proj_ba = column(2 * config.linear_num_value_heads)
        self.conv1d = HeadShardedParameter(config.conv_dim, config.linear_conv_kernel_dim, dtype=dtype)
        # The decay is exp of exp: float32 throughout, as in the checkpoint.
        self.A_log = HeadShardedParameter(config.linear_num_value_heads, dtype=torch.float32)
        self.dt_bias = HeadShardedParameter(config.linear_num_value_heads, dtype=torch.float32)
        self.norm = Qwen35GatedRMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            config.value_dim, config.hidden_size, bias=False, input_is_parallel=True, dtype=dtype
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        padding_mask: torch.Tensor | None = None,
        cos_cache: torch.Tensor | None = None,
        sin_cache: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> NeuronAttentionBaseOutput:
        """hidden_states [B, S, D]; past state (recurrent [B, H, K, V] float32, conv [B, Ch, W - 1]) or None.

        padding_mask [B, S] bool, True at real tokens, which come first; None when every token is real. Returns the
        output [B, S, D] and the state after the last real token; the rotary tables pass through.
        """
        recurrent_state, conv_state = past_key_value if past_key_value is not None else (None, None)
        qkv, z = self.in_proj_qkvz(hidden_states).split((2 * self.key_dim + self.value_dim, self.value_dim), dim=-1)
        b, a = self.in_proj_ba(hidden_states).split(self.num_value_heads, dim=-1)
        few = hidden_states.shape[1] <= MAX_DECODE_TOKENS  # more with a state is a prompt going on
        if few and recurrent_state is not None and conv_state is not None and self.kernel is not DeltaNetKernel.TORCH:
            weights = (self.conv1d.weight, conv_state, self.A_log.weight, self.dt_bias.weight, self.norm.weight)
            output, recurrent_state, conv_state = self.launch_decode(
                self.cores, self.norm.eps, qkv, z, a, b, *weights, recurrent_state
            )
            return NeuronAttentionBaseOutput(self.out_proj(output), (recurrent_state, conv_state), cos_cache, sin_cache)
        qkv, conv_state = causal_conv(qkv, self.conv1d.weight, conv_state, padding_mask)
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        g, beta = decay_and_beta(a, b, self.A_log.weight, self.dt_bias.weight)
        if padding_mask is not None:
            # A padded token neither decays nor writes: the state passes through it.
            real = padding_mask.unsqueeze(-1)
            g, beta = torch.where(real, g, 0.0), torch.where(real, beta, 0.0)

        q, k, v = (
            x.unflatten(-1, (-1, dim))
            for x, dim in ((q, self.key_head_dim), (k, self.key_head_dim), (v, self.value_head_dim))
        )
        if self.kernel is DeltaNetKernel.TORCH:
            delta_rule = recurrent_gated_delta_rule if hidden_states.shape[1] == 1 else chunk_gated_delta_rule
            output, recurrent_state = delta_rule(q, k, v, g, beta, recurrent_state)
        else:
            output, recurrent_state = self.launch_prefill(self.kernel, self.cores, q, k, v, g, beta, recurrent_state)
        output = self.norm(output, z.unflatten(-1, (-1, self.value_head_dim))).flatten(2)
        return NeuronAttentionBaseOutput(self.out_proj(output), (recurrent_state, conv_state), cos_cache, sin_cache)
