# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What kernels of different kinds share."""

from typing import Any

from .nki_seam import nisa, nl

Tensor = Any  # an NKI tensor; the SDK and the emulator have different classes for it

PARTITIONS = 128
"""Partitions of SBUF and PSUM, and rows and columns of the Tensor engine (nl.tile_size.pmax)."""

L2_EPS = 1e-6
"""eps of l2norm in transformers' Qwen3.5: x / sqrt(sum(x^2) + eps)."""


def make_ones_and_identity() -> tuple[Tensor, Tensor]:
    """A tile of ones and the identity, [128, 128] float32 each, made on chip."""
    ones = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    identity = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0, engine=nisa.engine.vector)
    nisa.affine_select(
        dst=identity,
        pattern=[[-1, PARTITIONS]],
        channel_multiplier=1,
        on_true_tile=ones,
        on_false_value=0.0,
        cmp_op=nl.equal,
    )
    return ones, identity
