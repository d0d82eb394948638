# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 quantize`: a checkpoint again, with its matrices in fp8."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_qwen35 import Qwen35NeuronConfig
from .options import CheckpointOptions, add_checkpoint_options, options_from

if TYPE_CHECKING:
    from .options import Commands


@dataclass(frozen=True)
class QuantizeOptions(CheckpointOptions):
    """The options of `qwen35 quantize`."""

    output: Path
    json: bool


def add_parser(commands: Commands) -> None:
    """Add `quantize` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint in fp8",
        description=(
            "Write a bfloat16 checkpoint again, the matrices of its layers in fp8 with a scale per output channel. "
            "What --weights-dtype fp8 does at every load is then done, and the files are about half as large."
        ),
    )
    parser.set_defaults(run=_run)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the directory to make")
    add_checkpoint_options(parser, "Hugging Face checkpoint, or ORG/NAME on the hub (default: the mini)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _run(args: argparse.Namespace) -> None:
    from ..json_files import read_object
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM
    from ..serving.compiled import write_whole
    from ..serving.loading import CONFIG_FILES
    from ..weights.checkpoint import INDEX_FILE, CheckpointReader
    from ..weights.quantise import Quantised, quantise_checkpoint

    options = options_from(QuantizeOptions, args)
    source = options.checkpoint
    model = options.build(NeuronQwen35ForCausalLM, Qwen35NeuronConfig())
    if model.config.fp8_form is not None:
        raise ValueError(f"--model {source}: it is in fp8 already; name the bf16 checkpoint")
    model.checkpoint_loader_fn()  # holds names, shapes and dtypes against the configuration
    done: list[Quantised] = []

    def write(path: Path) -> None:
        path.mkdir()
        done.append(quantise_checkpoint(CheckpointReader(source), path))
        for pattern in (*CONFIG_FILES, "merges.txt"):
            for file in source.glob(pattern):
                if file.name != INDEX_FILE:
                    shutil.copyfile(file, path / file.name)
        config = {**read_object(source / "config.json"), "quantization_config": done[0].quantization_config}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_whole(options.output, write)
    figures = asdict(done[0])
    del figures["quantization_config"]
    if options.json:
        print(json.dumps({"output": str(options.output), **figures}))
    else:
        print(
            f"{options.output}: {figures['matrices']} matrices in fp8, "
            f"{figures['bytes_before'] / 1e9:.3f} GB are now {figures['bytes_after'] / 1e9:.3f} GB"
        )
