# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 plan`: what a configuration takes of a device, and what fits; `plan_report` has what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..configuration_qwen35 import DTYPES, QWEN35_PRESETS
from ..hardware import INSTANCES
from ..nxdi import on_stand_ins
from ..planning.recommended import device_neuron_config
from .options import add_checkpoint_options, add_fp8_options, add_settings_option, dtype_named, options_from

if TYPE_CHECKING:
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM
    from .options import Commands


@dataclass(frozen=True)
class PlanOptions:
    """The options of `qwen35 plan`."""

    model: str
    revision: str | None
    vision: bool
    instance: str
    tp: int
    seq_len: int
    batch: int
    prompt_bucket: int | None
    speculate: int
    acceptance: list[float]
    dtype: torch.dtype
    weights_dtype: str | None
    kv_cache_dtype: str | None
    settings: Path | None
    recommended: bool
    json: bool
    png: Path | None


def add_parser(commands: Commands) -> None:
    """Add `plan` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "plan",
        help="what a configuration takes of a device, and what fits",
        description="Memory per rank, counted on the modules, and modelled least times; nothing is read or compiled.",
    )
    parser.set_defaults(run=_run)
    add_checkpoint_options(
        parser, f"a checkpoint, ORG/NAME on the hub, or {' or '.join(QWEN35_PRESETS)} (27B)", default="27B"
    )
    parser.add_argument("--vision", action="store_true", help="with the submodel for prompts with images")
    parser.add_argument("--instance", choices=INSTANCES, default="trn2.3xlarge")
    parser.add_argument("--tp", type=int, default=4, metavar="N", help="tensor-parallel degree (4)")
    parser.add_argument("--seq-len", type=int, default=32768, metavar="N", help="prompt and answer (32768)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (1)")
    parser.add_argument(
        "--prompt-bucket",
        type=int,
        metavar="N",
        help="most tokens of a prompt encoded at once (1024, or 512 beyond 32768 of context)",
    )
    parser.add_argument(
        "--dtype", type=dtype_named, default=torch.bfloat16, metavar="DTYPE", help=f"{' or '.join(DTYPES)} (bfloat16)"
    )
    add_fp8_options(parser)
    add_settings_option(parser)
    parser.add_argument(
        "--speculate", type=int, default=0, metavar="K", help="draft K tokens a step with the MTP head (0: none)"
    )
    parser.add_argument(
        "--acceptance",
        type=_share,
        nargs="+",
        default=[],
        metavar="A",
        help="share of drafts accepted once those before them are: one for all K, or K of them",
    )
    parser.add_argument("--recommended", action="store_true", help="list the recommended configurations of 27B instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw memory against context (PNG)")


def _share(text: str) -> float:
    """An argument from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to 1")
    return value


def _run(args: argparse.Namespace) -> None:
    options = options_from(PlanOptions, args)
    _acceptance(options)
    print(on_stand_ins(_report, options))


def _acceptance(options: PlanOptions) -> list[float]:
    """The share of each draft.

    Raises:
        ValueError: there are not as many as drafts.
    """
    drafts, shares = options.speculate, options.acceptance
    if len(shares) not in ({1, drafts} if drafts > 0 else {0}):
        asked = f"give one share, or {drafts}" if drafts > 0 else "name K with --speculate"
        raise ValueError(f"--speculate {drafts} with {len(shares)} values of --acceptance: {asked}")
    return shares * drafts if len(shares) == 1 else shares


def _report(options: PlanOptions) -> str:
    """The text to print; writes the picture."""
    from ..planning.plan import plan
    from .plan_report import as_json, as_table, recommended_as_markdown, write_png

    if options.recommended:
        return recommended_as_markdown()
    model = _application(options)
    found = plan(model, INSTANCES[options.instance])
    if options.png is not None:
        write_png(model, found, options.png)
    acceptance = _acceptance(options)
    return json.dumps(as_json(found, acceptance)) if options.json else as_table(found, acceptance)


def _application(options: PlanOptions) -> NeuronQwen35ForCausalLM:
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM
    from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
    from ..planning.plan import preset_application
    from ..serving.loading import CONFIG_FILES, resolve_checkpoint

    neuron_config = device_neuron_config(
        INSTANCES[options.instance],
        options.tp,
        options.seq_len,
        options.batch,
        options.dtype,
        options.prompt_bucket,
        weights_dtype=options.weights_dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        settings=options.settings,
        num_speculative_tokens=options.speculate,
    )
    if options.model in QWEN35_PRESETS:
        return preset_application(options.model, neuron_config)
    model_cls = NeuronQwen35VLForCausalLM if options.vision else NeuronQwen35ForCausalLM
    path = str(resolve_checkpoint(options.model, options.revision, CONFIG_FILES))
    return model_cls(path, model_cls.get_config_cls().from_pretrained(path, neuron_config))
