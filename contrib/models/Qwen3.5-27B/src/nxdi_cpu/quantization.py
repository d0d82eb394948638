# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Parallel linear layers with fp8 weights, and `convert` that puts them in; stands in for NxD's `quantization`.

Only what runs here is implemented: float8_e4m3fn with a scale per output channel, no quantised activations. A layer
holds `weight`, sharded as the plain layer's, and `scale` [rows, 1] float32: of a column-parallel layer each rank has
the scales of its rows, of a row-parallel one all of them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    divide,
    get_padding_length,
    require_inert,
    set_tensor_model_parallel_attributes,
)
from .parallel_state import (
    TensorParallelGroup,
    gather_from_tensor_model_parallel_region,
    get_tensor_model_parallel_group,
    reduce_from_tensor_model_parallel_region,
)


class QuantizationType(enum.Enum):
    PER_TENSOR_SYMMETRIC = "per_tensor_symmetric"
    PER_CHANNEL_SYMMETRIC = "per_channel_symmetric"


class QuantizedDtype(enum.Enum):
    INT8 = torch.int8
    F8E4M3 = torch.float8_e4m3fn


class KVQuantizationConfig:
    """How keys and values are kept: by default cast to float8_e4m3fn, without a scale."""

    def __init__(self, **kwargs: Any) -> None:
        self.k_quant_method = kwargs.pop("k_quant_method", QuantizationType.PER_TENSOR_SYMMETRIC)
        self.v_quant_method = kwargs.pop("v_quant_method", QuantizationType.PER_TENSOR_SYMMETRIC)
        self.quant_dtype: torch.dtype = kwargs.pop("quant_dtype", torch.float8_e4m3fn)
        self.direct_cast: bool = kwargs.pop("direct_cast", True)
        require_inert("KVQuantizationConfig", scales=not self.direct_cast)


def get_default_per_channel_custom_qconfig_dict() -> dict[str, Any]:
    """Settings for `convert`; the default dtype is int8, as in NxD."""
    return {
        "quantization_type": QuantizationType.PER_CHANNEL_SYMMETRIC,
        "quantized_dtype": QuantizedDtype.INT8,
        "quantization_per_channel_axis": None,
        "activation_quantization_type": None,
        "clamp_bound": float("inf"),
    }


class BaseQuantizeParallelLinear(nn.Module):
    """Base of the layers whose leaf parameters are a quantised weight and its scales."""

    weight: nn.Parameter
    scale: nn.Parameter
    tensor_parallel_group: TensorParallelGroup


def _set_parameters(layer: BaseQuantizeParallelLinear, shape: tuple[int, int], partition_dim: int) -> None:
    """Give a layer its weight of one rank, split along `partition_dim`, and its scales."""
    # Left unwritten: every weight is assigned from a checkpoint, and untouched pages cost no memory.
    layer.weight = nn.Parameter(torch.empty(shape, dtype=torch.float8_e4m3fn), requires_grad=False)
    layer.scale = nn.Parameter(torch.empty(shape[0], 1), requires_grad=False)
    ranks = layer.tensor_parallel_group.size()
    set_tensor_model_parallel_attributes(layer.weight, True, partition_dim, 1, ranks)
    if partition_dim == 0:
        set_tensor_model_parallel_attributes(layer.scale, True, 0, 1, ranks)
    else:
        set_tensor_model_parallel_attributes(layer.scale, False, 0, 1, 1)


def _scaled_product(layer: BaseQuantizeParallelLinear, x: torch.Tensor) -> torch.Tensor:
    """x W^T: the product with the weights as they are, cast to the dtype of x, then scaled in float32."""
    output = F.linear(x, layer.weight.to(x.dtype))
    return (output.float() * layer.scale.T).to(x.dtype)


def _require_fp8(
    owner: str, quantization_type: QuantizationType | str, quantized_dtype: QuantizedDtype | torch.dtype, **inert: Any
) -> None:
    """Refuse what is not implemented; `inert` are arguments that are there for the signature only."""
    if QuantizationType(quantization_type) is not QuantizationType.PER_CHANNEL_SYMMETRIC:
        raise NotImplementedError(f"{owner}: quantization_type={quantization_type}, only per_channel_symmetric")
    if QuantizedDtype(quantized_dtype) is not QuantizedDtype.F8E4M3:
        raise NotImplementedError(f"{owner}: quantized_dtype={quantized_dtype}, only float8_e4m3fn")
    require_inert(owner, **inert)


class QuantizedColumnParallel(BaseQuantizeParallelLinear):
    """`ColumnParallelLinear` with the weight in fp8."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        quantization_type: QuantizationType | str = "per_tensor_symmetric",
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        quantized_dtype: QuantizedDtype | torch.dtype = QuantizedDtype.INT8,
        device: torch.device | None = None,
        stride: int = 1,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        quantization_per_channel_axis: int | None = None,
        block_axis: list[int] | None = None,
        block_size: list[int] | None = None,
        scale_dtype: torch.dtype = torch.float32,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        pad: bool = False,
        activation_quantization_type: str | None = None,
        clamp_bound: float = float("inf"),
        rank_ordering: list[int] | None = None,
    ) -> None:
        super().__init__()
        _require_fp8(
            "QuantizedColumnParallel",
            quantization_type,
            quantized_dtype,
            bias=bias,
            sequence_parallel_enabled=sequence_parallel_enabled,
            keep_master_weight=keep_master_weight,
            quantization_per_channel_axis=quantization_per_channel_axis,
            block_size=block_size,
            activation_quantization_type=activation_quantization_type,
            rank_ordering=rank_ordering,
        )
        self.tensor_parallel_group = tensor_model_parallel_group or get_tensor_model_parallel_group()
        ranks = self.tensor_parallel_group.size()
        self.pad, self.gather_output = pad, gather_output
        self.pad_size = get_padding_length(output_size, ranks) if pad else 0
        _set_parameters(self, (divide(output_size + self.pad_size, ranks), input_size), 0)

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = _scaled_product(self, input)
        return (
            gather_from_tensor_model_parallel_region(output, self.tensor_parallel_group)
            if self.gather_output
            else output
        )

    def preshard_hook(self, model_state_dict: MutableMapping[str, torch.Tensor], prefix: str) -> None:
        """Append the zero rows that make weight and scales divisible."""
        if self.pad_size:
            for name in (prefix, prefix.removesuffix("weight") + "scale"):
                model_state_dict[name] = F.pad(model_state_dict[name], (0, 0, 0, self.pad_size))


class QuantizedRowParallel(BaseQuantizeParallelLinear):
    """`RowParallelLinear` with the weight in fp8; the partial sums are reduced in the dtype of the input."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        quantization_type: QuantizationType | str = "per_tensor_symmetric",
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        quantized_dtype: QuantizedDtype | torch.dtype = QuantizedDtype.INT8,
        device: torch.device | None = None,
        stride: int = 1,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        quantization_per_channel_axis: int | None = None,
        reduce_output: bool = True,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        pad: bool = False,
        activation_quantization_type: str | None = None,
        clamp_bound: float = float("inf"),
        block_axis: list[int] | None = None,
        block_size: list[int] | None = None,
        scale_dtype: torch.dtype = torch.float32,
        rank_ordering: list[int] | None = None,
    ) -> None:
        super().__init__()
        _require_fp8(
            "QuantizedRowParallel",
            quantization_type,
            quantized_dtype,
            bias=bias,
            input_is_not_parallel=not input_is_parallel,
            sequence_parallel_enabled=sequence_parallel_enabled,
            keep_master_weight=keep_master_weight,
            quantization_per_channel_axis=quantization_per_channel_axis,
            pad=pad,
            block_size=block_size,
            activation_quantization_type=activation_quantization_type,
            rank_ordering=rank_ordering,
        )
        self.tensor_parallel_group = tensor_model_parallel_group or get_tensor_model_parallel_group()
        self.reduce_output = reduce_output
        _set_parameters(self, (output_size, divide(input_size, self.tensor_parallel_group.size())), 1)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = _scaled_product(self, input_)
        return (
            reduce_from_tensor_model_parallel_region(output, self.tensor_parallel_group)
            if self.reduce_output
            else output
        )


def _quantized_column(mod: ColumnParallelLinear, q_config: dict[str, Any]) -> QuantizedColumnParallel:
    return QuantizedColumnParallel(
        mod.input_size,
        mod.output_size - mod.pad_size,
        bias=mod.bias is not None,
        gather_output=mod.gather_output,
        dtype=mod.weight.dtype,
        tensor_model_parallel_group=mod.tensor_parallel_group,
        pad=mod.pad,
        **q_config,
    )


def _quantized_row(mod: RowParallelLinear, q_config: dict[str, Any]) -> QuantizedRowParallel:
    return QuantizedRowParallel(
        mod.input_size,
        mod.output_size,
        bias=mod.bias is not None,
        input_is_parallel=True,
        dtype=mod.weight.dtype,
        reduce_output=mod.reduce_output,
        tensor_model_parallel_group=mod.tensor_parallel_group,
        **q_config,
    )


_QUANTIZED: dict[type[nn.Module], Any] = {
    ColumnParallelLinear: _quantized_column,
    RowParallelLinear: _quantized_row,
}


def convert(
    module: nn.Module,
    q_config: dict[str, Any] | None = None,
    inplace: bool = False,
    mapping: dict[Callable[..., Any], Any] | None = None,
    include: str | list[str] | None = None,
    modules_to_not_convert: list[str] | None = None,
) -> nn.Module:
    """Put a quantised layer in the place of every plain one below `module`, without values.

    Left as they are: layers whose own name, or a part of whose path, is in `modules_to_not_convert`.
    """
    require_inert("convert", mapping=mapping, include=include, default_q_config=q_config is None, copy=not inplace)
    kept = modules_to_not_convert or []
    for path, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            whole = f"{path}.{name}" if path else name
            if type(child) in _QUANTIZED and not any(key in whole for key in kept):
                setattr(parent, name, _QUANTIZED[type(child)](child, q_config))
    return module
