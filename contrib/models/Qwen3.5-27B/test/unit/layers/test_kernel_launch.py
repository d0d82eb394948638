# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model computes the same with each kernel, launched in the emulator, as in plain PyTorch; and how it launches
them: grid, device, arguments, and what moves data between HBM and the chip.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import nki_emulator
import nki_emulator.isa
from qwen35 import ops
from qwen35.kernel_selection import KERNEL_ENVIRONMENT, DeltaNetInverse, DeltaNetKernel
from qwen35.layers import gated_deltanet
from qwen35.layers.attention import NeuronQwen35Attention
from qwen35.layers.cache import DeltaNetState
from qwen35.layers.kernel_launch import attend_cached, attend_prompt, commit, continue_cached, decode, prefill, verify
from qwen35.nki_kernels.fused_chunked import deltanet_fused_chunked_layer
from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.phase import Phase
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import encode, load_tokenizer
from support.compare import assert_close
from support.kernel_cases import make_case
from support.models import load_neuron, neuron_greedy, random_prompts, save_heads
from support.own_kernels import Launches, all_kernels, recorded_launches, small_arguments

emulated = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def mini_tokens(kernel: str, steps: int, inverse: str = "tiled") -> tuple[torch.Tensor, torch.Tensor]:
    encoded = encode(load_tokenizer(MINI_CHECKPOINT), ["The capital of France is", "3 + 4 ="])
    prompts = [
        ids[: int(n)].tolist() for ids, n in zip(encoded["input_ids"], encoded["attention_mask"].sum(1), strict=True)
    ]
    model = load_neuron(MINI_CHECKPOINT, batch_size=2, seq_len=16, deltanet_kernel=kernel, deltanet_inverse=inverse)
    return neuron_greedy(model, prompts, steps)


@pytest.mark.parametrize(
    ("kernel", "inverse"),
    [("fused", "tiled"), ("fused", "plain"), ("chunked", "tiled"), ("chunked", "plain"), ("recurrent", "tiled")],
)
def test_the_mini_says_the_same_through_the_kernels_in_the_emulator(kernel: str, inverse: str) -> None:
    tokens, logits = mini_tokens(kernel, 3, inverse)
    expected_tokens, expected_logits = mini_tokens("torch", 3)
    assert torch.equal(tokens, expected_tokens)
    # float32 kernels: 5e-7 of the largest output of a layer, through six of them.
    torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("phase", "tokens"),
    [(Phase.TOKEN_GENERATION, 1), (Phase.CONTINUATION, 8), (Phase.CONTINUATION, 9)],
)
def test_a_layer_continues_from_a_state_by_kernel_as_by_torch(phase: Phase, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = []
    hidden = torch.randn(1, tokens, 128, generator=generator)
    state = DeltaNetState(
        torch.randn(1, 8, 128, 128, generator=generator), torch.randn(1, 2048, 3, generator=generator)
    )
    for kernel in ("fused", "torch"):
        model = load_neuron(MINI_CHECKPOINT, deltanet_kernel=kernel)
        with torch.no_grad():
            output, new_state = model.models[0].model.layers[0].linear_attn(hidden, phase, state)
        outputs.append((output, *new_state))
    for actual, expected in zip(*outputs, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fused_kernel_is_right_on_what_the_mini_computes(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tensors)
        return ops.chunk_gated_delta_rule(*tensors)

    monkeypatch.setattr(gated_deltanet, "chunk_gated_delta_rule", record)
    text = " ".join(["The capital of France is Paris. 3 + 4 = 7. The largest planet is Jupiter."] * 6)
    ids = encode(load_tokenizer(MINI_CHECKPOINT), [text])
    model = load_neuron(MINI_CHECKPOINT, seq_len=256)
    model(**ids, position_ids=torch.arange(ids["input_ids"].shape[1]).unsqueeze(0))
    assert len(calls) == 6 and min(float(g.min()) for _, _, _, g, *_ in calls) < -20
    for q, k, v, g, beta, _ in calls:
        # The oracle gets the rounded operands: what is measured is the kernel, not the rounding of its input.
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        expected = ops.recurrent_gated_delta_rule(*(x.double() for x in (q, k, v, g, beta)))
        for actual, reference in zip(deltanet_fused_chunked_layer(q, k, v, g, beta), expected, strict=True):
            assert (actual.double() - reference).abs().max() <= tolerance * reference.abs().max()


# --- Attention --------------------------------------------------------------------------------------------------------
SPLIT = dict(prefill_chunk_size=16, is_continuous_batching=True, ctx_batch_size=1)
"""Prompts come in chunks of 16, one at a time, and go to one of two slots: the kernel is told which."""


def test_the_mini_says_the_same_through_the_attention_kernels_in_the_emulator() -> None:
    encoded = encode(load_tokenizer(MINI_CHECKPOINT), ["The capital of France is", "3 + 4 ="])
    prompts = [
        ids[: int(n)].tolist() for ids, n in zip(encoded["input_ids"], encoded["attention_mask"].sum(1), strict=True)
    ]
    results = [
        neuron_greedy(load_neuron(MINI_CHECKPOINT, batch_size=2, attention_kernel=kernel), prompts, 6)
        for kernel in ("nki", "torch")
    ]
    assert torch.equal(results[0][0], results[1][0])
    # float32 kernels: 1e-6 of the largest output of a layer, through two of them.
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("head_dim", "options"),
    [
        (64, SPLIT),
        (128, SPLIT),
        (256, SPLIT),
        (256, {}),
        (256, {"enable_bucketing": True, "prefill_chunk_size": 128}),
    ],
    ids=["64 in chunks", "128 in chunks", "256 in chunks", "256 whole", "256 in buckets"],
)
def test_a_model_says_the_same_through_the_attention_kernels(
    head_dim: int, options: dict[str, Any], tmp_path: Path
) -> None:
    # Three query heads share each of two KV heads; the longer prompt has several chunks.
    save_heads(tmp_path, head_dim, num_attention_heads=6)
    prompts = random_prompts([40, 5])
    results = []
    for kernel in ("nki", "torch"):
        model = load_neuron(tmp_path, batch_size=2, seq_len=256, attention_kernel=kernel, **options)
        with recorded_launches() as launches:
            results.append(neuron_greedy(model, prompts, 4))
        assert bool(launches.compiled) == (kernel == "nki")
    assert torch.equal(results[0][0], results[1][0])
    # float32 kernels: 1e-6 of the largest output of a layer, and logits of order one.
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=0)


def test_kernels_of_attention_are_chosen_by_phase(tmp_path: Path) -> None:
    save_heads(tmp_path, 64)
    of_phase = {"context_encoding": "prefill", "continuation": "continuation", "token_generation": "decode"}
    for phase, kernel in of_phase.items():
        kernels = {name: "nki" if name == phase else "torch" for name in of_phase}
        model = load_neuron(tmp_path, attention_kernel=kernels, prefill_chunk_size=8)
        with recorded_launches() as launches:
            neuron_greedy(model, random_prompts([12]), 2)
        assert {key[0] for key in launches.compiled} == {f"attention_{kernel}"}


class Specifications:
    """What the kernels compute, in their place: the seam to NxDI is tested where no kernel runs."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def attend_prompt(self, cores: int, *tensors: torch.Tensor) -> torch.Tensor:
        self.calls.append("prompt")
        return ops.causal_attention(*tensors)

    def attend_cached(self, cores: int, *tensors: Any) -> torch.Tensor:
        *tensors, bucket = tensors
        self.calls.append(f"decode {bucket}")
        return ops.cached_attention(*tensors)

    def continue_cached(self, cores: int, *tensors: Any) -> torch.Tensor:
        q, k, v, k_cache, v_cache, lengths, slots, bucket = tensors
        self.calls.append(f"continue {bucket}")
        return ops.cached_attention(q, k, v, k_cache[slots], v_cache[slots], lengths)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, {"prompt", "decode 256"}),
        ({"prefill_chunk_size": 16}, {"prompt", "continue 256", "decode 256"}),
        (
            {"prefill_chunk_size": 16, "is_continuous_batching": True, "ctx_batch_size": 1, "enable_bucketing": True},
            {"prompt", "continue 128", "decode 128"},
        ),
    ],
    ids=["whole", "chunks", "slots"],
)
def test_the_model_gives_the_kernels_what_they_attend_to(
    options: dict[str, Any], calls: set[str], backend: str, tmp_path: Path
) -> None:
    save_heads(tmp_path, 64, num_attention_heads=6)
    prompts = random_prompts([40, 5])
    results, specifications = [], Specifications()
    for kernel in ("nki", "torch"):
        model = load_neuron(tmp_path, batch_size=2, seq_len=256, attention_kernel=kernel, **options)
        for submodel in model.models:
            for module in submodel.model.modules():
                if isinstance(module, NeuronQwen35Attention):
                    module.launches = specifications
        results.append(neuron_greedy(model, prompts, 4))
    assert {*specifications.calls} == calls
    assert torch.equal(results[0][0], results[1][0])
    # float32 sums in another order: 1e-6 of the largest output of a layer, and logits of order one.
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=0)


@emulated
@pytest.mark.parametrize("kernel", ["nki", "torch"])
def test_a_kernel_reads_the_cache_where_it_is(kernel: str, tmp_path: Path) -> None:
    save_heads(tmp_path, 64)
    model = load_neuron(tmp_path, batch_size=2, seq_len=256, attention_kernel=kernel, **SPLIT)
    manager = model.models[0].model.kv_mgr
    layer = manager.layout.is_linear.index(False)
    for phase, seq_ids in ((Phase.CONTINUATION, [1]), (Phase.TOKEN_GENERATION, [0, 1])):
        state = manager.get_kv_by_layer_id(layer, 128, phase, seq_ids=torch.tensor(seq_ids))
        whole = manager.layer_state(layer)
        for part, entry in zip(state, whole, strict=True):
            assert (part.data_ptr() == entry.data_ptr() and part.shape == entry.shape) is (kernel == "nki")


def test_on_the_meta_device_attention_has_a_shape_and_runs_nothing() -> None:
    q, k, cache = (torch.empty(shape, device="meta") for shape in ((2, 6, 3, 64), (2, 1, 3, 64), (2, 1, 256, 64)))
    rows = torch.empty(2, dtype=torch.int32, device="meta")
    for out in (
        attend_prompt(2, q, k, k),
        attend_cached(2, q, k, k, cache, cache, rows, 128),
        continue_cached(2, q, k, k, cache, cache, rows, rows, 128),
    ):
        assert out.is_meta and out.shape == q.shape


# --- Launches --------------------------------------------------------------------------------------------------------
LAUNCHED = [DeltaNetKernel.FUSED, DeltaNetKernel.LOOPED, DeltaNetKernel.CHUNKED, DeltaNetKernel.RECURRENT]


@emulated
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("kernel", LAUNCHED)
def test_every_launch_of_the_model_has_the_grid_of_a_logical_core_and_equal_calls_compile_once(
    kernel: DeltaNetKernel, cores: int
) -> None:
    model = load_neuron(MINI_CHECKPOINT, seq_len=16, deltanet_kernel=kernel, logical_nc_config=cores)
    with recorded_launches() as launches:
        neuron_greedy(model, [[1, 2, 3]], 3)
        compiled = len(launches.compiled)
        neuron_greedy(model, [[4, 5, 6]], 3)
    assert {*launches.grids} == {(cores,)}
    # One program encodes prompts and one decodes; six layers launch each of them, several times.
    assert len(launches.compiled) == compiled == 2


@emulated
@pytest.mark.parametrize("kernel", LAUNCHED)
def test_a_continued_prompt_compiles_one_program_too(kernel: DeltaNetKernel) -> None:
    case = make_case(S=8, K=128, V=128, state=True)
    with recorded_launches() as launches:
        for _ in range(2):
            prefill(kernel, DeltaNetInverse.TILED, 1, *case.tensors, case.state)
    assert len(launches.compiled) == 1


@emulated
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("tokens", [512, 500])
def test_the_looped_kernel_takes_whole_loops_and_leaves_others_to_the_fused_one(tokens: int, with_state: bool) -> None:
    case = make_case(S=tokens, R=1, K=128, V=128, state=with_state)
    with recorded_launches() as launches:
        results = prefill(DeltaNetKernel.LOOPED, DeltaNetInverse.TILED, 1, *case.tensors, case.state)
    name = launches.compiled[0][0]
    assert name.startswith("deltanet_looped" if tokens == 512 else "deltanet_fused")
    for actual, expected in zip(results, ops.chunk_gated_delta_rule(*case.tensors, case.state), strict=True):
        assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_call_with_none_compiles_every_time_in_the_record() -> None:
    launches = Launches()
    kernel = all_kernels()["deltanet_fused_chunked_layer"]
    for _ in range(2):
        launches.add(kernel, (torch.zeros(2),), {"inverse": "tiled"})
        launches.add(kernel, (torch.zeros(2), None), {})
    assert len(launches.compiled) == 3


@pytest.mark.parametrize("name", all_kernels())
def test_no_kernel_has_an_argument_that_may_be_none(name: str) -> None:
    parameters = inspect.signature(all_kernels()[name].function).parameters.values()
    assert [p.name for p in parameters if p.default is None] == []


@emulated
@pytest.mark.parametrize("inverse", DeltaNetInverse)
@pytest.mark.parametrize("kernel", LAUNCHED)
def test_results_are_where_the_inputs_are_whatever_the_default_device(
    kernel: DeltaNetKernel, inverse: DeltaNetInverse
) -> None:
    case = make_case(S=8, K=128, V=128)
    expected = ops.chunk_gated_delta_rule(*case.tensors)
    with torch.device("meta"):  # where tensors are made that name no device
        results = prefill(kernel, inverse, 2, *case.tensors, None)
    for actual, reference in zip(results, expected, strict=True):
        assert actual.device == reference.device
        assert_close(actual, reference, atol=1e-5 * float(reference.abs().max()), label=kernel.value)


STEP = "qkv z a b conv_weight conv_state A_log dt_bias norm_weight recurrent_state".split()
COMMIT = "keys u g recurrent_state qkv conv_state accepted".split()


@emulated
@pytest.mark.parametrize(
    ("launch", "kernel", "names", "options"),
    [
        (decode, "deltanet_decode_layer", STEP, {"norm_eps": 1e-6}),
        (verify, "deltanet_verify_layer", STEP, {"norm_eps": 1e-6}),
        (commit, "deltanet_commit_layer", COMMIT, {}),
    ],
)
def test_a_step_leaves_results_where_the_inputs_are_and_the_meta_device_tells_their_shapes(
    launch: Any, kernel: str, names: list[str], options: dict[str, float]
) -> None:
    inputs: dict[str, Any] = dict(zip(names, small_arguments(kernel), strict=True))
    with torch.device("meta"):
        results = launch(2, **inputs, **options)
    shapes = launch(2, **{name: x.to("meta") for name, x in inputs.items()}, **options)
    for result, shape in zip(results, shapes, strict=True):
        assert result.device.type == "cpu" and shape.is_meta
        assert (result.shape, result.dtype) == (shape.shape, shape.dtype)


@emulated
@pytest.mark.parametrize("accepted", [[4, 2], [1, 0]])
def test_a_layer_verifies_and_commits_by_kernel_as_by_torch(accepted: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 128, generator=generator)
    state = DeltaNetState(
        torch.randn(2, 8, 128, 128, generator=generator), torch.randn(2, 2048, 3, generator=generator)
    )
    results = []
    for kernel in ("fused", "torch"):
        layer = load_neuron(MINI_CHECKPOINT, deltanet_kernel=kernel).models[0].model.layers[0].linear_attn
        with torch.no_grad():
            output, tokens = layer(hidden, Phase.VERIFICATION, state)
            for row, count in enumerate(accepted):
                tokens.keys[row, count:] = torch.nan  # what is not accepted may hold anything
            results.append((output, *layer.commit(state, tokens, torch.tensor(accepted))))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@emulated
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_counts_are_data_so_that_all_of_them_share_a_program(integers: torch.dtype) -> None:
    inputs: dict[str, Any] = dict(zip(COMMIT, small_arguments("deltanet_commit_layer"), strict=True))
    with recorded_launches() as launches:
        for counts in ([0, 2], [1, 1]):
            commit(1, **{**inputs, "accepted": torch.tensor(counts, dtype=integers)})
    assert len(launches.compiled) == 1


@emulated
@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", all_kernels())
def test_no_dma_casts(name: str, dtype: torch.dtype, grid: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware descriptors move bytes, and the compiler may choose them (nki/migration/index.rst, dge_mode)."""
    casts, dma_copy = [], nki_emulator.isa.dma_copy

    def record(*, dst: Any, src: Any, **options: Any) -> None:
        if dst.dtype != src.dtype:
            casts.append(f"{src!r} to {dst!r}")
        dma_copy(dst=dst, src=src, **options)

    monkeypatch.setattr(nki_emulator.isa, "dma_copy", record)
    nki_emulator.emulate(all_kernels()[name], *small_arguments(name, dtype), grid=grid, timed=False)
    assert casts == []
