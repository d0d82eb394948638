# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder against transformers', and its loading, tracing and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwen35.configuration_qwen35 import Qwen35ConfigError
from qwen35.configuration_qwen35_vl import Qwen35VisionConfig
from qwen35.nxdi import NeuronConfig
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.vision.encoder import (
    NeuronQwen35VisionForImageEncoding,
    NeuronQwen35VisionModel,
    Qwen35VisionInferenceConfig,
    arithmetic_dtype,
)
from qwen35.weights.checkpoint import CheckpointReader
from qwen35.weights.conversion import ConversionError
from support.compare import assert_close
from support.ranks import RankPool

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import Qwen3_5VisionConfig, Qwen3_5VisionModel  # noqa: E402

TINY = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=24,
    num_position_embeddings=49,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    in_channels=3,
)
Grids = Sequence[Sequence[int]]


def random_reference(seed: int = 0, **overrides: Any) -> Qwen3_5VisionModel:
    """A transformers encoder whose every weight matters: activations of order one, biases and norms included."""
    model = Qwen3_5VisionModel._from_config(
        Qwen3_5VisionConfig(**{**TINY, **overrides}), attn_implementation="sdpa"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias") or "pos_embed" in name:
            parameter.data = 0.5 * noise
        else:
            # Queries and keys twice as strong, so that attention is far from uniform.
            parameter.data = noise * (2.0 if "qkv" in name else 1.0) * parameter[0].numel() ** -0.5
    return model


def tensors_of(reference: Qwen3_5VisionModel, prefix: str = "model.visual.") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in reference.state_dict().items()}


def ours_of(reference: Qwen3_5VisionModel, dtype: torch.dtype = torch.float32) -> NeuronQwen35VisionModel:
    config = Qwen35VisionConfig.from_dict(reference.config.to_dict())
    return NeuronQwen35VisionModel.from_checkpoint(tensors_of(reference), config, dtype)


def random_pixels(grids: Grids, config: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    grid_thw = torch.tensor(grids)
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid_thw.prod(1).sum()), size, generator=generator), grid_thw


@torch.no_grad()
def expected_tokens(reference: Qwen3_5VisionModel, pixels: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    return reference(pixels, grid_thw).pooler_output


@st.composite
def encoders(draw: Any) -> tuple[dict[str, int], Grids]:
    """Sizes of an encoder, and images and videos of sizes that it accepts."""
    merge, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    sizes = dict(
        depth=draw(st.integers(1, 3)),
        # Wide enough that no row of activations is constant by chance, whose rounding a norm would blow up.
        hidden_size=4 * heads * draw(st.integers(8, 12)),
        intermediate_size=draw(st.integers(1, 70)),
        num_heads=heads,
        out_hidden_size=draw(st.integers(1, 40)),
        num_position_embeddings=draw(st.integers(1, 9)) ** 2,
        patch_size=draw(st.integers(1, 5)),
        temporal_patch_size=draw(st.integers(1, 3)),
        spatial_merge_size=merge,
        in_channels=draw(st.integers(1, 4)),
    )
    side = st.integers(1, 6).map(lambda blocks: blocks * merge)
    return sizes, draw(st.lists(st.tuples(st.integers(1, 4), side, side), min_size=1, max_size=5))


# float32: outputs are of order one to ten after at most three layers, rounding stays under 1e-5 of that.
CLOSE = dict(atol=1e-4, rtol=1e-5)


@settings(max_examples=120, phases=(Phase.explicit, Phase.generate))
@given(case=encoders(), seed=st.integers(0, 999))
def test_tokens_equal_transformers_for_any_sizes_images_and_videos(case: Any, seed: int) -> None:
    sizes, grids = case
    reference = random_reference(seed, **sizes)
    pixels, grid_thw = random_pixels(grids, reference.config, seed)
    actual = ours_of(reference)(pixels, grid_thw)
    assert_close(actual, expected_tokens(reference, pixels, grid_thw), **CLOSE, label=f"{sizes} {grids}")


def test_a_layer_of_27b_width_equals_transformers() -> None:
    reference = random_reference(
        depth=1,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        out_hidden_size=512,
        num_position_embeddings=2304,
        patch_size=16,
    )
    pixels, grid_thw = random_pixels([[1, 10, 14], [2, 4, 6]], reference.config)
    actual = ours_of(reference)(pixels, grid_thw)
    assert_close(actual, expected_tokens(reference, pixels, grid_thw), **CLOSE, label="27B's width")


def test_patches_of_more_than_one_mlp_block_equal_transformers() -> None:
    reference = random_reference()
    pixels, grid_thw = random_pixels([[1, 40, 60]], reference.config)  # 2,400 patches in blocks of 1,024
    assert_close(ours_of(reference)(pixels, grid_thw), expected_tokens(reference, pixels, grid_thw), **CLOSE)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(compute_dtype: torch.dtype) -> None:
    reference = random_reference(depth=3).bfloat16()
    pixels, grid_thw = random_pixels([[1, 6, 8], [2, 4, 4], [1, 8, 6]], reference.config)
    model = ours_of(reference, torch.bfloat16)
    model.compute_dtype = compute_dtype
    actual = model(pixels.bfloat16(), grid_thw)
    theirs = expected_tokens(reference, pixels.bfloat16(), grid_thw)
    exact = expected_tokens(reference.float(), pixels.bfloat16().float(), grid_thw)
    assert actual.dtype == torch.bfloat16
    error, their_error = ((t.float() - exact).square().mean().sqrt() for t in (actual, theirs))
    # Half again: the order of roundings differs.
    assert error < 1.5 * their_error, f"error {error}, transformers' {their_error}"


def test_float32_weights_are_multiplied_in_float32() -> None:
    assert arithmetic_dtype(torch.float32) == torch.float32


def test_images_do_not_see_each_other_and_come_back_in_order() -> None:
    model = ours_of(random_reference())
    grids = [[1, 8, 8], [1, 2, 2], [2, 4, 6], [1, 6, 4], [1, 2, 2]]
    pixels, grid_thw = random_pixels(grids, model.config)
    together = model(pixels, grid_thw)
    counts = grid_thw.prod(1).tolist()
    alone = [
        model(image, grid[None]) for image, grid in zip(pixels.split(counts), grid_thw, strict=True)
    ]  # float32 rounding depends on the number of rows of a product
    assert_close(together, torch.cat(alone), atol=1e-5, label="images together and alone")


def test_a_video_is_encoded_as_its_frames_are() -> None:
    model = ours_of(random_reference())
    pixels, grid_thw = random_pixels([[3, 4, 6]], model.config)
    frames = model(pixels, torch.tensor([[1, 4, 6]] * 3))
    assert_close(model(pixels, grid_thw), frames, label="a video and its frames")


def test_no_images_give_no_tokens() -> None:
    model = ours_of(random_reference())
    tokens = model(torch.zeros(0, model.config.patch_dim), torch.zeros(0, 3, dtype=torch.long))
    assert tokens.shape == (0, TINY["out_hidden_size"])


@pytest.mark.parametrize(
    ("grids", "rows", "columns", "words"),
    [
        ([[1, 4, 4]], 15, 96, ("[15, 96]", "[16, 96]")),
        ([[1, 4, 4]], 16, 95, ("[16, 95]", "[16, 96]")),
        ([[1, 4, 4], [1, 3, 4]], 28, 96, ("grid_thw[1]=[1, 3, 4]", "spatial_merge_size=2")),
        ([[0, 4, 4]], 0, 96, ("grid_thw[0]=[0, 4, 4]", "at least 1")),
        ([1, 4, 4], 16, 96, ("shape [3]", "[images, 3]")),
    ],
)
def test_pixels_and_grids_that_do_not_fit_are_refused(
    grids: Any, rows: int, columns: int, words: Sequence[str]
) -> None:
    with pytest.raises(ValueError) as error:
        ours_of(random_reference())(torch.zeros(rows, columns), torch.tensor(grids))
    assert all(word in str(error.value) for word in words), error.value


def test_a_dtype_without_support_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16"):
        NeuronQwen35VisionModel(Qwen35VisionConfig(**TINY), torch.float16)


# Configuration


def test_configs_of_transformers_4_and_5_give_the_same_encoder() -> None:
    old = dict(TINY, model_type="qwen3_5", deepstack_visual_indexes=[], initializer_range=0.02)
    new = Qwen3_5VisionConfig(**{**TINY, "patch_size": [4, 4], "temporal_patch_size": 2})
    expected = Qwen35VisionConfig(**TINY)
    assert Qwen35VisionConfig.from_dict(old) == expected
    assert Qwen35VisionConfig.from_dict(new) == expected
    assert Qwen35VisionConfig.from_dict(new.to_dict()) == expected
    assert Qwen35VisionConfig.from_dict(SimpleNamespace(**old)) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 0}, ("depth=0", "positive integer")),
        ({"hidden_size": None}, ("hidden_size=None", "positive integer")),
        ({"hidden_size": 34}, ("hidden_size=34", "num_heads=2")),
        ({"num_position_embeddings": 50}, ("num_position_embeddings=50", "square")),
        ({"hidden_act": "silu"}, ("hidden_act='silu'", "gelu_pytorch_tanh")),
        ({"patch_size": [4, 8]}, ("patch_size=[4, 8]", "square")),
        ({"deepstack_visual_indexes": [1]}, ("deepstack_visual_indexes=[1]", "Qwen3.5")),
        ({"model_type": "qwen3_vl"}, ("model_type='qwen3_vl'", "qwen3_5_vision")),
        ({"rope_parameters": {"rope_type": "yarn"}}, ("rope_type='yarn'", "axial")),
        ({"rope_parameters": {"rope_theta": -1}}, ("rope_theta=-1", "positive")),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field_and_value(changes: dict[str, Any], words: Sequence[str]) -> None:
    with pytest.raises(Qwen35ConfigError) as error:
        Qwen35VisionConfig.from_dict({**TINY, **changes})
    assert all(word in str(error.value) for word in words), error.value


def test_every_missing_field_is_named() -> None:
    with pytest.raises(Qwen35ConfigError) as error:
        Qwen35VisionConfig.from_dict({"depth": 2, "patch_size": 16})
    assert len(error.value.problems) == 7


@pytest.mark.parametrize("content", ["{}", "not JSON", "[]"])
def test_a_checkpoint_without_a_vision_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(Qwen35ConfigError, match=r"config\.json"):
        Qwen35VisionConfig.from_pretrained(tmp_path)


# Loading


def save_checkpoint(path: Path, reference: Qwen3_5VisionModel, prefix: str = "model.visual.") -> None:
    decoder = {"model.language_model.norm.weight": torch.zeros(4)}
    save_file(tensors_of(reference, prefix) | decoder, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"vision_config": reference.config.to_dict()}))


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_a_checkpoint_is_read_a_tensor_at_a_time_and_the_decoder_not_at_all(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = random_reference()
    save_checkpoint(tmp_path, reference, prefix)
    read: list[str] = []
    original = CheckpointReader.__getitem__
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda self, name: read.append(name) or original(self, name))
    model = NeuronQwen35VisionModel.from_pretrained(tmp_path, torch.float32)
    assert sorted(read) == sorted(tensors_of(reference, prefix))
    pixels, grid_thw = random_pixels([[1, 4, 6]], reference.config)
    assert_close(model(pixels, grid_thw), expected_tokens(reference, pixels, grid_thw), **CLOSE)


def test_the_mini_is_encoded_as_transformers_does() -> None:
    model = NeuronQwen35VisionModel.from_pretrained(MINI_CHECKPOINT, torch.float32)
    reference = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32)
    pixels, grid_thw = random_pixels([[1, 8, 10], [2, 4, 4]], model.config)
    expected = expected_tokens(reference.model.visual, pixels, grid_thw)
    assert_close(model(pixels, grid_thw), expected, **CLOSE, label="the mini")


def test_everything_wrong_with_a_checkpoint_is_in_one_error() -> None:
    reference = random_reference()
    tensors = tensors_of(reference)
    del tensors["model.visual.merger.norm.bias"]
    tensors["model.visual.pos_embed.weight"] = torch.zeros(36, 32)
    tensors["model.visual.blocks.2.norm1.weight"] = torch.zeros(32)
    tensors["visual.merger.norm.weight"] = torch.zeros(32)
    tensors["model.visual.patch_embed.proj.bias"] = torch.zeros(32, dtype=torch.int8)
    with pytest.raises(ConversionError) as error:
        NeuronQwen35VisionModel.from_checkpoint(tensors, Qwen35VisionConfig(**TINY))
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
        NeuronQwen35VisionModel.from_checkpoint({"model.norm.weight": torch.zeros(4)}, Qwen35VisionConfig(**TINY))
    assert len(error.value.problems) == 1 and "vision-language" in str(error.value)


# The NxDI application


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


def test_a_saved_config_loads_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_reference())
    config = Qwen35VisionInferenceConfig.from_pretrained(tmp_path, NeuronConfig(buckets=[16]))
    config.save(tmp_path)
    assert Qwen35VisionInferenceConfig.load(tmp_path).vision == config.vision
