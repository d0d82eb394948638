# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The MLP kernel of nki-library (github.com/aws-neuron/nki-library, read at 2.29), which is no part of this package.

Only this module imports `nkilib`, and only when the kernel is asked for: the Neuron SDK has it, and a checkout of it on
PYTHONPATH runs in the emulator. Files are named from src/nkilib_src/nkilib/core/mlp.

Letters: B rows, S tokens, D hidden, I columns of a rank (intermediate_size / R on R ranks).
"""

from __future__ import annotations

from typing import Any

import torch

FEW_TOKENS = 96
"""B times S up to which it is the kernel for token generation (TKG_BS_SEQLEN_THRESHOLD in mlp_parameters.py); from
there on it is the one for context encoding."""

SCALE_ROWS = 128
"""Rows of the scales, all the same: of the matrix multiplied by, one for each partition (mlp_parameters.py,
_validate_shapes). The kernel for token generation reads B S of them."""

MOST_COLUMNS = 6144
"""I for which the kernel for token generation has room in SBUF, with 96 tokens, hidden sizes of 4,096 and 5,120, one
core or two, bfloat16 or fp8, in the emulator. At 8,704 (27B on 2 ranks) the weights of gate and up have none."""


def library_problem() -> str | None:
    """Why the kernel cannot be imported, or None where it can."""
    from .nki_seam import provide_nki  # loads NKI or its emulator, which a configuration without the kernel does not

    provide_nki()
    try:
        import nkilib.core.mlp.mlp  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def library_mlp(
    cores: int,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) of a rank's columns, on `cores` physical cores (LNC).

    Args:
        cores: 1 or 2; D is a multiple of 128 times this.
        x: [B, S, D] bfloat16.
        gate, up: [D, I], the transposes of a linear layer's weights, bfloat16; or float8_e4m3fn within +-240.
        down: [I, D] of the same dtype.
        scales: where the weights are in fp8, of the columns of gate, up and down: [128, I] twice and [128, D], float32,
            of equal rows. x stays in bfloat16, and products are scaled in float32; B S is at most `FEW_TOKENS`.

    Returns:
        [B, S, D] bfloat16, which the ranks are to sum.
    """
    from .nki_seam import of_others, provide_nki

    provide_nki()
    from nkilib.core.mlp.mlp import mlp
    from nkilib.core.utils.common_types import QuantizationType

    options: dict[str, Any] = {}
    if scales is not None:
        names = ("gate_w_scale", "up_w_scale", "down_w_scale")
        options = {**dict(zip(names, scales, strict=True)), "quantization_type": QuantizationType.ROW}
    output = of_others(mlp)[cores](x, gate, up, down, **options)
    # It returns a list of one, which a device gives as the tensor (NxDI, models/llama, _kernel_enabled_nki_mlp_tkg).
    result: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return result
