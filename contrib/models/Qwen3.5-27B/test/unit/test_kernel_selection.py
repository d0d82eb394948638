# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which DeltaNet kernel runs: the configured one, what `auto` means, what overrides it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.kernel_selection import (
    KERNEL_ENVIRONMENT,
    DeltaNetInverse,
    DeltaNetKernel,
    select_deltanet_inverse,
    select_deltanet_kernel,
)
from support.models import load_neuron
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
    with pytest.raises(Qwen35ConfigError, match=r"deltanet_inverse='exact' is unknown; set it to tiled, plain"):
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
