# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The MLP of a layer, against transformers' own; by nki-library's kernel, against the one in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nxdi_cpu.parallel_state import initialize_model_parallel
from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.layers.linear import use_fp8
from qwen35.layers.mlp import Qwen35KernelMLP, Qwen35MLP, make_mlp
from qwen35.nki_kernels.library_mlp import FEW_TOKENS
from qwen35.nxdi import NXDI_AVAILABLE
from support.compare import assert_close
from support.models import TINY
from support.nki_library import exact_mlp, in_fp8, mlp_matrices, needs_library
from support.own_kernels import recorded_launches
from support.ranks import RankPool

transformers = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
from transformers import Qwen3_5TextConfig  # noqa: E402


def test_the_mlp_of_every_layer_equals_transformers() -> None:
    theirs = transformers.Qwen3_5MLP(Qwen3_5TextConfig(**TINY), TINY["intermediate_size"])
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(torch_dtype=torch.float32, on_cpu=True), **TINY)
    x = torch.randn(2, 5, TINY["hidden_size"])
    for layer in range(config.num_hidden_layers):
        ours = make_mlp(config, layer)
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            # Sums of at most 96 terms of order one, in another order.
            assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5, label=f"output of the MLP of layer {layer}")


# --- By nki-library's kernel -----------------------------------------------------------------------------------------
HIDDEN, COLUMNS = 256, 384
MATRICES = ("gate_proj", "up_proj", "down_proj")
stand_ins_only = pytest.mark.skipif(NXDI_AVAILABLE, reason="NxD's layers want a process group")


def with_kernel(**options: Any) -> Qwen35InferenceConfig:
    settings = {"torch_dtype": torch.bfloat16, "logical_nc_config": 2, "mlp_kernel": "nki", **options}
    return Qwen35InferenceConfig(
        Qwen35NeuronConfig(**settings), **{**TINY, "hidden_size": HIDDEN, "intermediate_size": COLUMNS}
    )


def both_mlps(fp8: bool) -> tuple[Qwen35KernelMLP, Qwen35MLP, list[torch.Tensor]]:
    """The MLP by the kernel, the plain one with the same weights, and these as [inputs, outputs] in float64."""
    config = with_kernel(weights_dtype="fp8" if fp8 else None)
    ours, plain = make_mlp(config, 0), Qwen35MLP(config)
    assert isinstance(ours, Qwen35KernelMLP)
    holder = torch.nn.ModuleDict({"mlp": plain})
    if fp8:
        use_fp8(holder)
    exact = []
    for name, matrix in zip(MATRICES, mlp_matrices(HIDDEN, COLUMNS, torch.bfloat16), strict=True):
        kernels, plains = getattr(ours, name), getattr(plain, name)
        if fp8:
            matrix, kernels.scale.data = in_fp8(matrix)
            plains.scale.data = kernels.scale[:1].T.contiguous()
        kernels.weight.data, plains.weight.data = matrix, matrix.T.contiguous()
        exact.append(matrix.double() * (kernels.scale[0].double() if fp8 else 1))
    return ours, plain, exact


@stand_ins_only
@pytest.mark.usefixtures("library_is_there")
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
def test_longer_calls_multiply_by_the_weights_of_the_kernel_as_linear_layers_do(fp8: bool) -> None:
    ours, plain, _ = both_mlps(fp8)
    x = torch.randn(1, FEW_TOKENS + 1, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad(), recorded_launches() as launches:
        found, expected = ours(x), plain(x)
    assert not launches.grids
    # The same operations on the same numbers; products may be summed in another order, and rounded to bfloat16 after.
    assert_close(found.float(), expected.float(), atol=0.01 * float(expected.abs().max()), rtol=0, label="output")


@stand_ins_only
@needs_library
@pytest.mark.usefixtures("nki_as_before")
@pytest.mark.filterwarnings("ignore::nki_emulator.NkiWarning")
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (8, 1), (8, 4), (FEW_TOKENS, 1)])
def test_short_calls_are_the_kernels_and_no_further_from_the_exact_product(rows: int, tokens: int, fp8: bool) -> None:
    ours, plain, exact = both_mlps(fp8)
    x = torch.randn(rows, tokens, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad(), recorded_launches() as launches:
        found, expected = ours(x), plain(x)
    assert launches.grids == [(2,)]
    truth = exact_mlp(x, *exact)
    errors = [float((y.double() - truth).norm() / truth.norm()) for y in (found, expected)]
    assert errors[0] <= 1.2 * errors[1], "the kernel rounds gate and up once, to bfloat16 after their product"


@stand_ins_only
@pytest.mark.usefixtures("library_is_there")
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_on_the_meta_device_a_call_has_a_shape_and_launches_nothing(weights_dtype: str | None) -> None:
    with torch.device("meta"):
        mlp = make_mlp(with_kernel(weights_dtype=weights_dtype), 0)
        output = mlp(torch.empty(8, 1, HIDDEN, dtype=torch.bfloat16))
    assert output.shape == (8, 1, HIDDEN) and output.dtype == torch.bfloat16


def partial_mlp(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """On a rank of two, with its columns of gate and up and its rows of down."""
    initialize_model_parallel(2)
    rank = torch.distributed.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen35.kernel_selection.library_problem", lambda: None)
        mlp = make_mlp(with_kernel(tp_degree=2), 0)
    for name, matrix in zip(MATRICES, matrices, strict=True):
        layer = getattr(mlp, name)
        part = matrix.chunk(2, dim=layer.weight.partition_dim)[rank].contiguous()
        assert layer.weight.shape == part.shape
        layer.weight.data = part
    with torch.no_grad():
        output: torch.Tensor = mlp(x)
    return output


@stand_ins_only
def test_two_ranks_sum_their_parts(rank_pool: Callable[[int], RankPool]) -> None:
    matrices = mlp_matrices(HIDDEN, COLUMNS, torch.bfloat16)
    x = torch.randn(1, FEW_TOKENS + 1, HIDDEN, dtype=torch.bfloat16)
    exact = exact_mlp(x, *matrices)
    for output in rank_pool(2).call(partial_mlp, x, matrices):
        # Rounded to bfloat16 before the down projection, after it on each rank, and after the sum.
        assert_close(output.double(), exact, atol=0.015 * float(exact.abs().max()), rtol=0, label="output")
