# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder's rules: what is refused, and how its rows are moved."""

from __future__ import annotations

import pytest
import torch

from qwen35.configuration_qwen35_vl import Qwen35VisionConfig
from qwen35.weights.conversion import ConversionError
from qwen35.weights.vision_rules import adjacent_pairs, convert_vision_checkpoint, qkv_by_rank
from support.compare import assert_close
from support.vision_cases import TINY, random_reference, tensors_of


def plain_targets(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is built of the tensors where the rows of qkv stay in place."""
    config = Qwen35VisionConfig(**TINY)
    return dict(convert_vision_checkpoint(tensors, config, torch.float32, lambda qkv: qkv).items())


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_targets_are_the_checkpoints_tensors_with_the_patch_kernel_as_a_matrix(prefix: str) -> None:
    expected = dict(random_reference().state_dict())
    expected["patch_embed.proj.weight"] = expected["patch_embed.proj.weight"].flatten(1)
    targets = plain_targets(tensors_of(random_reference(), prefix))
    assert sorted(targets) == sorted(expected)
    for name, tensor in targets.items():
        assert_close(tensor, expected[name], label=name)


def test_tensors_of_other_parts_are_not_looked_at() -> None:
    others = {
        name: torch.zeros(3, dtype=torch.int8)
        for name in ("model.language_model.norm.weight", "lm_head.weight", "mtp.fc.weight", "anything")
    }
    tensors = tensors_of(random_reference())
    assert plain_targets(others | tensors).keys() == plain_targets(tensors).keys()


def test_the_two_dims_that_one_angle_turns_become_neighbours() -> None:
    heads, head_dim = 3, 8
    rows = torch.arange(3.0 * heads * head_dim)
    query, key, value = adjacent_pairs(rows, head_dim).chunk(3)
    wanted = [head * head_dim + i + half for head in range(heads) for i in range(4) for half in (0, 4)]
    assert query.tolist() == wanted
    assert key.tolist() == [24 + row for row in wanted]
    assert value.tolist() == list(range(48, 72))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_gets_the_rows_of_its_own_heads(ranks: int) -> None:
    rows, share = torch.arange(3 * 16), 16 // ranks
    for rank, block in enumerate(qkv_by_rank(rows, ranks).chunk(ranks)):
        own = range(rank * share, (rank + 1) * share)
        assert block.tolist() == [part * 16 + row for part in range(3) for row in own]


def test_everything_wrong_with_a_checkpoint_is_in_one_error() -> None:
    reference = random_reference()
    tensors = tensors_of(reference)
    del tensors["model.visual.merger.norm.bias"]
    tensors["model.visual.pos_embed.weight"] = torch.zeros(36, 32)
    tensors["model.visual.blocks.2.norm1.weight"] = torch.zeros(32)
    tensors["visual.merger.norm.weight"] = torch.zeros(32)
    tensors["model.visual.patch_embed.proj.bias"] = torch.zeros(32, dtype=torch.int8)
    with pytest.raises(ConversionError) as error:
        plain_targets(tensors)
    message = str(error.value)
    for words in (
        "visual.merger.norm.bias is missing, shape [32]",
        "model.visual.pos_embed.weight has shape [36, 32], expected [49, 32]",
        "model.visual.blocks.2.norm1.weight is unexpected",
        "are the same tensor, keep one",
        "patch_embed.proj.bias is torch.int8",
    ):
        assert words in message, message
    assert len(error.value.problems) == 5


def test_a_text_only_checkpoint_is_refused_in_one_line() -> None:
    with pytest.raises(ConversionError) as error:
        plain_targets({"model.norm.weight": torch.zeros(4)})
    assert error.value.problems == ["no tensor starts with model.visual. or visual.; use a vision-language checkpoint"]
