# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Configurations of the mini, as JSON and back."""

from __future__ import annotations

import json

import pytest

from qwen35.selftest.cases import Feature, ModelCase


@pytest.mark.parametrize("feature", Feature)
def test_a_case_comes_back_from_json(feature: Feature) -> None:
    case = ModelCase(2, {"deltanet_kernel": "fused", "attention_kernel": {"continuation": "torch"}}, feature)
    assert ModelCase.of_json(json.loads(json.dumps(case.as_json()))) == case
    neuron = case.neuron_config()
    assert (neuron.tp_degree, neuron.deltanet_kernel) == (2, "fused")
    assert (neuron.num_speculative_tokens > 0) == (feature is Feature.SPECULATION)
    assert (neuron.weights_dtype, neuron.kv_cache_dtype) == (
        "fp8" if feature is Feature.FP8_WEIGHTS else None,
        "fp8" if feature is Feature.FP8_CACHE else None,
    )
