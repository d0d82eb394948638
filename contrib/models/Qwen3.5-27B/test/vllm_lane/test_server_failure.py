# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What clients are told when a request fails inside `vllm serve`, and when the server itself ends.

The checkpoint is the mini with one embedding that is no number, of a token that nobody else uses.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import openai
from vllm import envs

from qwen35_vllm.platform import SHUTDOWN_SECONDS
from support.vllm_server import serve, spoil_mini

pytestmark = pytest.mark.vllm

PROMPTS = ["The capital of France is", "2 + 2 =", "The capital of Italy is"]


def test_the_client_of_a_request_that_fails_is_told_and_the_others_get_their_answers(tmp_path: Path) -> None:
    """Until SIGTERM, which without --shutdown-timeout aborts the answers of all; they are told so."""
    token = spoil_mini(tmp_path / "spoiled")
    arguments = ("--max-model-len", "512", "--max-num-seqs", "4", "--dtype", "float32")
    with serve(tmp_path / "log", *arguments, model=tmp_path / "spoiled") as server:

        def answer(prompt: str | list[int]) -> str:
            options = {"max_tokens": 24, "temperature": 0}
            return server.client.completions.create(model="mini", prompt=prompt, **options).choices[0].text

        alone = [answer(prompt) for prompt in PROMPTS]
        assert all(alone)
        with ThreadPoolExecutor(5) as clients:
            for _ in range(3):
                failing = [clients.submit(answer, [5, 6, token, 7]) for _ in range(2)]
                others = [clients.submit(answer, prompt) for prompt in PROMPTS]
                for client in failing:
                    with pytest.raises(openai.InternalServerError):
                        client.result()
                assert [client.result() for client in others] == alone
        server.require_idle()
        if SHUTDOWN_SECONDS in envs.environment_variables:
            assert {reason for _, reason in server.stop_in_the_middle()} == {"abort"}
        else:  # vLLM 0.23 kills its engine at once, and streaming clients wait
            assert server.stop() == 0
    log = (tmp_path / "log").read_text()
    assert "logits are nan or infinite" in log
