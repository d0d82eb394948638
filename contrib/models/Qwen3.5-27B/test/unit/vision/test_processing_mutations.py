# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of the processors: wrong ones are refused in our words, others give the same pixels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.vision.processing import Video, VisionInputError, VisionInputs, VisionProcessor
from support.mini_mutations import IMAGE, VIDEO, copy_of_the_mini, media_mutations
from support.mutations import Mutation

MUTATIONS = media_mutations()
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def processed(path: Path) -> VisionInputs:
    """Of a picture, and of a video of it, with the settings in `path`."""
    return VisionProcessor.from_pretrained(path)([PICTURE], [Video([PICTURE] * 4, fps=2.0)])


@pytest.fixture(scope="module")
def expected() -> VisionInputs:
    return processed(MINI_CHECKPOINT)


def test_there_are_enough_mutations_of_either_file_and_enough_of_each_sort() -> None:
    counts = Counter((mutation.file, mutation.harmless) for mutation in MUTATIONS)
    assert {file for file, _ in counts} == {IMAGE, VIDEO} and min(counts.values()) >= 20
    assert len({str(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.harmless], ids=str)
def test_a_harmless_mutation_leaves_the_pixels(expected: VisionInputs, tmp_path: Path, mutation: Mutation) -> None:
    path = copy_of_the_mini(tmp_path / "mutated")
    mutation.edit(path)
    for name, value in vars(processed(path)).items():
        wanted = getattr(expected, name)
        assert torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted, mutation.why


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if not m.harmless], ids=str)
def test_any_other_mutation_is_refused_in_lines_of_ours_before_a_picture_is_opened(
    tmp_path: Path, mutation: Mutation
) -> None:
    path = copy_of_the_mini(tmp_path / "mutated")
    mutation.edit(path)
    with pytest.raises(VisionInputError) as caught:
        VisionProcessor.from_pretrained(path)
    assert caught.value.problems
    for problem in caught.value.problems:
        assert mutation.file in problem or "processor_config.json" in problem
        assert "\n" not in problem and len(problem) < 500 + len(str(path)), problem
