# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated DeltaNet layer, three of every four (arXiv 2412.06464).

Letters: B batch, S tokens, D hidden; per rank: H value heads, Hk key heads, K key dim, V value dim, W conv kernel,
Ch = 2 Hk K + H V conv channels.
"""

from __future__ import annotations

import torch
from torch import nn

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..kernel_selection import DeltaNetKernel, select_deltanet_inverse, select_deltanet_kernel
from ..nxdi import get_tensor_model_parallel_size
from ..ops import (
    causal_conv,
    chunk_gated_delta_rule,
    commit_conv,
    commit_delta_rule,
    decay_and_beta,
    recurrent_gated_delta_rule,
    verify_delta_rule,
)
from ..phase import Phase
from .cache import DeltaNetState, DeltaNetTokens
from .linear import HeadShardedParameter, column_parallel, row_parallel
from .norms import Qwen35GatedRMSNorm


class NeuronGatedDeltaNet(nn.Module):
    """Linear attention over a recurrent state, sharded by head: a rank owns whole value heads and their key heads."""

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_size()
        self.kernel, self.cores = select_deltanet_kernel(config), config.neuron_config.logical_nc_config
        self.inverse = select_deltanet_inverse(config)
        if self.kernel is not DeltaNetKernel.TORCH:
            from .kernel_launch import commit, decode, prefill, verify  # loads NKI or its emulator

            self.launch_decode, self.launch_prefill = decode, prefill
            self.launch_verify, self.launch_commit = verify, commit
        self.key_head_dim, self.value_head_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim, self.value_dim = config.key_dim // ranks, config.value_dim // ranks
        self.num_value_heads = config.linear_num_value_heads // ranks

        # One product instead of four, so that hidden states are read once. Each rank's rows are [q | k | v | z].
        self.in_proj_qkvz = column_parallel(config, config.hidden_size, config.conv_dim + config.value_dim)
        self.in_proj_ba = column_parallel(config, config.hidden_size, 2 * config.linear_num_value_heads)
        self.conv1d = HeadShardedParameter(
            config.conv_dim, config.linear_conv_kernel_dim, dtype=config.neuron_config.torch_dtype
        )
        # The decay is exp of exp: float32 throughout, as in the checkpoint.
        self.A_log = HeadShardedParameter(config.linear_num_value_heads, dtype=torch.float32)
        self.dt_bias = HeadShardedParameter(config.linear_num_value_heads, dtype=torch.float32)
        self.norm = Qwen35GatedRMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = row_parallel(config, config.value_dim, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        phase: Phase,
        state: DeltaNetState | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, DeltaNetState | DeltaNetTokens]:
        """hidden_states [B, S, D]; the state of earlier tokens, or None where there are none.

        padding_mask [B, S] bool, True at real tokens, which come first; None when every token is real. Returns the
        output [B, S, D] and the state after the last real token; under VERIFICATION what `commit` makes it of.
        """
        qkv, z = self.in_proj_qkvz(hidden_states).split((2 * self.key_dim + self.value_dim, self.value_dim), dim=-1)
        b, a = self.in_proj_ba(hidden_states).split(self.num_value_heads, dim=-1)
        if not phase.encodes_prompts and state is not None and self.kernel is not DeltaNetKernel.TORCH:
            output, kept = self._decode_by_kernel(phase, qkv, z, a, b, state)
            return self.out_proj(output), kept
        recurrent, conv = (None, None) if state is None else state
        conv_inputs = qkv
        qkv, conv = causal_conv(qkv, self.conv1d.weight, conv, padding_mask)
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
        if phase is Phase.VERIFICATION:
            assert recurrent is not None, "drafts follow a prompt"
            output, keys, u = verify_delta_rule(q, k, v, g, beta, recurrent)
            kept = DeltaNetTokens(conv_inputs, keys, u, g)
        else:
            output, recurrent = self._delta_rule(phase, q, k, v, g, beta, recurrent)
            kept = DeltaNetState(recurrent, conv)
        output = self.norm(output, z.unflatten(-1, (-1, self.value_head_dim))).flatten(2)
        return self.out_proj(output), kept

    def commit(self, state: DeltaNetState, tokens: DeltaNetTokens, accepted: torch.Tensor) -> DeltaNetState:
        """The state after the first accepted[b] of the T tokens of each row that were verified from `state`; [B] ints.

        What is not accepted may hold anything, numbers or not.
        """
        real = torch.arange(tokens.g.shape[1], device=accepted.device) < accepted.unsqueeze(1)
        # Rejected ones are multiplied by zero, which leaves nan as it is.
        keys, u = (torch.where(real[..., None, None], x, 0.0) for x in (tokens.keys, tokens.u))
        g = torch.where(real[..., None], tokens.g, 0.0)
        if self.kernel is DeltaNetKernel.TORCH:
            recurrent = commit_delta_rule(keys, u, g, state.recurrent, accepted)
            return DeltaNetState(recurrent, commit_conv(tokens.conv_inputs, state.conv, accepted))
        recurrent, conv = self.launch_commit(
            self.cores,
            keys=keys,
            u=u,
            g=g,
            recurrent_state=state.recurrent,
            qkv=tokens.conv_inputs,
            conv_state=state.conv,
            accepted=accepted,
        )
        return DeltaNetState(recurrent, conv)

    def _decode_by_kernel(
        self, phase: Phase, qkv: torch.Tensor, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, state: DeltaNetState
    ) -> tuple[torch.Tensor, DeltaNetState | DeltaNetTokens]:
        """All between the projections in one kernel: the normed output [B, S, H V], and what `forward` returns."""
        arguments = dict(
            qkv=qkv,
            z=z,
            a=a,
            b=b,
            conv_weight=self.conv1d.weight,
            conv_state=state.conv,
            A_log=self.A_log.weight,
            dt_bias=self.dt_bias.weight,
            norm_weight=self.norm.weight,
            recurrent_state=state.recurrent,
        )
        if phase is Phase.VERIFICATION:
            output, *of_tokens = self.launch_verify(self.cores, **arguments, norm_eps=self.norm.eps)
            return output, DeltaNetTokens(qkv, *of_tokens)
        output, recurrent, conv = self.launch_decode(self.cores, **arguments, norm_eps=self.norm.eps)
        return output, DeltaNetState(recurrent, conv)

    def _delta_rule(
        self,
        phase: Phase,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        recurrent: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The contract of `ops.chunk_gated_delta_rule`, by the chosen kernel or in PyTorch."""
        if self.kernel is DeltaNetKernel.TORCH:
            rule = chunk_gated_delta_rule if phase.encodes_prompts else recurrent_gated_delta_rule
            return rule(q, k, v, g, beta, recurrent)
        return self.launch_prefill(self.kernel, self.inverse, self.cores, q, k, v, g, beta, recurrent)
