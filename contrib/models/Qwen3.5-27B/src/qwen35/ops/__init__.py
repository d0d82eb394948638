# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Operators in plain PyTorch: the specification of the NKI kernels, and what DeltaNet layers run on a CPU."""

from .cached_attention import cached_attention
from .causal_attention import causal_attention
from .causal_conv import causal_conv, commit_conv
from .gated_delta_rule import (
    CHUNK_SIZE,
    chunk_gated_delta_rule,
    commit_delta_rule,
    decay_and_beta,
    l2norm,
    recurrent_gated_delta_rule,
    verify_delta_rule,
)

__all__ = [
    "CHUNK_SIZE",
    "cached_attention",
    "causal_attention",
    "causal_conv",
    "chunk_gated_delta_rule",
    "commit_conv",
    "commit_delta_rule",
    "decay_and_beta",
    "l2norm",
    "recurrent_gated_delta_rule",
    "verify_delta_rule",
]
