# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Launches of the DeltaNet kernels with synthetic inputs, and what they should give, in the precision of the inputs.

Letters: B batch, T tokens, H value heads, Hk key heads, D = 128 the dimension of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration_qwen35 import DTYPES, dtype_name
from ..kernel_selection import DeltaNetInverse
from ..ops import causal_conv, recurrent_gated_delta_rule, verify_delta_rule

HEAD_DIM = 128
"""D of every Qwen3.5 checkpoint of the dense family (linear_key_head_dim, linear_value_head_dim)."""

CONV_WIDTH = 4
"""Taps of the convolution (linear_conv_kernel_dim)."""

NORM_EPS = 1e-6
"""rms_norm_eps of the checkpoints, and the default of the decoding kernels."""

SEED = 0


class KernelName(str, Enum):
    """The kernels that the model launches."""

    DECODE = "decode"  # deltanet_decode_layer: a layer between its projections, one token
    VERIFY = "verify"  # deltanet_verify_layer: the same for 1 to 8 tokens, without writing the state
    COMMIT = "commit"  # deltanet_commit_layer: the state after a prefix of those tokens
    CHUNKED = "chunked"  # deltanet_chunk_step: the delta rule over one chunk of 32, 64 or 128 tokens
    FUSED = "fused"  # deltanet_fused_chunked_layer: the delta rule over whole sequences
    LOOPED = "looped"  # deltanet_looped_chunked_layer_state: the same, with a loop over every 512 tokens


class Gates(str, Enum):
    """How hard the synthetic gates and keys are."""

    MILD = "mild"  # log-decay g of 0 to about -1 per token, write strength beta around 1/2
    STRONG = "strong"  # g from 0 to below -200: exp(g) underflows
    EQUAL_KEYS = "equal-keys"  # one key for all tokens, no decay, beta = 1: each token erases the one before it


DEFAULT_TOKENS = {
    KernelName.DECODE: 1,
    KernelName.VERIFY: 4,
    KernelName.COMMIT: 4,
    KernelName.CHUNKED: 128,
    KernelName.FUSED: 512,
    KernelName.LOOPED: 1024,
}

LAYER = (KernelName.DECODE, KernelName.VERIFY)
"""Kernels that take a layer's activations before the convolution."""


@dataclass(frozen=True)
class KernelCase:
    """One launch. The default heads are those of a rank of the 27B model at TP=4.

    Attributes:
        kernel: which kernel.
        batch, tokens: B and T.
        heads, key_heads: H and Hk per rank.
        dtype: of activations; gates and states are float32.
        cores: 1, or 2 for LNC=2.
        gates: how hard the inputs are.
        inverse: how the fused, looped and chunked kernels invert the system of a chunk; the others have no choice.

    Raises:
        ValueError: the kernel does not take this shape.
    """

    kernel: KernelName = KernelName.DECODE
    batch: int = 1
    tokens: int = 1
    heads: int = 12
    key_heads: int = 4
    dtype: torch.dtype = torch.bfloat16
    cores: int = 2
    gates: Gates = Gates.MILD
    inverse: DeltaNetInverse = DeltaNetInverse.TILED

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "heads", "key_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.heads % self.key_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of key_heads={self.key_heads}")
        if self.cores not in (1, 2):
            raise ValueError(f"cores={self.cores}: 1, or 2 with LNC=2")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype={self.dtype}: one of {', '.join(DTYPES)} is needed")
        if self.kernel is KernelName.DECODE and self.tokens != 1:
            raise ValueError(f"tokens={self.tokens}: the decode kernel takes 1 token; the verify kernel takes up to 8")
        if self.kernel in (KernelName.VERIFY, KernelName.COMMIT) and self.tokens > 8:
            raise ValueError(f"tokens={self.tokens}: the {self.kernel.value} kernel takes 1 to 8 tokens")
        if self.kernel is KernelName.CHUNKED and self.tokens not in (32, 64, 128):
            raise ValueError(f"tokens={self.tokens}: the chunked kernel takes 32, 64 or 128 tokens")
        if self.kernel is KernelName.LOOPED and self.tokens % 512:
            raise ValueError(f"tokens={self.tokens}: the looped kernel takes multiples of 512 tokens")

    def __str__(self) -> str:
        return (
            f"{self.kernel.value} B={self.batch} T={self.tokens} H={self.heads} Hk={self.key_heads} "
            f"{dtype_name(self.dtype)} cores={self.cores} gates={self.gates.value} inverse={self.inverse.value}"
        )


def make_inputs(case: KernelCase) -> list[Tensor]:
    """The kernel's arguments in its order; the same case gives the same numbers."""
    rng = torch.Generator().manual_seed(SEED)
    B, T, H, Hk, D = case.batch, case.tokens, case.heads, case.key_heads, HEAD_DIM

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    a, b, rates = normal(B, T, H), normal(B, T, H), 0.02 + 0.5 * torch.rand(H, generator=rng)
    qkv, history = normal(B, T, 2 * Hk + H, D), normal(B, CONV_WIDTH - 1, 2 * Hk + H, D)
    state = normal(B, H, D, D) / 10
    if case.gates is Gates.STRONG:
        a, rates = 5 * a, torch.full_like(rates, 16.0)  # A reaches 16 in checkpoints
    elif case.gates is Gates.EQUAL_KEYS:
        a, b = torch.full_like(a, -30.0), torch.full_like(b, 20.0)
        qkv[:, :, : 2 * Hk] = history[:, :, : 2 * Hk] = normal(1, 1, 1, D)

    if case.kernel in (*LAYER, KernelName.COMMIT):
        channels = (2 * Hk + H) * D
        # One filter for all heads keeps equal keys equal.
        weight = (normal(1, D, CONV_WIDTH) / 2).expand(2 * Hk + H, D, CONV_WIDTH).reshape(channels, CONV_WIDTH)
        activations = (qkv.flatten(2), normal(B, T, H * D), a, b, weight, history.flatten(2).mT.contiguous())
        rest = [rates.log(), torch.zeros(H), 1 + normal(D) / 10, state]
        step = [x.to(case.dtype) for x in activations] + rest
        return step if case.kernel in LAYER else _commit_inputs(*(x.float() for x in step), dtype=case.dtype)
    q, k, v = (x.contiguous().to(case.dtype) for x in qkv.split((Hk, Hk, H), dim=2))
    gated = [q, k, v, -rates * F.softplus(a), b.sigmoid()]
    return gated if case.kernel is KernelName.FUSED else [*gated, state]


def _commit_inputs(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`deltanet_commit_layer`'s arguments after verification of `deltanet_verify_layer`'s; rows accept 1, 2, ... T."""
    q, k, v, g, beta = delta_rule_inputs(qkv, a, b, conv_weight, conv_state, A_log, dt_bias)
    _, keys, u = verify_delta_rule(q, k, v, g, beta, state)
    accepted = 1 + torch.arange(len(qkv), dtype=torch.int32) % qkv.shape[1]
    return [keys.contiguous(), u.contiguous(), g, state, qkv.to(dtype), conv_state.to(dtype), accepted]


def delta_rule_inputs(
    qkv: Tensor, a: Tensor, b: Tensor, conv_weight: Tensor, conv_state: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, g and beta of a layer's activations, in their precision."""
    H = a.shape[2]
    mixed = causal_conv(qkv, conv_weight, conv_state)[0].unflatten(-1, (-1, HEAD_DIM))
    Hk = (mixed.shape[2] - H) // 2
    q, k, v = mixed.split((Hk, Hk, H), dim=2)
    return q, k, v, -A_log.exp() * F.softplus(a + dt_bias), b.sigmoid()


def layer_step(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H D] and final state [B, H, D, D] of `deltanet_verify_layer`'s arguments, in their precision."""
    q, k, v, g, beta = delta_rule_inputs(qkv, a, b, conv_weight, conv_state, A_log, dt_bias)
    o, new_state = recurrent_gated_delta_rule(q, k, v, g, beta, initial_state=state)
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + NORM_EPS) * norm_weight
    return normed.flatten(2) * F.silu(z), new_state


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest expected magnitude; infinite where a result is not a number."""
    error = (actual.double() - expected).abs().nan_to_num(nan=torch.inf).max()
    return float(error / expected.abs().max())
