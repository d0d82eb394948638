# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""One batch in, texts out, on the shipped checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from qwen35 import FinishReason, Qwen35Engine, Qwen35InferenceConfig, Request, SamplingOptions
from qwen35.phase import Phase
from qwen35.serving.generation import Generation, TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.serving.prompts import chat_text, encode
from support.simulated_device import faults

PROMPTS = ["The capital of France is", "3 + 4 =", "The capital of Japan is"]


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(64, 3))
    return TextGenerator.load(MINI_CHECKPOINT, config)


def test_a_row_ends_with_the_token_that_ends_an_answer(generator: TextGenerator) -> None:
    result = generator.generate(PROMPTS, 24)
    ends = {*generator.eos_token_ids}
    for prompt, tokens, text in zip(PROMPTS, result.tokens, result.texts, strict=True):
        assert tokens[-1] in ends and not ends & {*tokens[:-1]}, prompt
        assert text == generator.tokenizer.decode(tokens[:-1])
    assert "Paris" in result.texts[0] and "Tokyo" in result.texts[2]


def test_the_tokens_of_each_step_are_handed_over_as_they_come(generator: TextGenerator) -> None:
    steps: list[torch.Tensor] = []
    result = generator.generate(PROMPTS, 3, on_token=steps.append)
    assert [step.shape for step in steps] == [(3,)] * 3
    assert torch.stack(steps, dim=1).tolist() == result.tokens


def test_times_are_those_of_the_first_token_and_of_each_after_it(generator: TextGenerator) -> None:
    result = generator.generate(PROMPTS[:1], 3)
    assert result.time_to_first_token > 0
    assert result.time_per_output_token is not None and result.time_per_output_token > 0
    assert generator.generate(PROMPTS[:1], 1).time_per_output_token is None


def test_a_seed_makes_a_batch_repeatable(generator: TextGenerator) -> None:
    def sample(seed: int) -> list[list[int]]:
        options = SamplingOptions(temperature=3.0, top_p=0.95, top_k=50, seed=seed)
        return generator.generate(PROMPTS, 12, options).tokens

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("temperature", [0.0, 3.0], ids=["greedy", "sampled"])
def test_penalties_are_transformers_own_where_it_has_them(generator: TextGenerator, temperature: float) -> None:
    prompts = ["3"]
    options = SamplingOptions(temperature, top_k=30, top_p=0.9, seed=5, min_p=0.02, repetition_penalty=6.0)
    found = generator.generate(prompts, 40, options)
    chosen = dict(temperature=3.0, top_k=30, top_p=0.9, min_p=0.02) if temperature else {}
    torch.manual_seed(5)
    sequences = generator.adapter.generate(
        **encode(generator.tokenizer, prompts),
        generation_config=GenerationConfig(
            do_sample=temperature > 0,
            **chosen,
            repetition_penalty=6.0,
            max_new_tokens=40,
            eos_token_id=generator.eos_token_ids,
            pad_token_id=generator.pad_token_id,
        ),
    )
    expected = sequences[0, -len(found.tokens[0]) :].tolist()
    assert found.tokens == [expected]
    without = generator.generate(prompts, 40, replace(options, repetition_penalty=1.0))
    assert found.tokens != without.tokens, "the penalty changes nothing, and proves nothing"


def test_penalties_of_a_padded_row_are_those_of_the_row_alone(generator: TextGenerator) -> None:
    """transformers' own would penalise the token that pads, and with it change the answer."""
    prompts = ["3", "The capital of France is", "The capital of Japan is a city, and that of France is"]
    options = SamplingOptions(repetition_penalty=3.0, presence_penalty=1.0, frequency_penalty=0.5)
    together = generator.generate(prompts, 16, options).tokens
    assert together == [generator.generate([prompt], 16, options).tokens[0] for prompt in prompts]
    assert together != generator.generate(prompts, 16).tokens


def test_the_engine_gives_the_same_greedy_tokens_under_penalties(generator: TextGenerator) -> None:
    options = SamplingOptions(repetition_penalty=1.3, presence_penalty=1.5, frequency_penalty=0.2)
    engine = Qwen35Engine(generator.model)
    generator.model.reset()
    for prompt, tokens in zip(PROMPTS, generator.generate(PROMPTS, 16, options).tokens, strict=True):
        request = Request(generator.tokenizer(prompt)["input_ids"], 16, options, generator.eos_token_ids)
        assert [output.token for output in engine.stream(engine.add(request))] == tokens


def test_continuations_come_prompt_by_prompt_and_differ(generator: TextGenerator) -> None:
    options = SamplingOptions(temperature=3.0, seed=1)
    result = generator.generate(PROMPTS[:2], 8, options, n=3)
    assert len(result.tokens) == len(result.texts) == 6
    assert len({tuple(row) for row in result.tokens}) > 3
    assert [result.tokens[0], result.tokens[3]] == generator.generate(PROMPTS[:2], 8, options).tokens
    assert result.tokens == generator.generate(PROMPTS[:2], 8, options, n=3).tokens


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=2.0, seed=1, presence_penalty=2.0)])
def test_logprobs_are_the_models_own_whatever_is_sampled(generator: TextGenerator, options: SamplingOptions) -> None:
    result = generator.generate(PROMPTS, 8, options, logprobs=4)
    assert result.logprobs is not None
    engine = Qwen35Engine(generator.model)
    for prompt, tokens, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        ids = [*generator.tokenizer(prompt)["input_ids"]]
        assert len(logprobs) == len(tokens)
        for token, found in zip(tokens, logprobs, strict=True):
            generator.model.reset()
            row = torch.tensor([ids])
            positions = torch.arange(len(ids)).unsqueeze(0)
            expected = generator.model(row, attention_mask=torch.ones_like(row), position_ids=positions)
            values = expected.logits[0, -1].log_softmax(-1)
            assert found.chosen == pytest.approx(float(values[token]), abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(values.topk(4).values.tolist(), abs=1e-4)
            ids.append(token)
        if options.is_greedy:
            request = Request(generator.tokenizer(prompt)["input_ids"], 8, options, generator.eos_token_ids, logprobs=4)
            of_engine = [output.logprobs for output in engine.stream(engine.add(request))]
            for ours, theirs in zip(of_engine, logprobs, strict=True):
                assert ours is not None and ours.chosen == pytest.approx(theirs.chosen, abs=1e-4)
                assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert generator.generate(PROMPTS[:1], 2).logprobs is None


def test_what_cannot_be_run_is_refused_before_anything_is(generator: TextGenerator) -> None:
    size = generator.model.config.vocab_size
    inputs = {"input_ids": torch.tensor([[1, 2], [size + 3, 4]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    with pytest.raises(
        ValueError, match=rf"token {size + 3} of prompt 1 is not in 0\.\.{size - 1}: use the checkpoint"
    ):
        generator.complete(inputs, 2)
    with pytest.raises(ValueError, match=r"n=0: must be a whole number of 1\.\.1024; logprobs=-1: must be None or"):
        generator.generate(PROMPTS, 2, n=0, logprobs=-1)
    with pytest.raises(ValueError, match=r"n=2 with temperature=0\.0: greedy answers are all the same"):
        generator.generate(PROMPTS, 2, n=2)


def test_logits_that_are_no_numbers_are_an_error_and_not_token_0(generator: TextGenerator) -> None:
    def fault(phase: Phase, slots: list[int], logits: torch.Tensor) -> None:
        logits[1] = torch.nan

    with faults(generator.model, fault), pytest.raises(ValueError, match=r"prompt 1: 1024 of 1024 logits are nan or"):
        generator.generate(PROMPTS, 2)


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(generator: TextGenerator, temperature: float) -> None:
    options = SamplingOptions(temperature=temperature)
    assert generator.generate(PROMPTS, 4, options).tokens == generator.generate(PROMPTS, 4).tokens


@pytest.mark.parametrize("how", ["generate", "chat"])
def test_rows_end_before_their_stop_string_each_for_itself(how: str, generator: TextGenerator) -> None:
    def ask(**options: Any) -> Generation:
        if how == "generate":
            return generator.generate(PROMPTS, 24, **options)
        return generator.chat(
            [[{"role": "user", "content": f"What is {prompt}?"}] for prompt in PROMPTS], 24, **options
        )

    plain = ask()
    stop = plain.texts[0][2:4]
    stopped = ask(stop=[stop, "never said"])
    for before, after, tokens, ids in zip(plain.texts, stopped.texts, plain.tokens, stopped.tokens, strict=True):
        assert after == before.split(stop)[0]
        assert ids == tokens[: len(ids)]
        assert (len(ids) < len(tokens)) == (stop in before)
        assert after == before or stop in generator.tokenizer.decode(ids)
    assert ask(stop=stop).texts == stopped.texts
    assert ask(stop="never said").tokens == plain.tokens
    with pytest.raises(ValueError, match="stop has ''"):
        ask(stop=["a", ""])


def test_a_token_beyond_the_vocabulary_is_named_before_anything_runs(generator: TextGenerator) -> None:
    tokenizer = copy.deepcopy(generator.tokenizer)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(30)])
    added = TextGenerator(generator.model, generator.model_path, tokenizer, generator.generation_config)
    steps: list[torch.Tensor] = []
    words = r"token \d+ of prompt 1 \('<extra_29>'\) is not in 0\.\.1023: use the checkpoint's tokenizer"
    with pytest.raises(ValueError, match=words):
        added.generate(["The", "a <extra_29>"], 4, on_token=steps.append)
    assert steps == []


@pytest.mark.parametrize(
    ("generation", "text_eos"),
    [({"eos_token_id": [1016, 1014]}, 1014), (None, 1014), ({"do_sample": True}, 1014), ({"do_sample": True}, None)],
)
def test_a_chat_stops_at_the_end_of_the_turn_whatever_the_checkpoint_lacks(
    generation: dict[str, Any] | None, text_eos: int | None, tmp_path: Path
) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["eos_token_id"] = text_eos
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = Qwen35InferenceConfig.from_pretrained(tmp_path, neuron_config=default_neuron_config(96))
    loaded = TextGenerator.load(tmp_path, config)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert loaded.chat([question], 40).texts == ["Paris."]


def test_a_chat_takes_tools_and_the_templates_arguments(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextGenerator, "complete", lambda self, inputs, *rest, **more: inputs)  # what it would complete
    messages = [{"role": "user", "content": "3?"}]
    options: dict[str, Any] = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": True}}
    inputs: Any = generator.chat([messages], 4, **options)
    assert generator.tokenizer.decode(inputs["input_ids"][0]) == chat_text(generator.tokenizer, messages, **options)


@pytest.mark.parametrize("stop", ["is", ["aris", "zzz"], ["<|endoftext|>"], ["s.", ". The"]], ids=str)
def test_the_engine_ends_at_a_stop_string_as_a_batch_does(generator: TextGenerator, stop: str | list[str]) -> None:
    engine = Qwen35Engine(generator.model, tokenizer=generator.tokenizer)
    generator.model.reset()
    expected = generator.generate(PROMPTS, 12, stop=stop)
    ids = [
        engine.add(
            Request(generator.tokenizer(prompt)["input_ids"], 12, stop=stop, eos_token_ids=generator.eos_token_ids)
        )
        for prompt in PROMPTS
    ]
    for request_id, tokens, text in zip(ids, expected.tokens, expected.texts, strict=True):
        outputs = [*engine.stream(request_id)]
        assert [output.token for output in outputs] == tokens
        assert "".join(output.text or "" for output in outputs) == text
        stopped = any(
            each in generator.tokenizer.decode(tokens) for each in ([stop] if isinstance(stop, str) else stop)
        )
        assert (outputs[-1].finish_reason is FinishReason.STOP) == stopped


@pytest.mark.parametrize(
    ("tokenizer", "stop", "message"),
    [(False, "is", "the engine has no tokenizer"), (True, ["a", ""], "stop has ''"), (True, 7, "stop=")],
    ids=["no tokenizer", "empty", "no text"],
)
def test_stop_strings_that_cannot_be_found_are_refused_when_added(
    generator: TextGenerator, tokenizer: bool, stop: Any, message: str
) -> None:
    engine = Qwen35Engine(generator.model, tokenizer=generator.tokenizer if tokenizer else None)
    with pytest.raises(ValueError, match=message):
        engine.add(Request([1, 2], 4, stop=stop))
