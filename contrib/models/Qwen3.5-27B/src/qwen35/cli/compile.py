# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 compile`: a compiled model with the weights of every rank; on a CPU, a check of what would be compiled."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_qwen35 import Qwen35NeuronConfig
from ..hardware import INSTANCES
from ..nxdi import NXDI_AVAILABLE
from ..planning.recommended import RECOMMENDED, device_neuron_config
from .options import (
    ModelOptions,
    SpeculationOptions,
    add_model_options,
    add_speculate_option,
    options_from,
    positive,
)

if TYPE_CHECKING:
    from .options import Commands


@dataclass(frozen=True)
class CompileOptions(ModelOptions, SpeculationOptions):
    """The options of `qwen35 compile`."""

    output: Path
    seq_len: int
    batch: int
    vision: bool
    instance: str | None
    recommended: str | None
    json: bool


def add_parser(commands: Commands) -> None:
    """Add `compile` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "compile",
        help="compile a model for Neuron",
        description="Compile the model and write it with the weights of every rank; on a CPU, check what would be.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the directory to make")
    add_model_options(parser)
    parser.add_argument("--seq-len", type=positive, default=4096, metavar="N", help="prompt and answer (4096)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at a time (1)")
    add_speculate_option(parser)
    parser.add_argument("--vision", action="store_true", help="also take images and videos")
    parser.add_argument(
        "--instance", choices=INSTANCES, help="where it will run; on Neuron, refuse what does not fit there"
    )
    parser.add_argument(
        "--recommended",
        choices=RECOMMENDED,
        help=(
            "of 'qwen35 plan --recommended', in place of --tp, --dtype, --weights-dtype, --kv-cache-dtype, --seq-len, "
            "--batch, --instance; for a device"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _run(args: argparse.Namespace) -> None:
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM
    from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
    from ..serving.compiled import compile_whole

    options = options_from(CompileOptions, args)
    neuron_config = _neuron_config(options)
    neuron_config.num_speculative_tokens = options.speculate or 0
    model = options.build(NeuronQwen35VLForCausalLM if options.vision else NeuronQwen35ForCausalLM, neuron_config)
    if neuron_config.device_settings is not None:
        print(
            f"{options.settings}: it chose {neuron_config.device_settings['kernels'] or 'no kernel'}", file=sys.stderr
        )
    compile_whole(model, options.output, lambda line: print(line, file=sys.stderr))
    counted, compiled = model.bytes_per_rank(), (options.output / "model.pt").exists()
    if options.json:
        print(json.dumps({"output": str(options.output), "compiled": compiled, "bytes_per_rank": asdict(counted)}))
    else:
        print(f"{options.output}: {'compiled' if compiled else 'checked, not compiled: no Neuron SDK here'}; {counted}")


def _neuron_config(options: CompileOptions) -> Qwen35NeuronConfig:
    if options.recommended is not None:
        return RECOMMENDED[options.recommended].neuron_config(settings=options.settings)
    instance = None if options.instance is None else INSTANCES[options.instance]
    return device_neuron_config(
        instance,
        options.tp,
        options.seq_len,
        options.batch,
        options.dtype,
        on_cpu=not NXDI_AVAILABLE,
        **options.neuron_fields,
    )
