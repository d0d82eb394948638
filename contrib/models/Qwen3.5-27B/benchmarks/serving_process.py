# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the mini in a process of its own: started, measured by `vllm bench serve`, and asked what it counts.

Runs in vLLM's environment, see tools/vllm_env.sh.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from qwen35.serving.loading import MINI_CHECKPOINT

SECONDS_TO_READY = 180


class ServingProcess:
    """A server that answers, named by the path of the mini.

    Args:
        pid: of `vllm serve`.
        url: without a path.
    """

    def __init__(self, pid: int, url: str) -> None:
        self.pid, self.url = pid, url

    def counts(self) -> dict[str, float]:
        """vLLM's metrics by their names without `vllm:`, summed over labels; of histograms, sums and counts."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            if not name.endswith(("_bucket", "_created", "_info")):
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def resident_megabytes(self) -> float:
        """Of all its processes; a page that several share counts for each."""
        parents, sizes = {}, {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                fields = path.read_text().rpartition(")")[2].split()  # from the third field on, see proc(5)
                parents[int(path.parent.name)] = int(fields[1])
                sizes[int(path.parent.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        own = {self.pid}
        while more := {pid for pid, parent in parents.items() if parent in own and pid not in own}:
            own |= more
        return sum(sizes.get(pid, 0) for pid in own) / 1e6

    def why_no_pictures(self) -> str | None:
        """What it answers to a request with a picture, if that is an error."""
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (220, 40, 40)).save(file, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": str(MINI_CHECKPOINT), "messages": messages, "max_tokens": 1}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )  # fmt: skip
        try:
            urllib.request.urlopen(request, timeout=120).close()
        except urllib.error.HTTPError as error:
            return str(json.loads(error.read())["error"]["message"])
        return None

    def bench(self, *arguments: str) -> dict[str, Any]:
        """What `vllm bench serve` measures with these arguments.

        Raises:
            RuntimeError: it ends with an error, or requests failed.
        """
        with tempfile.TemporaryDirectory() as directory:
            command = vllm_command(
                "bench", "serve", "--model", str(MINI_CHECKPOINT), "--base-url", self.url, "--disable-tqdm",
                "--save-result", "--result-dir", directory, "--result-filename", "result.json", *arguments,
            )  # fmt: skip
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if ended.returncode:
                raise RuntimeError(f"vllm bench serve ended with status {ended.returncode}:\n{ended.stdout[-2000:]}")
            result: dict[str, Any] = json.loads((Path(directory) / "result.json").read_text())
        if result["failed"]:
            raise RuntimeError(f"{result['failed']} requests failed: see the server's output, with --verbose")
        return result


def vllm_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


@contextlib.contextmanager
def serving(*arguments: str, verbose: bool) -> Iterator[ServingProcess]:
    """A server of the mini with these options, on the loopback address, until the end of the block.

    Raises:
        RuntimeError: it ends, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = vllm_command(
        "serve", str(MINI_CHECKPOINT), "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log",
        *arguments,
    )  # fmt: skip
    output = None if verbose else subprocess.DEVNULL
    # A thread of arithmetic a process: more of them wait for one another where cores are few.
    process = subprocess.Popen(command, stdout=output, stderr=output, env={"OMP_NUM_THREADS": "1", **os.environ})
    server = ServingProcess(process.pid, f"http://127.0.0.1:{port}")
    # Without this SIGTERM would end this process and leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        start = time.monotonic()
        while not _answers(f"{server.url}/health"):
            if process.poll() is not None or time.monotonic() - start > SECONDS_TO_READY:
                raise RuntimeError("vllm serve did not come up: see its output, with --verbose")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
