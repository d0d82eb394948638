#!/usr/bin/env python3
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Times the DeltaNet operators of `qwen35.ops` against those of transformers on this CPU, in float32.

The two run in turn (ours, theirs, ours, ...) and each ratio is that of a neighbouring pair, so that other work on the
machine falls on both. Where threads have to share cores with other processes, set
OMP_WAIT_POLICY=passive: spinning threads otherwise measure the scheduler.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from paired import HEADER, PAIRS, Paired

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from qwen35.ops import causal_conv, chunk_gated_delta_rule, recurrent_gated_delta_rule

CONV_WIDTH = 4
DECODE_STEPS = 50
"""Calls per timing of one token, which alone would be too short to time."""

Operator = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class Row(NamedTuple):
    """One comparison; times per call."""

    name: str
    threads: int
    times: Paired
    max_difference: float


def compare(name: str, ours: Operator, other: Operator, calls: int, threads: int) -> Row:
    """Times `calls` calls of each in turn, after one call of each to warm up and to compare."""
    torch.set_num_threads(threads)

    def seconds(operator: Operator) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            operator()
        return (time.perf_counter() - start) / calls

    difference = max((a - b).abs().max().item() for a, b in zip(ours(), other(), strict=True))
    return Row(name, threads, Paired.of([(seconds(ours), seconds(other)) for _ in range(PAIRS)]), difference)


def delta_rule(args: argparse.Namespace, tokens: int, threads: int) -> Row:
    """The chunked form for a prompt, the recurrent one for a single token."""
    rng = torch.Generator().manual_seed(0)
    B, H, Hk, D = args.batch, args.heads, args.key_heads, args.head_dim
    q, k, v = (torch.randn(B, tokens, heads, D, generator=rng) for heads in (Hk, Hk, H))
    g, beta = -torch.rand(B, tokens, H, generator=rng), torch.rand(B, tokens, H, generator=rng)
    x = (q, k, v, g, beta)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    if tokens > 1:
        return compare(
            f"delta rule, {tokens} tokens",
            lambda: chunk_gated_delta_rule(*x),
            lambda: theirs.torch_chunk_gated_delta_rule(*x, initial_state=None, **options),
            1,
            threads,
        )
    state = torch.randn(B, H, D, D, generator=rng)
    return compare(
        "delta rule, decode step",
        lambda: recurrent_gated_delta_rule(*x, state),
        lambda: theirs.torch_recurrent_gated_delta_rule(*x, initial_state=state, **options),
        DECODE_STEPS,
        threads,
    )


def convolution(args: argparse.Namespace, tokens: int, threads: int) -> Row:
    """Both from [B, S, Ch] to [B, S, Ch] with the new state, transposes of transformers' layout included."""
    rng = torch.Generator().manual_seed(0)
    channels = (2 * args.key_heads + args.heads) * args.head_dim
    x = torch.randn(args.batch, tokens, channels, generator=rng)
    weight = torch.randn(channels, CONV_WIDTH, generator=rng)
    state = torch.zeros(args.batch, channels, CONV_WIDTH - 1)

    def prefill() -> tuple[torch.Tensor, torch.Tensor]:
        channels_first = x.transpose(1, 2)
        y = theirs.causal_conv1d_fn(channels_first, weight, activation="silu").transpose(1, 2)
        # The layer splits and reshapes y, which copies it.
        return y.contiguous(), torch.nn.functional.pad(channels_first, (CONV_WIDTH - 1, 0))[..., 1 - CONV_WIDTH :]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        new_state = state.clone()  # updated in place
        y = theirs.causal_conv1d_update(x.transpose(1, 2), new_state, weight, activation="silu").transpose(1, 2)
        return y, new_state

    name = f"causal conv, {tokens} tokens" if tokens > 1 else "causal conv, decode step"
    other, calls = (prefill, 1) if tokens > 1 else (step, DECODE_STEPS)
    return compare(name, lambda: causal_conv(x, weight, state), other, calls, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, default=48, help="value heads")
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128, help="of keys and of values")
    parser.add_argument("--tokens", type=int, default=1024, help="prompt length, above 1")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()  # it warns that it runs in plain PyTorch, which is what is compared
    with torch.inference_mode():
        rows = [
            measure(args, tokens, threads)
            for measure in (delta_rule, convolution)
            for tokens in (args.tokens, 1)
            for threads in args.threads
        ]

    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "load": os.getloadavg()}
        listed = [{**row._asdict(), "times": asdict(row.times)} for row in rows]
        print(json.dumps({**vars(args), **versions, "rows": listed}))
        return
    print(
        f"{args.heads} value heads, {args.key_heads} key heads, head_dim {args.head_dim}, batch {args.batch}, float32\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, load average {os.getloadavg()[0]:.1f}, "
        f"{PAIRS} pairs\n"
    )
    print(f"{'':28}{'threads':>7}{HEADER}  max |difference|")
    for row in rows:
        print(f"{row.name:28}{row.threads:>7}{row.times}{row.max_difference:>10.1e}")


if __name__ == "__main__":
    main()
