# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What commands share: options and their checks."""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch

from ..configuration_qwen35 import DTYPES, FP8_NAME, Qwen35NeuronConfig
from ..json_files import parse_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from ..modeling_qwen35 import NeuronQwen35ForCausalLM
    from ..serving.sampling import SamplingOptions

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    """What `ArgumentParser.add_subparsers` gives, and a command's parser is added to."""
    Options = TypeVar("Options", bound=DataclassInstance)


def options_from(kind: type[Options], args: argparse.Namespace) -> Options:
    """The dataclass `kind`, each field from the argument of its name."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


MOST_GB = 1e6


def gigabytes(text: str) -> float:
    """An argument that is an amount of memory in GB: from 0 to `MOST_GB`, more than any host has."""
    value = float(text)
    if not 0 <= value <= MOST_GB:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to {MOST_GB:,.0f}")
    return value


def dtype_named(text: str) -> torch.dtype:
    """An argument that names a dtype of weights and activations."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text}: must be {' or '.join(DTYPES)}")
    return DTYPES[text]


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoint: the options of `add_checkpoint_options`."""

    model: str | None
    revision: str | None

    @cached_property
    def checkpoint(self) -> Path:
        """The directory of the checkpoint named, fetched if a hub has it, or of the mini.

        Raises:
            ValueError: a revision of something that is not on a hub.
            OSError: it has no config.json, or cannot be fetched.
        """
        from ..serving.loading import MINI_CHECKPOINT, resolve_checkpoint

        return existing(resolve_checkpoint(self.model or str(MINI_CHECKPOINT), self.revision))

    def build(
        self, model_cls: type[NeuronQwen35ForCausalLM], neuron_config: Qwen35NeuronConfig
    ) -> NeuronQwen35ForCausalLM:
        """An application of class `model_cls` over the checkpoint, not loaded."""
        path = str(self.checkpoint.resolve())  # a compiled model is read from anywhere
        return model_cls(path, model_cls.get_config_cls().from_pretrained(path, neuron_config=neuron_config))


class NeuronFields(TypedDict):
    """Arguments of `Qwen35NeuronConfig`."""

    weights_dtype: str | None
    kv_cache_dtype: str | None
    settings: Path | None


@dataclass(frozen=True)
class ModelOptions(CheckpointOptions):
    """Which checkpoint is run, and how: the options of `add_model_options`."""

    tp: int
    dtype: torch.dtype | None
    weights_dtype: str | None
    kv_cache_dtype: str | None
    settings: Path | None

    @property
    def neuron_fields(self) -> NeuronFields:
        """What is in fp8, and which kernels `auto` is, for a `Qwen35NeuronConfig`."""
        return {
            "weights_dtype": self.weights_dtype,
            "kv_cache_dtype": self.kv_cache_dtype,
            "settings": self.settings,
        }

    def require_no_settings(self, compiled: Path | None) -> None:
        """Check that a compiled model is not to have other kernels.

        Raises:
            ValueError: it is.
        """
        if compiled is not None and self.settings is not None:
            raise ValueError(
                f"--settings {self.settings} with --compiled {compiled}: its kernels were chosen when it was compiled; "
                "leave --settings out, or compile it anew"
            )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ModelOptions`."""
    add_checkpoint_options(
        parser, "Hugging Face checkpoint, or ORG/NAME on the hub (default: the mini, or as compiled)"
    )
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel degree (1)")
    parser.add_argument(
        "--dtype",
        type=dtype_named,
        metavar="DTYPE",
        help=f"{' or '.join(DTYPES)}; default: float32 on a CPU, bfloat16 on Neuron",
    )
    add_fp8_options(parser)
    add_settings_option(parser)


def add_settings_option(parser: argparse.ArgumentParser) -> None:
    """Add --settings."""
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="device settings of a self-test: which kernels work there"
    )


def add_fp8_options(parser: argparse.ArgumentParser) -> None:
    """Add --weights-dtype and --kv-cache-dtype."""
    parser.add_argument(
        "--weights-dtype", choices=[FP8_NAME], help="keep the matrices of the layers in fp8, of any checkpoint"
    )
    parser.add_argument("--kv-cache-dtype", choices=[FP8_NAME], help="keep keys and values in fp8")


@dataclass(frozen=True)
class SpeculationOptions:
    """Whether tokens are drafted: the option of `add_speculate_option`."""

    speculate: int | None

    def require_compiled(self, compiled: Path | None, drafted: int) -> None:
        """Check that a compiled model drafts as many tokens as are asked for.

        Raises:
            ValueError: it was compiled for another number.
        """
        if compiled is not None and self.speculate not in (None, drafted):
            raise ValueError(
                f"--speculate {self.speculate} with --compiled {compiled}: it was compiled to draft {drafted} tokens; "
                "leave --speculate out, or compile it anew"
            )


def add_speculate_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of `SpeculationOptions`."""
    parser.add_argument(
        "--speculate", type=int, metavar="K", help="draft K tokens a step with the checkpoint's MTP head (0: none)"
    )


SAMPLING = {
    "temperature": (float, "0, the default, is greedy"),
    "top_p": (float, "sample from the likeliest tokens that sum to P (1)"),
    "top_k": (int, "sample from the K likeliest tokens (0: from all)"),
    "min_p": (float, "sample from tokens at least P times as likely as the likeliest (0)"),
    "presence_penalty": (float, "taken from the logits of tokens of the answer (0)"),
    "frequency_penalty": (float, "the same, for each time that the answer has the token (0)"),
    "repetition_penalty": (float, "divides the logits of tokens of prompt and answer (1)"),
}
"""Options of the names of fields of `SamplingOptions`: the type and what is said of each."""


def add_checkpoint_options(parser: argparse.ArgumentParser, help: str, default: str | None = None) -> None:
    """Add --model, of which `help` says what may be named, and --revision."""
    parser.add_argument("--model", default=default, metavar="MODEL", help=help)
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a model on the hub")


@dataclass(frozen=True)
class ChatTemplateOptions:
    """What a chat template is given beside the question: the options of `add_chat_template_options`."""

    system: str | None
    think: bool | None
    tools: Path | None
    stop: list[str]

    @cached_property
    def tool_schemas(self) -> list[Any] | None:
        """What --tools names.

        Raises:
            ValueError: it is no JSON list of schemas.
            OSError: it cannot be read.
        """
        from ..serving.prompts import check_tools

        if self.tools is None:
            return None
        try:
            return check_tools(parse_json(self.tools.read_bytes()))
        except ValueError as error:
            raise ValueError(f"--tools {self.tools}: {error}") from error


def add_chat_template_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ChatTemplateOptions`."""
    parser.add_argument("--system", metavar="TEXT", help="the system's message, before the first turn")
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="let the model think before it answers, or not (default: as its chat template does)",
    )
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of the functions that it may call")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")


@dataclass(frozen=True)
class AnswerOptions:
    """How tokens are chosen, and how many: the options of `add_answer_options`. None is for what was not given."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    sampling: str | None

    def sampling_of(self, checkpoint: Path) -> SamplingOptions:
        """The same for `serving`; under `--sampling checkpoint` what was not given is as that of `checkpoint`.

        Raises:
            FileNotFoundError, ValueError: a number is out of its range, or the checkpoint has no usable values.
        """
        from ..serving.sampling import GREEDY, checkpoint_sampling

        given = {name: value for name in (*SAMPLING, "seed") if (value := getattr(self, name)) is not None}
        return replace(checkpoint_sampling(checkpoint) if self.sampling == "checkpoint" else GREEDY, **given)


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `AnswerOptions`."""
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="most to generate (64)")
    for name, (kind, words) in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=words)
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--sampling",
        choices=["checkpoint"],
        help="take what is not given here from the checkpoint's generation_config.json",
    )


def existing(path: Path) -> Path:
    """The path of a checkpoint's directory.

    Raises:
        FileNotFoundError: it has no config.json.
    """
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"--model {path}: no config.json there; name a Hugging Face checkpoint's directory")
    return path


def print_any_text() -> None:
    """Let standard output print "?" for a character that its encoding does not have."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
