# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The MLP of a layer, against transformers' own."""

from __future__ import annotations

import pytest
import torch

from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.layers.mlp import make_mlp
from support.compare import assert_close
from support.models import TINY

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
