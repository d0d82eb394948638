# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""fp8 matrices against NumPy and ml_dtypes; and every way in which a checkpoint's scales can be wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.fp8_form import CHANNEL_METHOD, FP8, Fp8Form
from qwen35.weights import fp8
from qwen35.weights.conversion import ConversionError, Skipped
from qwen35.weights.fp8 import ScaledMatrix, quantise_per_channel, scale_per_channel
from qwen35.weights.text_rules import convert_checkpoint
from support.compare import assert_close
from support.fp8_cases import PUBLISHED, dequantise_blocks, dequantised, published, quantise_blocks
from support.models import TINY, random_weights

BLOCKS, ROWS = Fp8Form((128, 128), ()), Fp8Form(None, ())
MATRICES = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    elements=st.floats(-1e4, 1e4, width=32),
)


def values(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    """What fp8 bytes are, by ml_dtypes."""
    return weight.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """torch compares no fp8 tensors."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def with_pieces(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(fp8, "_PIECE", elements)


# --- Between dtypes --------------------------------------------------------------------------------------------------
@given(MATRICES)
@settings(deadline=None)
def test_each_row_is_rounded_to_e4m3_with_its_largest_element_at_240(matrix: np.ndarray[Any, Any]) -> None:
    weight, scale = quantise_per_channel("x", torch.from_numpy(matrix))
    assert weight.dtype == FP8 and weight.shape == matrix.shape
    assert scale.dtype == torch.float32 and scale.shape == (len(matrix), 1)
    largest = np.abs(matrix).max(1, keepdims=True)
    scaled = largest / np.float32(240)
    expected_scale = np.where(scaled > 0, scaled, np.float32(1))  # what is too small to scale is a row of zeros
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    exact = np.clip(matrix / expected_scale, -240, 240)
    np.testing.assert_array_equal(values(weight), exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    # Trainium reads what is above 0x77 as infinity and NaN; its e4m3 is ml_dtypes' float8_e4m3.
    as_bytes = weight.view(torch.uint8).numpy()
    assert ((as_bytes & 0x7F) <= 0x77).all()
    np.testing.assert_array_equal(as_bytes.view(ml_dtypes.float8_e4m3).astype(np.float32), values(weight))


def test_rows_as_small_as_bfloat16_has_them_keep_their_precision() -> None:
    tiny = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 2.0**-100
    weight, scale = quantise_per_channel("x", tiny)
    relative = (weight.double() * scale.double() - tiny).norm() / tiny.double().norm()
    assert relative < 0.03  # as for rows of order one: NxD's own quantiser never divides by less than 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 300), (1, 129), (300, 1)])
def test_a_published_matrix_is_its_weights_times_the_scales_of_their_blocks(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale = quantise_blocks(torch.randn(shape, generator=torch.Generator().manual_seed(1)), dtype)
    expected = dequantise_blocks(weight, scale)
    matrix = ScaledMatrix("x.weight", weight, scale, BLOCKS)
    assert_close(matrix.dequantised(torch.float32), expected)
    assert_close(matrix.dequantised(torch.bfloat16), expected.bfloat16())
    with_pieces(monkeypatch, 7 * shape[1])  # pieces that begin and end within a block
    assert_close(matrix.dequantised(torch.float32), expected)


def test_other_sizes_of_blocks_are_taken_as_they_are_said() -> None:
    weight = torch.full((5, 7), 2.0).to(FP8)
    scale = torch.arange(1.0, 7.0).view(2, 3)
    found = ScaledMatrix("x.weight", weight, scale, Fp8Form((3, 3), ())).dequantised(torch.float32)
    expected = [[2.0 * scale[i // 3, j // 3].item() for j in range(7)] for i in range(5)]
    assert found.tolist() == expected


def test_a_published_matrix_per_channel_is_the_rounding_of_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = quantise_blocks(torch.randn(200, 300, generator=torch.Generator().manual_seed(2)), torch.bfloat16)
    matrix = ScaledMatrix("x.weight", weight, scale, BLOCKS)
    expected = quantise_per_channel("x", dequantise_blocks(weight, scale))
    with_pieces(monkeypatch, 7 * 300)
    for found, part in zip(quantise_per_channel("x", matrix), expected, strict=True):
        assert_close(bits(found), bits(part))
    assert_close(scale_per_channel("x", matrix), expected.scale)


def test_a_matrix_in_our_form_is_passed_on_unless_it_goes_beyond_240() -> None:
    channels = quantise_per_channel("x", torch.randn(20, 30, generator=torch.Generator().manual_seed(3)))
    found = quantise_per_channel("x", ScaledMatrix("x.weight", channels.weight, channels.scale, ROWS))
    assert found.weight is channels.weight and torch.equal(found.scale, channels.scale)
    beyond = ScaledMatrix("x.weight", torch.tensor([[448.0, 3.0]]).to(FP8), torch.ones(1, 1), ROWS)
    rounded = quantise_per_channel("x", beyond)
    assert rounded.weight.float().abs().max() == 240 and rounded.scale.item() == pytest.approx(448 / 240)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_with_values_that_are_no_numbers_is_named(value: float) -> None:
    matrix = torch.ones(3, 4, dtype=torch.bfloat16)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="x has infinities or NaN among its weights; the file is corrupt"):
        quantise_per_channel("x", matrix)


# --- The targets -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("overrides", [{}, {"num_attention_heads": 6, "num_key_value_heads": 2}])
@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_weights_and_scales_of_a_target_are_its_rows_quantised(tp_degree: int, overrides: dict[str, int]) -> None:
    """Row by row quantising commutes with moving rows: heads in rank order, gates out of q_proj, padded heads."""
    fields = {**TINY, **overrides}
    weights = random_weights(**overrides)
    plain = convert_checkpoint(weights, _config(tp_degree, fields)).materialise()
    found = convert_checkpoint(weights, _config(tp_degree, fields, weights_dtype="fp8")).materialise()
    matrices = [name for name, tensor in found.items() if tensor.dtype == FP8]
    assert {name.split(".")[-2] for name in matrices} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkvz", "out_proj"
    }  # fmt: skip
    for name, tensor in plain.items():
        if name not in matrices:
            assert_close(found[name], tensor, label=name)
            continue
        scale = found[name.removesuffix("weight") + "scale"]
        expected = quantise_per_channel(name, tensor)
        assert scale.shape == expected.scale.shape and scale.dtype == torch.float32
        padding = tensor.abs().amax(1, keepdim=True) == 0
        assert padding.any() == (
            "num_attention_heads" in overrides and tp_degree == 4 and "gate_proj" in name and "attn" in name
        )
        assert_close(bits(found[name]), bits(expected.weight), label=name)
        assert_close(scale, torch.where(padding, 0.0, expected.scale), label=name)


def _config(tp_degree: int, fields: dict[str, Any], **options: Any) -> Qwen35InferenceConfig:
    neuron_config = Qwen35NeuronConfig(tp_degree=tp_degree, torch_dtype=torch.float32, **options)
    return Qwen35InferenceConfig(neuron_config, **fields)


def test_a_published_checkpoint_may_be_kept_in_fp8(caplog: pytest.LogCaptureFixture) -> None:
    tensors = published(random_weights())
    config = _config(1, {**TINY, "quantization_config": PUBLISHED}, weights_dtype="fp8")
    with caplog.at_level(logging.WARNING):
        found = convert_checkpoint(tensors, config).materialise()
    assert caplog.text.count("rounded again") == 1
    caplog.clear()
    expected = convert_checkpoint(dequantised(tensors), _config(1, TINY, weights_dtype="fp8")).materialise()
    assert "rounded again" not in caplog.text
    for name, tensor in expected.items():
        assert_close(bits(found[name]), bits(tensor), label=name)


# --- Wrong checkpoints -----------------------------------------------------------------------------------------------
FP8_CONFIG = Qwen35InferenceConfig(Qwen35NeuronConfig(torch_dtype="float32"), **TINY, quantization_config=PUBLISHED)
GATE = "model.layers.0.mlp.gate_proj.weight"
SCALE = f"{GATE}_scale_inv"

Change = Callable[[dict[str, torch.Tensor]], object]


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


CORRUPTIONS: dict[str, tuple[Change, str]] = {
    "no scale": (lambda t: t.pop(SCALE), f"{GATE} is torch.float8_e4m3fn without {SCALE}"),
    "no weight": (lambda t: t.pop(GATE), f"{SCALE} scales {GATE}, which is missing"),
    "a scale beside a bf16 weight": (put(GATE, lambda w: w.bfloat16()), f"{GATE} is torch.bfloat16 beside {SCALE}"),
    "e5m2": (put(GATE, lambda w: w.to(torch.float8_e5m2)), f"{GATE} is torch.float8_e5m2 beside {SCALE}"),
    "bytes as integers": (put(GATE, lambda w: w.view(torch.uint8)), f"{GATE} is torch.uint8 beside {SCALE}"),
    "too few scales": (put(SCALE, lambda s: s.flatten()), f"{SCALE} has shape [1], expected [1, 1] for blocks of 128"),
    "a scale per tensor": (put(SCALE, lambda s: s[0, 0].clone()), f"{SCALE} has shape [], expected [1, 1]"),
    "scales of other blocks": (put(SCALE, lambda s: s.repeat(2, 1)), f"{SCALE} has shape [2, 1], expected [1, 1]"),
    "scales as integers": (put(SCALE, lambda s: s.to(torch.int32)), f"{SCALE} is torch.int32, not bfloat16"),
    "scales as exponents": (put(SCALE, lambda s: s.to(torch.float8_e8m0fnu)), f"{SCALE} is torch.float8_e8m0fnu"),
    "a static scale of activations": (
        lambda t: t.__setitem__(f"{GATE[:-7]}.input_scale", torch.ones(1)),
        f"{GATE[:-7]}.input_scale is a static scale of activations, which is not read",
    ),
    "a vector in fp8": (
        lambda t: t.update({"model.norm.weight": torch.ones(64).to(FP8), "model.norm.weight_scale_inv": torch.ones(1)}),
        "model.norm.weight is torch.float8_e4m3fn of shape [64], only matrices can be",
    ),
    "an embedding in fp8 without a scale": (
        put("model.embed_tokens.weight", lambda w: w.to(FP8)),
        "model.embed_tokens.weight is torch.float8_e4m3fn without model.embed_tokens.weight_scale_inv",
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_scale_that_does_not_fit_is_one_line_before_anything_is_read(kind: str) -> None:
    change, words = CORRUPTIONS[kind]
    tensors = published(random_weights())
    change(tensors)
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(tensors, FP8_CONFIG)
    lines = [line for line in caught.value.problems if not line.endswith("is missing, shape [96, 64]")]
    assert len(lines) == 1 and lines[0].startswith(words) and ("use the" in lines[0] or "download" in lines[0]), lines


def test_corruptions_of_one_kind_are_summed_up() -> None:
    tensors = {name: tensor for name, tensor in published(random_weights()).items() if "_scale_inv" not in name}
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(tensors, FP8_CONFIG)
    *first, more = caught.value.problems
    assert len(first) == 3 and more.endswith("more tensors are scaled wrongly")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_a_scale_that_is_no_positive_number_is_named(value: float, weights_dtype: str | None) -> None:
    tensors = published(random_weights())
    tensors[SCALE].fill_(value)
    _refuses_values(tensors, weights_dtype, f"{SCALE} has the scale {value}, not a positive number")


@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_a_weight_that_is_no_number_is_named(weights_dtype: str | None) -> None:
    tensors = published(random_weights())
    tensors[GATE].view(torch.uint8)[3, 4] = 0x7F
    _refuses_values(tensors, weights_dtype, f"{GATE} has NaN among its weights")


def _refuses_values(tensors: dict[str, torch.Tensor], weights_dtype: str | None, words: str) -> None:
    config = _config(1, {**TINY, "quantization_config": PUBLISHED}, weights_dtype=weights_dtype)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tensors, config).materialise()


def test_fp8_in_config_json_alone_is_refused() -> None:
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(random_weights(), FP8_CONFIG)
    assert "says that weights are in fp8, and none is" in str(caught.value)


def test_fp8_weights_without_a_word_in_config_json_are_refused() -> None:
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(published(random_weights()), _config(1, TINY))
    (problem,) = caught.value.problems
    assert "quantised with fp8" in problem and "download config.json again" in problem


@pytest.mark.parametrize("method", ["blocks", "rows"])
def test_the_other_forms_scales_are_refused(method: str) -> None:
    tensors = published(random_weights())
    if method == "blocks":  # the tensors are, config.json says rows
        config = Qwen35InferenceConfig(
            Qwen35NeuronConfig(), **TINY, quantization_config={"quant_method": CHANNEL_METHOD}
        )
    else:
        tensors = {name.replace("_scale_inv", "_scale"): tensor for name, tensor in tensors.items()}
        config = FP8_CONFIG
    with pytest.raises(ConversionError, match="scale"):
        convert_checkpoint(tensors, config)


# --- Right checkpoints with something odd ----------------------------------------------------------------------------
def test_a_list_that_says_something_else_than_the_tensors_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Releases list what a dense model lacks, as mlp.gate, and leave out what is in bfloat16, as norms."""
    tensors = published(random_weights(), chosen=lambda name: name.endswith(("gate_proj.weight", "lm_head.weight")))
    listed = ["model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "lm_head", "model.layers.1", "nothing"]
    config = Qwen35InferenceConfig(
        Qwen35NeuronConfig(torch_dtype="float32"),
        **TINY,
        quantization_config={**PUBLISHED, "modules_to_not_convert": listed},
    )
    with caplog.at_level(logging.WARNING):
        found = convert_checkpoint(tensors, config).materialise()
    assert (
        "modules_to_not_convert lists model.layers.0.mlp.gate_proj, lm_head, which the files have in fp8" in caplog.text
    )
    expected = convert_checkpoint(dequantised(tensors), _config(1, TINY)).materialise()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, label=name)


def test_scales_of_tensors_that_are_skipped_are_skipped_with_them() -> None:
    mtp = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(96, 64), "mtp.fc.weight": torch.randn(64, 128)}
    tensors = published({**random_weights(), **mtp})
    assert "mtp.layers.0.mlp.up_proj.weight_scale_inv" in tensors
    report = convert_checkpoint(tensors, FP8_CONFIG).report
    assert report.skipped[Skipped.MTP].count == 3
    assert report.consumed.count == len(tensors) - 3
    assert report.consumed.nbytes == sum(t.nbytes for name, t in tensors.items() if not name.startswith("mtp"))


def test_a_prefix_of_wrappers_before_weight_and_scale_is_read() -> None:
    tensors = {f"module.{name}": tensor for name, tensor in published(random_weights()).items()}
    assert convert_checkpoint(tensors, FP8_CONFIG)["norm.weight"].shape == (64,)
