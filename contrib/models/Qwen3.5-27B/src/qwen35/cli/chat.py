# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 chat`: a conversation, turn by turn."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_qwen35 import Qwen35InferenceConfig
from .options import (
    AnswerOptions,
    ChatTemplateOptions,
    ModelOptions,
    SpeculationOptions,
    add_answer_options,
    add_chat_template_options,
    add_model_options,
    add_speculate_option,
    gigabytes,
    options_from,
    positive,
    print_any_text,
)

if TYPE_CHECKING:
    from ..serving.chat import Conversation
    from .options import Commands


@dataclass(frozen=True)
class ChatOptions(ChatTemplateOptions, AnswerOptions, ModelOptions, SpeculationOptions):
    """The options of `qwen35 chat`."""

    seq_len: int
    cache_gb: float
    compiled: Path | None


def add_parser(commands: Commands) -> None:
    """Add `chat` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "chat",
        help="talk, turn by turn",
        description=(
            "Answer each line of standard input as the next turn of a conversation, until its end. Ctrl-C ends an "
            "answer, and the program while it waits for a question."
        ),
    )
    parser.set_defaults(run=_run)
    add_model_options(parser)
    parser.add_argument("--seq-len", type=positive, default=4096, metavar="N", help="the whole conversation (4096)")
    parser.add_argument(
        "--cache-gb", type=gigabytes, default=8.0, metavar="GB", help="host memory for what later turns restore (8)"
    )
    add_answer_options(parser)
    add_chat_template_options(parser)
    add_speculate_option(parser)
    parser.add_argument("--compiled", type=Path, metavar="DIR", help="what 'qwen35 compile' wrote; on Neuron needed")


def _run(args: argparse.Namespace) -> None:
    print_any_text()
    conversation = _conversation(options_from(ChatOptions, args))
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A byte that is no UTF-8 spoils its own question, which is said, and not what was read with it.
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        _talk(conversation)
    except KeyboardInterrupt:
        pass  # at the prompt, or a second one in an answer: the end, as that of standard input
    if conversation.engine.acceptance.drafted:
        print(f"[{conversation.engine.acceptance}]", file=sys.stderr)


def _talk(conversation: Conversation) -> None:
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        print(mark, end="", flush=True)
        if not (question := sys.stdin.readline()):
            return
        if question.strip():
            _answer(conversation, question.strip())


def _answer(conversation: Conversation, question: str) -> None:
    """Print the answer; of a question that cannot be asked, say so, and leave it out of the conversation."""
    try:
        with _interrupting(conversation):
            for piece in conversation.ask(question):
                print(piece, end="", flush=True)
    except ValueError as error:
        print(f"qwen35: this question is left out: {error}", file=sys.stderr, flush=True)
    print(flush=True)


@contextmanager
def _interrupting(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C ends the answer when the model's present call is done; a second one raises KeyboardInterrupt."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        conversation.interrupt()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _conversation(options: ChatOptions) -> Conversation:
    from ..serving.chat import Conversation
    from ..serving.generation import TextGenerator
    from ..serving.loading import checkpoint_of

    config = _config(options)
    path = checkpoint_of(options.compiled) if options.model is None and options.compiled else options.checkpoint
    sampling = options.sampling_of(path)
    generator = TextGenerator.load(path, config, options.compiled)
    return Conversation(
        generator,
        options.max_new_tokens,
        sampling,
        int(options.cache_gb * 1e9),
        system=options.system,
        stop=options.stop,
        tools=options.tool_schemas,
        enable_thinking=options.think,
    )


def _config(options: ChatOptions) -> Qwen35InferenceConfig:
    from ..serving.chat import CHUNK_SIZE
    from ..serving.loading import default_neuron_config, load_compiled_config

    if options.compiled is not None:
        config = load_compiled_config(options.compiled)
        options.require_compiled(options.compiled, config.num_speculative_tokens)
        options.require_no_settings(options.compiled)
        return config
    if options.tp != 1:
        raise ValueError(f"--tp {options.tp}: a chat on a CPU has one rank, which reads the questions; leave it out")
    chunk_size = min(CHUNK_SIZE, options.seq_len)
    neuron_config = default_neuron_config(options.seq_len, 1, 1, options.dtype, chunk_size, **options.neuron_fields)
    neuron_config.num_speculative_tokens = options.speculate or 0
    return Qwen35InferenceConfig.from_pretrained(options.checkpoint, neuron_config=neuron_config)
