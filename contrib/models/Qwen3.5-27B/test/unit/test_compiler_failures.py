# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What keeps this model clear of known failures of neuronx-cc; docs/compiler_failures.md has the table and sources.

Graphs are walked on the meta device as they are traced, operation by operation.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nki_emulator
import nki_emulator.isa
from nki_emulator.memory import NkiTensor
from qwen35.kernel_selection import DeltaNetInverse
from qwen35.memory.fit import require_fits
from qwen35.memory.programs import PROGRAM_INSTRUCTIONS, walk_buckets
from qwen35.nki_kernels.decode_layer import deltanet_decode_layer
from qwen35.nki_kernels.fused_chunked import deltanet_fused_chunked_layer
from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.phase import Phase
from qwen35.planning.recommended import RECOMMENDED
from qwen35.serving.loading import MINI_CHECKPOINT
from support import tracing
from support.applications import needs_stand_ins, of_27b
from support.kernel_cases import make_case
from support.models import load_neuron
from support.own_kernels import addresses, all_kernels, small_arguments

emulated = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

OPTIONS = {
    name: options
    for name, options in tracing.OPTIONS.items()
    if name not in ("plain delta rule", "sampled tokens and logits")  # those run on a CPU only
}
PRODUCTS = {
    "aten.mm.default",
    "aten.bmm.default",
    "aten.addmm.default",
    "aten.baddbmm.default",
    "aten.baddbmm_.default",
}


@dataclass(frozen=True)
class Call:
    """An operation of a graph and its tensor operands."""

    name: str
    operands: tuple[torch.Tensor, ...]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{x.dtype} {list(x.shape)}' for x in self.operands)})"


class Recorder(TorchDispatchMode):
    """Keeps every operation that reaches a backend, such as XLA's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        self.calls.append(Call(str(func), tuple(x for x in flat if isinstance(x, torch.Tensor)), tuple(args)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def lone_rank(backend: str) -> None:
    """NxD's layers ask for their group; loading a model on a CPU makes one of this process alone."""
    if NXDI_AVAILABLE:
        load_neuron(MINI_CHECKPOINT)


def calls_of(module: Any, *inputs: Any, **options: Any) -> list[Call]:
    with Recorder() as recorder, torch.device("meta"):
        module(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs), **options)
    return recorder.calls


def graphs(**options: Any) -> Iterator[tuple[str, list[Call]]]:
    for bucket, module, _, inputs in tracing.traced(tracing.small_application(**options)):
        yield bucket, calls_of(module, *inputs)


def deltanet_calls(phase: Phase, kernel: str) -> list[Call]:
    """The graph of one DeltaNet layer."""
    _, module, _, _ = next(tracing.traced(tracing.small_application(batch_size=1, deltanet_kernel=kernel)))
    layer, state = module.layers[0].linear_attn, module.kv_mgr.layer_state(0)
    tokens = 1 if phase is Phase.TOKEN_GENERATION else 128
    return calls_of(layer, torch.empty(1, tokens, module.hidden_size, dtype=torch.bfloat16), phase, state)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
class TestGraphs:
    def test_products_have_at_most_three_axes(self, options: dict[str, Any], lone_rank: None) -> None:
        """NCC_INLA001, 'Expected 2D tensor but got 4D AP'."""
        for bucket, calls in graphs(**options):
            products = [c for c in calls if any(word in c.name for word in ("mm.", "mm_.", "matmul", "einsum", "dot"))]
            assert products and {c.name for c in products} <= PRODUCTS, bucket
            assert [str(c) for c in products if any(x.dim() > 3 for x in c.operands)] == [], bucket

    def test_integers_are_neither_multiplied_as_matrices_nor_scattered_with_sums(
        self, options: dict[str, Any], lone_rank: None
    ) -> None:
        """NCC_EVRF035, 060 and 062: hard errors once --implicit-integer-downcast=none is the default."""
        forbidden = ("scatter_add", "scatter_reduce", "index_add", "pow.")
        for bucket, calls in graphs(**options):
            of_integers = [c for c in calls if c.operands and not c.operands[0].is_floating_point()]
            assert [str(c) for c in of_integers if c.name in PRODUCTS or any(w in c.name for w in forbidden)] == []
            sums = [c for c in calls if "index_put" in c.name and len(c.arguments) > 3 and c.arguments[3]]
            assert [str(c) for c in sums] == [], bucket

    def test_what_is_written_into_a_tensor_has_its_dtype(self, options: dict[str, Any], lone_rank: None) -> None:
        """A dynamic-update-slice of mixed precision, which NxDI's pull request 173 avoids for K and V."""
        for bucket, calls in graphs(**options):
            writes = [
                c for c in calls if any(w in c.name for w in ("copy_.", "index_put", "slice_scatter", "scatter."))
            ]
            mixed = [c for c in writes if len({x.dtype for x in c.operands if x.is_floating_point()}) > 1]
            assert [str(c) for c in mixed] == [], bucket


class PlaceRecorder(TorchDispatchMode):
    """Keeps the modules of ours whose lines split along the last axis, and those that select by an index tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.splits: set[str] = set()
        self.selections: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "split" in name and args[2] in (-1, args[0].dim() - 1):
            self.splits.add(self.place())
        if "index_select" in name:
            self.selections.add(self.place())
        return func(*args, **(kwargs or {}))

    @staticmethod
    def place() -> str:
        ours = [path for frame in traceback.extract_stack() if "/src/" in (path := frame.filename)]
        return ours[-1].rpartition("/src/")[2]


@needs_stand_ins
def test_splits_and_selections_are_where_the_table_says() -> None:
    """Both gave wrong values under torch.compile: here are the places to change, should a first run be wrong."""
    with PlaceRecorder() as recorder, torch.device("meta"):
        for options in OPTIONS.values():
            for _, module, _, inputs in tracing.traced(tracing.small_application(**options)):
                module(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs))
    assert recorder.splits == {
        "qwen35/layers/gated_deltanet.py",
        "qwen35/layers/rope.py",
        "qwen35/modeling_qwen35_mtp.py",
    }
    assert recorder.selections == {"qwen35/layers/cache.py"}


@needs_stand_ins
@pytest.mark.parametrize("phase", Phase)
class TestDeltaNetLayer:
    def test_its_products_are_in_the_kernel(self, phase: Phase) -> None:
        """NCC_INLA001 struck the chunked rule in PyTorch: here only projections are left to the compiler."""
        names = {call.name for call in deltanet_calls(phase, "fused")}
        assert names & PRODUCTS == {"aten.mm.default"}

    def test_it_makes_no_triangle(self, phase: Phase) -> None:
        """NCC_IINAR001 in TensorScalarAffineSelect, which a triangle of ones becomes."""
        assert not {c.name for c in deltanet_calls(phase, "fused")} & {"aten.tril.default", "aten.triu.default"}

    @pytest.mark.parametrize("kernel", ["fused", "torch"])
    def test_it_assigns_to_no_slice(self, phase: Phase, kernel: str) -> None:
        """Slices of growing width, assigned in a loop, came out wrong in NxDI's pull requests 170 and 173."""
        assigned = ("copy_.", "slice_scatter", "select_scatter", "index_put", "as_strided_scatter")
        names = {c.name for c in deltanet_calls(phase, kernel)}
        assert [name for name in names if any(word in name for word in assigned)] == []


# --- Compiler arguments ----------------------------------------------------------------------------------------------
def arguments_of_submodels() -> dict[str, str | None]:
    return {
        wrapper.tag: wrapper.compiler_args
        for wrapper in tracing.small_application(**OPTIONS["prompts in chunks"]).models
    }


@needs_stand_ins
def test_the_arguments_are_left_to_nxdi() -> None:
    """It gives them by the tag: decoding is compiled at -O2, as one graph; see `get_compiler_args`."""
    assert arguments_of_submodels() == {
        "context_encoding_model": None,
        "token_generation_model": None,
        "continuation_model": None,
    }


@pytest.mark.skipif(not NXDI_AVAILABLE, reason="the real NxDI composes the arguments")
@pytest.mark.nxdi
def test_decoding_is_compiled_at_o2_without_modular_flow(lone_rank: None) -> None:
    """NCC_IBTN006 and NCC_IINAR001 are of a dense decode graph at -O1."""
    arguments = arguments_of_submodels()
    decoding = arguments.pop("token_generation_model")
    assert decoding is not None and "-O2" in decoding.split() and "modular-flow" not in decoding
    for prompts in arguments.values():
        assert prompts is not None and "-O1" in prompts.split() and "--modular-flow-mac-threshold=10" in prompts
        assert "--auto-cast=none" in prompts and "--auto-cast=none" in decoding


# --- Sizes -----------------------------------------------------------------------------------------------------------
@needs_stand_ins
def test_the_slots_with_which_a_peer_exceeded_hbm_are_refused_before_compiling() -> None:
    """NCC_EVRF009: 542 recurrent states of 27B are 20.5 GB per rank at TP=4."""
    with pytest.raises(ValueError, match=r"kv_cache_batch_size=542 .*needs .* GB of HBM per rank.*lower"):
        require_fits(of_27b(seq_len=2048, batch=542))


@needs_stand_ins
@emulated
@pytest.mark.parametrize("inverse", DeltaNetInverse)
def test_a_prompt_s_program_is_far_from_too_long_with_its_kernels(inverse: DeltaNetInverse) -> None:
    """NCC_EBVF030: products outside the kernels, and 48 launches unrolled over the longest recommended chunk."""
    app = of_27b()
    tokens = max(app.neuron_config.context_encoding_buckets)
    case = make_case(S=tokens, Hk=4, R=3, K=128, V=128, dtype=torch.bfloat16)
    report = nki_emulator.emulate(deltanet_fused_chunked_layer, *case.tensors, inverse.value, grid=2).report
    launch = sum(sum(core.calls.values()) for core in report.cores)
    assert launch > 2 * 2 * 8 * 100, "two cores, two units, eight chunks, and hundreds of instructions for each"
    program = max(walk_buckets(app, slice(-1, None)), key=lambda program: program.matmuls)
    assert program.matmuls + 48 * launch < PROGRAM_INSTRUCTIONS.value / 2


@pytest.mark.parametrize("entry", RECOMMENDED.values(), ids=RECOMMENDED)
def test_no_recommended_program_encodes_2048_tokens_at_once(entry: Any) -> None:
    """With one bucket of 2,048 a peer's 27B spilled: 78% of its HBM reads brought back what had left SBUF."""
    neuron = entry.neuron_config()
    assert max(neuron.context_encoding_buckets) <= 1024 and neuron.prefill_chunk_size <= 1024
    assert len(neuron.context_encoding_buckets) > 1, "a short prompt does not pay for a long bucket"


# --- Kernels ---------------------------------------------------------------------------------------------------------
@emulated
@pytest.mark.parametrize("name", all_kernels())
def test_no_two_cores_write_the_same_element_of_hbm_and_each_output_is_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NKI's verifier took two programs that store to one slice for a dependency (NxDI's pull request 173)."""
    written: dict[int, list[np.ndarray]] = {0: [], 1: []}
    dma_copy = nki_emulator.isa.dma_copy

    def record(*, dst: NkiTensor, src: NkiTensor, **options: Any) -> None:
        if nki_emulator.language.is_hbm(dst.buffer):
            written[nki_emulator.language.program_id(0)].append(addresses(dst.array))
        dma_copy(dst=dst, src=src, **options)

    monkeypatch.setattr(nki_emulator.isa, "dma_copy", record)
    result = nki_emulator.emulate(all_kernels()[name], *small_arguments(name), grid=2, timed=False).outputs
    first, second = (np.concatenate([*parts, np.empty(0, np.int64)]) for parts in written.values())
    assert np.intersect1d(first, second).size == 0
    outputs = result if isinstance(result, tuple) else (result,)
    unreturned = 128 * 128 if name == "deltanet_recurrent_fwd" else 0  # the final state
    assert np.unique(np.concatenate([first, second])).size == unreturned + sum(o.numel() for o in outputs)


@emulated
@pytest.mark.parametrize("tokens", [1, 32, 33])
def test_a_prompt_shorter_than_a_chunk_is_read_within_its_bounds(tokens: int) -> None:
    """NxDI's pull request 170 reports an index up to 127 beyond a dimension of 33; the emulator refuses such reads."""
    case = make_case(S=tokens, K=128, V=128, dtype=torch.bfloat16)
    output, _ = nki_emulator.emulate(deltanet_fused_chunked_layer, *case.tensors, grid=2, timed=False).outputs
    assert output.shape == case.v.shape and torch.isfinite(output).all()


@emulated
def test_a_decoding_step_is_one_launch_of_few_instructions() -> None:
    report = nki_emulator.emulate(deltanet_decode_layer, *small_arguments("deltanet_decode_layer"), grid=2).report
    launch = sum(sum(core.calls.values()) for core in report.cores)
    assert 100 < launch and 48 * launch < PROGRAM_INSTRUCTIONS.value / 100
