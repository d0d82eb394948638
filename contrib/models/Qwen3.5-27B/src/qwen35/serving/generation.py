# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts and conversations in, text out, one batch at a time.

Letters: B prompts, S tokens of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..nxdi import HuggingFaceGenerationAdapter
from ..vision.media import shorten
from ..vision.processing import VisionProcessor
from .loading import load_generation_config
from .prompts import Messages, StopStrings, Tools, encode, encode_chat, load_tokenizer
from .sampling import GREEDY, SamplingOptions

OnToken = Callable[[torch.Tensor], None]
"""Gets the tokens [B] of each step."""


@dataclass(frozen=True)
class Generation:
    """Generated tokens and texts, a row a prompt, without prompt and padding; times in seconds."""

    tokens: list[list[int]]
    texts: list[str]
    time_to_first_token: float
    time_per_output_token: float | None
    """Mean over the steps after the first; None when one step was enough."""


class _TokenClock(StoppingCriteria):
    """Never stops anything: `generate` calls it after every step, on NxDI too, which has no streamers."""

    def __init__(self, on_token: OnToken | None) -> None:
        self.on_token = on_token
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        if self.on_token is not None:
            self.on_token(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class _StopOnText(StoppingCriteria):
    """Ends each row at its first stop string; `lengths` are the generated tokens of the rows that it ended."""

    def __init__(self, rows: Sequence[StopStrings]) -> None:
        self.rows, self.lengths = rows, [0] * len(rows)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for i, (row, token) in enumerate(zip(self.rows, input_ids[:, -1].tolist(), strict=True)):
            if not row.stopped:
                row.push(token)
                self.lengths[i] += 1
        return torch.tensor([row.stopped for row in self.rows])


class TextGenerator:
    """A loaded model with its tokenizer; of the vision-language class where the configuration is."""

    def __init__(
        self, model: NeuronQwen35ForCausalLM, model_path: Path, tokenizer: Any, generation_config: GenerationConfig
    ) -> None:
        self.model, self.model_path, self.tokenizer = model, model_path, tokenizer
        self.generation_config = generation_config
        self.adapter = HuggingFaceGenerationAdapter(model)

    @classmethod
    def load(cls, model_path: Path, config: Qwen35InferenceConfig, compiled_path: Path | None = None) -> TextGenerator:
        """Read, convert and load a checkpoint, or load what was compiled of it.

        Raises:
            ValueError: the checkpoint or the configuration does not do.
        """
        with_images = isinstance(config, Qwen35VLInferenceConfig)
        model_cls = NeuronQwen35VLForCausalLM if with_images else NeuronQwen35ForCausalLM
        model = model_cls(str(model_path), config)
        if compiled_path is None:
            model.to_cpu()
        else:
            model.load(str(compiled_path))
        tokenizer = load_tokenizer(model_path)
        return cls(model, model_path, tokenizer, load_generation_config(model_path, config, tokenizer))

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Complete all prompts as one right-padded batch; `on_token` gets the tokens [B] of each step as they come.

        The text of a row ends before the first of the texts in `stop`.
        """
        return self.complete(encode(self.tokenizer, prompts), max_new_tokens, sampling, on_token, stop)

    def chat(
        self,
        conversations: Sequence[Messages],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
        stop: str | Sequence[str] = (),
        *,
        tools: Tools | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Answer conversations whose messages may hold images and videos (`encode_chat`), as one batch.

        `stop` is as of `generate`; `tools`, `enable_thinking` and `chat_template_kwargs` as of `prompts.chat_text`.

        Raises:
            VisionInputError: an image or a video cannot be used; all are listed, before the model runs.
            ValueError: a conversation is not one, or the template refuses it.
        """
        inputs = encode_chat(
            self.tokenizer,
            VisionProcessor.from_pretrained(self.model_path),
            conversations,
            tools=tools,
            enable_thinking=enable_thinking,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.complete(inputs, max_new_tokens, sampling, on_token, stop)

    def complete(
        self,
        inputs: dict[str, torch.Tensor],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Complete encoded prompts: input_ids and attention_mask [B, S], and pixels and grids as a processor gives.

        Raises:
            ValueError: a token is beyond the model's vocabulary, or a stop string is empty.
        """
        self._check_vocabulary(inputs["input_ids"])
        stops = _StopOnText([StopStrings(self.tokenizer, stop) for _ in inputs["input_ids"]])
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, **{k: v for k, v in asdict(sampling).items() if k != "seed"}}
        clock = _TokenClock(on_token)
        start = time.perf_counter()
        sequences = self.adapter.generate(
            **inputs,
            generation_config=GenerationConfig(
                **chosen,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.eos_token_ids or None,
                pad_token_id=self.pad_token_id,
            ),
            stopping_criteria=[clock, stops],
        )
        rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        ended = [stops.lengths[i] if row.stopped else None for i, row in enumerate(stops.rows)]
        tokens = [self._until_eos(row[:end]) for row, end in zip(rows, ended, strict=True)]
        steps = len(clock.times) - 1
        return Generation(
            tokens=tokens,
            texts=[
                row.text if row.stopped else self.tokenizer.decode(ids, skip_special_tokens=True)
                for row, ids in zip(stops.rows, tokens, strict=True)
            ],
            time_to_first_token=clock.times[0] - start,
            time_per_output_token=(clock.times[-1] - clock.times[0]) / steps if steps else None,
        )

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text, of whatever the checkpoint says (`loading.eos_token_ids`); may be empty."""
        return [*self.generation_config.eos_token_id]

    @property
    def pad_token_id(self) -> int:
        return next(iter(self.eos_token_ids), 0)

    def _check_vocabulary(self, input_ids: torch.Tensor) -> None:
        size = self.model.config.vocab_size
        if (beyond := (input_ids < 0) | (input_ids >= size)).any():
            row, position = (int(i) for i in beyond.nonzero()[0])
            token = int(input_ids[row, position])
            text = shorten(repr(self.tokenizer.convert_ids_to_tokens(token)))
            raise ValueError(
                f"prompt {row} has token {token} ({text}), which is not in 0..{size - 1}, the model's vocabulary: "
                "use the checkpoint's own tokenizer, without added tokens"
            )

    def _until_eos(self, row: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(row) if token in self.eos_token_ids]
        return row[: ends[0] + 1] if ends else row
