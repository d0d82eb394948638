# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker: the one process that has the devices, and drives all their ranks through one loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from .artifacts import load_model
from .device_thread import DeviceThread, HandedOver, PendingOutput, StepOutput
from .draft_counts import discount_padding
from .options import serve_options
from .runner import StepRunner

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

logger = init_logger(f"vllm.{__name__}")


class Qwen35Worker(WorkerBase):
    """Rows of a compiled batch instead of blocks of a cache: a sequence has one block, which stands for its row.

    Steps are queued to a thread of their own, see `device_thread`. With async scheduling vLLM reads the output of a
    step after it has handed over the next; without, it waits for each.
    """

    _runner: StepRunner
    _forward: Future[None]

    def init_device(self) -> None:
        """Choose the CPU for what vLLM computes itself; the devices are NxDI's affair, when the model is loaded."""
        self.device = torch.device("cpu")
        self._thread, self._handed_over = DeviceThread(), HandedOver()

    def load_model(self, **_: Any) -> None:
        """Load the compiled model on the thread that will call it.

        Raises:
            ConfigurationRefused, ValueError: see `artifacts.load_model`, and `StepRunner`.
        """
        start = time.monotonic()
        load = partial(load_model, self.vllm_config, serve_options(self.vllm_config), logger.info)
        try:
            self._runner = StepRunner(self.vllm_config, self._thread.run(load))
        except BaseException:
            self.shutdown()  # vLLM shuts a worker down only once it has an executor
            raise
        logger.info("the model is loaded, after %.1f s", time.monotonic() - start)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Any: vLLM's cache has nothing in it."""
        return ["LBNHC"]

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """A layer that stands for all: vLLM counts its blocks, one a sequence, and allocates none."""
        return {
            "rows": FullAttentionSpec(
                block_size=self.cache_config.block_size, num_kv_heads=1, head_size=1, dtype=torch.int8
            )
        }

    def determine_available_memory(self) -> int:
        """Bytes of as many such blocks as are configured; the memory of the devices was planned with the model."""
        blocks = self.cache_config.num_gpu_blocks_override
        assert blocks is not None, "the platform sets it"
        return blocks * sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values())

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Nothing: the rows are the model's."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Nothing is left to do: the model was compiled or found before it was loaded, which warms it up."""
        return CompilationTimes(0.0, 0.0)

    def get_kv_connector_handshake_metadata(self) -> None:
        """None: there is no other worker to shake hands with."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> AsyncModelRunnerOutput | ModelRunnerOutput | None:
        """Queue the calls of a step, whose tokens `sample_tokens` then chooses; None says so.

        A step that schedules nothing still tells which requests are finished.
        """
        self._handed_over.add(scheduler_output)
        discount_padding(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return self._output(partial(self._runner.idle, scheduler_output))
        self._forward = self._thread.submit(partial(self._runner.forward, scheduler_output))
        return None

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> AsyncModelRunnerOutput | ModelRunnerOutput:
        """Queue the choice of the tokens of the step that was queued last."""
        return self._output(partial(self._sample, self._forward, grammar_output))

    def take_draft_token_ids(self) -> DraftTokenIds:
        """What was drafted, once the steps that are queued are done: vLLM asks where grammars must obey it."""
        return self._thread.run(self._runner.drafts)

    def reset_encoder_cache(self) -> None:
        """Forget the encoded images and videos, as vLLM's scheduler does at the same time."""
        self._thread.run(self._runner.forget_media)

    def _output(self, step: Callable[[], StepOutput]) -> AsyncModelRunnerOutput | ModelRunnerOutput:
        pending = PendingOutput(self._thread.submit(step), self._handed_over)
        # vLLM 0.23 reads an output that is pending under asynchronous scheduling alone.
        return pending if self.scheduler_config.async_scheduling else pending.get_output()

    def _sample(self, forward: Future[None], grammar_output: GrammarOutput | None) -> StepOutput:
        forward.result()  # it is done; what it raised ends the engine
        return self._runner.sample(grammar_output)

    def shutdown(self) -> None:
        self._thread.close()
