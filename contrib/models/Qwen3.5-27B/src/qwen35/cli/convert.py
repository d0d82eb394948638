# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 convert`: a checkpoint in the Neuron layout, a safetensors file per rank."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..configuration_qwen35 import Qwen35NeuronConfig
from .options import ModelOptions, add_model_options, options_from

if TYPE_CHECKING:
    from .options import Commands


@dataclass(frozen=True)
class ConvertOptions(ModelOptions):
    """The options of `qwen35 convert`."""

    output: Path
    json: bool


def add_parser(commands: Commands) -> None:
    """Add `convert` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "convert",
        help="pre-shard a checkpoint",
        description="Write the checkpoint in the Neuron layout, a safetensors file per rank, for fast loading.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the directory to make")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _run(args: argparse.Namespace) -> None:
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM
    from ..serving.compiled import write_whole

    options = options_from(ConvertOptions, args)
    neuron_config = Qwen35NeuronConfig(
        tp_degree=options.tp,
        torch_dtype=options.dtype or torch.bfloat16,
        save_sharded_checkpoint=True,
        **options.neuron_fields,
    )
    model = options.build(NeuronQwen35ForCausalLM, neuron_config)

    def write(path: Path) -> None:
        model.config.save(str(path))
        model.shard_weights(str(path))

    write_whole(options.output, write)
    files = sorted((options.output / "weights").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    if options.json:
        print(json.dumps({"output": str(options.output), "tp_degree": options.tp, "bytes_per_rank": sizes}))
    else:
        print(f"{options.output}: {len(files)} ranks, {max(sizes) / 1e6:.1f} MB each at most")
