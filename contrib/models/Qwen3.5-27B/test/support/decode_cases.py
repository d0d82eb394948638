# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Steps of a DeltaNet layer between its projections, and their results by the formulas of the layer in float64.

Letters: B batch, T tokens of a step, H value heads, Hk key heads of a rank; K = V = 128.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

D = 128
EPS = 1e-6

# Relative to the largest element. float32 rounds at 6e-8 and some hundred products meet in a sum; bfloat16 operands are
# exact inside the kernels, so that only the output's own rounding, 2^-9 = 2e-3, is left.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
HARD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
STATE_TOLERANCE = 1e-5  # float32 whatever the operands


@dataclass
class Step:
    """Inputs of a step, in the order of the kernels."""

    qkv: Tensor
    z: Tensor
    a: Tensor
    b: Tensor
    conv_weight: Tensor
    conv_state: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    state: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, H, Hk."""
        B, T, H = self.a.shape
        return B, T, H, (self.qkv.shape[2] // D - H) // 2


def make(B: int, T: int, H: int, Hk: int, dtype: torch.dtype = torch.float32, zero: bool = False) -> Step:
    channels = (2 * Hk + H) * D
    return Step(
        qkv=torch.randn(B, T, channels).to(dtype),
        z=torch.randn(B, T, H * D).to(dtype),
        a=torch.randn(B, T, H).to(dtype),
        b=torch.randn(B, T, H).to(dtype),
        conv_weight=(torch.randn(channels, 4) / 2).to(dtype),
        conv_state=torch.randn(B, channels, 3).to(dtype),
        A_log=(1 + 15 * torch.rand(H)).log(),
        dt_bias=torch.randn(H),
        norm_weight=1 + torch.randn(D) / 10,
        state=torch.zeros(B, H, D, D) if zero else torch.randn(B, H, D, D) / 10,
    )


def one_token(step: Step, t: int) -> Step:
    """Token t of a step, with the state before the first one."""
    return replace(step, **{x: getattr(step, x)[:, t : t + 1].contiguous() for x in ("qkv", "z", "a", "b")})


def strong_decay(step: Step, a: float) -> Step:
    """g from -1e-13 over -80 to -1.6e5 per token, as `a` goes from -30 to 1e4; not all heads and tokens alike."""
    a_rows = torch.full_like(step.a, a)
    a_rows[:, step.a.shape[1] // 2, 1] = 0
    A_log, dt_bias = torch.full_like(step.A_log, 16.0).log(), torch.zeros_like(step.dt_bias)
    return replace(step, a=a_rows, A_log=A_log, dt_bias=dt_bias)


def equal_keys(step: Step) -> Step:
    """Every token erases what the one before wrote: beta = 1 to 2e-9, no decay, k and q the same for all tokens."""
    keys = 2 * step.sizes[3] * D
    same = torch.randn(1, 1, keys).to(step.qkv.dtype)
    qkv, history = step.qkv.clone(), step.conv_state.clone()
    qkv[:, :, :keys], history[:, :keys] = same, same.mT
    return replace(step, qkv=qkv, conv_state=history, b=torch.full_like(step.b, 20.0), a=torch.full_like(step.a, -30.0))


def broken_row(step: Step, row: int) -> Step:
    """The step with nothing but nan in one row, as after an overflow."""
    rows = {name: getattr(step, name).clone() for name in ("qkv", "z", "a", "b", "conv_state", "state")}
    for x in rows.values():
        x[row] = torch.nan
    return replace(step, **rows)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def naive(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the state after every token [B, T, H, K, V] and the conv state after the last, in float64, token by
    token."""
    B, T, H, Hk = step.sizes
    qkv, z, a, b, weight, history, A_log, dt_bias, norm, S = (x.double() for x in step.tensors())
    inputs = torch.cat((history, qkv.mT), dim=2)  # [B, Ch, 3 + T]
    outputs, states = [], []
    for t in range(T):
        y = silu((inputs[:, :, t : t + 4] * weight).sum(2)).view(B, -1, D)
        q, k, v = y[:, :Hk], y[:, Hk : 2 * Hk], y[:, 2 * Hk :]
        q = q / torch.sqrt(q.square().sum(-1, keepdim=True) + EPS) / D**0.5
        k = k / torch.sqrt(k.square().sum(-1, keepdim=True) + EPS)
        q, k = q.repeat_interleave(H // Hk, 1), k.repeat_interleave(H // Hk, 1)  # [B, H, K]
        g = -A_log.exp() * torch.log1p(torch.exp(-(a[:, t] + dt_bias).abs())) - A_log.exp() * (a[:, t] + dt_bias).relu()
        S = g.exp()[..., None, None] * S
        u = torch.sigmoid(b[:, t])[..., None] * (v - torch.einsum("bhkv,bhk->bhv", S, k))
        S = S + k[..., None] * u[..., None, :]
        o = torch.einsum("bhkv,bhk->bhv", S, q)
        o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + EPS) * norm
        outputs.append((o * silu(z[:, t].view(B, H, D))).flatten(1))
        states.append(S)
    return torch.stack(outputs, 1), torch.stack(states, 1), inputs[:, :, T:]
