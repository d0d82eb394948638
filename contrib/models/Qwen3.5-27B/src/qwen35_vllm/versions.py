# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What vLLM versions 0.23 and 0.33 differ in, in one place."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import InputBatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class _Batch(InputBatch):
    def condense(self) -> None:
        super().condense()
        # 0.23 leaves the allowed tokens of a request that moved where it was, and the next one there is held to them.
        if self.allowed_token_ids_mask_cpu_tensor is not None:
            self.allowed_token_ids_mask_cpu_tensor[self.num_reqs :] = False


def input_batch(
    vllm_config: VllmConfig, device: torch.device, vocab_size: int, logitsprocs: Any, **options: Any
) -> Any:
    """vLLM's batch, for as many rows as run at a time; one block a sequence."""
    block, length = vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len
    given = dict(
        max_num_reqs=vllm_config.scheduler_config.max_num_seqs,
        max_model_len=length,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        device=device,
        vocab_size=vocab_size,
        block_sizes=[block],
        max_num_blocks_per_req=[-(-length // block)],
        logitsprocs=logitsprocs,
        reasoning_config=vllm_config.reasoning_config,
        pin_memory=False,  # these two up to 0.23
        kernel_block_sizes=[block],
        **options,
    )
    taken = inspect.signature(InputBatch).parameters
    return _Batch(**{name: value for name, value in given.items() if name in taken})


class _NativeSampler(Sampler):
    @staticmethod
    def greedy_sample(logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)


def native_sampler(logprobs_mode: Any) -> Any:
    """vLLM's sampler in plain PyTorch; where its platform is a CPU, 0.33 has compiled operators do parts of it.

    The pure-Python build has none of them.
    """
    sampler = _NativeSampler(logprobs_mode=logprobs_mode)
    sampler.topk_topp_sampler.forward = sampler.topk_topp_sampler.forward_native
    return sampler


def other_constraints(params: SamplingParams) -> bool:
    """Whether a request has a constraint that one of the versions does not know of."""
    return getattr(params, "thinking_token_budget", None) is not None
