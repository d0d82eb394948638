# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of long prompts on the mini, encoded in chunks, each length in a process of its own. Linux only.

The cache is made for the longest prompt whatever the length and is written once before, so that what grows with a
prompt is only what encoding it needs: that should be nothing. Time is linear but for attention, which looks at all
cached tokens; it is taken apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.serving.loading import MINI_CHECKPOINT


def measure(tokens: int, longest: int, chunk: int, threads: int) -> dict[str, float]:
    """Seconds to encode a prompt of `tokens`, those in its attention layers, and MB resident at most beyond before."""
    torch.set_num_threads(threads)
    neuron_config = Qwen35NeuronConfig(
        torch_dtype=torch.float32, on_cpu=True, seq_len=longest, prefill_chunk_size=chunk, enable_bucketing=True
    )
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=neuron_config)
    model = NeuronQwen35ForCausalLM(str(MINI_CHECKPOINT), config)
    model.to_cpu()
    module = model.models[0].model
    for entry in module.kv_mgr.past_key_values:
        entry.data.fill_(0.0)  # touch the whole cache: a page that was never written is not resident
    begun: list[float] = []
    attention: list[float] = []
    for i in config.full_attention_layers:
        layer = module.layers[i].self_attn
        layer.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
        layer.register_forward_hook(lambda *_: attention.append(time.perf_counter() - begun[-1]))
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    encode(model, ids[:, :chunk])  # once before the clock starts
    attention.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (proc(5))
    before = resident_megabytes("VmRSS")
    start = time.perf_counter()
    encode(model, ids)
    seconds = time.perf_counter() - start
    return {
        "tokens": tokens,
        "seconds": seconds,
        "attention_seconds": sum(attention),
        "encoding_mb": resident_megabytes("VmHWM") - before,
        "kept_mb": sum(entry.nbytes for entry in module.kv_mgr.past_key_values) / 1e6,
    }


def encode(model: NeuronQwen35ForCausalLM, ids: torch.Tensor) -> None:
    model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(ids.shape[1]).unsqueeze(0))


def resident_megabytes(field: str) -> float:
    """VmRSS, what is resident, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def plot(rows: list[dict[str, float]], chunk: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    tokens = [row["tokens"] for row in rows]
    left.plot(tokens, [row["encoding_mb"] for row in rows], "o-", label="to encode the prompt")
    per_token = rows[-1]["kept_mb"] / tokens[-1]
    left.plot(tokens, [per_token * n for n in tokens], "--", label="cache of its tokens")
    left.set(title="Memory on top of the weights", xlabel="tokens of the prompt", ylabel="MB", ylim=(0, None))
    left.legend()
    rest = [row["seconds"] - row["attention_seconds"] for row in rows]
    right.plot(tokens, [row["attention_seconds"] for row in rows], "o-", label="attention layers")
    right.plot(tokens, rest, "o-", label="all the rest")
    right.plot(tokens, [rest[0] / tokens[0] * n for n in tokens], "--", label="linear")
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
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
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
    print(f"{'tokens':>8} {'MB to encode':>13} {'seconds':>9} {'attention':>10} {'the rest':>9} {'us a token':>11}")
    for row in rows:
        rest = row["seconds"] - row["attention_seconds"]
        print(
            f"{row['tokens']:8d} {row['encoding_mb']:13.1f} {row['seconds']:9.2f} {row['attention_seconds']:10.2f} "
            f"{rest:9.2f} {1e6 * rest / row['tokens']:11.1f}"
        )


if __name__ == "__main__":
    main()
