# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Whole-model speed on this CPU, ours against transformers', on the same weights, threads and tokens.

Prefill is one forward pass over the prompt that fills the caches and gives the last token's logits; decoding is one
pass a token from there. The two sides run in turn, ten times, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig

from paired import HEADER, PAIRS, Paired
from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.serving.loading import MINI_CHECKPOINT

# About 100 M parameters with the head ratios of 27B: 3 value heads per key head, 6 query heads per KV head.
CONFIG_100M = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=24,
    num_attention_heads=6,
    num_key_value_heads=1,
    head_dim=256,
    linear_num_key_heads=4,
    linear_num_value_heads=12,
)


class Side:
    """One implementation: `prefill` starts a sequence, `decode` continues it by a token; both return logits [1, V]."""

    def __init__(self, prefill: Callable[[torch.Tensor], torch.Tensor], decode: Callable[..., torch.Tensor]) -> None:
        self.prefill, self.decode = prefill, decode


def ours(path: Path, tokens: int, steps: int) -> Side:
    neuron_config = Qwen35NeuronConfig(
        torch_dtype=torch.float32, on_cpu=True, seq_len=tokens + steps, max_context_length=tokens
    )
    config = Qwen35InferenceConfig.from_pretrained(path, neuron_config=neuron_config)
    model = NeuronQwen35ForCausalLM(str(path), config)
    model.to_cpu()

    def prefill(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[:, -1]

    def decode(token: torch.Tensor, position: int) -> torch.Tensor:
        mask = torch.ones(1, position, dtype=torch.long)
        return model(input_ids=token, attention_mask=mask, position_ids=torch.tensor([[position]])).logits[:, -1]

    return Side(prefill, decode)


def transformers_side(model: Any) -> Side:
    cache: list[Any] = [None]

    def prefill(ids: torch.Tensor) -> torch.Tensor:
        output = model(ids, use_cache=True, logits_to_keep=1)
        cache[0] = output.past_key_values
        return output.logits[:, -1]

    def decode(token: torch.Tensor, position: int) -> torch.Tensor:
        return model(token, past_key_values=cache[0], use_cache=True).logits[:, -1]

    return Side(prefill, decode)


def time_prefill(side: Side, ids: torch.Tensor) -> tuple[float, int]:
    """(seconds, first greedy token)."""
    start = time.perf_counter()
    logits = side.prefill(ids)
    return time.perf_counter() - start, int(logits.argmax())


def time_decoding(side: Side, position: int, token: int, steps: int) -> tuple[float, list[int]]:
    """(seconds a token, greedy tokens)."""
    tokens = [token]
    start = time.perf_counter()
    for step in range(steps):
        tokens.append(int(side.decode(torch.tensor([tokens[-1:]]), position + step).argmax()))
    return (time.perf_counter() - start) / steps, tokens


@torch.inference_mode()
def compare(name: str, path: Path, reference: Any, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    vocabulary = reference.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    sides = (ours(path, args.tokens, args.steps), transformers_side(reference))
    prefills, decodings, same = [], [], True
    for _ in tqdm(range(PAIRS + 1), desc=f"{name}, {threads} threads"):
        filled = [time_prefill(side, ids) for side in sides]
        decoded = [
            time_decoding(side, args.tokens, token, args.steps) for side, (_, token) in zip(sides, filled, strict=True)
        ]
        prefills.append((filled[0][0], filled[1][0]))
        decodings.append((decoded[0][0], decoded[1][0]))
        same = same and decoded[0][1] == decoded[1][1]
    return [
        {"model": name, "what": what, "threads": threads, "same_tokens": same, **asdict(Paired.of(pairs[1:]))}
        for what, pairs in ((f"prefill of {args.tokens} tokens", prefills), ("decoding, per token", decodings))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded after it")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    mini = Qwen3_5ForConditionalGeneration.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32).eval()
    random_model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**CONFIG_100M)).eval()
    parameters = sum(p.numel() for p in random_model.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as path:
        random_model.save_pretrained(path)
        rows = [
            row
            for name, checkpoint, reference in (
                ("mini", MINI_CHECKPOINT, mini),
                (f"random, {parameters:.0f} M", Path(path), random_model),
            )
            for threads in args.threads
            for row in compare(name, checkpoint, reference, threads, args)
        ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'model':<16} {'what':<24} {'threads':>7}{HEADER}")
    for row in rows:
        figures = Paired(**{field.name: row[field.name] for field in fields(Paired)})
        tokens = "same greedy tokens" if row["same_tokens"] else "OTHER TOKENS"
        print(f"{row['model']:<16} {row['what']:<24} {row['threads']:>7}{figures}  {tokens}")


if __name__ == "__main__":
    main()
