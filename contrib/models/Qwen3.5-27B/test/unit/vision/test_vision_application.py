# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The traced vision encoder against the one on the host, over buckets, padding and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.configuration_qwen35 import Qwen35ConfigError, Qwen35NeuronConfig
from qwen35.nxdi import NeuronConfig
from qwen35.vision.application import NeuronQwen35VisionForImageEncoding, Qwen35VisionInferenceConfig
from support.compare import assert_close
from support.ranks import RankPool
from support.vision_cases import (
    CLOSE,
    Grids,
    expected_tokens,
    ours_of,
    random_pixels,
    random_reference,
    save_checkpoint,
)


def load_application(path: Path, buckets: list[int], **options: Any) -> NeuronQwen35VisionForImageEncoding:
    options = {"torch_dtype": torch.float32, "on_cpu": True, "buckets": buckets, **options}
    config = Qwen35VisionInferenceConfig.from_pretrained(path, NeuronConfig(**options))
    application = NeuronQwen35VisionForImageEncoding(str(path), config)
    application.to_cpu()
    return application


@pytest.mark.parametrize("grids", [[[1, 4, 4]], [[1, 4, 6], [2, 2, 4], [1, 2, 2]], [[1, 8, 8]]])
def test_the_traced_program_of_each_bucket_gives_what_the_eager_model_gives(grids: Grids, tmp_path: Path) -> None:
    reference = random_reference()
    save_checkpoint(tmp_path, reference)
    application, eager = load_application(tmp_path, [16, 64]), ours_of(reference)
    pixels, grid_thw = random_pixels(grids, eager.config)
    wrapper = application.models[0]
    for bucket, sample in zip([16, 64], wrapper.input_generator(), strict=True):
        assert all(len(tensor) == bucket for tensor in sample)
        inputs = wrapper.bucket_inputs(pixels, grid_thw)
        if len(inputs[0]) == bucket:
            program = torch.export.export(wrapper.model, sample).module()
            traced = program(*inputs)[: len(pixels) // 4]
            assert_close(traced, eager(pixels, grid_thw), **CLOSE, label=f"bucket {bucket}")
    assert_close(application(pixels, grid_thw), eager(pixels, grid_thw), **CLOSE, label="application")


def test_padding_patches_change_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_reference())
    application = load_application(tmp_path, [32])
    pixels, grid_thw = random_pixels([[1, 4, 6]], application.config.vision)
    inputs = application.models[0].bucket_inputs(pixels, grid_thw)
    clean = application.models[0].model(*inputs)
    dirty = application.models[0].model(torch.cat([pixels, torch.full((8, pixels.shape[1]), 1e4)]), *inputs[1:])
    assert_close(dirty[:6], clean[:6], label="tokens beside other padding")


def encode_on_rank(path: str, pixels: torch.Tensor, grid_thw: torch.Tensor, tp: int) -> torch.Tensor:
    return load_application(Path(path), [64], tp_degree=tp)(pixels, grid_thw).clone()


def test_two_ranks_encode_as_one_does(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    reference = random_reference()
    save_checkpoint(tmp_path, reference)
    pixels, grid_thw = random_pixels([[1, 4, 6], [2, 2, 4]], reference.config)
    for tokens in rank_pool(2).call(encode_on_rank, str(tmp_path), pixels, grid_thw, 2):
        assert_close(tokens, expected_tokens(reference, pixels, grid_thw), **CLOSE, label="TP 2")


def test_more_patches_than_the_largest_bucket_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_reference())
    application = load_application(tmp_path, [16])
    with pytest.raises(ValueError, match=r"24 patches exceed the largest vision bucket \(16\)"):
        application(*random_pixels([[1, 4, 6]], application.config.vision))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"buckets": [16, 18]}, ("buckets=[18]", "4 patches")),
        ({"tp_degree": 3}, ("tp_degree=3", "num_heads=2")),
        ({"torch_dtype": torch.float16}, ("torch.float16", "bfloat16")),
    ],
)
def test_run_settings_that_cannot_work_are_refused(
    options: dict[str, Any], words: Sequence[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, random_reference())
    with pytest.raises(Qwen35ConfigError) as error:
        Qwen35VisionInferenceConfig.from_pretrained(tmp_path, NeuronConfig(**options))
    assert all(word in str(error.value) for word in words), error.value


def test_the_encoder_stays_in_torch_dtype(tmp_path: Path) -> None:
    """NxDI would put its linear layers in fp8 too: there it looks at no list of modules."""
    save_checkpoint(tmp_path, random_reference())
    with pytest.raises(Qwen35ConfigError, match=r"weights_dtype='fp8' is not supported: the vision encoder stays"):
        Qwen35VisionInferenceConfig.from_pretrained(tmp_path, Qwen35NeuronConfig(buckets=[16], weights_dtype="fp8"))


def test_a_saved_config_loads_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_reference())
    config = Qwen35VisionInferenceConfig.from_pretrained(tmp_path, NeuronConfig(buckets=[16]))
    config.save(tmp_path)
    assert Qwen35VisionInferenceConfig.load(tmp_path).vision == config.vision
