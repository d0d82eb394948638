# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 chat`: a conversation, turn by turn."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_qwen35 import Qwen35InferenceConfig
from .options import AnswerOptions, ModelOptions, add_answer_options, add_model_options, options_from, positive

if TYPE_CHECKING:
    from ..serving.chat import Conversation
    from .options import Commands


@dataclass(frozen=True)
class ChatOptions(AnswerOptions, ModelOptions):
    """The options of `qwen35 chat`."""

    seq_len: int
    cache_gb: float
    compiled: Path | None


def add_parser(commands: Commands) -> None:
    """Add `chat` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "chat",
        help="talk, turn by turn",
        description="Answer each line of standard input as the next turn of a conversation, until its end.",
    )
    parser.set_defaults(run=_run)
    add_model_options(parser)
    parser.add_argument("--seq-len", type=positive, default=4096, metavar="N", help="the whole conversation (4096)")
    parser.add_argument(
        "--cache-gb", type=float, default=8.0, metavar="GB", help="host memory for what later turns restore (8)"
    )
    add_answer_options(parser)
    parser.add_argument("--compiled", type=Path, metavar="DIR", help="what 'qwen35 compile' wrote; on Neuron needed")


def _run(args: argparse.Namespace) -> None:
    conversation = _conversation(options_from(ChatOptions, args))
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        print(mark, end="", flush=True)
        if not (question := sys.stdin.readline()):
            return
        if question.strip():
            for piece in conversation.ask(question.strip()):
                print(piece, end="", flush=True)
            print(flush=True)


def _conversation(options: ChatOptions) -> Conversation:
    from ..serving.chat import Conversation
    from ..serving.generation import TextGenerator

    config = _config(options)
    model_path = options.model or Path(config._name_or_path)
    sampling = options.sampling_of(model_path)
    generator = TextGenerator.load(model_path, config, options.compiled)
    return Conversation(generator, options.max_new_tokens, sampling, int(options.cache_gb * 1e9))


def _config(options: ChatOptions) -> Qwen35InferenceConfig:
    from ..serving.chat import CHUNK_SIZE
    from ..serving.loading import default_neuron_config, load_compiled_config

    if options.compiled is not None:
        return load_compiled_config(options.compiled)
    if options.tp != 1:
        raise ValueError(f"--tp {options.tp}: a chat on a CPU has one rank, which reads the questions; leave it out")
    neuron_config = default_neuron_config(options.seq_len, 1, 1, options.dtype, CHUNK_SIZE)
    return Qwen35InferenceConfig.from_pretrained(options.checkpoint, neuron_config=neuron_config)
