# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The one thread that calls the model, so that vLLM schedules step n + 1 while the device runs step n.

vLLM's engine core hands over a step, then asks for its output only after it has handed over the next one. Here a step
is queued, and the thread runs what is queued in order: it has the rows, the batch and the generators to itself, and
knows the tokens of step n when step n + 1, which was scheduled without them, begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeAlias, TypeVar

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from .connector import connector_output
from .row_metrics import RowStats

Result = TypeVar("Result")
Failures: TypeAlias = "dict[str, tuple[list[int], ...]]"
"""Requests that cannot go on, and their blocks, a list a group of vLLM's cache."""


class StepOutput(NamedTuple):
    """What a step gives vLLM.

    Args:
        output: its tokens.
        failures: the requests that vLLM is told of as failed.
        lost: blocks of prompts that were to be stored, and are not.
        rows: how many are in use after it.
    """

    output: ModelRunnerOutput
    failures: Failures
    lost: list[bytes]
    rows: RowStats | None = None


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


class HandedOver:
    """What the scheduler has said since of requests whose steps are still queued.

    Failures are told by blocks (see `connector`). A request that was finished or preempted in a step handed over in the
    meantime has its blocks no more, and another may have them: it must not be told of. vLLM 0.33 reads an output right
    before it uses it, and this is exact. 0.23 reads it on a thread of its own, and a client that hangs up at the very
    step at which its request fails could end another request.
    """

    def __init__(self) -> None:
        self._ended: deque[Collection[str]] = deque(maxlen=2)  # as many steps as vLLM hands over before it reads one

    def add(self, scheduled: SchedulerOutput) -> None:
        """A step was handed over."""
        self._ended.append({*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())})

    def still_running(self, failures: Failures) -> Failures:
        """Those that have their blocks, as far as the scheduler has said."""
        ended = {request_id for step in tuple(self._ended) for request_id in step}
        return {request_id: blocks for request_id, blocks in failures.items() if request_id not in ended}


class PendingOutput(AsyncModelRunnerOutput):
    """The output of a step that is queued; `get_output` waits for it, and raises what the step raised."""

    def __init__(self, step: Future[StepOutput], handed_over: HandedOver) -> None:
        self._step, self._handed_over = step, handed_over

    def get_output(self) -> ModelRunnerOutput:
        step = self._step.result()
        failed = self._handed_over.still_running(step.failures).values()
        step.output.kv_connector_output = connector_output(failed, step.lost, step.rows)
        return step.output

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """None: what failed has said so in its output, or its step raises."""
        return None
