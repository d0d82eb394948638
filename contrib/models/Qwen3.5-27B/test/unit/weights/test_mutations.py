# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is wrong is refused in our words; one that is merely written differently gives the same tokens."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from qwen35.configuration_qwen35 import Qwen35ConfigError
from qwen35.weights import checkpoint
from qwen35.weights.checkpoint import CheckpointError
from qwen35.weights.conversion import ConversionError
from support.models import load_neuron, neuron_greedy
from support.mutations import Mutation, all_mutations, save_tiny

MUTATIONS = all_mutations()
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
REFUSALS = (Qwen35ConfigError, CheckpointError, ConversionError)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original")
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def tokens(original: Path) -> list[int]:
    return greedy(original)


def greedy(path: Path) -> list[int]:
    return neuron_greedy(load_neuron(path, seq_len=16), [PROMPT], 4)[0][0].tolist()


def mutated(original: Path, directory: Path, mutation: Mutation) -> Path:
    shutil.copytree(original, directory)
    mutation.edit(directory)
    return directory


def test_there_are_enough_mutations_of_every_file_and_enough_of_each_sort() -> None:
    assert len(MUTATIONS) >= 500 and sum(mutation.harmless for mutation in MUTATIONS) >= 150
    assert min(Counter(mutation.file for mutation in MUTATIONS).values()) >= 50
    assert len({str(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.harmless], ids=str)
def test_a_harmless_mutation_leaves_the_tokens(
    original: Path, tokens: list[int], tmp_path: Path, mutation: Mutation
) -> None:
    assert greedy(mutated(original, tmp_path / "mutated", mutation)) == tokens, mutation.why


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if not m.harmless], ids=str)
def test_any_other_mutation_is_refused_in_lines_of_ours_before_a_tensor_is_read(
    original: Path, tmp_path: Path, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mutated(original, tmp_path / "mutated", mutation)
    monkeypatch.setattr(checkpoint, "safe_open", lambda *args, **kwargs: pytest.fail("a tensor was read"))
    with pytest.raises(REFUSALS) as caught:
        load_neuron(path, seq_len=16)
    assert isinstance(caught.value, REFUSALS) and caught.value.problems
    for problem in caught.value.problems:
        assert problem and "\n" not in problem and len(problem) < 500 + len(str(tmp_path)), problem
