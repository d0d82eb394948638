# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The `qwen35` command: a module per command, each with `add_parser` and what the command does and prints.

Parsers are made without the model's code, so that `qwen35 --help` is quick: a command imports that when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import chat, compile, convert, generate, kernels, plan, quantize, selftest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: its own, as a rule 0, or 2 after an error that the message explains."""
    args = _parser().parse_args(argv)
    try:
        status: int | None = args.run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"qwen35: error: {error}", file=sys.stderr)
        return 2
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen35", description="Qwen3.5 on AWS Trainium, or on this CPU.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, chat, compile, convert, quantize, plan, kernels, selftest):
        command.add_parser(commands)
    return parser
