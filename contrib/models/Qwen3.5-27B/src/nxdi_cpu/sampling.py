# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Token choice inside the model ("on-device sampling"); stands in for NxDI's `modules.generation.sampling`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import NeuronConfig, OnDeviceSamplingConfig
from .layers import require_inert

# Pushed below every real logit, so that its probability is zero.
_IGNORED_LOGIT = -3000.0


def prepare_sampling_params(
    batch_size: int,
    top_k: Any = [1],  # noqa: B006 - NxDI's signature; never written
    top_p: Any = [1.0],  # noqa: B006
    temperature: Any = [1.0],  # noqa: B006
) -> torch.Tensor:
    """[batch_size, 3] float32: top_k, top_p, temperature; a single value is meant for every row."""

    def column(value: Any) -> torch.Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
        return tensor.expand(batch_size) if tensor.numel() == 1 else tensor

    return torch.stack([column(top_k), column(top_p), column(temperature)], dim=1)


def validate_sampling_params(params: torch.Tensor, on_device_sampling_config: OnDeviceSamplingConfig) -> None:
    """Check [B, 3] sampling parameters.

    Raises:
        ValueError: top_k is not an integer in -1..global_topk, top_p not in (0, 1], or temperature negative.
    """
    top_k, top_p, temperature = params.float().unbind(dim=1)
    limit = on_device_sampling_config.global_topk
    if params.shape[1] != 3:
        raise ValueError(f"sampling_params must be [batch, 3] (top_k, top_p, temperature), got {tuple(params.shape)}")
    if ((top_k < -1) | (top_k > limit) | (top_k != top_k.floor())).any():
        raise ValueError(f"top_k={top_k.tolist()}: must be whole numbers from -1 to global_topk={limit}")
    if ((top_p <= 0) | (top_p > 1)).any():
        raise ValueError(f"top_p={top_p.tolist()}: must be in (0, 1]")
    if (temperature < 0).any():
        raise ValueError(f"temperature={temperature.tolist()}: must not be negative")


def infer_sampling_params(params: torch.Tensor) -> torch.Tensor:
    """Temperature 0 means greedy: such rows get top_k = 1 and top_p = 1."""
    greedy = params[:, 2:] == 0
    return torch.where(greedy & torch.tensor([[True, True, False]]), torch.ones_like(params), params)


def mask_padded_logits(
    logits: torch.Tensor, rank_id: torch.Tensor, world_size: int, pad_size: int | None = None
) -> torch.Tensor:
    """Logits [..., V] of this rank with the vocabulary padding of the last rank pushed to the minimum."""
    if not pad_size:
        return logits
    padded = torch.arange(logits.shape[-1]) >= logits.shape[-1] - pad_size
    return logits.masked_fill(padded & (rank_id == world_size - 1), torch.finfo(logits.dtype).min)


class Sampler(nn.Module):
    """Greedy, or top-k / top-p / temperature with torch's generator."""

    def __init__(self, neuron_config: NeuronConfig, do_sample: bool | None = None) -> None:
        super().__init__()
        config = neuron_config.on_device_sampling_config or OnDeviceSamplingConfig()
        self.do_sample = config.do_sample if do_sample is None else do_sample
        self.dynamic, self.deterministic, self.global_topk = config.dynamic, config.deterministic, config.global_topk

    def forward(
        self,
        token_logits: torch.Tensor,
        sampling_params: torch.Tensor,
        return_values: bool = False,
        rank_id: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens [B] from logits [B, V] and sampling_params [B, 3]."""
        require_inert("Sampler", return_values=return_values)
        if not self.do_sample and not self.dynamic:
            return token_logits.argmax(dim=-1)
        top_k, top_p, temperature = sampling_params.unsqueeze(-1).unbind(dim=1)
        values, indices = token_logits.topk(min(self.global_topk, token_logits.shape[-1]), dim=-1)
        beyond_k = (torch.arange(values.shape[-1]) >= top_k) & (top_k > 0)
        values = (values / temperature.clamp(min=1e-6)).masked_fill(beyond_k, _IGNORED_LOGIT)
        probabilities = values.softmax(dim=-1)
        # A token stays while the mass before it is below top_p, so that the first always stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = values.masked_fill(before >= top_p, _IGNORED_LOGIT).softmax(dim=-1)
        if self.deterministic:
            choice = (probabilities.cumsum(dim=-1) < 0.5).sum(dim=-1, keepdim=True)
        else:
            choice = torch.multinomial(probabilities, 1)
        return indices.gather(-1, choice).squeeze(-1)


def create_sampler(
    neuron_config: NeuronConfig, lm_head_tp_degree: int | None = None, do_sample: bool | None = None
) -> Sampler:
    return Sampler(neuron_config, do_sample)
