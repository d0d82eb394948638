# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which kernels run: the configured ones, what `auto` means, what overrides it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.kernel_selection import (
    ATTENTION_CHUNK_QUERIES,
    ATTENTION_GROUP_QUERIES,
    ATTENTION_HEAD_DIMS,
    ATTENTION_NEW_KEYS,
    ATTENTION_QUERIES,
    ATTENTION_TILE,
    ATTENTION_TOKENS,
    KERNEL_ENVIRONMENT,
    AttentionKernel,
    DeltaNetInverse,
    DeltaNetKernel,
    MLPKernel,
    select_attention,
    select_deltanet_inverse,
    select_deltanet_kernel,
    select_mlp_kernel,
)
from qwen35.nki_kernels import attention_continuation, attention_decode, attention_pieces, attention_prefill
from qwen35.phase import Phase
from support.models import load_neuron, save_checkpoint
from support.oracle import save_reference


def config(**options: object) -> Qwen35InferenceConfig:
    return Qwen35InferenceConfig(Qwen35NeuronConfig(**options), **QWEN35_PRESETS["27B"])


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_auto_is_fused_on_a_device_and_torch_on_a_cpu() -> None:
    assert select_deltanet_kernel(config()) is DeltaNetKernel.FUSED
    assert select_deltanet_kernel(config(on_cpu=True)) is DeltaNetKernel.TORCH


@pytest.mark.parametrize("kernel", [kernel for kernel in DeltaNetKernel if kernel is not DeltaNetKernel.AUTO])
def test_a_configured_kernel_is_taken_and_survives_saving(kernel: DeltaNetKernel, tmp_path: Path) -> None:
    for given in (kernel, kernel.value):
        config(deltanet_kernel=given).save(tmp_path)
        assert select_deltanet_kernel(Qwen35InferenceConfig.load(tmp_path)) is kernel


@pytest.mark.parametrize("inverse", DeltaNetInverse)
def test_a_configured_inverse_is_taken_and_survives_saving(inverse: DeltaNetInverse, tmp_path: Path) -> None:
    for given in (inverse, inverse.value):
        config(deltanet_inverse=given).save(tmp_path)
        assert select_deltanet_inverse(Qwen35InferenceConfig.load(tmp_path)) is inverse
    assert select_deltanet_inverse(config()) is DeltaNetInverse.TILED


def test_an_unknown_inverse_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(Qwen35ConfigError, match=r"deltanet_inverse='exact' is unknown; set it to auto, tiled, plain"):
        config(deltanet_inverse="exact")


@pytest.mark.parametrize(("name", "kernel"), KERNEL_ENVIRONMENT.items())
def test_the_environment_overrides_the_configuration(
    name: str, kernel: DeltaNetKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    assert select_deltanet_kernel(config(deltanet_kernel="chunked")) is kernel
    monkeypatch.setenv(name, "0")
    assert select_deltanet_kernel(config(deltanet_kernel="chunked")) is DeltaNetKernel.CHUNKED


def test_two_overrides_at_once_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_NKI", "1")
    monkeypatch.setenv("USE_NKI_FUSED", "1")
    with pytest.raises(Qwen35ConfigError, match="USE_NKI_FUSED and USE_NKI are all set"):
        config()


def test_an_unknown_kernel_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(Qwen35ConfigError, match=r"deltanet_kernel='fast' is unknown; set it to auto, fused"):
        config(deltanet_kernel="fast")


def test_a_kernel_for_other_head_sizes_is_an_error(tmp_path: Path) -> None:
    save_reference(tmp_path)
    with pytest.raises(Qwen35ConfigError, match="128 dims, not 16 and 16; use 'torch'"):
        load_neuron(tmp_path, deltanet_kernel="fused")


# --- Attention --------------------------------------------------------------------------------------------------------
CHUNKED = dict(seq_len=32768, prefill_chunk_size=1024, tp_degree=4)


def test_auto_takes_the_attention_kernels_on_a_device_from_where_they_win() -> None:
    choice = select_attention(config(**CHUNKED))
    assert choice.any_kernel
    assert [choice.encodes(tokens) for tokens in (128, 511, 512, 1024, 4096, 4097)] == [False] * 2 + [True] * 3 + [
        False
    ]
    assert choice.reads_cache(Phase.CONTINUATION, 1024)
    decodes = [choice.reads_cache(Phase.TOKEN_GENERATION, bucket) for bucket in (4096, 8192, 8200, 32768)]
    assert decodes == [False, True, False, True]


def test_auto_is_torch_on_a_cpu() -> None:
    choice = select_attention(config(on_cpu=True, **{**CHUNKED, "tp_degree": 1}))
    assert not choice.any_kernel and not choice.encodes(1024) and not choice.reads_cache(Phase.CONTINUATION, 1024)


def test_float32_halves_the_tokens_of_a_kernel() -> None:
    choice = select_attention(config(torch_dtype=torch.float32, **{**CHUNKED, "prefill_chunk_size": 2048}))
    assert [choice.encodes(tokens) for tokens in (2048, 4096)] == [True, False]
    assert not choice.reads_cache(Phase.CONTINUATION, 4096)


def test_chunks_too_short_to_win_and_rows_too_many_are_left_to_torch() -> None:
    assert not select_attention(config(**{**CHUNKED, "prefill_chunk_size": 256})).reads_cache(Phase.CONTINUATION, 4096)
    rows = ATTENTION_QUERIES // 6
    for batch, taken in ((rows, True), (rows + 1, False)):
        choice = select_attention(config(seq_len=8192, tp_degree=4, batch_size=batch))
        assert choice.reads_cache(Phase.TOKEN_GENERATION, 8192) is taken


@pytest.mark.parametrize(
    ("drafts", "batch", "taken"),
    [(0, 128, True), (0, 129, False), (3, 32, True), (3, 33, False), (7, 16, True), (7, 17, False)],
)
def test_new_keys_too_many_are_left_to_torch(drafts: int, batch: int, taken: bool) -> None:
    # Three query heads on a rank share a KV head: 512 queries would be 170 new keys.
    choice = select_attention(config(seq_len=8192, tp_degree=8, batch_size=batch, num_speculative_tokens=drafts))
    assert choice.reads_cache(Phase.VERIFICATION if drafts else Phase.TOKEN_GENERATION, 8192) is taken


@pytest.mark.parametrize(("drafts", "taken"), [(5, True), (6, False)])
def test_queries_of_a_kv_head_too_many_are_left_to_torch(drafts: int, taken: bool) -> None:
    eight = {**QWEN35_PRESETS["27B"], "num_attention_heads": 32}  # on each of four KV heads
    neuron = Qwen35NeuronConfig(seq_len=8192, tp_degree=4, num_speculative_tokens=drafts)
    assert select_attention(Qwen35InferenceConfig(neuron, **eight)).reads_cache(Phase.VERIFICATION, 8192) is taken


@pytest.mark.parametrize(
    ("heads", "cores", "dtype", "chunk", "taken"),
    [
        (24, 1, torch.bfloat16, 2048, True),
        (32, 1, torch.bfloat16, 1536, True),
        (32, 1, torch.bfloat16, 2048, False),
        (32, 2, torch.bfloat16, 2048, True),
        (32, 1, torch.float32, 768, True),
        (32, 1, torch.float32, 1024, False),
    ],
)
def test_chunks_of_more_queries_than_fit_a_core_are_left_to_torch(
    heads: int, cores: int, dtype: torch.dtype, chunk: int, taken: bool
) -> None:
    neuron = Qwen35NeuronConfig(
        seq_len=8192, tp_degree=4, logical_nc_config=cores, torch_dtype=dtype, prefill_chunk_size=chunk
    )
    fields = {**QWEN35_PRESETS["27B"], "num_attention_heads": heads}  # on four KV heads
    choice = select_attention(Qwen35InferenceConfig(neuron, **fields))
    assert choice.reads_cache(Phase.CONTINUATION, 8192) is taken


def test_the_limits_are_those_of_the_kernels() -> None:
    assert ATTENTION_HEAD_DIMS == attention_pieces.HEAD_DIMS and ATTENTION_TILE == attention_pieces.TILE
    assert ATTENTION_TOKENS[Phase.CONTEXT_ENCODING] == attention_prefill.MAX_TOKENS
    assert ATTENTION_TOKENS[Phase.CONTINUATION] == attention_continuation.MAX_TOKENS
    assert ATTENTION_QUERIES == attention_decode.MAX_COLUMNS
    assert ATTENTION_CHUNK_QUERIES == attention_continuation.MAX_QUERIES
    assert ATTENTION_GROUP_QUERIES == attention_decode.MAX_QUERIES
    assert ATTENTION_NEW_KEYS == attention_pieces.TILE


@pytest.mark.parametrize("kernel", AttentionKernel)
def test_a_configured_attention_kernel_is_taken_and_survives_saving(kernel: AttentionKernel, tmp_path: Path) -> None:
    for given in (
        kernel,
        kernel.value,
        {name: kernel for name in ("context_encoding", "continuation", "token_generation")},
    ):
        config(attention_kernel=given, **CHUNKED).save(tmp_path)
        assert {*select_attention(Qwen35InferenceConfig.load(tmp_path)).kernels.values()} == {kernel}


def test_a_kernel_may_be_named_for_one_phase_and_the_others_are_auto(tmp_path: Path) -> None:
    config(attention_kernel={"token_generation": "torch"}, **CHUNKED).save(tmp_path)
    kernels = select_attention(Qwen35InferenceConfig.load(tmp_path)).kernels
    assert kernels.pop(Phase.TOKEN_GENERATION) is AttentionKernel.TORCH
    assert {*kernels.values()} == {AttentionKernel.AUTO}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("fast", {}, "attention_kernel='fast' is unknown; set it to auto, nki, torch"),
        (
            {"decode": "nki"},
            {},
            r"attention_kernel\['decode'\] is no phase that has a kernel; set one of context_encoding",
        ),
        ({"continuation": 1}, {}, r"attention_kernel\['continuation'\]=1 is unknown; set it to auto, nki, torch"),
        ("nki", {"seq_len": 200}, "reads the cache in multiples of 128 positions, not 200; make seq_len"),
        ("nki", {"seq_len": 8192}, "takes prompts of at most 4096 tokens, not max_context_length=8192; use 'auto'"),
        (
            "nki",
            {"seq_len": 8192, "prefill_chunk_size": 3072},
            "chunks of at most 2048 tokens, not prefill_chunk_size=3072",
        ),
        (
            {"token_generation": "nki"},
            {"seq_len": 8192, "tp_degree": 4, "batch_size": 100},
            "at most 512 queries, 48 of .* and 128 new keys on a rank, not 600, 6 and 100; lower tkg_batch_size=100",
        ),
        (
            {"token_generation": "nki"},
            {"seq_len": 8192, "tp_degree": 8, "batch_size": 40, "num_speculative_tokens": 3},
            "not 480, 12 and 160; lower tkg_batch_size=40 or num_speculative_tokens=3, or use 'auto'",
        ),
    ],
)
def test_what_the_attention_kernels_cannot_do_is_an_error(given: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(Qwen35ConfigError, match=message):
        config(attention_kernel=given, **options)


def test_fewer_query_heads_than_kv_heads_are_an_error_of_their_own() -> None:
    neuron = Qwen35NeuronConfig(seq_len=2048, prefill_chunk_size=1024, attention_kernel="nki")
    fields = {**QWEN35_PRESETS["27B"], "num_attention_heads": 2}
    with pytest.raises(Qwen35ConfigError, match="num_attention_heads=2 is not a multiple of num_key_value_heads=4"):
        Qwen35InferenceConfig(neuron, **fields)


def test_attention_kernels_for_other_head_dims_are_an_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(Qwen35ConfigError, match="has heads of 64, 128 or 256 dims, not 32; use 'torch'"):
        load_neuron(tmp_path, attention_kernel="nki")


# --- The MLP ---------------------------------------------------------------------------------------------------------
def test_the_mlp_is_pytorchs_unless_the_kernel_is_asked_for() -> None:
    assert select_mlp_kernel(config()) is MLPKernel.TORCH


@pytest.mark.usefixtures("library_is_there")
@pytest.mark.parametrize("kernel", MLPKernel)
def test_a_configured_mlp_kernel_is_taken_and_survives_saving(kernel: MLPKernel, tmp_path: Path) -> None:
    for given in (kernel, kernel.value):
        config(mlp_kernel=given, torch_dtype=torch.bfloat16, tp_degree=4).save(tmp_path)
        assert select_mlp_kernel(Qwen35InferenceConfig.load(tmp_path)) is kernel


@pytest.mark.usefixtures("library_is_there")
@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"mlp_kernel": "fast"}, {}, r"mlp_kernel='fast' is unknown; set it to auto, torch, nki"),
        (
            {"torch_dtype": torch.float32},
            {},
            r"mlp_kernel='nki' computes in bfloat16, not torch_dtype=torch.float32; set it to that, or use 'torch'",
        ),
        (
            {"logical_nc_config": 2},
            {"hidden_size": 128 * 7},
            r"mlp_kernel='nki' takes hidden sizes in multiples of 256 with logical_nc_config=2, not hidden_size=896",
        ),
        ({"logical_nc_config": 1}, {"hidden_size": 192}, r"in multiples of 128 with logical_nc_config=1.*=192; use"),
        (
            {"tp_degree": 2},
            {},
            r"takes at most 6144 columns of intermediate_size on a rank, not 8704; raise tp_degree=2, or use 'torch'",
        ),
    ],
)
def test_what_the_mlp_kernel_cannot_do_is_an_error(
    options: dict[str, object], fields: dict[str, int], message: str
) -> None:
    options = {"mlp_kernel": "nki", "torch_dtype": torch.bfloat16, "tp_degree": 4, **options}
    with pytest.raises(Qwen35ConfigError, match=message) as raised:
        Qwen35InferenceConfig(Qwen35NeuronConfig(**options), **{**QWEN35_PRESETS["27B"], **fields})
    assert len(raised.value.problems) == 1


@pytest.mark.usefixtures("nki_as_before")
def test_the_mlp_kernel_without_the_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nkilib", None)  # importing it fails from here on
    with pytest.raises(Qwen35ConfigError, match=r"mlp_kernel='nki' needs nki-library, .*nkilib.*; install it, or use"):
        config(mlp_kernel="nki", torch_dtype=torch.bfloat16, tp_degree=4)
