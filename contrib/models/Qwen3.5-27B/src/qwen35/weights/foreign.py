# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a form that is not read, told apart by the names of their tensors and by files beside them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..error_text import first_three
from ..json_files import read_json

QUANTISED = "quantised checkpoints are not read, use the unquantised checkpoint"

_FP8_REMEDY = (
    "fp8 is read in the decoder, where quantization_config in config.json says how it is scaled: "
    "download config.json again, or use the unquantised checkpoint"
)

# (maker, last parts of tensor names, of which one tells). The first that fits is named: some have others' parts too.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bitsandbytes", ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format")),
    ("GPTQ", ("g_idx",)),
    ("AWQ", ("qweight", "qzeros")),
    ("compressed-tensors", ("weight_packed", "weight_zero_point", "weight_g_idx")),
    ("NVIDIA ModelOpt", ("weight_scale_2", "weight_quantizer", "input_quantizer")),
    ("fp8", ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")),
    ("MXFP4", ("weight_blocks", "weight_scales")),
    ("HQQ", ("W_q",)),
    ("AQLM", ("codebooks", "codes")),
    ("EXL2", ("q_weight", "q_invperm")),
    ("EXL3", ("trellis", "suh", "svh")),
    ("QuIP", ("Qidxs",)),
    ("quanto", ("_data", "_scale")),
    ("MLX", ("scales", "biases")),
)
_BITSANDBYTES_STATE = "quant_state.bitsandbytes__"
_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "base_layer")
_SIDE_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantization_config.json": "AutoRound",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}
_METHODS = {"gptq": "GPTQ", "awq": "AWQ"}


def foreign_form(unexpected: Collection[str], directory: Path | None) -> str | None:
    """One line that says what form the tensors of these names are in, and what to do; None where nothing tells.

    Args:
        unexpected: names of tensors that no plain checkpoint has.
        directory: of the checkpoint; a file there may name the maker more exactly than the tensors do.
    """
    adapter = [name for name in unexpected if any(part in name.split(".") for part in _ADAPTER_PARTS)]
    if adapter:
        return f"an adapter is not merged into the weights ({first_three(adapter)}); merge it and save the model again"
    for maker, ends in _SIGNS:
        told = [name for name in unexpected if _BITSANDBYTES_STATE in name or name.rsplit(".", 1)[-1] in ends]
        if told:
            maker = maker_beside(directory) or maker
            remedy = _FP8_REMEDY if maker == "fp8" else QUANTISED
            return f"the weights are quantised with {maker} ({first_three(told)}); {remedy}"
    return None


def maker_beside(directory: Path | None) -> str | None:
    """Who quantised the checkpoint, as a file beside the weights says."""
    for file, maker in _SIDE_FILES.items():
        if directory is None or not (directory / file).is_file():
            continue
        try:
            fields = read_json(directory / file)
        except ValueError:
            return maker
        method = fields.get("quant_method") if isinstance(fields, dict) else None
        return _METHODS.get(str(method), str(method)) if method else maker
    return None
