# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens that the model chooses itself, for requests in slots that are not in their order.

The calls are those of AWS's vLLM plugin: no attention mask, rows with the ids of their slots, and top_k, top_p and
temperature for each row. On the real NxDI with `-m nxdi`. The oracle is the recorded output of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig
from support.decoder_cases import CASES, STEPS, recorded
from support.models import load_neuron
from support.simulated_device import put_on_simulated_device

pytestmark = pytest.mark.usefixtures("backend")

MINI = CASES[0]
PROMPTS = MINI.prompts()
GREEDY = [1.0, 1.0, 1.0]  # top_k, top_p, temperature, as the plugin has them for temperature=0
UNIFORM = [256.0, 1.0, 1e4]
"""Near enough: a row that was given these for GREEDY has the right token once in 256 steps."""


@pytest.fixture(scope="module", params=[False, True], ids=["on a CPU", "behind a loaded model"])
def model(request: pytest.FixtureRequest) -> NeuronQwen35ForCausalLM:
    options: dict[str, Any] = dict(
        batch_size=4, ctx_batch_size=1, is_continuous_batching=True, enable_bucketing=True, seq_len=64,
        on_device_sampling_config=OnDeviceSamplingConfig(dynamic=True, deterministic=False),
    )  # fmt: skip
    loaded = load_neuron(MINI.checkpoint(None), **options)  # type: ignore[arg-type] # the mini needs no scratch folder
    return put_on_simulated_device(loaded) if request.param else loaded


def choose(
    model: NeuronQwen35ForCausalLM,
    slots: Sequence[int],
    tokens: Sequence[Sequence[int]],
    first: Sequence[int],
    sampling: Sequence[Sequence[float]],
) -> list[int]:
    """A call of the plugin: rows of as many tokens each, which begin at the positions `first`."""
    positions = torch.tensor([[start + i for i in range(len(row))] for start, row in zip(first, tokens, strict=True)])
    outputs = model(
        torch.tensor(tokens), attention_mask=None, position_ids=positions, seq_ids=torch.tensor(slots),
        sampling_params=torch.tensor(sampling), block_table=torch.empty(0), slot_mapping=torch.empty(0),
        full_context_lens=positions[:, -1:] + 1, computed_context_lens=positions[:, :1], adapter_ids=None,
    )  # fmt: skip
    assert outputs.hidden_states.shape == (len(slots),)  # what the plugin reads
    return [int(token) for token in outputs.hidden_states]


def answers(
    model: NeuronQwen35ForCausalLM, slots: Sequence[int], sampling: Sequence[Sequence[float]]
) -> list[list[int]]:
    """STEPS tokens after each prompt: encoded alone, decoded in the order of the prompts."""
    found = [
        choose(model, [slot], [prompt], [0], [row]) for slot, prompt, row in zip(slots, PROMPTS, sampling, strict=True)
    ]
    for step in range(STEPS - 1):
        first = [len(prompt) + step for prompt in PROMPTS]
        last = [row[-1:] for row in found]
        for row, token in zip(found, choose(model, slots, last, first, sampling), strict=True):
            row.append(token)
    return found


@pytest.mark.parametrize("slots", [[3, 1, 0, 2], [1, 3, 2, 0]])
def test_rows_get_the_tokens_of_transformers_whatever_their_slots(
    model: NeuronQwen35ForCausalLM, slots: list[int]
) -> None:
    assert answers(model, slots, [GREEDY] * 4) == recorded(MINI)[0].tolist()


@pytest.mark.parametrize("greedy", [0, 3])
def test_sampling_parameters_stay_with_their_row(model: NeuronQwen35ForCausalLM, greedy: int) -> None:
    torch.manual_seed(greedy)
    found = answers(model, [2, 0, 3, 1], [GREEDY if row == greedy else UNIFORM for row in range(4)])
    for row, (tokens, expected) in enumerate(zip(found, recorded(MINI)[0].tolist(), strict=True)):
        assert (tokens == expected) == (row == greedy), f"row {row}: {tokens}"


def test_rows_that_wait_do_not_disturb_those_that_decode(model: NeuronQwen35ForCausalLM) -> None:
    expected = recorded(MINI)[0].tolist()
    slots = [3, 0, 1, 2]
    for slot, prompt in zip(slots, PROMPTS, strict=True):
        choose(model, [slot], [prompt], [0], [GREEDY])
    for step in range(STEPS - 1):
        for rows in ([2], [3, 0], [1]):  # none beside another but the second and third, in falling order of slots
            first = [len(PROMPTS[row]) + step for row in rows]
            chosen = choose(
                model,
                [slots[row] for row in rows],
                [[expected[row][step]] for row in rows],
                first,
                [GREEDY] * len(rows),
            )
            assert chosen == [expected[row][step + 1] for row in rows]
