# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a model is loaded with: the shipped checkpoint, configurations of compiled models, defaults of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..configuration_qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..nxdi import NXDI_AVAILABLE

if TYPE_CHECKING:
    from transformers import GenerationConfig

MINI_CHECKPOINT = Path(__file__).parent.parent / "mini"
"""The small trained checkpoint that ships with the package: a test vehicle with the architecture of the real ones."""


def load_compiled_config(compiled_path: Path) -> Qwen35InferenceConfig:
    """The configuration that a compiled model was saved with.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (compiled_path / "neuron_config.json").exists():
        raise FileNotFoundError(f"{compiled_path}: no neuron_config.json there; name what 'qwen35 compile' wrote")
    fields = json.loads((compiled_path / "neuron_config.json").read_text(encoding="utf-8"))
    config_cls = Qwen35VLInferenceConfig if fields.get("takes_images") else Qwen35InferenceConfig
    config = config_cls.load(str(compiled_path))
    assert isinstance(config, Qwen35InferenceConfig)
    return config


def checkpoint_of(compiled_path: Path) -> Path:
    """The checkpoint that a compiled model was made of: its tokenizer is there.

    Raises:
        FileNotFoundError: it is not where it was.
    """
    path = Path(load_compiled_config(compiled_path)._name_or_path)
    if not path.exists():
        raise FileNotFoundError(f"{compiled_path} was compiled of {path}, which is gone: pass --model")
    return path


def default_neuron_config(
    seq_len: int,
    batch_size: int = 1,
    tp_degree: int = 1,
    torch_dtype: torch.dtype | None = None,
    prefill_chunk_size: int | None = None,
) -> Qwen35NeuronConfig:
    """Options for prompts and answers of `seq_len` tokens together: float32 on a CPU, bfloat16 on Neuron."""
    return Qwen35NeuronConfig(
        tp_degree=tp_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        max_context_length=seq_len,
        prefill_chunk_size=prefill_chunk_size,
        torch_dtype=torch_dtype or (torch.bfloat16 if NXDI_AVAILABLE else torch.float32),
        on_cpu=not NXDI_AVAILABLE,
        enable_bucketing=True,
    )


def load_generation_config(model_path: Path, config: Qwen35InferenceConfig) -> GenerationConfig:
    """The checkpoint's generation_config.json, or one with the end of text of its config.json where there is none."""
    # Here, because transformers takes seconds to import, and a configuration does not need it.
    from transformers import GenerationConfig

    if (model_path / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(model_path)
    return GenerationConfig(eos_token_id=config.eos_token_id)
