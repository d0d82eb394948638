# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The whole decoder, through every way in that NxDI offers, on the real NxDI and on the stand-ins.

Every test runs on whichever of the two this process has: on the stand-ins by default, on the real NxDI with `-m nxdi`.
The oracle is the recorded output of transformers >= 5 (`decoder_cases.py`), one prompt at a time and unpadded.

Tolerance: 1e-4 on float32 logits of order one, as in `test_against_transformers.py`; the head of the tied checkpoint is
its embedding of order one, which makes its logits, and their rounding, eight times as large.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig
from support.compare import assert_close
from support.decoder_cases import CASES, STEPS, Case, recorded
from support.models import load_neuron, neuron_greedy, right_padded
from support.simulated_device import put_on_simulated_device

SEQ_LEN = 160
pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    scratch = tmp_path_factory.mktemp("checkpoints")
    paths: dict[str, Path] = {}

    def get(case: Case) -> Path:
        if case.name not in paths:
            paths[case.name] = case.checkpoint(scratch)
        return paths[case.name]

    return get


def every_case(argument: str = "case") -> Any:
    return pytest.mark.parametrize(argument, CASES, ids=lambda case: case.name)


def check(case: Case, tokens: torch.Tensor, logits: torch.Tensor, rows: Any = slice(None)) -> None:
    """Against the recorded `rows` of the case: one row, or all."""
    expected_tokens, expected_logits = (tensor[rows] for tensor in recorded(case))
    tolerance = 1e-4 * max(1.0, float(expected_logits.std()))
    assert_close(logits, expected_logits, atol=tolerance, label=f"logits of row {rows}")
    assert torch.equal(tokens, expected_tokens), f"greedy tokens of row {rows} differ"


def load(path: str, options: dict[str, Any], simulated: bool) -> NeuronQwen35ForCausalLM:
    model = load_neuron(Path(path), seq_len=SEQ_LEN, **options)
    return put_on_simulated_device(model) if simulated else model


def generate(
    path: str, prompts: list[list[int]], options: dict[str, Any], simulated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through HuggingFaceGenerationAdapter.generate, all prompts as one right-padded batch."""
    return neuron_greedy(load(path, options, simulated), prompts, STEPS)


class Slots:
    """Sequences in the slots of one model: each enters, waits and leaves on its own."""

    def __init__(self, model: NeuronQwen35ForCausalLM) -> None:
        self.model = model
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.lengths: dict[int, int] = {}

    def enter(self, prompts: dict[int, list[int]]) -> None:
        """Context-encode prompts {slot: tokens} in the order given."""
        ids, mask = right_padded(list(prompts.values()))
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        for slot, prompt in prompts.items():
            self.tokens[slot], self.logits[slot], self.lengths[slot] = [], [], len(prompt)
        self._take(list(prompts), self.model(ids, torch.tensor([*prompts]), mask, positions))

    def step(self, chosen: Sequence[int]) -> None:
        """Decode one token of each of `chosen`, in the order given; the other slots wait."""
        positions = torch.tensor([[self.lengths[slot] + len(self.tokens[slot]) - 1] for slot in chosen])
        ids = torch.tensor([[self.tokens[slot][-1]] for slot in chosen])
        mask = (torch.arange(int(positions.max())) < positions).long()
        self._take(chosen, self.model(ids, torch.tensor([*chosen]), mask, positions))

    def _take(self, chosen: Sequence[int], outputs: Any) -> None:
        for slot, logits in zip(chosen, outputs.logits[:, -1], strict=True):
            self.logits[slot].append(logits)
            self.tokens[slot].append(int(logits.argmax()))

    def leave(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        del self.lengths[slot]
        return torch.tensor(self.tokens.pop(slot)), torch.stack(self.logits.pop(slot))


def continuous(
    path: str, prompts: list[list[int]], options: dict[str, Any], seed: int, simulated: bool = False
) -> list[tuple[int, Any]]:
    """(index of the prompt, its tokens and logits) of every prompt twice, under a random schedule of 4 slots."""
    finished = []
    rng = random.Random(seed)
    slots = Slots(load(path, options, simulated))
    waiting = [*range(len(prompts))] * 2
    rng.shuffle(waiting)
    running: dict[int, int] = {}
    while waiting or running:
        free = [slot for slot in range(4) if slot not in running]
        if free and waiting and rng.random() < 0.6:
            entering = rng.sample(free, min(len(free), len(waiting), rng.randint(1, 2)))
            running |= {slot: waiting.pop() for slot in entering}
            slots.enter({slot: prompts[running[slot]] for slot in entering})
        elif running:
            slots.step(rng.sample([*running], rng.randint(1, len(running))))
        for slot in [slot for slot in running if len(slots.tokens[slot]) == STEPS]:
            finished.append((running.pop(slot), slots.leave(slot)))
    return finished


STATIC = {
    "one bucket": dict(batch_size=4),
    "buckets": dict(batch_size=4, enable_bucketing=True, context_encoding_buckets=[16, 64], max_context_length=64),
    "fewer rows than compiled": dict(batch_size=6),
    "logits beside sampled tokens": dict(
        batch_size=4, on_device_sampling_config=OnDeviceSamplingConfig(), output_logits=True
    ),
}
CHUNKS = dict(batch_size=4, prefill_chunk_size=8, enable_bucketing=True)
CONTINUOUS = {
    "one prompt at a time": dict(batch_size=4, ctx_batch_size=1, is_continuous_batching=True),
    "two prompts at a time, buckets": dict(
        batch_size=4,
        ctx_batch_size=2,
        is_continuous_batching=True,
        enable_bucketing=True,
        context_encoding_buckets=[16, 64],
        max_context_length=64,
    ),
    "two rows a step": dict(
        batch_size=2, ctx_batch_size=1, kv_cache_batch_size=4, max_batch_size=4, is_continuous_batching=True
    ),
}


@every_case()
@pytest.mark.parametrize("options", STATIC.values(), ids=STATIC)
def test_a_ragged_batch_generates_what_transformers_generates(
    case: Case, options: dict[str, Any], checkpoint: Callable[[Case], Path]
) -> None:
    check(case, *generate(str(checkpoint(case)), case.prompts(), options))


@every_case()
@pytest.mark.parametrize("options", CONTINUOUS.values(), ids=CONTINUOUS)
def test_rows_that_enter_wait_and_leave_give_what_they_give_alone(
    case: Case, options: dict[str, Any], checkpoint: Callable[[Case], Path]
) -> None:
    finished = continuous(str(checkpoint(case)), case.prompts(), options, seed=0)
    assert sorted(index for index, _ in finished) == [0, 0, 1, 1, 2, 2, 3, 3]
    for index, (tokens, logits) in finished:
        check(case, tokens, logits, index)


@pytest.mark.parametrize("options", [*STATIC.values(), CHUNKS], ids=[*STATIC, "chunks"])
def test_a_batch_on_a_simulated_device_generates_what_transformers_generates(
    options: dict[str, Any], checkpoint: Callable[[Case], Path]
) -> None:
    case = CASES[1]
    check(case, *generate(str(checkpoint(case)), case.prompts(), options, simulated=True))


@pytest.mark.parametrize("options", CONTINUOUS.values(), ids=CONTINUOUS)
def test_rows_on_a_simulated_device_give_what_they_give_alone(
    options: dict[str, Any], checkpoint: Callable[[Case], Path]
) -> None:
    case = CASES[1]
    for index, (tokens, logits) in continuous(str(checkpoint(case)), case.prompts(), options, seed=2, simulated=True):
        check(case, tokens, logits, index)


@every_case()
def test_two_ranks_generate_what_transformers_generates(
    case: Case, checkpoint: Callable[[Case], Path], rank_pool: Any
) -> None:
    path, prompts = str(checkpoint(case)), case.prompts()
    for output in rank_pool(2).call(generate, path, prompts, dict(batch_size=4, tp_degree=2)):
        check(case, *output)
    options = dict(batch_size=4, ctx_batch_size=1, is_continuous_batching=True, tp_degree=2)
    for finished in rank_pool(2).call(continuous, path, prompts, options, seed=1):
        assert len(finished) == 8
        for index, (tokens, logits) in finished:
            check(case, tokens, logits, index)


def test_rows_that_pad_a_batch_write_nowhere(checkpoint: Callable[[Case], Path]) -> None:
    case = CASES[1]
    options = dict(batch_size=4, ctx_batch_size=2, is_continuous_batching=True)
    slots = Slots(load_neuron(checkpoint(case), seq_len=SEQ_LEN, **options))

    def contents(slot: int) -> list[torch.Tensor]:
        state = slots.model.token_generation_model.model.kv_mgr.past_key_values
        return [entry[slot, ..., :SEQ_LEN, :].clone() for entry in state]

    prompts = case.prompts()
    slots.enter({2: prompts[2], 0: prompts[1]})
    before = contents(0), contents(1), contents(2)
    assert not any(entry.any() for entry in before[1]), "an idle slot was written while a prompt was encoded"
    slots.enter({3: prompts[3]})  # one prompt in a batch of two
    slots.step([3])  # one row in a batch of four
    for slot in range(3):
        for i, (entry, kept) in enumerate(zip(contents(slot), before[slot], strict=True)):
            assert_close(entry, kept, label=f"entry {i} of waiting slot {slot}")


@pytest.mark.parametrize("order", [[2, 0], [0, 3], [3, 1, 0, 2]], ids=str)
def test_rows_of_a_static_batch_may_be_in_any_slots(order: list[int], checkpoint: Callable[[Case], Path]) -> None:
    case = CASES[1]
    slots = Slots(load_neuron(checkpoint(case), seq_len=SEQ_LEN, batch_size=4))
    slots.enter({slot: case.prompts()[slot] for slot in order})
    for step in range(STEPS - 1):
        slots.step(order if step % 2 else order[::-1])
    for slot in order:
        check(case, *slots.leave(slot), slot)


@pytest.mark.parametrize("ids", [[0, 0], [-1, 1], [1, 4]])
def test_a_slot_that_does_not_exist_or_is_given_twice_is_an_error(
    ids: list[int], checkpoint: Callable[[Case], Path]
) -> None:
    model = load_neuron(checkpoint(CASES[1]), seq_len=SEQ_LEN, batch_size=4)
    tokens, mask = right_padded([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"seq_ids=.* distinct and in 0\.\.3"):
        model(tokens, torch.tensor(ids), mask, torch.arange(2).expand(2, 2))


def test_bfloat16_weights_leave_state_norms_and_decays_in_float32(checkpoint: Callable[[Case], Path]) -> None:
    model = load_neuron(checkpoint(CASES[1]), torch_dtype=torch.bfloat16, seq_len=SEQ_LEN)
    module = model.models[0].model
    module._apply(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t)  # NxDI's cast, once more
    kept = {n for n, p in module.named_parameters() if p.dtype == torch.float32}
    assert {f"kv_mgr.past_key_values.{2 * i}" for i in model.config.linear_attention_layers} < kept
    assert {n for n, _ in module.named_parameters() if n.endswith(("A_log.weight", "dt_bias.weight"))} < kept
    tokens, _ = neuron_greedy(model, CASES[1].prompts()[3:], 1)
    assert int(tokens) in recorded(CASES[1])[1][3, 0].topk(3).indices


def test_a_saved_configuration_finds_its_checkpoint_again(checkpoint: Callable[[Case], Path], tmp_path: Path) -> None:
    case = CASES[2]
    model = load_neuron(checkpoint(case), seq_len=SEQ_LEN, batch_size=4, enable_bucketing=True)
    model.config.save(str(tmp_path))
    again = NeuronQwen35ForCausalLM(str(tmp_path))
    assert again.config.to_json_string() == model.config.to_json_string()
    again.to_cpu()
    check(case, *neuron_greedy(again, case.prompts(), STEPS))
