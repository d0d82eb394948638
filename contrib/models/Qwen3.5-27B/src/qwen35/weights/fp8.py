# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""fp8 matrices: which scale belongs to which weight, and between fp8 and other dtypes, some rows at a time.

Two forms: *scaled* in a checkpoint, W = weight * scale of its block; and *per channel* for the ranks, a scale per row
(output channel), weights within what Trainium can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..error_text import first_three
from ..fp8_form import FP8, FP8_MAX, Fp8Form
from .checkpoint import TensorSpec

_PIECE = 1 << 24
"""Elements converted at a time: 64 MB in float32."""
_LARGEST_BYTE, _NAN_BYTE = 0x77, 0x7F
"""Of e4m3, without the sign: 240, and what is no number; in between are 256 to 448."""
_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STATIC = (".input_scale", ".activation_scale", ".output_scale")


ROUNDED_AGAIN = (
    "the checkpoint is in fp8 by blocks, and its matrices are rounded again, per output channel: the error is about "
    "1.4 times that of the bf16 checkpoint in fp8, use that where you have it"
)
"""The warning where blocks are taken to what the ranks hold."""


class PerChannel(NamedTuple):
    """A matrix [rows, columns] in fp8 within +-`FP8_MAX`, and scale [rows, 1] float32: W = weight * scale."""

    weight: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class ScaledMatrix:
    """A checkpoint's fp8 matrix [rows, columns] with its scales, as `Fp8Form.scale_shape`."""

    name: str
    weight: torch.Tensor
    scale: torch.Tensor
    form: Fp8Form

    def check(self) -> None:
        """Refuse values that no quantiser writes.

        Raises:
            ValueError: a scale is not a positive number, or a weight is NaN.
        """
        scale = self.scale.float()
        ill = ~(torch.isfinite(scale) & (scale > 0))
        if ill.any():
            raise ValueError(
                f"{self.form.scale_name(self.name)} has the scale {scale[ill][0].item()}, not a positive number; "
                "the file is corrupt, download it again"
            )
        if self._largest_byte() == _NAN_BYTE:
            raise ValueError(f"{self.name} has NaN among its weights; the file is corrupt, download it again")

    def rows(self, part: slice) -> torch.Tensor:
        """Some rows of W [n, columns] in float32."""
        rows, columns = self.weight.shape
        scale = self.scale.float()
        if self.form.block is None:
            return self.weight[part].float() * scale[part]
        high, wide = self.form.block
        of_rows = torch.arange(*part.indices(rows)) // high
        return self.weight[part].float().mul_(scale[of_rows].repeat_interleave(wide, 1)[:, :columns])

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """W [rows, columns] in `dtype`."""
        self.check()
        whole = torch.empty(self.weight.shape, dtype=dtype)
        for part in row_pieces(self.weight):
            whole[part] = self.rows(part)
        return whole

    def is_per_channel(self) -> bool:
        """Whether it is in the form for the ranks already, with nothing beyond `FP8_MAX`."""
        return self.form.block is None and self._largest_byte() <= _LARGEST_BYTE

    def _largest_byte(self) -> int:
        """The largest weight as its byte without the sign: those of e4m3 are in the order of their values."""
        return int((self.weight.contiguous().view(torch.uint8) & 0x7F).max()) if self.weight.numel() else 0


def row_pieces(matrix: torch.Tensor) -> Iterator[slice]:
    """Slices over all rows of a matrix, each of a bounded number of elements."""
    step = max(1, _PIECE // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def channel_scales(name: str, rows: torch.Tensor) -> torch.Tensor:
    """The scales [n, 1] float32 that take rows [n, columns], float32, to +-`FP8_MAX`; 1 for a row of zeros, or
    of numbers too small to be scaled.

    Raises:
        ValueError: a row has infinities or NaN.
    """
    largest = rows.abs().amax(1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise ValueError(f"{name} has infinities or NaN among its weights; the file is corrupt, download it again")
    scale = largest / FP8_MAX
    return torch.where(scale > 0, scale, 1.0)


def scale_per_channel(name: str, matrix: torch.Tensor | ScaledMatrix) -> torch.Tensor:
    """The scales of `quantise_per_channel` alone, [rows, 1] float32."""
    if isinstance(matrix, ScaledMatrix):
        matrix.check()
        if matrix.is_per_channel():
            return matrix.scale.float()
    return torch.cat([channel_scales(name, rows) for _, rows in _float_rows(matrix)])


def quantise_per_channel(name: str, matrix: torch.Tensor | ScaledMatrix) -> PerChannel:
    """A matrix in the form for the ranks: each row rounded to fp8 with its largest element at `FP8_MAX`.

    One that is in it already is passed on. One scaled by blocks is rounded a second time: its error is about sqrt(2)
    times that of quantising the bfloat16 matrix (`docs/checkpoints.md` has the figures).

    Raises:
        ValueError: `name` has values that are no numbers.
    """
    if isinstance(matrix, ScaledMatrix):
        matrix.check()
        if matrix.is_per_channel():
            return PerChannel(matrix.weight, matrix.scale.float())
    rows = matrix.weight.shape[0] if isinstance(matrix, ScaledMatrix) else matrix.shape[0]
    scale = torch.empty(rows, 1)
    return PerChannel(torch.cat(list(channel_rows(name, matrix, scale))), scale)


def channel_rows(name: str, matrix: torch.Tensor | ScaledMatrix, scale: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of `quantise_per_channel`, some at a time; their scales are written to `scale` [rows, 1]."""
    for part, rows in _float_rows(matrix):
        scale[part] = channel_scales(name, rows)
        yield rows.div_(scale[part]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def _float_rows(matrix: torch.Tensor | ScaledMatrix) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows at a time in float32, for the caller to change."""
    if isinstance(matrix, ScaledMatrix):
        yield from ((part, matrix.rows(part)) for part in row_pieces(matrix.weight))
    else:
        yield from ((part, matrix[part].to(torch.float32, copy=True)) for part in row_pieces(matrix))


def build_weight(build: Callable[..., torch.Tensor], sources: list[PerChannel]) -> torch.Tensor:
    """The fp8 target of a `Build` that moves rows or adds rows of zeros; as bytes, which every operation takes."""
    return build(*(source.weight.view(torch.uint8) for source in sources)).view(FP8)


@dataclass(frozen=True)
class Scales:
    """Which tensor of a checkpoint scales which, found from names, dtypes and shapes."""

    form: Fp8Form | None = None
    """None where config.json says of no fp8: then nothing is paired, and fp8 weights are refused as any other dtype."""
    of: Mapping[str, str] = field(default_factory=dict)
    """Weight in fp8 -> its scales."""
    beside: frozenset[str] = frozenset()
    """The scales that have their weight beside them."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> why it cannot be read."""

    def matrix(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> ScaledMatrix:
        assert self.form is not None, "scales are paired where there is a form"
        return ScaledMatrix(name, weight, scale, self.form)

    def contradictions(self) -> list[str]:
        """The modules that config.json lists as not in fp8, and that are."""
        listed = () if self.form is None else self.form.not_converted
        return [module for module in listed if f"{module}.weight" in self.of]


NO_SCALES = Scales()


def find_scales(specs: Mapping[str, TensorSpec], form: Fp8Form | None) -> Scales:
    """Pair the fp8 weights of a checkpoint with their scales; no tensor is read."""
    if form is None:
        return NO_SCALES
    of: dict[str, str] = {}
    beside: set[str] = set()
    problems: dict[str, str] = {}
    for name, spec in specs.items():
        if name.endswith(_STATIC):
            problems[name] = f"{name} is a static scale of activations, which is not read; use the bf16 checkpoint"
        elif (weight := form.weight_name(name)) is None:
            if _is_fp8(spec.dtype) and form.scale_name(name) not in specs:
                problems[name] = f"{name} is {spec.dtype} without {form.scale_name(name)}; download the files again"
        elif weight not in specs:
            problems[name] = f"{name} scales {weight}, which is missing; download the files again"
        else:
            beside.add(name)
            if problem := _mismatch(weight, specs[weight], name, spec, form):
                problems[weight] = problem
            else:
                of[weight] = name
    return Scales(form, of, frozenset(beside), problems)


def _is_fp8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _mismatch(weight: str, spec: TensorSpec, name: str, scale: TensorSpec, form: Fp8Form) -> str | None:
    """Why a scale does not fit its weight, if it does not."""
    if spec.dtype != FP8:
        return f"{weight} is {spec.dtype} beside {name}, not {FP8}; use the bf16 checkpoint, or download both again"
    if len(spec.shape) != 2:
        return f"{weight} is {FP8} of shape {list(spec.shape)}, only matrices can be; use the bf16 checkpoint"
    if scale.dtype not in _SCALE_DTYPES:
        return f"{name} is {scale.dtype}, not bfloat16, float16 or float32; use the bf16 checkpoint"
    if scale.shape != form.scale_shape(spec.shape):
        blocks = "rows" if form.block is None else f"blocks of {form.block[0]} x {form.block[1]}"
        return (
            f"{name} has shape {list(scale.shape)}, expected {list(form.scale_shape(spec.shape))} for {blocks} of "
            f"{weight}, shape {list(spec.shape)}; download the files again"
        )
    return None


def contradiction(modules: list[str]) -> str:
    """The warning that config.json and the tensors say different things."""
    return f"modules_to_not_convert lists {first_three(modules)}, which the files have in fp8: read as fp8"
