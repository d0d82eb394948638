# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The whole decoder, through every way in that NxDI offers, on the real NxDI and on the stand-ins.

Every test runs on whichever of the two this process has: on the stand-ins by default, on the real NxDI with `-m nxdi`.
The oracle is the recorded output of transformers >= 5 (`decoder_cases.py`), one prompt at a time and unpadded.

Tolerance: 1e-4 on float32 logits of order one, as in `test_parity_model.py`; the head of the tied checkpoint is its
embedding of order one, which makes its logits, and their rounding, eight times as large.
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


def load(path: str, options: dict[str, Any], on_device: bool) -> NeuronQwen35ForCausalLM:
    model = load_neuron(Path(path), seq_len=SEQ_LEN, **options)
    return put_on_simulated_device(model) if on_device else model


def generate(
    path: str, prompts: list[list[int]], options: dict[str, Any], on_device: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through HuggingFaceGenerationAdapter.generate, all prompts as one right-padded batch."""
    return neuron_greedy(load(path, options, on_device), prompts, STEPS)


class Lines:
    """Sequences on the lines of one model, each entering, waiting and leaving as it likes."""

    def __init__(self, model: NeuronQwen35ForCausalLM) -> None:
        self.model = model
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.lengths: dict[int, int] = {}

    def enter(self, prompts: dict[int, list[int]]) -> None:
        """Context-encode prompts {line: tokens} in the order given."""
        ids, mask = right_padded(list(prompts.values()))
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        for line, prompt in prompts.items():
            self.tokens[line], self.logits[line], self.lengths[line] = [], [], len(prompt)
        self._take(list(prompts), self.model(ids, torch.tensor([*prompts]), mask, positions))

    def step(self, lines: Sequence[int]) -> None:
        """Decode one token of each of `lines`, in the order given; the other lines wait."""
        positions = torch.tensor([[self.lengths[line] + len(self.tokens[line]) - 1] for line in lines])
        ids = torch.tensor([[self.tokens[line][-1]] for line in lines])
        mask = (torch.arange(int(positions.max())) < positions).long()
        self._take(lines, self.model(ids, torch.tensor([*lines]), mask, positions))

    def _take(self, lines: Sequence[int], outputs: Any) -> None:
        for line, logits in zip(lines, outputs.logits[:, -1], strict=True):
            self.logits[line].append(logits)
            self.tokens[line].append(int(logits.argmax()))

    def leave(self, line: int) -> tuple[torch.Tensor, torch.Tensor]:
        del self.lengths[line]
        return torch.tensor(self.tokens.pop(line)), torch.stack(self.logits.pop(line))


def continuous(
    path: str, prompts: list[list[int]], options: dict[str, Any], seed: int, on_device: bool = False
) -> list[tuple[int, Any]]:
    """(index of the prompt, its tokens and logits) of every prompt twice, under a random schedule of 4 lines."""
    finished = []
    rng = random.Random(seed)
    lines = Lines(load(path, options, on_device))
    waiting = [*range(len(prompts))] * 2
    rng.shuffle(waiting)
    running: dict[int, int] = {}
    while waiting or running:
        free = [line for line in range(4) if line not in running]
        if free and waiting and rng.random() < 0.6:
            entering = rng.sample(free, min(len(free), len(waiting), rng.randint(1, 2)))
            running |= {line: waiting.pop() for line in entering}
            lines.enter({line: prompts[running[line]] for line in entering})
        elif running:
            lines.step(rng.sample([*running], rng.randint(1, len(running))))
        for line in [line for line in running if len(lines.tokens[line]) == STEPS]:
            finished.append((running.pop(line), lines.leave(line)))
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
def test_a_batch_on_a_device_generates_what_transformers_generates(
    options: dict[str, Any], checkpoint: Callable[[Case], Path]
) -> None:
    case = CASES[1]
    check(case, *generate(str(checkpoint(case)), case.prompts(), options, on_device=True))


@pytest.mark.parametrize("options", CONTINUOUS.values(), ids=CONTINUOUS)
def test_rows_on_a_device_give_what_they_give_alone(
    options: dict[str, Any], checkpoint: Callable[[Case], Path]
) -> None:
    case = CASES[1]
    for index, (tokens, logits) in continuous(str(checkpoint(case)), case.prompts(), options, seed=2, on_device=True):
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


def test_rows_that_fill_a_batch_up_write_nowhere(checkpoint: Callable[[Case], Path]) -> None:
    case = CASES[1]
    options = dict(batch_size=4, ctx_batch_size=2, is_continuous_batching=True)
    lines = Lines(load_neuron(checkpoint(case), seq_len=SEQ_LEN, **options))

    def contents(line: int) -> list[torch.Tensor]:
        state = lines.model.token_generation_model.model.kv_mgr.past_key_values
        return [entry[line, ..., :SEQ_LEN, :].clone() for entry in state]

    prompts = case.prompts()
    lines.enter({2: prompts[2], 0: prompts[1]})
    before = contents(0), contents(1), contents(2)
    assert not any(entry.any() for entry in before[1]), "an idle line was written while a prompt was encoded"
    lines.enter({3: prompts[3]})  # one prompt in a batch of two
    lines.step([3])  # one row in a batch of four
    for line in range(3):
        for i, (entry, kept) in enumerate(zip(contents(line), before[line], strict=True)):
            assert_close(entry, kept, label=f"entry {i} of waiting line {line}")


@pytest.mark.parametrize("order", [[2, 0], [0, 3], [3, 1, 0, 2]], ids=str)
def test_rows_of_a_static_batch_may_sit_on_any_lines(order: list[int], checkpoint: Callable[[Case], Path]) -> None:
    case = CASES[1]
    lines = Lines(load_neuron(checkpoint(case), seq_len=SEQ_LEN, batch_size=4))
    lines.enter({line: case.prompts()[line] for line in order})
    for step in range(STEPS - 1):
        lines.step(order if step % 2 else order[::-1])
    for line in order:
        check(case, *lines.leave(line), line)


@pytest.mark.parametrize("ids", [[0, 0], [-1, 1], [1, 4]])
def test_a_line_that_is_not_there_or_is_given_twice_is_an_error(
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
