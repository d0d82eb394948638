# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The one thread that calls the model, so that vLLM schedules step n + 1 while the device runs step n.

vLLM's engine core hands over a step, then asks for its output only after it has handed over the next one. Here a step
is queued, and the thread runs what is queued in order: it has the rows, the batch and the generators to itself, and
knows the tokens of step n when step n + 1, which was scheduled without them, begins.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

Result = TypeVar("Result")


class DeviceThread:
    """Runs what is submitted, one after the other, in the order of submission."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qwen35-device")

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Queue some work; what it raises is raised by the future's `result`."""
        return self._executor.submit(work)

    def run(self, work: Callable[[], Result]) -> Result:
        """Do some work after all that is queued, and wait for it."""
        return self.submit(work).result()

    def close(self) -> None:
        """End the thread once the work that it is doing is done; what is queued behind is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class PendingOutput(AsyncModelRunnerOutput):
    """The output of a step that is queued; `get_output` waits for it, and raises what the step raised."""

    def __init__(self, output: Future[ModelRunnerOutput]) -> None:
        self._output = output

    def get_output(self) -> ModelRunnerOutput:
        return self._output.result()

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """None: what failed has said so in its output, or its step raises."""
        return None
