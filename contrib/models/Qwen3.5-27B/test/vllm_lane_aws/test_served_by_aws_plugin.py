# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The mini behind AWS's vLLM plugin, in vLLM's engine of this process: tokens, options, what is written and refused.

The oracle of tokens is the recorded output of transformers, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from support import aws_machine

if not aws_machine.PLUGIN_AVAILABLE:
    pytest.skip(aws_machine.NO_PLUGIN, allow_module_level=True)

from vllm import EngineArgs, SamplingParams
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from support.decoder_cases import CASES, STEPS, recorded

pytestmark = pytest.mark.aws_plugin

MINI = CASES[0]
PROMPTS = MINI.prompts()
TOKENS, LOGITS = recorded(MINI)
GREEDY = {"temperature": 0, "max_tokens": STEPS, "ignore_eos": True}


@contextmanager
def engine_of(path: Path, override: dict[str, Any] | None = None, **options: Any) -> Iterator[LLMEngine]:
    """An engine of two rows with the settings `override_neuron_config`, until the end of the block."""
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 2,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "worker_cls": aws_machine.WORKER,
        # on_cpu: NxDI's own word for a model without the operators of a device.
        "additional_config": {"override_neuron_config": {"on_cpu": True, **(override or {})}},
        **options,
    }
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(path), **arguments))
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()


def runner_of(engine: LLMEngine) -> Any:
    return engine.model_executor.driver_worker.worker.model_runner


def finish(
    engine: LLMEngine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    """The last output of a request for each prompt, all queued at once."""
    for i, (prompt, of_prompt) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), {"prompt_token_ids": [*prompt]}, of_prompt)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    return [outputs[str(i)] for i in range(len(prompts))]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [[*output.outputs[0].token_ids] for output in outputs]


def require_tokens_of_transformers(engine: LLMEngine) -> None:
    assert tokens_of(finish(engine, PROMPTS, [SamplingParams(**GREEDY)] * 4)) == TOKENS.tolist()


@contextmanager
def calls_of(engine: LLMEngine) -> Iterator[list[dict[str, Any]]]:
    """What the plugin gives the model, call by call."""
    model, calls = runner_of(engine).model, []
    forward = model.forward

    def spy(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(**kwargs)

    model.forward = spy
    try:
        yield calls
    finally:
        del model.forward


def test_prompts_of_unequal_length_get_the_tokens_of_transformers_in_slots_of_any_order(mini: Path) -> None:
    # Answers of unequal length, so that a slot is free again while the other one is in use.
    rows = [0, 1, 2, 3, 2, 0, 3, 1]
    lengths = [3, STEPS, 7, STEPS, 5, STEPS, 2, 9]
    with engine_of(mini) as engine, calls_of(engine) as calls:
        params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
        outputs = finish(engine, [PROMPTS[row] for row in rows], params)
    assert tokens_of(outputs) == [TOKENS[row, :length].tolist() for row, length in zip(rows, lengths, strict=True)]
    slots = [call["input_block_ids"].tolist() for call in calls]
    assert [1, 0] in slots and [0, 1] in slots, "no step had its requests in another order than their slots"
    assert all(len(call["input_ids"]) == 1 for call in calls if call["input_ids"].shape[1] > 1)  # one prompt at a time


def test_more_slots_than_two(mini: Path) -> None:
    with engine_of(mini, max_num_seqs=5) as engine:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 9, 4, 12, 6, 3, 12, 8)]
        outputs = finish(engine, PROMPTS * 2, params)
    for row, (tokens, of_row) in enumerate(zip(tokens_of(outputs), params, strict=True)):
        assert tokens == TOKENS[row % 4, : of_row.max_tokens].tolist()


def test_a_single_slot(mini: Path) -> None:
    with engine_of(mini, max_num_seqs=1) as engine:
        require_tokens_of_transformers(engine)


def test_what_is_chosen_on_the_device_takes_top_k_top_p_and_temperature(mini: Path) -> None:
    torch.manual_seed(0)
    with engine_of(mini) as engine:
        for same in ({"temperature": 0.7, "top_k": 1}, {"temperature": 0.7, "top_p": 1e-6}):
            options = {**GREEDY, **same}
            assert tokens_of(finish(engine, PROMPTS, [SamplingParams(**options)] * 4)) == TOKENS.tolist(), same
        drawn = tokens_of(finish(engine, PROMPTS, [SamplingParams(**{**GREEDY, "temperature": 100.0})] * 4))
        assert all(tokens != expected for tokens, expected in zip(drawn, TOKENS.tolist(), strict=True))


def test_the_first_token_is_drawn_with_the_options_of_the_oldest_request(mini: Path) -> None:
    """The plugin's, which docs/serve.md warns of: if this fails, the plugin has learned it, and so must the text."""
    with engine_of(mini) as engine, calls_of(engine) as calls:
        wild = SamplingParams(temperature=100.0, max_tokens=STEPS, ignore_eos=True)
        finish(engine, PROMPTS[1:3], [wild, SamplingParams(**GREEDY)])
    second_prompt = [call["sampling_params"] for call in calls if call["input_ids"].shape[1] > 1][1]
    assert second_prompt.tolist() == [[256.0, 1.0, 100.0]]
    both = [call["sampling_params"].tolist() for call in calls if len(call["input_ids"]) == 2]
    assert both and all(params == [[256.0, 1.0, 100.0], [1.0, 1.0, 1.0]] for params in both)


def test_vllms_sampler_takes_the_options_of_each_request(mini: Path) -> None:
    with engine_of(mini, {"on_device_sampling_config": None}) as engine:
        wild = SamplingParams(temperature=100.0, max_tokens=STEPS, ignore_eos=True)
        exact = SamplingParams(**GREEDY, logprobs=3)
        outputs = finish(engine, [PROMPTS[0], *PROMPTS], [wild, exact, exact, exact, exact])
        second = [int(LOGITS[1, 0].topk(2).indices[1])]
        (other,) = finish(engine, [PROMPTS[1]], [SamplingParams(**GREEDY, allowed_token_ids=second)])
    assert tokens_of(outputs[1:]) == TOKENS.tolist()
    assert tokens_of([other])[0] == second * STEPS
    expected = LOGITS.log_softmax(-1)
    for row, output in enumerate(outputs[1:]):
        given = output.outputs[0].logprobs
        assert given is not None
        for step, of_step in enumerate(given):
            chosen = of_step[int(TOKENS[row, step])].logprob
            # Two float32 implementations of 8 layers.
            assert abs(chosen - float(expected[row, step].max())) < 1e-4, (row, step)


IGNORED = {
    "logit_bias": {"logit_bias": {int(TOKENS[1, 0]): -100.0}},
    "seed": {"temperature": 100.0, "seed": 1},
    "min_p": {"temperature": 100.0, "min_p": 1.0},
}


@pytest.mark.parametrize("override", [{}, {"on_device_sampling_config": None}], ids=["device", "vLLM"])
@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_options_that_it_ignores(override: dict[str, Any], ignored: dict[str, Any], mini: Path) -> None:
    """The plugin's, which docs/serve.md warns of, as above."""
    torch.manual_seed(0)
    with engine_of(mini, override) as engine:
        params = [SamplingParams(**{**GREEDY, **ignored})] * 2
        first, second = tokens_of(finish(engine, [PROMPTS[1]] * 2, params))
    assert (first == TOKENS[1].tolist()) == ("logit_bias" in ignored) == (first == second)


@pytest.mark.parametrize(
    "override",
    [
        {"prefill_chunk_size": 8},
        {"context_encoding_buckets": [16, 64], "token_generation_buckets": [32, 64]},
        {"deltanet_kernel": "torch", "deltanet_inverse": "plain", "attention_kernel": "torch", "mlp_kernel": "torch"},
        {"attention_kernel": {"context_encoding": "torch"}},
    ],
    ids=lambda override: ", ".join(override),
)
def test_settings_reach_the_model_and_keep_its_tokens(override: dict[str, Any], mini: Path) -> None:
    with engine_of(mini, override) as engine:
        config = runner_of(engine).model.model.config.neuron_config
        assert {name: getattr(config, name) for name in override} == override
        require_tokens_of_transformers(engine)


def test_fp8_reaches_the_model(mini: Path) -> None:
    with engine_of(mini, {"weights_dtype": "fp8", "kv_cache_dtype": "fp8"}) as engine:
        application = runner_of(engine).model.model
        weight = application.models[0].model.layers[0].mlp.down_proj.weight
        assert weight.dtype == torch.float8_e4m3fn and application.neuron_config.kv_cache_quant
        answered = tokens_of(finish(engine, PROMPTS, [SamplingParams(**GREEDY)] * 4))
    assert all(len(tokens) == STEPS for tokens in answered)
    # Three bits of mantissa: near ties may fall otherwise, the first token of a fact that the mini knows does not.
    assert answered[1][0] == int(TOKENS[1, 0])


@pytest.mark.parametrize(
    ("override", "options", "told"),
    [
        ({"deltanet_kernel": "fast"}, {}, "deltanet_kernel='fast'"),
        ({"mlp_kernel": "fast"}, {}, "mlp_kernel='fast'"),
        ({"fused_qkv": True}, {}, "fused_qkv=True"),
        ({"instance": "trn9"}, {}, "instance='trn9'"),
        ({}, {"enable_prefix_caching": True, "block_size": 16}, "is_prefix_caching=True"),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "enable_fused_speculation=True"),
    ],
    ids=str,
)
def test_what_the_model_cannot_do_is_told_before_it_is_loaded(
    override: dict[str, Any], options: dict[str, Any], told: str, mini: Path
) -> None:
    with pytest.raises(Exception) as caught, engine_of(mini, override, **options):
        pass
    assert told in str(caught.value)
    assert not list((mini / "neuron-compiled-artifacts").glob("*/*"))


def test_vllms_own_scheduler_which_needs_blocks_is_refused_too(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_NEURON_CUSTOM_SCHEDULER", "1")
    chunks = {"chunked_prefill_config": {"max_num_seqs": 2}}
    with pytest.raises(Exception) as caught, engine_of(mini, chunks, block_size=16, max_num_batched_tokens=32):
        pass
    assert "is_block_kv_layout=True" in str(caught.value)


def artifacts(mini: Path) -> list[Path]:
    return sorted((mini / "neuron-compiled-artifacts").glob("*/neuron_config.json"))


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from qwen35 import NeuronQwen35ForCausalLM

    compiled: list[str] = []
    compile_ = NeuronQwen35ForCausalLM.compile

    def count(application: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        compiled.append(str(path))
        compile_(application, path, *args, **kwargs)

    monkeypatch.setattr(NeuronQwen35ForCausalLM, "compile", count)
    return compiled


def test_it_compiles_into_the_checkpoints_folder_and_anew_at_every_start(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = count_compilations(monkeypatch)
    for starts in (1, 2):
        with engine_of(mini):
            assert len(compiled) == starts and [str(path.parent) for path in artifacts(mini)] == [compiled[-1]]


def test_with_neuron_compiled_artifacts_it_loads_what_was_compiled(
    mini: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = count_compilations(monkeypatch)
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", str(tmp_path / "compiled"))
    for _ in range(2):
        with engine_of(mini) as engine:
            require_tokens_of_transformers(engine)
    assert compiled == [str(tmp_path / "compiled")] and not artifacts(mini)


def test_a_checkpoint_of_text_alone_is_served_too(mini: Path) -> None:
    config = json.loads((mini / "config.json").read_text())
    text = {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}
    (mini / "config.json").write_text(json.dumps(text))
    with engine_of(mini) as engine:
        require_tokens_of_transformers(engine)
