# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of the mini through vLLM's server and vLLM's LLM class, and of `Qwen35Engine` alone.

All three have the same configuration of the model, random prompts of the same length, greedy answers of the same
length, and as many requests at a time as rows. They run in turn, so that other work on the machine falls on all; the
server, which is idle meanwhile, is measured by `vllm bench serve`. `--profile` tells where a step's time goes instead.

Runs in vLLM's environment, see tools/vllm_env.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm import LLM, EngineArgs, SamplingParams

from qwen35 import Qwen35Engine
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.request import Request
from qwen35_vllm.artifacts import load_model
from qwen35_vllm.options import serve_options
from serving_process import ServingProcess, serving

Rates = dict[str, list[float]]


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(MINI_CHECKPOINT),
        "dtype": "float32",
        "max_model_len": args.prompt_tokens + args.answer_tokens + 16,
        "max_num_seqs": args.rows,
    }


def prompts_of(args: argparse.Namespace, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 900, (args.requests, args.prompt_tokens), generator=generator).tolist()


class Engine:
    """Our own engine, with the configuration that the worker gives its model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        config = EngineArgs(**engine_arguments(args)).create_engine_config()
        self._engine = Qwen35Engine(load_model(config, serve_options(config), lambda _: None))

    def tokens_per_second(self, seed: int) -> float:
        for prompt in prompts_of(self._args, seed):
            self._engine.add(Request(prompt, max_new_tokens=self._args.answer_tokens))
        start, tokens = time.perf_counter(), 0
        while self._engine.has_work:
            tokens += len(self._engine.step())
        return tokens / (time.perf_counter() - start)


class Offline:
    """vLLM's LLM class."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.llm = LLM(**engine_arguments(args))

    def tokens_per_second(self, seed: int) -> float:
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(self._args, seed)]
        params = SamplingParams(temperature=0, max_tokens=self._args.answer_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - start)


class Served:
    """`vllm serve` on the loopback address, and `vllm bench serve` against it."""

    def __init__(self, args: argparse.Namespace, process: ServingProcess) -> None:
        self._args, self._process = args, process

    def tokens_per_second(self, seed: int) -> float:
        args = self._args
        result = self._process.bench(
            "--backend", "vllm", "--dataset-name", "random", "--random-input-len", str(args.prompt_tokens),
            "--random-output-len", str(args.answer_tokens), "--num-prompts", str(args.requests),
            "--max-concurrency", str(args.rows), "--temperature", "0", "--ignore-eos", "--seed", str(seed),
        )  # fmt: skip
        return float(result["output_throughput"])


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[Served]:
    options = engine_arguments(args)
    names = ("dtype", "max_model_len", "max_num_seqs")
    arguments = [word for name in names for word in (f"--{name.replace('_', '-')}", str(options[name]))]
    with serving(*arguments, verbose=args.verbose) as process:
        yield Served(args, process)


def compare(args: argparse.Namespace) -> Rates:
    """Tokens a second of each side, a number a round, after one round that warms all up."""
    rates: Rates = defaultdict(list)
    with server(args) as served:
        sides = {"engine": Engine(args), "offline": Offline(args), "served": served}
        for seed in range(args.rounds + 1):
            for name, side in sides.items():
                rate = side.tokens_per_second(seed)
                if seed:
                    rates[name].append(rate)
    return dict(rates)


STAGES = {
    # What is timed, by the object that has it and its name; the first three on the device's thread.
    "model": ("runner", "forward"),
    "sampling": ("runner", "sample"),
    "schedule": ("scheduler", "schedule"),
    "hand over": ("worker", "execute_model"),
    "update": ("scheduler", "update_from_output"),
    "text": ("output_processor", "process_outputs"),
}


def profile(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each stage a step of the LLM class, in one process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    offline = Offline(args)
    engine: Any = offline.llm.llm_engine
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    owners = {
        "runner": worker._runner,
        "worker": worker,
        "scheduler": core.scheduler,
        "output_processor": engine.output_processor,
    }
    offline.tokens_per_second(0)
    spent: dict[str, float] = defaultdict(float)
    steps = 0

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            nonlocal steps
            steps += name == "model"
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    for stage, (owner, name) in STAGES.items():
        setattr(owners[owner], name, timed(stage, getattr(owners[owner], name)))
    start = time.perf_counter()
    offline.tokens_per_second(1)
    spent["whole step"] = time.perf_counter() - start
    return {stage: 1e3 * seconds / steps for stage, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="requests at a time")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="milliseconds a step, by stage, instead")
    parser.add_argument("--verbose", action="store_true", help="show what the server prints")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if args.profile:
        stages = profile(args)
        print(json.dumps(stages) if args.json else "\n".join(f"{name:>12} {ms:8.2f} ms" for name, ms in stages.items()))
        return
    rates = compare(args)
    if args.json:
        print(json.dumps(rates))
        return
    print(f"the mini, {args.rows} at a time, {args.prompt_tokens} + {args.answer_tokens} tokens, {args.rounds} rounds")
    for name, each in rates.items():
        ratios = [rate / engine for rate, engine in zip(each, rates["engine"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} of the engine's ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:>8} {statistics.median(each):8.0f} tokens/s  {spread}")


if __name__ == "__main__":
    main()
