# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The mini compiled and generating: its tokens are those that transformers recorded, whatever kernels and features run.

Compiling goes through `serving.compiled` as for any model; on a device that has not happened yet. On a CPU a rank is a
process, float32 is the dtype, and the emulator runs the kernels that a case names.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..nxdi import NXDI_AVAILABLE
from ..serving.compiled import compile_whole
from ..serving.loading import MINI_CHECKPOINT, load_compiled_config
from ..serving.prefix_cache import Chain, PrefixCache
from ..serving.ranks import run_on_every_rank
from .cases import DRAFTS, Feature, ModelCase
from .outcome import CheckFailed, Values
from .recorded import Answer, draw, recorded

if TYPE_CHECKING:
    from ..serving.generation import TextGenerator

CACHE_BYTES = 1 << 28


def application(case: ModelCase) -> NeuronQwen35ForCausalLM:
    """The mini in this configuration, not loaded."""
    vision = case.feature is Feature.VISION
    model_cls = NeuronQwen35VLForCausalLM if vision else NeuronQwen35ForCausalLM
    config_cls = Qwen35VLInferenceConfig if vision else Qwen35InferenceConfig
    config = config_cls.from_pretrained(MINI_CHECKPOINT, neuron_config=case.neuron_config())
    return model_cls(str(MINI_CHECKPOINT), config)


def run_model_check(case: ModelCase, workdir: Path) -> Values:
    """Compile the mini below `workdir`, load it and compare what it says.

    Raises:
        CheckFailed: a token is another.
    """
    compiled = workdir / "compiled"
    start = time.monotonic()
    compile_whole(application(case), compiled, lambda line: print(line, file=sys.stderr))
    compile_s = time.monotonic() - start
    config = load_compiled_config(compiled)
    answer = workdir / "answer.json"
    run_on_every_rank(config.neuron_config, _run_rank, case, compiled, answer)
    found = json.loads(answer.read_text(encoding="utf-8"))
    if found["wrong"]:
        raise CheckFailed(found["wrong"])
    return {**found["values"], "compile_s": compile_s if NXDI_AVAILABLE else None}


def _run_rank(case: ModelCase, compiled: Path, answer: Path) -> None:
    """What every rank does; the first one writes."""
    from ..serving.generation import TextGenerator

    generator = TextGenerator.load(MINI_CHECKPOINT, load_compiled_config(compiled), compiled)
    try:
        wrong, values = "", _RUNS.get(case.feature, _one_by_one)(generator)
    except CheckFailed as error:
        wrong, values = str(error), {}
    if int(os.environ.get("RANK", "0")) == 0:
        answer.write_text(json.dumps({"wrong": wrong, "values": values}), encoding="utf-8")


# --- What is run -----------------------------------------------------------------------------------------------------
def _one_by_one(generator: TextGenerator) -> Values:
    return _generate(generator, recorded().short[:2])


def _in_pieces(generator: TextGenerator) -> Values:
    return _generate(generator, (*recorded().short[:1], *recorded().long))


def _generate(generator: TextGenerator, answers: Sequence[Answer]) -> Values:
    first, each = [], []
    for answer in answers:
        ids = torch.tensor([answer.prompt])
        result = generator.complete({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, len(answer.answer))
        _require_tokens(answer, result.tokens[0], generator.tokenizer)
        first.append(result.time_to_first_token)
        each += [result.time_per_output_token] if result.time_per_output_token is not None else []
    values: Values = {"ttft_s": statistics.median(first[1:] or first), "prompts": len(answers)}
    if each:
        values["tpot_s"] = statistics.median(each[1:] or each)  # the first call of a program is slower
    return values


def _with_drafts(generator: TextGenerator) -> Values:
    return {**_generate(generator, recorded().short), "drafts": DRAFTS}


def _pictures(generator: TextGenerator) -> Values:
    from ..serving.prompts import encode_chat
    from ..vision.processing import VisionProcessor

    processor = VisionProcessor.from_pretrained(MINI_CHECKPOINT)
    for answer in recorded().pictures:
        assert answer.picture is not None
        content = [{"type": "image", "image": draw(answer.picture)}, {"type": "text", "text": answer.text}]
        inputs = encode_chat(generator.tokenizer, processor, [[{"role": "user", "content": content}]])
        _require_equal(f"prompt {answer.text!r}", inputs["input_ids"][0].tolist(), answer.prompt, generator.tokenizer)
        result = generator.complete(inputs, len(answer.answer))
        _require_tokens(answer, result.tokens[0], generator.tokenizer)
    return {"prompts": len(recorded().pictures)}


def _at_once(generator: TextGenerator) -> Values:
    """Four requests in one engine, twice: the second time in other slots."""
    from ..serving.engine import Qwen35Engine

    engine = Qwen35Engine(generator.model)
    answers = recorded().short
    for order in (answers, answers[::-1]):
        _drive(engine, order, generator)
    return {"prompts": 2 * len(answers)}


def _restored(generator: TextGenerator) -> Values:
    """Two prompts that begin alike, and the first again: states of the last two come from the cache."""
    from ..serving.engine import Qwen35Engine

    cache = _CountingCache(generator.model, CACHE_BYTES)
    engine = Qwen35Engine(generator.model, cache)
    answers = (*recorded().long, recorded().long[0])
    for answer in answers:
        _drive(engine, [answer], generator)
    if cache.restored == 0:
        raise CheckFailed("no prompt was continued from stored states: the prefix cache found nothing")
    return {"prompts": len(answers), "restored_tokens": cache.restored}


class _CountingCache(PrefixCache):
    """Counts the tokens that it has restored."""

    restored = 0

    def restore(self, slot: int, chain: Chain) -> int:
        tokens = super().restore(slot, chain)
        self.restored += tokens
        return tokens


def _drive(engine: Any, answers: Sequence[Answer], generator: TextGenerator) -> None:
    from ..serving.request import Request

    ids = [
        engine.add(Request([*answer.prompt], len(answer.answer), eos_token_ids=generator.eos_token_ids))
        for answer in answers
    ]
    for request_id, answer in zip(ids, answers, strict=True):
        outputs = [*engine.stream(request_id)]
        if errors := [output.error for output in outputs if output.error]:
            raise CheckFailed(f"prompt {answer.text[-40:]!r}: {errors[0]}")
        _require_tokens(answer, [output.token for output in outputs], generator.tokenizer)


_RUNS: dict[Feature, Callable[[Any], Values]] = {
    Feature.CHUNKED_PROMPTS: _in_pieces,
    Feature.BATCH: _at_once,
    Feature.PREFIX_CACHE: _restored,
    Feature.VISION: _pictures,
    Feature.SPECULATION: _with_drafts,
}


# --- Comparison ------------------------------------------------------------------------------------------------------
def _require_tokens(answer: Answer, tokens: Sequence[int], tokenizer: Any) -> None:
    _require_equal(f"after {answer.text[-40:]!r}", tokens, answer.answer, tokenizer)


def _require_equal(where: str, found: Sequence[int], expected: Sequence[int], tokenizer: Any) -> None:
    """Raise CheckFailed with the first token that differs."""
    if [*found] == [*expected]:
        return
    at = next(_differences(found, expected))
    words = [repr(tokenizer.decode([tokens[at]])) if at < len(tokens) else "the end" for tokens in (found, expected)]
    raise CheckFailed(f"{where}: token {at} is {words[0]}, transformers says {words[1]}")


def _differences(found: Sequence[int], expected: Sequence[int]) -> Iterator[int]:
    shared = min(len(found), len(expected))
    yield from (i for i in range(shared) if found[i] != expected[i])
    yield shared
