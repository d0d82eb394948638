# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine in this process, over our worker and a random checkpoint, and what a test asks it.

Needs vLLM, and VLLM_ENABLE_V1_MULTIPROCESSING=0 before it is imported: `test/vllm_lane/conftest.py` sees to both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm import EngineArgs, SamplingParams
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from qwen35.serving.prefix_cache import BlockStore
from qwen35_vllm import worker
from qwen35_vllm.prefixes import PrefixPlanner
from support import vl_cases
from support.models import save_checkpoint
from support.simulated_device import put_on_simulated_device
from support.speculation import let_head_foretell

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def save_served_checkpoint(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random checkpoint that vLLM takes for a Qwen3.5: its text configuration nested, as published ones have it."""
    save_checkpoint(path, seed, **overrides)
    nest_config(path)
    return path


def save_served_vl_checkpoint(path: Path, branch: float = 1.0) -> Path:
    """A random checkpoint with a vision encoder and an MTP head, whose images are of 4 to 16 tokens.

    Args:
        branch: of less than one, how strong all but the last token is, which the head then foretells; see
            `let_head_foretell`.
    """
    vl_cases.save_vl_checkpoint(path, mtp=True)
    if branch < 1:
        let_head_foretell(path, branch)
    sizes = vl_cases.VISION
    factor = sizes["patch_size"] * sizes["spatial_merge_size"]
    settings = {
        "size": {"shortest_edge": 4 * factor**2, "longest_edge": 16 * factor**2},
        "patch_size": sizes["patch_size"],
        "temporal_patch_size": sizes["temporal_patch_size"],
        "merge_size": sizes["spatial_merge_size"],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def nest_config(path: Path) -> None:
    """Let a checkpoint of text alone have the config.json of published ones. vLLM 0.23 drafts for no other."""
    text = json.loads((path / "config.json").read_text())
    text.pop("architectures")
    config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "dtype": "float32",
        "text_config": text,
    }
    (path / "config.json").write_text(json.dumps(config))


@contextmanager
def engine_of(path: Path, qwen35: Mapping[str, Any] | None = None, **options: Any) -> Iterator[LLMEngine]:
    """An engine as `make_engine` makes it, until the end of the block, where it must have nothing left."""
    engine = make_engine(path, qwen35, **options)
    try:
        yield engine
        require_no_row_left(engine)
    finally:
        close(engine)


def make_engine(path: Path, qwen35: Mapping[str, Any] | None = None, **options: Any) -> LLMEngine:
    """An engine of token ids: requests have no text."""
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "additional_config": {"qwen35": dict(qwen35 or {})},
        **options,
    }
    return LLMEngine.from_engine_args(EngineArgs(model=str(path), **arguments))


def worker_of(engine: LLMEngine) -> worker.Qwen35Worker:
    """The worker of an engine of this process."""
    found = engine.model_executor.driver_worker.worker
    assert isinstance(found, worker.Qwen35Worker)
    return found


def store_of(engine: LLMEngine) -> BlockStore:
    """The blocks of prompts that the worker of an engine keeps."""
    store = worker_of(engine)._runner.prefixes
    assert store is not None, "it reuses prefixes"
    return store


def planner_of(engine: LLMEngine) -> PrefixPlanner:
    """What the scheduler of an engine knows of them."""
    core: Any = engine.engine_core.engine_core
    planner = core.scheduler.connector.planner
    assert isinstance(planner, PrefixPlanner), "it reuses prefixes"
    return planner


def close(engine: LLMEngine) -> None:
    """End an engine of this process, and its thread."""
    engine.engine_core.shutdown()


@contextmanager
def two_ranks_behind_a_loaded_model() -> Iterator[None]:
    """Workers that load a model get it on the simulated device, with a second rank that has caches of its own."""
    load = worker.load_model

    def load_on_device(vllm_config: Any, options: Any, progress: Any) -> Any:
        return put_on_simulated_device(*(load(vllm_config, options, progress) for _ in range(2)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "load_model", load_on_device)
        yield


def add(
    engine: LLMEngine,
    request_id: str,
    prompt: Sequence[int],
    params: SamplingParams,
    images: Sequence[Image.Image] = (),
) -> None:
    """Queue a prompt of token ids, and the images that its placeholders stand for, one apiece."""
    media: dict[str, Any] = {"multi_modal_data": {"image": [*images]}} if images else {}
    engine.add_request(request_id, {"prompt_token_ids": [*prompt], **media}, params)


def finish(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Step until nothing is left; the last output of each request."""
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


def tokens_of(output: RequestOutput) -> list[list[int]]:
    """The answers to a request, as token ids."""
    return [list(answer.token_ids) for answer in output.outputs]


def answers(
    engine: LLMEngine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] = GREEDY
) -> list[list[int]]:
    """The first answer to each prompt, all queued at once."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for i, (prompt, of_prompt) in enumerate(zip(prompts, each, strict=True)):
        add(engine, str(i), prompt, of_prompt)
    outputs = finish(engine)
    return [tokens_of(outputs[str(i)])[0] for i in range(len(prompts))]


def require_no_row_left(engine: LLMEngine) -> None:
    """Check that neither vLLM nor the worker still has a request, a block or a slot in use.

    vLLM tells the worker of finished requests, and of blocks of prompts and encoded items to drop, with the next step
    that it schedules. Of these blocks, the scheduler must know the very ones that the worker keeps; for the items see
    `require_items_counted`.
    """
    core: Any = engine.engine_core.engine_core
    worker_of(engine)._thread.run(lambda: None)  # after the steps that are queued
    rows = worker_of(engine)._runner.rows
    left = {*rows.requests} - core.scheduler.finished_req_ids
    assert not left, f"the worker still has {left}"
    assert not core.scheduler.requests and not core.scheduler.running
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks leaked"  # one is vLLM's own
    assert len(rows.free_slots) + len(rows.requests) == rows.slots
    if worker_of(engine)._runner.prefixes is not None:
        planner, store = planner_of(engine), store_of(engine)
        assert not planner.requests, "prompts leaked"
        assert {*store} - planner._plan.drops == {*planner.index} and len(planner.index) <= planner.index.capacity
        held = [tensor for block in store._blocks.values() for tensor in (*block.states, *block.key_values)]
        assert sum(tensor.nbytes for tensor in held) == store.nbytes
    if worker_of(engine)._runner._media is not None:
        require_items_counted(engine)


def require_items_counted(engine: LLMEngine) -> None:
    """Check that no request holds an encoded item, and that the scheduler counts each one that the worker keeps.

    It may count more: what it scheduled for a request that it preempted or aborted in the same step, or that failed.
    """
    core: Any = engine.engine_core.engine_core
    manager, media = core.scheduler.encoder_cache_manager, worker_of(engine)._runner._media
    assert media is not None
    kept = {name: len(encoding) for name, encoding in media._kept.items() if name not in manager.freed}
    assert not any(manager.cached.values()) and not manager.request_cached_ids, "a finished request holds items"
    assert {*manager.freeable} == {*manager.cached} and manager.num_freeable_slots == manager.cache_size
    assert manager.num_free_slots + sum(manager.freeable.values()) == manager.cache_size
    assert kept.items() <= manager.freeable.items(), "items are kept that the scheduler will never drop"
