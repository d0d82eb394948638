# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for: checked where vLLM takes requests in, before one is queued."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

NO_PROMPT_LOGPROBS = (
    "prompt_logprobs is not served: the model was compiled for the logits after the last token of a prompt alone; "
    """start the server with --additional-config '{"qwen35": {"prompt_logprobs": true}}', or leave it out"""
)

_NOT_SERVED = {
    "logprob_token_ids": "vLLM's sampler would give them to the other requests of a step, too; set logprobs instead",
    "prompt_logprob_token_ids": "set prompt_logprobs instead",
    "trace_decode_token_ids": "tokens are chosen here, not replayed; leave it out",
}
"""Fields that vLLM's own worker takes in some of its versions, and why this one does not."""


def check_params(params: SamplingParams, prompt_logprobs: bool) -> None:
    """Refuse what the worker cannot do.

    Args:
        params: of a request.
        prompt_logprobs: whether the model gives the logits after every token of a prompt.

    Raises:
        ValueError: naming the field and what to do instead.
    """
    if params.prompt_logprobs is not None and not prompt_logprobs:
        raise ValueError(NO_PROMPT_LOGPROBS)
    for name, reason in _NOT_SERVED.items():
        if getattr(params, name, None) is not None:
            raise ValueError(f"{name} is not served: {reason}")


def check_min_tokens(params: SamplingParams, prompt: int, max_model_len: int) -> None:
    """Refuse more tokens at least than a row has room for: vLLM 0.23 would never end such a request.

    Args:
        params: of a request.
        prompt: its tokens.
        max_model_len: tokens of a row.

    Raises:
        ValueError: naming the field and what to do instead.
    """
    room = max(max_model_len - prompt, 0)  # a prompt that is too long is told by vLLM
    if params.min_tokens > room:
        raise ValueError(
            f"min_tokens={params.min_tokens} exceeds the {room} tokens that max_model_len={max_model_len} leaves "
            f"after a prompt of {prompt}; set min_tokens to no more"
        )
