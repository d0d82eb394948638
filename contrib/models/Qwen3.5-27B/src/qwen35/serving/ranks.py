# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Running on every rank: on a device one process drives them all, on a CPU each is a process of its own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..nxdi import NeuronConfig


def run_on_every_rank(neuron_config: NeuronConfig, run: Callable[..., None], *rest: Any) -> None:
    """Call run(*rest) once; on a CPU with tp_degree=N, in N processes that form a gloo group.

    `run` is a function that another process finds by its name, and `rest` is pickled.

    Raises:
        ValueError, OSError, NotImplementedError: a process raised it; the message is the same.
        torch.multiprocessing.ProcessRaisedException: a process raised something else, and has its traceback.
    """
    ranks = neuron_config.tp_degree
    if not neuron_config.on_cpu or ranks == 1:
        run(*rest)
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            torch.multiprocessing.start_processes(
                _rank_process, args=(scratch, ranks, run, *rest), nprocs=ranks, start_method="spawn"
            )
        except torch.multiprocessing.ProcessRaisedException:
            # Not only of the process that ended first: that may be one that lost the connection to the one that failed.
            for path in sorted(Path(scratch).glob("error_*.json")):
                kind, message = json.loads(path.read_text(encoding="utf-8"))
                raise _ERRORS[kind](message) from None
            raise


_ERRORS = {kind.__name__: kind for kind in (ValueError, OSError, NotImplementedError)}
"""What a command explains in its message, by name: a rank hands these on to the process that started it."""


def _keep_standard_output_for_python() -> None:
    """Drop what libraries write to the file descriptor: gloo of torch 2.9 reports its connections there, amid JSON."""
    own = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    sys.stdout = own


def _rank_process(rank: int, scratch: str, ranks: int, run: Callable[..., None], *rest: Any) -> None:
    os.environ["RANK"] = str(rank)
    _keep_standard_output_for_python()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    rendezvous = f"file://{scratch}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    try:
        run(*rest)
    except tuple(_ERRORS.values()) as error:
        kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
        path = Path(scratch) / f"error_{rank}"
        path.write_text(json.dumps([kind, str(error)]), encoding="utf-8")
        path.rename(path.with_suffix(".json"))  # whole, should this process be ended in between
        raise
    finally:
        torch.distributed.destroy_process_group()
