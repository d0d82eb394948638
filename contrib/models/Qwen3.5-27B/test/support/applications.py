# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Applications for a device that are never loaded: their memory is counted and their programs are walked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.hardware import TRN2_3XLARGE, TRN2_48XLARGE
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.planning.plan import Plan, plan
from qwen35.planning.recommended import device_neuron_config
from support.models import TINY

needs_stand_ins = pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's layers do not run without a process group")

# Heads of 128 dims, so that the kernels take them; a chip's worth of HBM is far more than it needs.
SMALL = {**TINY, "linear_key_head_dim": 128, "linear_value_head_dim": 128}


def application(fields: dict[str, Any], **options: Any) -> NeuronQwen35ForCausalLM:
    """A text model of config fields for a device, at LNC=2 and in bfloat16 unless options say otherwise."""
    settings = {"logical_nc_config": 2, "torch_dtype": torch.bfloat16, **options}
    return NeuronQwen35ForCausalLM(
        "no-such-checkpoint", Qwen35InferenceConfig(Qwen35NeuronConfig(**settings), **fields)
    )


def of_27b(
    seq_len: int = 32768, batch: int = 1, tp_degree: int = 4, prompt_bucket: int | None = None, **other: Any
) -> NeuronQwen35ForCausalLM:
    """27B as the command line configures it for a device."""
    neuron_config = device_neuron_config(TRN2_48XLARGE, tp_degree, seq_len, batch, prompt_bucket=prompt_bucket, **other)
    config = Qwen35InferenceConfig(neuron_config, **QWEN35_PRESETS["27B"])
    return NeuronQwen35ForCausalLM("no-such-checkpoint", config)


@cache
def of_27b_at_256k() -> NeuronQwen35ForCausalLM:
    """27B at TP=4, 262,144 tokens, batch 1; of each submodel the largest bucket alone, to save time."""
    neuron_config = device_neuron_config(TRN2_3XLARGE, 4, 262144, 1)
    neuron_config.enable_bucketing = False
    return NeuronQwen35ForCausalLM("no-such-checkpoint", Qwen35InferenceConfig(neuron_config, **QWEN35_PRESETS["27B"]))


@cache
def plan_of_256k() -> Plan:
    """The plan of `of_27b_at_256k` on the smallest instance."""
    return plan(of_27b_at_256k(), TRN2_3XLARGE)


def install_neuron_ls(directory: Path, printed: str, status: int = 0, before: str = "") -> None:
    """A neuron-ls for PATH that prints this and ends with that status."""
    directory.mkdir(exist_ok=True)
    tool = directory / "neuron-ls"
    tool.write_text(f"#!/bin/sh\n{before}\n/bin/cat <<'EOF'\n{printed}\nEOF\nexit {status}\n")
    tool.chmod(0o755)
