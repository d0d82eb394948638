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
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, EngineArgs, SamplingParams

from qwen35 import Qwen35Engine
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.request import Request
from qwen35_vllm.artifacts import load_model
from qwen35_vllm.options import serve_options

SECONDS_TO_READY = 180
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

    def __init__(self, args: argparse.Namespace, port: int) -> None:
        self._args, self._port = args, port

    def tokens_per_second(self, seed: int) -> float:
        args = self._args
        with tempfile.TemporaryDirectory() as directory:
            command = [
                "bench", "serve", "--backend", "vllm", "--model", str(MINI_CHECKPOINT), "--base-url", self.url,
                "--dataset-name", "random", "--random-input-len", str(args.prompt_tokens),
                "--random-output-len", str(args.answer_tokens), "--num-prompts", str(args.requests),
                "--max-concurrency", str(args.rows), "--temperature", "0", "--ignore-eos", "--disable-tqdm",
                "--seed", str(seed), "--save-result", "--result-dir", directory, "--result-filename", "result.json",
            ]  # fmt: skip
            subprocess.run(vllm_command(*command), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            result = json.loads((Path(directory) / "result.json").read_text())
        if result["failed"]:
            raise RuntimeError(f"{result['failed']} requests failed: see the server's output, with --verbose")
        return float(result["output_throughput"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"


def vllm_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = engine_arguments(args)
    command = vllm_command(
        "serve", options["model"], "--dtype", options["dtype"], "--max-model-len", str(options["max_model_len"]),
        "--max-num-seqs", str(options["max_num_seqs"]), "--host", "127.0.0.1", "--port", str(port),
        "--disable-uvicorn-access-log",
    )  # fmt: skip
    output = None if args.verbose else subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=output, stderr=output)
    served = Served(args, port)
    try:
        start = time.monotonic()
        while not answers(f"{served.url}/health"):
            if process.poll() is not None or time.monotonic() - start > SECONDS_TO_READY:
                raise RuntimeError("vllm serve did not come up: see its output, with --verbose")
            time.sleep(0.5)
        yield served
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


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
