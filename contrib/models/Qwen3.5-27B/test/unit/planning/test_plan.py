# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The plan of a configuration: counts against arithmetic written out here and against a checkpoint's headers."""

from __future__ import annotations

import math

import pytest
from safetensors import safe_open

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig
from qwen35.hardware import TRN2_3XLARGE
from qwen35.planning.plan import plan
from qwen35.planning.recommended import device_neuron_config
from qwen35.serving.loading import MINI_CHECKPOINT
from support.applications import needs_stand_ins, plan_of_256k

pytestmark = needs_stand_ins


def test_27b_at_tp_4_fits_256k_tokens_in_24_gb_of_a_rank() -> None:
    found = plan_of_256k()
    layout = found.sharded.layout
    assert found.fits and layout.total < 24e9 < layout.hbm == 24 * 2**30
    assert layout.kv_cache == 16 * 2 * (262144 + 128) * 256 * 2
    assert found.valid_tp_degrees == (1, 2, 4)
    # The published layout: 11.1 GB of DeltaNet, and a context that ends long before.
    replicated = found.replicated
    assert replicated.layout.weights.deltanet == pytest.approx(11.12e9, rel=1e-3)
    assert not replicated.layout.fits and replicated.limits.batch == 0
    assert 512 <= replicated.limits.context < 4096


def test_the_vision_encoder_is_planned_on_the_host() -> None:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, device_neuron_config(TRN2_3XLARGE, 2, 256, 1))
    found = plan(NeuronQwen35ForCausalLM(str(MINI_CHECKPOINT), config), TRN2_3XLARGE)
    assert found.vision is not None and found.vision.rank is not None
    with safe_open(MINI_CHECKPOINT / "model.safetensors", "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys() if "visual" in name]
    assert found.vision.host == 2 * sum(sizes)
    assert found.vision.host / 2 < found.vision.rank < found.vision.host, "half of it, and what is not split"
