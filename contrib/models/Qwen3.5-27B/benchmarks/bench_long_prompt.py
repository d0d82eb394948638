# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of long prompts on the mini, encoded in chunks, each length in a process of its own.

The cache is made for the longest prompt whatever the length, so that what grows with a prompt is only what encoding it
needs: that should be nothing. Time is linear but for attention, which looks at all cached tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.generation import MINI_CHECKPOINT


def measure(tokens: int, longest: int, chunk: int, threads: int) -> dict[str, float]:
    """Seconds to encode a prompt of `tokens`, and MB resident at most, before the prompt and in all."""
    torch.set_num_threads(threads)
    neuron_config = Qwen35NeuronConfig(
        torch_dtype=torch.float32, on_cpu=True, seq_len=longest, prefill_chunk_size=chunk, enable_bucketing=True
    )
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=neuron_config)
    model = NeuronQwen35ForCausalLM(str(MINI_CHECKPOINT), config)
    model.to_cpu()
    for entry in model.models[0].model.kv_mgr.past_key_values:
        entry.data.fill_(0.0)  # touch the whole cache: a page that was never written is not resident
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    before = peak_megabytes()
    start = time.perf_counter()
    model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(tokens).unsqueeze(0))
    seconds = time.perf_counter() - start
    kept = sum(entry.nbytes for entry in model.models[0].model.kv_mgr.past_key_values) / 1e6
    return {"tokens": tokens, "seconds": seconds, "before_mb": before, "peak_mb": peak_megabytes(), "kept_mb": kept}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def plot(rows: list[dict[str, float]], chunk: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    tokens = [row["tokens"] for row in rows]
    left.plot(tokens, [row["peak_mb"] - row["before_mb"] for row in rows], "o-")
    left.set(title="Memory on top of weights and cache", xlabel="tokens of the prompt", ylabel="MB", ylim=(0, None))
    right.plot(tokens, [row["seconds"] for row in rows], "o-")
    right.plot(tokens, [rows[0]["seconds"] / tokens[0] * n for n in tokens], "--", label="linear")
    right.set(title="Time to encode it", xlabel="tokens of the prompt", ylabel="s", ylim=(0, None))
    right.legend()
    figure.suptitle(f"the mini, chunks of {chunk} tokens, float32 on a CPU")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    # glibc keeps freed blocks below this size in its heap, which fragments: resident memory would grow with the number
    # of chunks although nothing is held. Larger ones go back to the system.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 22)
    context = multiprocessing.get_context("spawn")
    for tokens in tqdm(args.lengths, unit="length", disable=args.json):
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (tokens, max(args.lengths), args.chunk, args.threads)))
    if args.png:
        plot(rows, args.chunk, args.png)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"the mini, chunks of {args.chunk}, {rows[0]['kept_mb']:.0f} MB of cache and state for every length")
    print(f"{'tokens':>8} {'seconds':>9} {'ms a token':>11} {'MB to encode':>13}")
    for row in rows:
        extra = row["peak_mb"] - row["before_mb"]
        print(f"{row['tokens']:8d} {row['seconds']:9.2f} {1e3 * row['seconds'] / row['tokens']:11.3f} {extra:13.1f}")


if __name__ == "__main__":
    main()
