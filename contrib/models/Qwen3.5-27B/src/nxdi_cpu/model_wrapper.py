# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""One submodel (context encoding or token generation) behind its buckets; stands in for `models.model_wrapper`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .config import InferenceConfig
from .sampling import prepare_sampling_params

CONTEXT_ENCODING_MODEL_TAG = "context_encoding_model"
TOKEN_GENERATION_MODEL_TAG = "token_generation_model"
VISION_ENCODER_MODEL_TAG = "vision_encoder_model"


class _ModelInstance:
    """Makes the module of a submodel."""

    def __init__(self, model_cls: Any, config: InferenceConfig, **kwargs: Any) -> None:
        self.model_cls, self.config, self.neuron_config, self.kwargs = model_cls, config, config.neuron_config, kwargs
        self.module: Any = None
        self.input_output_aliases: dict[torch.nn.Parameter, int] | None = None

    def load_module(self) -> None:
        """Build the module; `cast_type="config"` casts every floating tensor of it to torch_dtype."""
        module = self.model_cls(self.config, **self.kwargs)
        module.eval()
        dtype = self.neuron_config.torch_dtype
        if self.neuron_config.cast_type == "config" and dtype != torch.float32:
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        self.module = module


class DecoderModelInstance(_ModelInstance):
    """Also the map from its cache parameters to output positions, for each bucket."""

    def get(self, bucket_rank: int | None, **kwargs: Any) -> tuple[Any, dict[torch.nn.Parameter, int]]:
        """(module set to the bucket, {cache parameter: index of the output that replaces it})."""
        if bucket_rank is not None:
            self.module.n_positions = self.neuron_config.buckets[bucket_rank]
        first = 2 if self.neuron_config.output_logits else 1
        self.input_output_aliases = {
            parameter: first + i for i, parameter in enumerate(self.module.kv_mgr.past_key_values)
        }
        return self.module, self.input_output_aliases


class EncoderModelInstance(_ModelInstance):
    """A submodel that keeps nothing between calls and serves every bucket as it is."""

    def get(self, bucket_rank: int | None, **kwargs: Any) -> tuple[Any, dict[torch.nn.Parameter, int]]:
        self.input_output_aliases = {}
        return self.module, self.input_output_aliases


class ModelWrapper(torch.nn.Module):
    """Pads inputs to the bucket and the compiled batch, runs the module, and takes the padding off the outputs."""

    def __init__(
        self,
        config: InferenceConfig,
        model_cls: Any,
        tag: str = "",
        compiler_args: str | None = None,
        priority_model_idx: int | None = None,
        pipeline_execution: bool = False,
        return_ranked_to_cpu: bool = False,
        model_init_kwargs: dict[str, Any] = {},  # noqa: B006 - NxDI's signature; never written
    ) -> None:
        super().__init__()
        self.config, self.neuron_config = config, config.neuron_config
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0
        self.model_cls, self.tag, self.compiler_args = model_cls, tag, compiler_args
        self.priority_model_idx, self.model_init_kwargs = priority_model_idx, model_init_kwargs
        self.async_mode = self.neuron_config.async_mode
        self.model: Any = None

    def is_neuron(self) -> bool:
        return isinstance(self.model, torch.jit.ScriptModule)

    def get_model_instance(self) -> _ModelInstance:
        return DecoderModelInstance(model_cls=self.model_cls, config=self.config, **self.model_init_kwargs)

    def input_generator(self) -> list[tuple[torch.Tensor, ...]]:
        """One tuple of sample inputs per bucket, in the order of the module's `forward`."""
        batch = self.neuron_config.batch_size
        inputs: list[tuple[torch.Tensor, ...]] = []
        for bucket in self.neuron_config.buckets:
            tokens = bucket if self.neuron_config.bucket_n_active_tokens else self.neuron_config.n_active_tokens
            if self.tag == CONTEXT_ENCODING_MODEL_TAG:
                position_ids = torch.arange(tokens, dtype=torch.int32).repeat(batch, 1)
            else:
                position_ids = torch.ones((batch, tokens), dtype=torch.int32)
            inputs.append(
                (
                    torch.ones((batch, tokens), dtype=torch.int32),
                    torch.ones((batch, bucket), dtype=torch.int32),
                    position_ids,
                    torch.arange(batch, dtype=torch.int32),
                    prepare_sampling_params(batch),
                    torch.zeros(batch, dtype=torch.int32),
                    torch.zeros(batch, dtype=torch.int32),
                )
            )
        return inputs

    def convert_int64_to_int32(self, *args: torch.Tensor) -> list[torch.Tensor]:
        return [t.to(torch.int32) if t.dtype == torch.int64 else t for t in args]

    def get_target_bucket(self, *args: torch.Tensor, strategy: str = "first_fit") -> int:
        """The smallest bucket longer than the attention mask, or the largest when it just fits.

        Raises:
            ValueError: the input is longer than the largest bucket.
        """
        length, buckets = args[1].shape[1], self.neuron_config.buckets
        fitting = [bucket for bucket in buckets if length < bucket]
        if fitting:
            return fitting[0]
        if length == buckets[-1]:
            return buckets[-1]
        raise ValueError(
            f"input of {length} tokens exceeds the largest {self.tag} bucket ({buckets[-1]}): raise seq_len / "
            f"max_context_length or shorten the input"
        )

    def pad_inputs(self, *args: torch.Tensor, pad_type: str = "first_fit") -> tuple[torch.Tensor, ...]:
        """Right-pad to the bucket: tokens, mask and positions of a prompt, the mask alone of a decoding step."""
        bucket = self.get_target_bucket(*args, strategy=pad_type)
        if self.tag != CONTEXT_ENCODING_MODEL_TAG:
            return (args[0], F.pad(args[1], (0, bucket - args[1].shape[1])), *args[2:])
        padded = (
            F.pad(arg, (0, bucket - arg.shape[1]), value=value)
            for arg, value in zip(args[:3], (self.config.pad_token_id, 0, 1), strict=True)
        )
        return (*padded, *args[3:])

    def _process_args(self, *args: Any) -> tuple[torch.Tensor, ...]:
        placeholder = torch.zeros(args[3].shape[0], dtype=torch.int32)
        filled = list(args) + [None] * (7 - len(args))
        filled[5:7] = [placeholder if arg is None else arg for arg in filled[5:7]]
        return tuple(arg for arg in filled if isinstance(arg, torch.Tensor))

    def _forward(self, *args: torch.Tensor) -> list[torch.Tensor]:
        return self.model(*args)

    def forward(self, *args: Any, pad_type: str = "first_fit") -> list[torch.Tensor]:
        """[tokens or logits, (logits,) *caches] of one compiled batch; NxDI also splits and pads batches.

        Raises:
            RuntimeError: no weights were loaded.
            ValueError: another number of rows than was compiled.
        """
        if self.model is None:
            raise RuntimeError("forward called before the weights were loaded: call to_cpu() or load() first")
        args = tuple(self.convert_int64_to_int32(*self._process_args(*args)))
        args = self.pad_inputs(*args, pad_type=pad_type)
        if args[3].shape[0] != self.neuron_config.batch_size:
            raise ValueError(f"{args[3].shape[0]} rows for a batch of {self.neuron_config.batch_size}")
        return self._forward(*args)
