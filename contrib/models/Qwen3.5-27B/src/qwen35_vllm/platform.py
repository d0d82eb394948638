# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The platform: a device that vLLM knows nothing of but its limits; NxDI does the rest, in the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from .options import serve_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER = "qwen35_vllm.worker.Qwen35Worker"


class Qwen35Platform(Platform):
    """Qwen3.5 on NxDI. To vLLM it is a CPU: what vLLM itself computes, sampling among it, is done there."""

    _enum = PlatformEnum.OOT
    device_name = "neuron"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return cls.device_name

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    def is_cpu(self) -> bool:
        # Else vLLM asks torch.accelerator, which has none, when it clears up.
        return True

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return False

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what is not served, and set what vLLM must plan with.

        Raises:
            ConfigurationRefused: in one line.
        """
        parallel, cache, scheduler = (
            vllm_config.parallel_config,
            vllm_config.cache_config,
            vllm_config.scheduler_config,
        )
        parallel.worker_cls = WORKER
        if vllm_config.model_config is None:
            return
        serve_options(vllm_config)
        # Here, because vLLM's configuration classes ask the platform while they are imported.
        from .connector import use_connector

        use_connector(vllm_config)
        # NxDI drives all ranks from one process.
        parallel.distributed_executor_backend = "uni"
        # A row has its state and keys to itself, and no block of them is another row's.
        cache.enable_prefix_caching = False
        length = vllm_config.model_config.max_model_len
        if not cache.user_specified_block_size:
            cache.block_size = length
        if cache.num_gpu_blocks_override is None:
            # vLLM keeps one block for itself.
            cache.num_gpu_blocks_override = scheduler.max_num_seqs * -(-length // cache.block_size) + 1
