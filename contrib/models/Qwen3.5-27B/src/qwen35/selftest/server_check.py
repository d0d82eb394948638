# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's server on the mini: it starts, answers with the recorded text, and ends when asked to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..device_settings import DeviceSettings, write_settings
from ..nxdi import NXDI_AVAILABLE
from ..serving.loading import MINI_CHECKPOINT
from .outcome import Absent, CheckFailed, Values
from .recorded import recorded

SECONDS_TO_END = 90
SECONDS_TO_ANSWER = 300


def run_server_check(tp_degree: int, kernels: dict[str, Any], workdir: Path) -> Values:
    """Start `vllm serve`, ask it, and end it; it has the settings that a user would give it.

    Its own start has no limit here: it compiles, and the check has one.

    Raises:
        Absent: vLLM is not installed.
        CheckFailed: the server ended, or said something else.
    """
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        raise Absent("vLLM is not installed here: tools/vllm_env.sh installs it") from None
    settings = workdir / "settings.json"
    write_settings(settings, DeviceSettings(kernels, made={"by": "qwen35 selftest, for its server"}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"qwen35": {"settings": str(settings), "cache_dir": str(workdir / "compiled")}}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MINI_CHECKPOINT)]
    command += ["--served-model-name", "mini", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    command += ["--max-num-seqs", "2", "--dtype", "bfloat16" if NXDI_AVAILABLE else "float32"]
    # On a CPU the server has one process, and so one rank.
    command += ["--tensor-parallel-size", str(tp_degree if NXDI_AVAILABLE else 1)]
    start = time.monotonic()
    server = subprocess.Popen([*command, "--additional-config", json.dumps(own)], env=os.environ)
    try:
        _wait_until_ready(server, f"http://127.0.0.1:{port}/health")
        ready_s = time.monotonic() - start
        _require_answer(f"http://127.0.0.1:{port}/v1/completions")
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"the server did not end within {SECONDS_TO_END} s of SIGTERM") from None
    finally:
        server.kill()
        server.wait()
    return {"vllm": installed, "ready_s": ready_s}


def _wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    while True:
        if server.poll() is not None:
            raise CheckFailed(f"the server ended with status {server.returncode} before it answered: see log.txt")
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)


def _require_answer(address: str) -> None:
    asked = recorded().short[0]
    body = {"model": "mini", "prompt": list(asked.prompt), "max_tokens": len(asked.answer), "temperature": 0}
    body |= {"return_token_ids": True}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as response:
            choice = json.loads(response.read())["choices"][0]
    except urllib.error.HTTPError as error:
        raise CheckFailed(f"the server answered {error.code}: {error.read().decode(errors='replace')[:300]}") from None
    tokens = choice.get("token_ids")
    if tokens != [*asked.answer]:
        raise CheckFailed(f"the server says {choice.get('text')!r} {tokens}, transformers {[*asked.answer]}")
