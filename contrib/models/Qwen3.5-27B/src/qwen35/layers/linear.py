# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Where the linear layers of the decoder are made, so that one place decides what their weights are.

NxDI's attention makes its own q, k, v and o projections. None of these layers has a bias. Where the matrices are in
fp8, `use_fp8` puts NxD's quantised layers in the place of all of them, those of NxDI included.
"""

from __future__ import annotations

import torch
from torch import nn

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..fp8_form import FP8, MODULES_NOT_CONVERTED
from ..nki_kernels.library_mlp import SCALE_ROWS
from ..nxdi import (
    BaseParallelLinear,
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    convert,
    get_default_per_channel_custom_qconfig_dict,
    get_tensor_model_parallel_size,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)


def column_parallel(
    config: Qwen35InferenceConfig, inputs: int, outputs: int, gather_output: bool = False
) -> ColumnParallelLinear:
    """x [..., inputs] -> [..., outputs / R] on each of R ranks, which has its own rows of the weight.

    With gather_output every rank gets all [..., outputs].
    """
    return ColumnParallelLinear(
        inputs, outputs, bias=False, gather_output=gather_output, dtype=config.neuron_config.torch_dtype
    )


def row_parallel(config: Qwen35InferenceConfig, inputs: int, outputs: int) -> RowParallelLinear:
    """x [..., inputs / R], the output of a column-parallel layer -> [..., outputs], summed over the R ranks."""
    return RowParallelLinear(
        inputs, outputs, bias=False, input_is_parallel=True, dtype=config.neuron_config.torch_dtype
    )


def token_embedding(config: Qwen35InferenceConfig) -> ParallelEmbedding:
    """Ids [B, S] -> [B, S, hidden_size]; each rank has some columns of the table."""
    return ParallelEmbedding(
        config.vocab_size,
        config.hidden_size,
        dtype=config.neuron_config.torch_dtype,
        shard_across_embedding=True,
        pad=True,
    )


def output_head(config: Qwen35InferenceConfig) -> ColumnParallelLinear:
    """x [..., hidden_size] -> logits, padded to whole ranks: a rank's own where a device samples, else all."""
    neuron_config = config.neuron_config
    return ColumnParallelLinear(
        config.hidden_size,
        config.vocab_size,
        bias=False,
        pad=True,
        # On a device the sampler reduces over the ranks; on a CPU it wants whole rows.
        gather_output=neuron_config.on_device_sampling_config is None or neuron_config.on_cpu,
        # NxDI masks as many of the last columns as there is padding; without it they would be tokens.
        keep_padded_output=True,
        dtype=neuron_config.torch_dtype,
    )


def use_fp8(model: nn.Module) -> None:
    """Put NxD's layers with fp8 weights in the place of the linear layers, all but `MODULES_NOT_CONVERTED`.

    NxDI does it too, and leaves alone what is converted already; but only with modules that it traces: in `to_cpu` it
    would run the fp8 numbers without their scales.
    """
    settings = {**get_default_per_channel_custom_qconfig_dict(), "quantized_dtype": FP8}
    convert(model, settings, inplace=True, modules_to_not_convert=MODULES_NOT_CONVERTED)


class HeadShardedParameter(BaseParallelLinear):
    """A bare parameter whose rows are split over the ranks; NxD splits only parameters of its own linear layers."""

    def __init__(self, rows: int, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_size()
        self.weight = nn.Parameter(torch.empty(rows // ranks, *shape, dtype=dtype), requires_grad=False)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1, ranks)


class TransposedLinear(BaseParallelLinear):
    """x [..., inputs] -> x W^T [..., outputs] with the weight kept as W^T, as nki-library's kernels take it.

    It is transposed when a checkpoint is converted (`weights.conversion.Rule`): a kernel's operand lies in HBM as it is
    said to, so that another layout would be a copy in every call. weight [inputs, outputs] is in the configuration's
    `matrix_dtype`. In fp8 there is scale [128, outputs] float32, of equal rows.

    Args:
        split: the dimension of the weight of which each rank has its part: 1 as in a column-parallel layer, or 0 as in
            a row-parallel one, whose outputs `sum_over_ranks` sums.
    """

    def __init__(self, config: Qwen35InferenceConfig, inputs: int, outputs: int, split: int) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_size()
        sizes = [inputs, outputs]
        sizes[split] //= ranks
        self.weight = nn.Parameter(torch.empty(sizes, dtype=config.matrix_dtype), requires_grad=False)
        set_tensor_model_parallel_attributes(self.weight, True, split, 1, ranks)
        if config.matrix_dtype == FP8:
            self.scale = nn.Parameter(torch.empty(SCALE_ROWS, sizes[1]), requires_grad=False)
            set_tensor_model_parallel_attributes(self.scale, split == 1, 1, 1, ranks if split == 1 else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = torch.matmul(x, self.weight.to(x.dtype))
        return (output.float() * self.scale[0]).to(x.dtype) if self.weight.dtype == FP8 else output


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's x, in float32 as a row-parallel layer sums."""
    if get_tensor_model_parallel_size() == 1:
        return x
    reduced: torch.Tensor = reduce_from_tensor_model_parallel_region(x.float())
    return reduced.to(x.dtype)
