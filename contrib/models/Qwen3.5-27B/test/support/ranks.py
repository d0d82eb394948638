# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks that stay alive for many tests: processes of one gloo group, each with one thread."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from . import neuron_shells

neuron_shells.install()  # a rank is a new process: before it imports qwen35


class RankPool:
    """Calls a function in every rank and returns what each returned, in rank order."""

    def __init__(self, size: int) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, f"file://{self._scratch.name}/rendezvous"), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Raises RuntimeError with the traceback of the first rank that failed."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = [pipe.recv() for pipe in self._pipes]
        for failed, value in answers:
            if failed:
                raise RuntimeError(value)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
        self._scratch.cleanup()


def _serve(pipe: Any, rank: int, size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    while (task := pipe.recv()) is not None:
        function, args, kwargs = task
        try:
            pipe.send((False, function(*args, **kwargs)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
    torch.distributed.destroy_process_group()
