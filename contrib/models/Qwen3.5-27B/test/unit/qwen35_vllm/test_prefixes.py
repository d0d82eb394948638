# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a scheduler plans steps ahead is what a worker can do later, in the order of the steps. Needs no vLLM.

The worker here is a dictionary of what each block stands for, and does the plans some steps late.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35 import NeuronQwen35ForCausalLM
from qwen35.serving.prefix_cache import Medium
from qwen35_vllm import prefixes
from qwen35_vllm.options import ConfigurationRefused, ServeOptions
from qwen35_vllm.prefixes import PrefixBudget, PrefixPlanner, StepPlan, prefix_budget
from support.models import load_neuron, save_checkpoint

BLOCK = 4


def planner_of(blocks: int) -> PrefixPlanner:
    return PrefixPlanner(PrefixBudget(BLOCK, 1, blocks))


@dataclass
class Scheduler:
    """Rows of a planner, whose steps are taken in as they are decided."""

    planner: PrefixPlanner
    prompts: dict[str, Sequence[int]] = field(default_factory=dict)

    def start(self, request: str, prompt: Sequence[int], salt: str | None = None) -> int:
        """A request gets a row; how many of its tokens are restored."""
        chain = self.planner.chain(request, prompt, (), salt)
        known = self.planner.known(chain, len(prompt))
        self.planner.begin(request, chain, known)
        self.prompts[request] = prompt
        return len(known) * BLOCK

    def step(self, **tokens: int) -> StepPlan:
        """The plan of a step after which rows have so many tokens."""
        for request, count in tokens.items():
            self.planner.encode(request, count)
        return self.planner.take_plan()


def test_blocks_are_stored_in_the_step_that_completes_them_and_restored_before_the_last_token() -> None:
    scheduler = Scheduler(planner_of(8))
    assert scheduler.start("a", range(9)) == 0
    plans = [scheduler.step(a=3), scheduler.step(a=4), scheduler.step(a=9), scheduler.step(a=10)]
    assert [[*plan.stores.get("a", {})] for plan in plans] == [[], [4], [8], []]
    assert not any(plan.restores or plan.drops for plan in plans)
    first, second = plans[1].stored + plans[2].stored
    for request, prompt, restored in (("b", range(8), [first]), ("c", range(9), [first, second]), ("d", range(4), [])):
        assert scheduler.start(request, prompt) == BLOCK * len(restored)
        plan = scheduler.step(**{request: len(prompt)})
        assert plan.restores.get(request, []) == restored and not plan.stores


def test_an_answer_that_is_encoded_again_is_not_stored() -> None:
    scheduler = Scheduler(planner_of(8))
    scheduler.start("a", range(6))
    assert [*scheduler.step(a=20).stores["a"]] == [4]
    assert scheduler.planner.requests == {"a"}, "its chain, until it ends"
    scheduler.planner.end("a")
    assert scheduler.planner.requests == set()


def test_a_resumed_row_may_be_restored_up_to_the_end_of_its_prompt() -> None:
    scheduler = Scheduler(planner_of(8))
    scheduler.start("a", range(8))
    scheduler.step(a=8)
    chain = scheduler.planner.chain("a", range(8), (), None)
    assert [len(scheduler.planner.known(chain, tokens)) for tokens in (8, 9, 30)] == [1, 2, 2]


def test_what_is_dropped_in_the_step_that_stores_it_is_neither() -> None:
    scheduler = Scheduler(planner_of(2))
    scheduler.start("a", range(8))
    scheduler.start("b", range(100, 108))
    plan = scheduler.step(a=8, b=8)
    assert not plan.drops and [*plan.stores["b"]] == [4, 8] and not plan.stores["a"]
    assert {*plan.stored} == {*scheduler.planner.index}


def test_salts_and_media_are_prompts_of_their_own() -> None:
    planner = planner_of(8)
    chains = [
        planner.chain("a", range(8), (), None),
        planner.chain("b", range(8), (), ""),
        planner.chain("c", range(8), (), "x"),
        planner.chain("d", range(8), (), "x\ud800"),
        planner.chain("e", range(8), [Medium(2, b"one")], None),
        planner.chain("f", range(8), [Medium(3, b"one")], None),
        planner.chain("g", range(8), [Medium(2, b"two")], None),
    ]
    assert len({key for chain in chains for key in chain.keys}) == 2 * len(chains)
    late = planner.chain("h", range(8), [Medium(6, b"one")], None)
    assert late.keys[0] == chains[0].keys[0] and late.keys[1] != chains[0].keys[1]
    assert planner.chain("i", range(8), (), "x").keys == chains[2].keys


def test_a_prompt_that_grows_is_hashed_anew() -> None:
    planner = planner_of(8)
    prompt = [*range(6)]
    assert len(planner.chain("a", prompt, (), None).keys) == 1
    prompt += range(6, 13)
    assert planner.chain("a", prompt, (), None).keys == planner.chain("b", range(13), (), None).keys


def test_rows_that_are_being_encoded_store_nothing_after_a_reset() -> None:
    scheduler = Scheduler(planner_of(8))
    scheduler.start("a", range(12))
    (key,) = scheduler.step(a=4).stored
    scheduler.planner.reset()
    plan = scheduler.step(a=12)
    assert plan == StepPlan(drops={key}) and not len(scheduler.planner.index)
    assert scheduler.start("b", range(12)) == 0
    assert [*scheduler.step(b=12).stores["b"]] == [4, 8, 12]


class Worker:
    """Does plans in order; a block is the tokens that it stands for. What `fails` says so of is not stored."""

    def __init__(self, fails: random.Random | None) -> None:
        self.blocks: dict[bytes, list[int]] = {}
        self.lost: set[bytes] = set()
        self._fails = fails

    def run(self, plan: StepPlan, prompts: dict[str, Sequence[int]], capacity: int) -> list[bytes]:
        """Returns what was not stored."""
        for request, keys in plan.restores.items():
            for i, key in enumerate(keys):
                if key not in self.lost:
                    assert self.blocks[key] == [*prompts[request][: (i + 1) * BLOCK]], "another prompt's"
        for key in plan.drops:
            self.blocks.pop(key, None)
        missing = []
        for request, ends in plan.stores.items():
            for end, key in ends.items():
                if self._fails is not None and self._fails.random() < 0.2:
                    missing.append(key)
                else:
                    self.blocks[key] = [*prompts[request][:end]]
                    self.lost.discard(key)
        self.lost.update(missing)
        assert len(self.blocks) <= capacity
        return missing


@given(st.integers(0, 1 << 30), st.booleans())
def test_a_worker_some_steps_late_has_what_is_restored_and_nothing_that_is_forgotten(seed: int, fails: bool) -> None:
    rng = random.Random(seed)
    capacity = rng.randint(1, 8)
    scheduler, worker = Scheduler(planner_of(capacity)), Worker(rng if fails else None)
    shared = [[rng.randrange(3) for _ in range(30)] for _ in range(2)]
    queued: deque[StepPlan] = deque()
    running: dict[str, int] = {}

    def work() -> None:
        scheduler.planner.lose(worker.run(queued.popleft(), scheduler.prompts, capacity))

    for number in range(rng.randint(1, 25)):
        tokens: dict[str, int] = {}
        for _ in range(rng.randint(0, 2)):
            prompt = [*rng.choice(shared)[: rng.randint(0, 30)], rng.randrange(3)]
            request = f"r{number}-{len(running)}"
            running[request] = scheduler.start(request, prompt)
            tokens[request] = running[request] + 1
        for request in [*running]:
            if rng.random() < 0.7:
                tokens[request] = running[request] + rng.randint(1, 12)
            elif rng.random() < 0.2:  # aborted, before what it was to store, or after
                scheduler.planner.end(request)
                del running[request]
                tokens.pop(request, None)
        running |= tokens
        queued.append(scheduler.step(**tokens))
        if rng.random() < 0.1:
            scheduler.planner.reset()
        while len(queued) > rng.randint(0, 2):
            work()
    while queued:
        work()
    assert {*worker.blocks} - scheduler.step().drops == {*scheduler.planner.index}
    for request in running:
        scheduler.planner.end(request)
    assert not scheduler.planner.requests


def model_of(path: Path, **options: Any) -> NeuronQwen35ForCausalLM:
    save_checkpoint(path)
    return load_neuron(path, **{"seq_len": 64, "batch_size": 2, "is_continuous_batching": True, **options})


def test_a_budget_is_so_many_blocks_as_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tmp_path, prefill_chunk_size=16)
    budget = prefix_budget(model, ServeOptions(prefix_cache_bytes=1 << 20), 1)
    assert budget is not None and budget.blocks == (1 << 20) // budget.block_nbytes and budget.block_tokens == 16
    entries = [entry for rank in model.cache_entries() for entry in rank]
    states = sum(entry[0].nbytes for i, entry in enumerate(entries) if i < 6)  # three DeltaNet layers, then attention
    token = sum(entry[0, :, 0].nbytes for entry in entries[6:])
    assert budget.block_nbytes == states + 16 * token
    larger = prefix_budget(model, ServeOptions(prefix_cache_bytes=1 << 20, prefix_block_tokens=48), 1)
    assert larger == PrefixBudget(48, states + 48 * token, (1 << 20) // (states + 48 * token))
    monkeypatch.setattr(prefixes.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}.__getitem__)
    assert prefix_budget(model, ServeOptions(), 2).blocks == (1 << 28) // budget.block_nbytes  # type: ignore[union-attr]
    assert prefix_budget(model, ServeOptions(), 0).blocks == (1 << 29) // budget.block_nbytes  # type: ignore[union-attr]
    monkeypatch.setattr(prefixes.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 30}.__getitem__)
    assert prefix_budget(model, ServeOptions(), 2).blocks == (16 << 30) // budget.block_nbytes  # type: ignore[union-attr]
    monkeypatch.setattr(prefixes.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 8}.__getitem__)
    assert prefix_budget(model, ServeOptions(), 1) is None


def test_nothing_is_kept_where_nothing_is_asked_for_or_can_be(tmp_path: Path) -> None:
    assert prefix_budget(model_of(tmp_path, prefill_chunk_size=16), ServeOptions(prefix_cache_bytes=0), 1) is None
    assert prefix_budget(model_of(tmp_path), ServeOptions(), 1) is None


@pytest.mark.parametrize(
    ("chunk", "options", "told"),
    [
        (
            16,
            {"prefix_cache_bytes": 9},
            "prefix_cache_bytes=9 holds no block: one of 16 tokens takes {size} bytes; ",
        ),
        (
            16,
            {"prefix_block_tokens": 24},
            "prefix_block_tokens=24 must be a multiple of prefill_chunk_size=16 ",
        ),
        (
            16,
            {"prefix_block_tokens": 64},
            "prefix_block_tokens=64 must be a multiple of prefill_chunk_size=16 ",
        ),
        (
            None,
            {"prefix_cache_bytes": 9},
            "prefix_cache_bytes=9: prompts of up to 64 tokens are encoded in one",
        ),
        (None, {"prefix_block_tokens": 16}, "prefix_block_tokens=16: prompts of up to 64 tokens are encoded in one"),
    ],
)
def test_what_a_model_cannot_have_is_refused(
    chunk: int | None, options: dict[str, int], told: str, tmp_path: Path
) -> None:
    model = model_of(tmp_path, prefill_chunk_size=chunk)
    if "{size}" in told:
        told = told.format(size=prefix_budget(model, ServeOptions(), 1).block_nbytes)  # type: ignore[union-attr]
    with pytest.raises(ConfigurationRefused) as refused:
        prefix_budget(model, ServeOptions(**options), 1)
    assert told in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}, {"torch_dtype": torch.bfloat16}], ids=str)
def test_a_block_is_counted_before_the_model_is_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    from qwen35.serving.prefix_cache import BlockStore, block_nbytes

    save_checkpoint(tmp_path, mtp=True)
    model = load_neuron(tmp_path, seq_len=64, prefill_chunk_size=16, num_speculative_tokens=2, **options)
    store = BlockStore(model, 32)
    store.read(0, b"key", 32)
    (block,) = store._blocks.values()
    kept = sum(tensor.nbytes for tensor in (*block.states, *block.key_values))
    assert kept == store.nbytes == store.block_nbytes == block_nbytes(model, 32)
