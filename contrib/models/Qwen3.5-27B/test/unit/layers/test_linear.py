# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The linear layers of the decoder in the shapes of a rank, and what their ranks compute together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nxdi_cpu.parallel_state import initialize_model_parallel
from qwen35 import OnDeviceSamplingConfig, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.layers.linear import (
    HeadShardedParameter,
    TransposedLinear,
    column_parallel,
    output_head,
    row_parallel,
    token_embedding,
    use_fp8,
)
from qwen35.nxdi import as_rank
from support.applications import needs_stand_ins
from support.compare import assert_close
from support.models import TINY
from support.ranks import RankPool

pytestmark = needs_stand_ins


def config(**options: Any) -> Qwen35InferenceConfig:
    return Qwen35InferenceConfig(Qwen35NeuronConfig(torch_dtype=torch.float32, **options), **TINY)


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_weights_have_the_shapes_of_a_rank(tp_degree: int) -> None:
    with as_rank(0, tp_degree), torch.device("meta"):
        of_rank = config(tp_degree=tp_degree)
        assert column_parallel(of_rank, 64, 96).weight.shape == (96 // tp_degree, 64)
        assert row_parallel(of_rank, 96, 64).weight.shape == (64, 96 // tp_degree)
        assert token_embedding(of_rank).weight.shape == (160, 64 // tp_degree)
        assert output_head(of_rank).weight.shape == (160 // tp_degree, 64)
        assert HeadShardedParameter(8, 16, dtype=torch.float32).weight.shape == (8 // tp_degree, 16)


def column_then_row(wide: torch.Tensor, narrow: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """On a rank of two: narrow (wide x), with its rows of `wide` and its columns of `narrow`."""
    initialize_model_parallel(2)
    rank = torch.distributed.get_rank()
    of_rank = config(tp_degree=2)
    first, second = column_parallel(of_rank, *wide.shape[::-1]), row_parallel(of_rank, *narrow.shape[::-1])
    first.weight.data, second.weight.data = wide.chunk(2)[rank], narrow.chunk(2, dim=1)[rank]
    output: torch.Tensor = second(first(x))
    return output


def test_two_ranks_compute_what_the_whole_weights_do(rank_pool: Callable[[int], RankPool]) -> None:
    wide, narrow, x = torch.randn(96, 64), torch.randn(64, 96), torch.randn(2, 5, 64)
    for output in rank_pool(2).call(column_then_row, wide, narrow, x):
        # Products of order 10 and sums of 96 of them, in float32 and another order.
        assert_close(output, x @ wide.T @ narrow.T, atol=1e-3, label="output")


@pytest.mark.parametrize(
    ("options", "gathers"),
    [
        ({}, True),
        (dict(on_device_sampling_config=OnDeviceSamplingConfig()), False),
        (dict(on_device_sampling_config=OnDeviceSamplingConfig(), on_cpu=True), True),
    ],
    ids=["sampled by the host", "sampled on a device", "sampled on a CPU"],
)
def test_the_head_gathers_all_logits_unless_a_device_samples(options: dict[str, Any], gathers: bool) -> None:
    with as_rank(0, 2), torch.device("meta"):
        assert output_head(config(tp_degree=2, **options)).gather_output is gathers


def test_a_vocabulary_that_does_not_divide_is_padded_to_whole_ranks() -> None:
    odd = Qwen35InferenceConfig(Qwen35NeuronConfig(tp_degree=4), **{**TINY, "vocab_size": 161})
    with as_rank(3, 4), torch.device("meta"):
        head = output_head(odd)
    assert head.weight.shape == (41, 64) and head.pad_size == 3


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_weights_in_fp8_have_the_shapes_of_a_rank_and_scales_of_their_outputs(tp_degree: int) -> None:
    model = torch.nn.Module()
    with as_rank(0, tp_degree), torch.device("meta"):
        of_rank = config(tp_degree=tp_degree)
        model.up_proj, model.down_proj = column_parallel(of_rank, 64, 96), row_parallel(of_rank, 96, 64)
        model.in_proj_ba, model.lm_head = column_parallel(of_rank, 64, 16), output_head(of_rank)
        model.embed_tokens, model.conv1d = token_embedding(of_rank), HeadShardedParameter(8, 4, dtype=torch.float32)
        use_fp8(model)
    in_fp8 = {name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert in_fp8 == {"up_proj.weight", "down_proj.weight"}
    assert model.up_proj.weight.shape == (96 // tp_degree, 64) and model.up_proj.scale.shape == (96 // tp_degree, 1)
    assert model.down_proj.weight.shape == (64, 96 // tp_degree) and model.down_proj.scale.shape == (64, 1)
    assert model.up_proj.scale.partition_dim == 0 and model.up_proj.scale.num_partitions == tp_degree
    assert not model.down_proj.scale.tensor_model_parallel


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_transposed_weights_have_the_shapes_of_a_rank(tp_degree: int, weights_dtype: str | None) -> None:
    with as_rank(0, tp_degree), torch.device("meta"):
        of_rank = config(tp_degree=tp_degree, weights_dtype=weights_dtype)
        wide, narrow = TransposedLinear(of_rank, 64, 96, split=1), TransposedLinear(of_rank, 96, 64, split=0)
    assert wide.weight.shape == (64, 96 // tp_degree) and narrow.weight.shape == (96 // tp_degree, 64)
    assert (wide.weight.partition_dim, narrow.weight.partition_dim) == (1, 0)
    assert wide.weight.dtype == narrow.weight.dtype == of_rank.matrix_dtype
    if weights_dtype is None:
        assert not hasattr(wide, "scale")
        return
    assert wide.scale.shape == (128, 96 // tp_degree) and narrow.scale.shape == (128, 64)
    assert wide.scale.partition_dim == 1 and wide.scale.num_partitions == tp_degree
    assert not narrow.scale.tensor_model_parallel


@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_a_transposed_layer_is_the_layer(weights_dtype: str | None) -> None:
    layer = TransposedLinear(config(weights_dtype=weights_dtype), 64, 96, split=1)
    matrix, scale = torch.randn(64, 96), torch.ones(96)
    if weights_dtype:
        matrix, scale = matrix.to(torch.float8_e4m3fn), torch.rand(96) + 0.5
        layer.scale.data = scale.repeat(128, 1)
    layer.weight.data = matrix
    x = torch.randn(2, 5, 64)
    # Sums of 64 products of order one, in float32 and another order.
    assert_close(layer(x), x @ (matrix.float() * scale), atol=1e-4, label="output")
