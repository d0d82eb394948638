# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What NxDI does with the model when it traces it: modules, buckets, sample inputs, aliases, operations.

Runs on the real NxDI's instances and modules, and on the stand-ins. Nothing is computed: all is on the meta device,
where a shape or a branch that depends on data is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nxdi_cpu.model_builder import alias_problems, input_problems, shapes_of
from qwen35.nxdi import NXDI_AVAILABLE
from support.tracing import OPTIONS, small_application, traced

# The operations of a stock model, NxDI's Qwen3 at commit 4bcdc54, as its CPU mode dispatches them: the compiler takes
# these. One is left out: aten.scatter.src, by which NxDI writes a decoding step's keys element by element.
STOCK = """
    _softmax _to_copy _unsafe_view add.Tensor arange arange.start_step bmm cat clone copy_ cos div.Tensor embedding exp
    expand full gather index_put max.dim maximum mean.dim mul.Tensor neg permute pow.Scalar pow.Tensor_Scalar reciprocal
    rsqrt scalar_tensor silu sin slice.Tensor sub.Tensor sum.dim_IntList t transpose.int tril unsqueeze view
    where.self
"""
# What ours adds: elementwise operations, comparisons and reductions, views, constants. Each is one HLO instruction or a
# few, of static shape; those that end in _ are made functional before they are lowered.
OURS = """
    addcmul_ alias amax any.dim bitwise_or.Tensor clamp eq.Scalar eq.Tensor exp_ ge.Scalar ge.Tensor gt.Scalar lt.Scalar
    mul_.Tensor sigmoid silu_ softplus sub_.Tensor index_select select.int split.Tensor split_with_sizes new_zeros
    empty_like new_empty
"""
# The gated delta rule in plain PyTorch, for head sizes that the kernels do not have.
PLAIN_DELTA_RULE = """
    addcmul baddbmm baddbmm_ constant_pad_nd cumsum eye flip ones stack unbind.int zeros
"""
# Steps with drafts: comparisons, a reduction, constants; rotary axes, as with images; what waits, side by side.
DRAFTS = """
    all.dim bitwise_and.Tensor bitwise_not empty.memory_format index.Tensor le.Scalar le.Tensor lt.Tensor ones_like
    stack zeros_like
"""
# The sampler on a CPU; on a device a kernel takes its place.
CPU_SAMPLER = "argmax"
# The attention of the stand-ins, in the place of NxDI's own.
STAND_IN_ATTENTION = "mm _safe_softmax bitwise_not masked_fill.Scalar mul.Scalar ones"

UNKNOWN_TO_NEURON = ("scatter", "aten.item", "_local_scalar_dense", "nonzero", "unique", "masked_select")


def names(*tables: str) -> set[str]:
    found = {name if "." in name else f"{name}.default" for table in tables for name in table.split()}
    return {f"aten.{name}" for name in found}


class Operations(TorchDispatchMode):
    """Names of the operations that reach a backend, such as XLA's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, (torch.Tensor, list, tuple)):  # and not a question about dtypes
            self.names.add(str(func))
        return output


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_bucket_runs_with_every_state_aliased_and_known_operations(
    options: dict[str, Any], lone_rank: None
) -> None:
    allowed = names(STOCK, OURS)
    if options.get("deltanet_kernel") == "torch":
        allowed |= names(PLAIN_DELTA_RULE)
    if options.get("on_cpu"):
        allowed |= names(PLAIN_DELTA_RULE, CPU_SAMPLER)
    if options.get("num_speculative_tokens"):
        allowed |= names(DRAFTS)
    if not NXDI_AVAILABLE:
        allowed |= names(STAND_IN_ATTENTION)
    app = small_application(**options)
    seen, programs = [], {}
    for bucket, module, aliases, inputs in traced(app):
        with Operations() as operations, torch.device("meta"):
            outputs = module(*(tensor.to("meta") for tensor in inputs))
        assert input_problems(inputs) + alias_problems(module, aliases, outputs) == [], bucket
        assert len(aliases) == len(app.cache_layout.parameter_names())
        assert operations.names - allowed == set(), bucket
        seen.append(bucket)
        programs.setdefault(shapes_of(inputs), []).append(bucket)
    assert [same for same in programs.values() if len(same) > 1] == [], (
        "NxD finds a program by the shapes of its inputs"
    )
    assert len(seen) == len({*seen}) == sum(len(wrapper.neuron_config.buckets) for wrapper in app.models)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's attention makes constants that torch.export does not take")
def test_every_bucket_exports_as_one_graph(options: dict[str, Any]) -> None:
    for _, module, _, inputs in traced(small_application(**options)):
        program = torch.export.export(module, tuple(tensor.to("meta") for tensor in inputs), strict=False)
        assert len(program.graph_signature.user_outputs) == len(module(*(tensor.to("meta") for tensor in inputs)))
        assert not any(name in str(node.target) for node in program.graph.nodes for name in UNKNOWN_TO_NEURON)


def test_the_compiler_gets_the_arguments_of_each_submodel(lone_rank: None) -> None:
    context_encoding, token_generation = (wrapper.compiler_args for wrapper in small_application().models)
    if not NXDI_AVAILABLE:
        assert context_encoding is token_generation is None, "NxDI composes them"
        return
    for arguments in (context_encoding, token_generation):
        assert "--auto-cast=none" in arguments and "--lnc=2" in arguments
        assert "--enable-ccop-compute-overlap" in arguments
    assert " -O1 " in context_encoding and "--modular-flow-mac-threshold=10" in context_encoding
    assert " -O2 " in token_generation and "--cc-pipeline-tiling-factor=1" in token_generation
