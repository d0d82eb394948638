# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""One batch in, texts out, on the shipped checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35 import Qwen35InferenceConfig, SamplingOptions
from qwen35.serving.generation import Generation, TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.serving.prompts import chat_text

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
    words = r"prompt 1 has token \d+ \('<extra_29>'\), which is not in 0..1023, the model's vocabulary: use"
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
    monkeypatch.setattr(TextGenerator, "complete", lambda self, inputs, *rest: inputs)  # what it would complete
    messages = [{"role": "user", "content": "3?"}]
    options: dict[str, Any] = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": True}}
    inputs: Any = generator.chat([messages], 4, **options)
    assert generator.tokenizer.decode(inputs["input_ids"][0]) == chat_text(generator.tokenizer, messages, **options)
