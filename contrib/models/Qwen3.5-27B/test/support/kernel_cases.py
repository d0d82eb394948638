# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Inputs of the gated delta rule for the kernels, the recurrence written out in float64, and their comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from support.compare import assert_close

# Largest error relative to the largest element.
# float32: 6e-8 per rounding; sums over 128 tokens and 128 dimensions bring 5e-7, equal keys 3e-6 (the triangular system
# is then worst conditioned).
# bfloat16: 4e-3 per rounding of an operand, 5e-3 to 9e-3 in all; with equal keys and beta near 1 successive writes
# nearly cancel, and what is left carries the roundings of all: 4e-2.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TOLERANCE_EQUAL_KEYS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass
class Case:
    """Arguments of a layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.g, self.beta


def make_case(
    B: int = 1,
    S: int = 256,
    Hk: int = 1,
    R: int = 2,
    K: int = 64,
    V: int = 32,
    dtype: torch.dtype = torch.float32,
    gates: str = "mild",
    keys: str = "random",
    state: bool = False,
    seed: int = 0,
) -> Case:
    """Normal q, k, v; see the code for the gates and keys that the names stand for."""
    rng = torch.Generator().manual_seed(seed)
    H = Hk * R
    q, k, v = (torch.randn(B, S, *heads, generator=rng) for heads in ((Hk, K), (Hk, K), (H, V)))
    g, beta = (torch.rand(B, S, H, generator=rng) for _ in range(2))
    rare = torch.rand(B, S, H, generator=rng) < 0.1
    g = {
        "none": 0 * g,
        "weak": -1e-3 * g,
        "mild": -0.5 * g,
        "strong": -20 * g,
        "extreme": -80 * g,
        "rare": torch.where(rare, -80.0, -0.01 * g),
    }[gates]
    if keys != "random":
        k = {"equal": k[:, :1].expand_as(k).contiguous(), "alike": 0.9 * k[:, :1] + 0.1 * k}[keys]
        beta = 0.95 + 0.05 * beta
    initial = torch.randn(B, H, K, V, generator=rng) if state else None
    return Case(q.to(dtype), k.to(dtype), v.to(dtype), g, beta, initial)


def naive(case: Case, lengths: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time, in float64; beyond its length a sequence's state stays."""
    q, k, v, g, beta = (x.double().numpy() for x in case.tensors)
    (B, S, Hk, K), (H, V) = q.shape, v.shape[2:]
    state = np.zeros((B, H, K, V)) if case.state is None else case.state.double().numpy().copy()
    o = np.zeros((B, S, H, V))
    for b, h in np.ndindex(B, H):
        for t in range(S if lengths is None else lengths[b]):
            q_t, k_t = (x[b, t, h // (H // Hk)] for x in (q, k))
            q_t = q_t / np.sqrt(q_t @ q_t + 1e-6) / np.sqrt(K)
            k_t = k_t / np.sqrt(k_t @ k_t + 1e-6)
            s = state[b, h] * np.exp(g[b, t, h])
            state[b, h] = s + np.outer(k_t, (v[b, t, h] - s.T @ k_t) * beta[b, t, h])
            o[b, t, h] = state[b, h].T @ q_t
    return torch.from_numpy(o), torch.from_numpy(state)


def check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for name, a, e in zip(("o", "state"), actual, expected, strict=True):
        # The floor is for single tokens whose q and k are nearly orthogonal: all that is left of o is rounding.
        assert_close(a.double(), e, atol=tolerance * max(e.abs().max().item(), 1e-2), label=name)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, label: str) -> None:
    """No error is larger than `tolerance` times the largest expected element."""
    assert_close(actual.double(), expected, atol=tolerance * float(expected.abs().max()), label=label)
