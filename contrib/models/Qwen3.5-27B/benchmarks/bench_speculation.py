# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Time a token of the mini on this CPU with drafts of its MTP head and without, and how many drafts were accepted.

Runs of 64 greedy tokens, or to the end token, over prompts of each kind that the head was not trained on. Both sides
answer each prompt in turn, ten times, so that a busy machine slows both; a token's time is that of the steps after the
first token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from paired import PAIRS, Paired
from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.serving.engine import Qwen35Engine
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.request import Request

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from mini_facts import all_facts
from mini_images import Split
from train_mini_mtp import MAX_NEW_TOKENS, text_prompts

ENDS = json.loads((MINI_CHECKPOINT / "generation_config.json").read_text())["eos_token_id"]


def engine_of(drafts: int) -> Qwen35Engine:
    neuron_config = Qwen35NeuronConfig(
        torch_dtype=torch.float32, on_cpu=True, seq_len=512, max_context_length=256, num_speculative_tokens=drafts
    )
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=neuron_config)
    model = NeuronQwen35ForCausalLM(str(MINI_CHECKPOINT), config)
    model.to_cpu()
    return Qwen35Engine(model)


def run(engine: Qwen35Engine, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Seconds a token after the first ones, and the tokens."""
    seconds, count, answers = 0.0, 0, []
    for prompt in prompts:
        request_id, tokens = engine.add(Request(prompt, MAX_NEW_TOKENS, eos_token_ids=ENDS)), []
        tokens += [output.token for output in engine.step()]  # encodes the prompt, and drafts
        start = time.perf_counter()
        tokens += [output.token for output in engine.stream(request_id)]
        seconds += time.perf_counter() - start
        count += len(tokens) - 1
        answers.append(tokens)
    return seconds / count, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafts", type=int, default=3, metavar="K", help="drafts a step (3)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of PyTorch (2)")
    parser.add_argument("--of-a-kind", type=int, default=4, metavar="N", help="prompts of each kind (4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoTokenizer

    kinds: dict[str, list[list[int]]] = {}
    for prompt in text_prompts(AutoTokenizer.from_pretrained(MINI_CHECKPOINT), all_facts(), Split.HELD_OUT):
        if len(kinds.setdefault(prompt.kind, [])) < args.of_a_kind:
            kinds[prompt.kind].append(prompt.ids)
    prompts = [ids for of_kind in kinds.values() for ids in of_kind]
    plain, drafting = engine_of(0), engine_of(args.drafts)
    pairs = []
    for _ in range(PAIRS + 1):
        (ours, tokens), (theirs, expected) = run(drafting, prompts), run(plain, prompts)
        assert tokens == expected, "the tokens are those without drafts"
        pairs.append((ours, theirs))
    found, accepted = Paired.of(pairs[1:]), drafting.acceptance
    if args.json:
        report: dict[str, Any] = {"drafts": args.drafts, "threads": args.threads, "prompts": len(prompts)}
        print(json.dumps(report | {"time": asdict(found), "acceptance": asdict(accepted)}))
        return
    print(f"{len(prompts)} prompts, {args.drafts} drafts a step, {args.threads} threads: {accepted}")
    print(
        f"with drafts {found.ours_ms:.2f} ms a token, without {found.transformers_ms:.2f} ms: "
        f"{found.ratio:.2f} times ({found.least:.2f} to {found.largest:.2f})"
    )


if __name__ == "__main__":
    main()
