# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Rows with and without images in one decoder, on the real NxDI and on the stand-ins (see `test_decoder.py`).

The oracle is the recorded output of transformers >= 5; tolerance 1e-4 on float32 logits of order one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.compare import assert_close
from support.decoder_cases import STEPS, recorded_tensors
from support.simulated_device import put_on_simulated_device
from support.vl_cases import EXAMPLE, greedy, load, media, save_vl_checkpoint

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vision-language")
    save_vl_checkpoint(path)
    return str(path)


def check(tokens: torch.Tensor, logits: torch.Tensor, rows: Any = slice(None)) -> None:
    expected_tokens, expected_logits = (tensor[rows] for tensor in recorded_tensors("vision-language"))
    assert_close(logits, expected_logits, atol=1e-4, label=f"logits of row {rows}")
    assert torch.equal(tokens, expected_tokens)


def generate(path: str, options: dict[str, Any], simulated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    model: Any = load(path, **options)
    return greedy(put_on_simulated_device(model) if simulated else model, EXAMPLE, STEPS)


@pytest.mark.parametrize("simulated", [False, True], ids=["CPU", "simulated device"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(batch_size=5),
        dict(enable_bucketing=True, context_encoding_buckets=[16, 64], max_context_length=64),
        dict(ctx_batch_size=1, is_continuous_batching=True),
        dict(ctx_batch_size=2, is_continuous_batching=True),
        dict(prefill_chunk_size=8, enable_bucketing=True),
    ],
    ids=[
        "one bucket",
        "fewer rows than compiled",
        "buckets",
        "one prompt at a time",
        "two prompts at a time",
        "chunks",
    ],
)
def test_a_ragged_batch_with_images_generates_what_transformers_generates(
    options: dict[str, Any], simulated: bool, path: str
) -> None:
    check(*generate(path, options, simulated))


def test_two_ranks_generate_what_transformers_generates(path: str, rank_pool: Callable[[int], Any]) -> None:
    for output in rank_pool(2).call(generate, path, dict(tp_degree=2)):
        check(*output)


@pytest.mark.parametrize("simulated", [False, True], ids=["CPU", "simulated device"])
def test_rows_with_images_enter_and_leave_beside_rows_without(simulated: bool, path: str) -> None:
    model: Any = load(path, ctx_batch_size=1, is_continuous_batching=True)
    model = put_on_simulated_device(model) if simulated else model
    tokens, logits = recorded_tensors("vision-language")

    def enter(slot: int) -> None:
        ids = torch.tensor([EXAMPLE[slot].ids])
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        output = model(ids, torch.tensor([slot]), torch.ones_like(ids), positions, **media([EXAMPLE[slot]]))
        assert_close(output.logits[0, -1], logits[slot, 0], atol=1e-4, label=f"prompt of slot {slot}")

    taken = [0, 0, 0]
    for entering, stepping in (([2, 0], [2, 0]), ([1], [1, 0, 2]), ([], [0, 1]), ([0], [0, 2])):
        for slot in entering:
            enter(slot)
            taken[slot] = 0
        steps = [taken[slot] for slot in stepping]
        ids = tokens[stepping, steps].unsqueeze(1)
        positions = torch.tensor([[len(EXAMPLE[slot].ids) + n] for slot, n in zip(stepping, steps, strict=True)])
        mask = (torch.arange(int(positions.max())) < positions).long()
        output = model(ids, torch.tensor(stepping), mask, positions)
        for row, slot in enumerate(stepping):
            taken[slot] += 1
            assert_close(output.logits[row, -1], logits[slot, taken[slot]], atol=1e-4, label=f"step of slot {slot}")
