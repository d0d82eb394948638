# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The platform: a device that vLLM knows nothing of but its limits; NxDI does the rest, in the worker."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .prefixes import PrefixBudget

WORKER = "qwen35_vllm.worker.Qwen35Worker"
DEFAULT_MAX_NUM_SEQS = 8
"""Rows of `vllm serve` when it is not told: vLLM's own default is for devices that batch hundreds."""

SHUTDOWN_SECONDS = "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"
"""vLLM's variable (0.33 has it) for how long an engine may take to end after SIGTERM. Unset, and without
--shutdown-timeout, vLLM kills it at once: streaming clients then wait for ever, and a device may not be given back."""

logger = init_logger(f"vllm.{__name__}")


class Qwen35Platform(Platform):
    """Qwen3.5 on NxDI. To vLLM it is a CPU: what vLLM itself computes, sampling among it, is done there."""

    _enum = PlatformEnum.OOT
    device_name = "neuron"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    simple_compile_backend = "eager"

    prompt_logprobs = False
    """Whether the model of this process gives the logits after every token of a prompt."""

    max_model_len = 0
    """Tokens of a row of the model of this process."""

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
    def pre_register_and_update(cls, parser: Any = None) -> None:
        if parser is not None:
            parser.set_defaults(max_num_seqs=DEFAULT_MAX_NUM_SEQS)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what is not served, and set what vLLM must plan with. Doing it twice changes nothing.

        Raises:
            ConfigurationRefused: in one line.
        """
        vllm_config.parallel_config.worker_cls = WORKER
        if vllm_config.model_config is None:
            return
        # Here, because vLLM's configuration classes ask the platform while they are imported.
        from .artifacts import check_model
        from .connector import reuses_prefixes, use_connector
        from .cores import check_cores
        from .options import ConfigurationRefused, serve_options
        from .prefixes import prefix_budget
        from .refusals import refusals

        options = serve_options(vllm_config)
        if problems := [*refusals(vllm_config)]:
            raise ConfigurationRefused(f"not served: {'; '.join(problems)}")
        check_cores(vllm_config.parallel_config, options)
        try:
            model = check_model(vllm_config, options)
        except ValueError as error:
            raise ConfigurationRefused(str(error)) from error
        replicas = vllm_config.parallel_config.data_parallel_size_local
        budget = prefix_budget(model, options, replicas) if reuses_prefixes(vllm_config) else None
        use_connector(vllm_config, budget)
        _log_prefixes(budget)
        _leave_videos_undecoded(vllm_config)
        cls.prompt_logprobs = model.config.output_prompt_logits
        cls.max_model_len = vllm_config.model_config.max_model_len
        # NxDI drives all ranks from one process.
        vllm_config.parallel_config.distributed_executor_backend = "uni"
        _plan_rows(vllm_config)
        if SHUTDOWN_SECONDS in envs.environment_variables:
            os.environ.setdefault(SHUTDOWN_SECONDS, "30")

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Refuse a request that the worker could not answer, before it is queued.

        Raises:
            VLLMValidationError: naming the field and what to do instead; the client is told, with status 400.
        """
        from vllm.exceptions import VLLMValidationError

        from .request_rules import check_min_tokens, check_params

        try:
            check_params(params, cls.prompt_logprobs)
            check_min_tokens(params, len(processed_inputs.get("prompt_token_ids", ())), cls.max_model_len)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error


def _leave_videos_undecoded(vllm_config: VllmConfig) -> None:
    """Let `media_items.UndecodedVideo` load videos, unless the user names another of vLLM's loaders."""
    if (media := vllm_config.model_config.multimodal_config) is not None:
        from .options import VIDEO_LOADER

        media.media_io_kwargs.setdefault("video", {}).setdefault("video_backend", VIDEO_LOADER)


def _log_prefixes(budget: PrefixBudget | None) -> None:
    if budget is None:
        logger.info(
            "no prefixes of prompts are reused: that was turned off, or prompts are encoded whole (prefill_chunk_size "
            "below --max-model-len has them in chunks), or no block fits"
        )
        return
    logger.info(
        "prefixes of prompts are reused: up to %d blocks of %d tokens, %.1f MB each, in host memory",
        budget.blocks,
        budget.block_tokens,
        budget.block_nbytes / 1e6,
    )


def _plan_rows(vllm_config: VllmConfig) -> None:
    """Let vLLM's scheduler plan with as many sequences as there are rows: a block is a row, unless the user says."""
    cache, length = vllm_config.cache_config, vllm_config.model_config.max_model_len
    # vLLM's own is by blocks that several requests have: a row has its state to itself. See `connector`.
    cache.enable_prefix_caching = False
    if not cache.user_specified_block_size:
        cache.block_size = length
    if cache.num_gpu_blocks_override is None:
        # vLLM keeps one for itself.
        rows = vllm_config.scheduler_config.max_num_seqs
        cache.num_gpu_blocks_override = rows * -(-length // cache.block_size) + 1
