# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The mini in the configurations of the self-test, without kernels; with them: whole_model/test_selftest_faults.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwen35.selftest import model_checks
from qwen35.selftest.cases import Feature, ModelCase
from qwen35.selftest.model_checks import application, run_model_check
from qwen35.selftest.outcome import CheckFailed
from qwen35.selftest.plan import ALL_TORCH, Kernels
from qwen35.selftest.recorded import recorded
from support.applications import needs_stand_ins

pytestmark = needs_stand_ins


QUICK = {Feature.GENERATION, Feature.PREFIX_CACHE, Feature.VISION, Feature.FP8_CACHE}


@pytest.mark.parametrize(
    "feature", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in Feature]
)
def test_the_mini_says_what_was_recorded(feature: Feature, tmp_path: Path) -> None:
    values = run_model_check(ModelCase(1, ALL_TORCH.fields, feature), tmp_path)
    assert values["prompts"] >= 2
    if feature is Feature.PREFIX_CACHE:
        assert values["restored_tokens"] >= 2 * 128  # of the second prompt, and of the first one again


@pytest.mark.parametrize("feature", Feature)
@pytest.mark.parametrize("deltanet", ["fused", "looped"])
def test_as_many_programs_are_announced_as_the_submodels_have_buckets(feature: Feature, deltanet: str) -> None:
    case = ModelCase(1, replace(ALL_TORCH, deltanet=deltanet).fields, feature)
    assert case.programs == sum(len(wrapper.neuron_config.buckets) for wrapper in application(case).models)


def test_another_token_is_named_with_what_transformers_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = recorded().short
    wrong = replace(first, answer=(first.answer[0] + 1, *first.answer[1:]))
    monkeypatch.setattr(model_checks, "recorded", lambda: replace(recorded(), short=(wrong, *others)))
    with pytest.raises(CheckFailed, match=r"after 'The capital of France is': token 0 is .*, transformers says "):
        run_model_check(ModelCase(1, ALL_TORCH.fields), tmp_path)


def test_the_kernels_of_a_case_are_those_that_run(tmp_path: Path) -> None:
    attention = {"context_encoding": "nki", "continuation": "torch", "token_generation": "torch"}
    neuron = application(ModelCase(1, Kernels("chunked", "plain", attention).fields)).neuron_config
    assert (neuron.deltanet_kernel, neuron.deltanet_inverse, neuron.attention_kernel) == ("chunked", "plain", attention)
