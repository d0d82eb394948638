# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""While the device runs a step, vLLM schedules and hands over the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from qwen35_vllm.device_thread import DeviceThread, HandedOver, PendingOutput, StepOutput
from support.simulated_device import faults
from support.vllm_engines import add, close, finish, make_engine, tokens_of, two_ranks_behind_a_loaded_model, worker_of

pytestmark = pytest.mark.vllm


def test_work_runs_in_its_order_on_one_thread_and_whoever_submits_it_goes_on() -> None:
    thread, begin, ran = DeviceThread(), threading.Event(), []
    futures = [thread.submit(lambda: begin.wait(10))]
    futures += [thread.submit(lambda i=i: ran.append((i, threading.get_ident()))) for i in range(3)]
    assert not any(future.done() for future in futures)
    begin.set()
    assert thread.run(lambda: 5) == 5
    assert [i for i, _ in ran] == [0, 1, 2]
    assert {ident for _, ident in ran} != {threading.get_ident()} and len({ident for _, ident in ran}) == 1
    thread.close()


def test_what_a_step_raises_is_raised_where_its_output_is_read() -> None:
    def fail() -> StepOutput:
        raise RuntimeError("the device is gone")

    thread = DeviceThread()
    output = PendingOutput(thread.submit(fail), HandedOver())
    with pytest.raises(RuntimeError, match="the device is gone"):
        output.get_output()
    output = PendingOutput(thread.submit(lambda: StepOutput(ModelRunnerOutput(["a"], {"a": 0}), {}, [])), HandedOver())
    assert output.get_output().req_ids == ["a"] and output.get_kv_connector_output() is None
    thread.close()


def step_that_ends(*finished: str, preempted: Sequence[str] = ()) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.finished_req_ids, step.preempted_req_ids = {*finished}, {*preempted}
    return step


@pytest.mark.parametrize(
    ("later", "told"),
    [
        ([], {1, 2}),
        ([step_that_ends()], {1, 2}),
        ([step_that_ends("a")], {2}),
        ([step_that_ends(preempted=["b"])], {1}),
        ([step_that_ends("a"), step_that_ends(preempted=["b"])], set()),
    ],
)
def test_a_failure_is_not_told_of_a_request_whose_blocks_another_may_have_by_now(
    later: list[SchedulerOutput], told: set[int]
) -> None:
    thread, handed_over = DeviceThread(), HandedOver()
    handed_over.add(step_that_ends("z"))
    step = StepOutput(ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1}), {"a": ([1],), "b": ([2],)}, [])
    output = PendingOutput(thread.submit(lambda: step), handed_over)
    for ended in later:
        handed_over.add(ended)
    connector = output.get_output().kv_connector_output
    assert (set() if connector is None else connector.invalid_block_ids) == told
    thread.close()


def test_closing_waits_for_what_runs_and_drops_what_is_queued() -> None:
    thread, started, ran = DeviceThread(), threading.Event(), []

    def work() -> None:
        started.set()
        time.sleep(0.05)
        ran.append("first")

    thread.submit(work)
    thread.submit(lambda: ran.append("second"))
    started.wait(10)
    thread.close()
    assert ran == ["first"]


TOKENS = 6


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["asynchronous", "synchronous"])
def test_the_next_step_is_scheduled_before_the_tokens_of_this_one_are_known(
    served_checkpoint: Path, async_scheduling: bool
) -> None:
    """A program of the device, which has computed, holds its outputs back until the scheduler has gone on."""
    with two_ranks_behind_a_loaded_model():
        engine = make_engine(served_checkpoint, async_scheduling=async_scheduling)
    scheduler: Any = engine.engine_core.engine_core.scheduler
    handed_over = threading.Condition()
    scheduled = 0
    ahead: list[bool] = []
    execute = worker_of(engine).execute_model

    def count(step: Any) -> Any:
        nonlocal scheduled
        with handed_over:
            scheduled += 1
            handed_over.notify_all()
        return execute(step)

    def hold(*_: Any) -> None:
        this = len(ahead) + 1
        # Without asynchronous scheduling nobody would come; the last step has none after it.
        patience = 10.0 if async_scheduling and this < TOKENS else 0.2
        with handed_over:
            ahead.append(handed_over.wait_for(lambda: scheduled > this, timeout=patience))

    with pytest.MonkeyPatch.context() as patch, faults(worker_of(engine)._runner._runner.model, hold):
        patch.setattr(worker_of(engine), "execute_model", count)
        add(engine, "a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
        answer = tokens_of(finish(engine)["a"])[0]
    assert scheduler.__class__.__name__ == ("AsyncScheduler" if async_scheduling else "Scheduler")
    close(engine)
    assert len(answer) == TOKENS
    assert len(ahead) == TOKENS, "a call of the model for each token"
    assert ahead[:-1] == [async_scheduling] * (TOKENS - 1)


def test_asynchronous_scheduling_is_on_by_default(served_checkpoint: Path) -> None:
    engine = make_engine(served_checkpoint)
    assert engine.vllm_config.scheduler_config.async_scheduling
    close(engine)
