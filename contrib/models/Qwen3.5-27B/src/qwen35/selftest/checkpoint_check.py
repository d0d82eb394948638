# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A real checkpoint: compiled as `qwen35 compile` does, asked something that every model of the family knows, timed."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..hardware import detected_instance
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..nxdi import NXDI_AVAILABLE, on_stand_ins
from ..planning.recommended import device_neuron_config
from ..planning.step import not_modelled, step_model_of
from ..serving.compiled import compile_whole
from ..serving.loading import load_compiled_config
from ..serving.ranks import run_on_every_rank
from .journal import write_json
from .outcome import CheckFailed, Values

PROMPT, ANSWER = "The capital of France is", "Paris"
SEQ_LEN, PROMPT_TOKENS, NEW_TOKENS = 512, 256, 32
"""What is compiled and timed: a prompt that fills the one bucket, and the tokens after it."""

REPEATS = 5


def run_checkpoint_check(model: Path, tp_degree: int, kernels: dict[str, Any], workdir: Path) -> Values:
    """Compile a checkpoint below `workdir`, generate, and measure.

    Raises:
        CheckFailed: the answer is not in what it says.
        ValueError: it cannot be compiled, or does not fit.
    """
    neuron_config = device_neuron_config(
        detected_instance() if NXDI_AVAILABLE else None,
        tp_degree,
        SEQ_LEN,
        1,
        prompt_bucket=PROMPT_TOKENS,
        on_cpu=not NXDI_AVAILABLE,
        prefill_chunk_size=None,
        **kernels,
    )
    config = Qwen35InferenceConfig.from_pretrained(model, neuron_config=neuron_config)
    compiled, answer = workdir / "compiled", workdir / "answer.json"
    start = time.monotonic()
    compile_whole(NeuronQwen35ForCausalLM(str(model), config), compiled, lambda line: print(line, file=sys.stderr))
    compile_s = time.monotonic() - start
    run_on_every_rank(neuron_config, _run_rank, model, compiled, answer)
    from ..json_files import read_object

    found = read_object(answer)
    if ANSWER not in found["text"]:
        raise CheckFailed(f"after {PROMPT!r} it says {found['text']!r}, without {ANSWER!r}")
    modelled = on_stand_ins(modelled_times, config.to_json_string())
    return {**found, **modelled, "compile_s": compile_s if NXDI_AVAILABLE else None}


def _run_rank(model: Path, compiled: Path, answer: Path) -> None:
    import os

    import torch

    from ..serving.generation import TextGenerator

    generator = TextGenerator.load(model, load_compiled_config(compiled), compiled)
    text = generator.generate([PROMPT], 8).texts[0]
    ids = torch.arange(1000, 1000 + PROMPT_TOKENS - 1).remainder(generator.model.config.vocab_size).unsqueeze(0)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator.complete(prompt, 2)  # the first calls of a program are slower
    runs = [generator.complete(prompt, NEW_TOKENS) for _ in range(REPEATS)]
    each = [run.time_per_output_token for run in runs if run.time_per_output_token is not None]
    values = {"text": text, "ttft_s": statistics.median(run.time_to_first_token for run in runs)}
    values |= {"tpot_s": statistics.median(each)} if each else {}
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(answer, values)


def modelled_times(config_json: str) -> Values:
    """Modelled seconds of the same prompt and of a step after it; nothing where there are no kernel times."""
    config = Qwen35InferenceConfig.from_json_string(config_json)
    assert isinstance(config, Qwen35InferenceConfig)
    model = NeuronQwen35ForCausalLM("", config)
    if not_modelled(model) is not None:
        return {}
    step = step_model_of(model)
    return {
        "modelled_ttft_s": step.prompt(PROMPT_TOKENS).modelled,
        "modelled_tpot_s": step.decode(PROMPT_TOKENS).modelled,
    }
