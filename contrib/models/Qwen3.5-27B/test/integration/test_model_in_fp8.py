# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Matrices in fp8: what is compiled so, which all other tests run on too, or on a CPU a model of its own."""

from __future__ import annotations

import pytest

from qwen35.serving.generation import TextGenerator
from support.integration import ON_DEVICE, Settings
from support.logit_limits import Limits, errors_of
from support.recorded_logits import FP8, Errors, Recording

PROMPTS = ("fact", "chat")


@pytest.fixture(scope="module")
def in_fp8(settings: Settings, request: pytest.FixtureRequest) -> TextGenerator:
    if settings.compiled is None and not ON_DEVICE:
        return settings.load(weights_dtype="fp8")
    generator: TextGenerator = request.getfixturevalue("generator")
    if generator.model.neuron_config.weights_dtype is None:
        pytest.skip(f"matrices are not in fp8; in fp8: {settings.compile_command(weights_dtype='fp8')}")
    return generator


def test_logits_are_those_of_transformers_with_the_same_rounded_matrices(
    in_fp8: TextGenerator, settings: Settings, recording: Recording
) -> None:
    limits = Limits.of(in_fp8, recording, PROMPTS)
    limits.check(Errors.together([*errors_of(in_fp8, settings, recording, PROMPTS).values()]))
    if in_fp8.model.neuron_config.kv_cache_dtype is None:
        assert float(recording.errors(FP8, PROMPTS).mean.mean()) > limits.mean, "they would pass without rounding"


def test_the_capital_of_france_is_known_in_fp8(in_fp8: TextGenerator) -> None:
    assert "Paris" in in_fp8.generate(["The capital of France is"], 16).texts[0]
