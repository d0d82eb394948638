# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the loopback address, in a process of its own, and what a test asks it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import openai
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file

from qwen35.serving.loading import MINI_CHECKPOINT

SECONDS_TO_START = 400
SECONDS_TO_END = 300
"""More than it takes on a machine that runs much else. When --shutdown-timeout is out, vLLM leaves clients waiting."""


class Server:
    """A server that answers requests.

    Args:
        process: `vllm serve`.
        port: on 127.0.0.1.
        log: the file of what it says.
        seconds_to_ready: from its start until it answered.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, seconds_to_ready: float) -> None:
        self.process, self.port, self.log, self.seconds_to_ready = process, port, log, seconds_to_ready
        self.url = f"http://127.0.0.1:{port}"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(self.metrics(name).values())

    def metrics(self, name: str, label: str = "engine") -> dict[str, float]:
        """The sums of a metric for each value of a label, as in 'engine="0"'."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = re.findall(rf"^vllm:{name}(?:{{([^}}]*)}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        sums: dict[str, float] = {}
        for labels, value in found:
            key = next((each for each in labels.split(",") if each.startswith(f"{label}=")), "")
            sums[key] = sums.get(key, 0.0) + float(value)
        return sums

    def require_idle(self, seconds: float = 30) -> None:
        """Check that soon no request is running or waiting, and no block, that is no row, is in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        end = time.monotonic() + seconds
        while any(left := {name: self.metric(name) for name in names}.values()):
            assert time.monotonic() < end, f"still in use: {left}"
            time.sleep(0.2)

    def stop(self, seconds: float = 60) -> int:
        """Ask it to end, and wait: its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=seconds)

    def stop_in_the_middle(self, clients: int = 6) -> list[tuple[int, str | None]]:
        """Ask it to end while clients stream long answers, more of them than it has rows.

        Returns:
            Of each client: the chunks it got, and why its answer ended, or the name of the error instead.

        Raises:
            AssertionError: a client waits in vain, or the server does not end as it should, with status 0.
        """
        counts = [0] * clients
        reasons: list[str | None] = [None] * clients

        def read(i: int) -> None:
            options = {"max_tokens": 200, "temperature": 0, "extra_body": {"ignore_eos": True}}
            try:
                for chunk in self.client.completions.create(model="mini", prompt="Once", stream=True, **options):
                    counts[i] += 1
                    reasons[i] = chunk.choices[0].finish_reason
            except (openai.APIError, OSError) as error:
                reasons[i] = type(error).__name__

        readers = [Thread(target=read, args=(i,)) for i in range(clients)]
        for reader in readers:
            reader.start()
        end = time.monotonic() + SECONDS_TO_END
        while sum(count >= 5 for count in counts) < 4:
            assert time.monotonic() < end, counts
            time.sleep(0.02)
        said = len(self.log.read_text())
        self.process.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join(timeout=SECONDS_TO_END)
            assert not reader.is_alive(), "a client waits, until its own time is out"
        status, log = self.process.wait(timeout=SECONDS_TO_END), self.log.read_text()[said:]
        assert status == 0, log[-3000:]
        # On a busy machine vLLM's reader of outputs finds that the engine has ended, and says so in this way.
        assert log.count("Traceback") == log.count("AsyncLLM output_handler failed"), log[-3000:]
        return [*zip(counts, reasons, strict=True)]


@contextmanager
def serve(log: Path, *arguments: str, model: Path = MINI_CHECKPOINT) -> Iterator[Server]:
    """A server of the mini, named "mini", until the end of the block.

    Raises:
        AssertionError: it ends, or does not answer in time; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "mini"]
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            # A thread of arithmetic a process: more of them wait for one another where cores are few.
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    try:
        while not _answers(port):
            state = "ended" if process.poll() is not None else "does not answer"
            waited = time.monotonic() - start
            assert process.poll() is None and waited < SECONDS_TO_START, f"it {state}:\n{log.read_text()[-4000:]}"
            time.sleep(0.2)
        yield Server(process, port, log, time.monotonic() - start)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def spoil_mini(directory: Path) -> int:
    """Copy the mini, with no number in the embedding of its last token, which no other text has; returns its id."""
    shutil.copytree(MINI_CHECKPOINT, directory)
    weights = load_file(directory / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    token = weights[name].shape[0] - 1
    weights[name][token] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return token
