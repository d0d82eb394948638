# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Generation config, tokenizer and chat template: wrong ones are refused in our words, others give the same tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers

from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, load_generation_config
from qwen35.serving.prompts import chat_text, load_tokenizer
from support.mini_mutations import copy_of_the_mini, text_mutations
from support.models import load_neuron
from support.mutations import Mutation

MUTATIONS = text_mutations()
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Caf\u00e9, 123 it's\n\nwhat is the  capital of France?"},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_neuron(MINI_CHECKPOINT, seq_len=96)


@pytest.fixture(scope="module")
def expected(model: Any) -> tuple[str, list[int], set[int]]:
    return answer(model, MINI_CHECKPOINT)


def answer(model: Any, path: Path) -> tuple[str, list[int], set[int]]:
    """The text of a chat with the files in `path`, the tokens that answer it, and those that end an answer."""
    tokenizer = load_tokenizer(path)
    generator = TextGenerator(model, path, tokenizer, load_generation_config(path, model.config, tokenizer))
    tokens = generator.chat([CHAT], 4).tokens[0]
    return chat_text(tokenizer, CHAT), tokens, {*generator.eos_token_ids}


def test_there_are_enough_mutations_of_every_file_and_enough_of_each_sort() -> None:
    counts = Counter((mutation.file, mutation.harmless) for mutation in MUTATIONS)
    for file in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert counts[file, True] + counts[file, False] >= 50 and min(counts[file, True], counts[file, False]) >= 20
    assert counts["chat_template.jinja", True] + counts["chat_template.jinja", False] >= 30
    assert len({str(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)


AS_TRANSFORMERS_5 = {
    f"tokenizer_config.json: {what}"
    for what in (
        "missing",
        "tokenizer_file = '/nowhere'",
        "tokenizer_file = None",
        "added_tokens_decoder = {}",
        "added_tokens_decoder = {'1016': {'content': '<|im_end|>', 'special': True}}",
        "added_tokens_decoder = {'1000': {'content': '<|im_end|>', 'special': True}}",
    )
}
"""Where transformers 4 does otherwise: it reads the first three, which 5 ignores, and ignores the others."""


def mutations(*, harmless: bool) -> list[Any]:
    """Those whose outcome is the same with the transformers that is installed."""
    known = AS_TRANSFORMERS_5 if transformers.__version__.startswith("4.") else set()
    skip = pytest.mark.skip(reason="transformers 4 does otherwise")
    chosen = [mutation for mutation in MUTATIONS if mutation.harmless == harmless]
    return [pytest.param(m, marks=skip if str(m) in known else ()) for m in chosen]


def test_the_mutations_that_depend_on_transformers_exist() -> None:
    assert {str(mutation) for mutation in MUTATIONS} >= AS_TRANSFORMERS_5


@pytest.mark.parametrize("mutation", mutations(harmless=True), ids=str)
def test_a_harmless_mutation_leaves_the_text_and_the_tokens(
    model: Any, expected: tuple[str, list[int], set[int]], tmp_path: Path, mutation: Mutation
) -> None:
    path = copy_of_the_mini(tmp_path / "mutated")
    mutation.edit(path)
    assert answer(model, path) == expected, mutation.why


@pytest.mark.parametrize("mutation", mutations(harmless=False), ids=str)
def test_any_other_mutation_is_refused_in_a_line_of_ours_before_the_model_runs(
    model: Any, tmp_path: Path, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of_the_mini(tmp_path / "mutated")
    mutation.edit(path)
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        answer(model, path)
    message = str(caught.value)
    assert type(caught.value) in (ValueError, FileNotFoundError)
    assert "\n" not in message and len(message) < 500 + len(str(path)), message
    assert str(path) in message or mutation.file in message or "vocabulary" in message, message


def test_a_checkpoint_with_a_wrong_tokenizer_or_generation_config_is_refused_before_its_weights_are_read(
    model: Any, tmp_path: Path
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        path = copy_of_the_mini(tmp_path / file.partition(".")[0])
        (path / "model.safetensors").unlink()
        (path / file).write_text("[]")
        with pytest.raises(ValueError, match=f"{file} holds a list, not an object; download it again"):
            TextGenerator.load(path, model.config)
