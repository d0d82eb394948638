# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts and conversations in, text out, one batch at a time.

Letters: B prompts, S tokens of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..error_text import shorten
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..vision.processing import VisionProcessor
from .hf_adapter import HuggingFaceGenerationAdapter
from .loading import load_generation_config
from .prompts import Messages, Tools, encode, encode_chat, load_tokenizer
from .request import out_of_vocabulary
from .sampling import (
    GREEDY,
    SamplingOptions,
    TokenLogprobs,
    continuation_problems,
    logprobs_of,
    penalized,
)
from .speculation import Acceptance
from .text_stream import StopStrings

OnToken = Callable[[torch.Tensor], None]
"""Gets the tokens [B] of each step."""


@dataclass(frozen=True)
class Generation:
    """Generated tokens and texts without prompt and padding; times in seconds.

    A row is a continuation: those of the first prompt come first, then those of the second.
    """

    tokens: list[list[int]]
    texts: list[str]
    time_to_first_token: float
    time_per_output_token: float | None
    """Mean over the steps after the first; None when one step was enough."""
    logprobs: list[list[TokenLogprobs]] | None = None
    """Of each token, when they were asked for."""
    acceptance: Acceptance | None = None
    """Of drafts, from a model that drafts tokens."""


class _Penalties(LogitsProcessor):
    """Penalties of each row for its own tokens, whatever pads it; keeps the logits [B, V] that they were applied to.

    transformers' own penalty would count padding as said.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, options: SamplingOptions) -> None:
        self.prompts = [ids[mask.bool()].unique() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.width, self.options = input_ids.shape[1], options
        self.logits = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores
        if not self.options.has_penalties:
            return scores
        rows = zip(scores, self.prompts, input_ids[:, self.width :].long(), strict=True)
        return torch.stack([penalized(row, prompt, generated, self.options) for row, prompt, generated in rows])


class _TokenClock(StoppingCriteria):
    """Never stops anything: `generate` calls it after every step, on NxDI too, which has no streamers."""

    def __init__(self, on_token: OnToken | None, penalties: _Penalties, logprobs: int | None) -> None:
        self.on_token, self.penalties, self.count = on_token, penalties, logprobs
        self.times: list[float] = []
        self.logprobs: list[list[TokenLogprobs]] = []  # of each step, a row each

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        tokens = input_ids[:, -1]
        if self.on_token is not None:
            self.on_token(tokens)
        if self.count is not None:
            rows = zip(self.penalties.logits, tokens.tolist(), strict=True)
            self.logprobs.append([logprobs_of(logits, token, self.count) for logits, token in rows])
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


class _RowResult(NamedTuple):
    """What a row of a batch gave."""

    tokens: list[int]
    text: str
    logprobs: list[TokenLogprobs]


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
        # What these can have wrong is said before weights are read.
        tokenizer = load_tokenizer(model_path)
        generation_config = load_generation_config(model_path, config, tokenizer)
        if compiled_path is None:
            model.to_cpu()
        else:
            model.load(str(compiled_path))
        return cls(model, model_path, tokenizer, generation_config)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
        stop: str | Sequence[str] = (),
        *,
        n: int = 1,
        logprobs: int | None = None,
    ) -> Generation:
        """Complete all prompts as one padded batch; further arguments as of `complete`."""
        inputs = encode(self.tokenizer, prompts)
        return self.complete(inputs, max_new_tokens, sampling, on_token, stop, n=n, logprobs=logprobs)

    def chat(
        self,
        conversations: Sequence[Messages],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
        stop: str | Sequence[str] = (),
        *,
        n: int = 1,
        logprobs: int | None = None,
        tools: Tools | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Answer conversations whose messages may hold images and videos (`encode_chat`), as one batch.

        `tools`, `enable_thinking`, `chat_template_kwargs` are as of `prompts.chat_text`, the others as of `complete`.

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
        return self.complete(inputs, max_new_tokens, sampling, on_token, stop, n=n, logprobs=logprobs)

    def complete(
        self,
        inputs: dict[str, torch.Tensor],
        max_new_tokens: int,
        sampling: SamplingOptions = GREEDY,
        on_token: OnToken | None = None,
        stop: str | Sequence[str] = (),
        *,
        n: int = 1,
        logprobs: int | None = None,
    ) -> Generation:
        """Complete encoded prompts: input_ids and attention_mask [B, S], and pixels and grids as a processor gives.

        Args:
            inputs: the prompts; more than the model has slots run one group after the other.
            max_new_tokens: tokens to give at most.
            sampling: how they are chosen.
            on_token: gets the tokens of each step as they come, one for each row of the group that runs.
            stop: the text of a row ends before the first of these.
            n: continuations of each prompt; the batch runs as often, with further random numbers.
            logprobs: as in `Request`.

        Raises:
            ValueError: a token is not in the vocabulary, an option is wrong, or the model gave logits that are nan or
                infinite.
        """
        self._check(inputs, sampling, n, logprobs)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        groups = self.adapter.groups(inputs)
        start, clocks, runs, accepted = time.perf_counter(), [], [], Acceptance()
        for _ in range(n):
            rows: list[_RowResult] = []
            for group in groups:
                results, clock = self._run(group, max_new_tokens, sampling, on_token, stop, logprobs)
                rows += results
                clocks.append(clock)
                if self.adapter.acceptance is not None:
                    accepted.join(self.adapter.acceptance)
            runs.append(rows)
        results = [rows[i] for i in range(len(inputs["input_ids"])) for rows in runs]
        steps = sum(len(clock.times) - 1 for clock in clocks)
        stepping = sum(clock.times[-1] - clock.times[0] for clock in clocks)
        return Generation(
            tokens=[row.tokens for row in results],
            texts=[row.text for row in results],
            time_to_first_token=clocks[0].times[0] - start,
            time_per_output_token=stepping / steps if steps else None,
            logprobs=None if logprobs is None else [row.logprobs for row in results],
            acceptance=None if self.adapter.acceptance is None else accepted,
        )

    def _check(self, inputs: dict[str, torch.Tensor], sampling: SamplingOptions, n: int, logprobs: int | None) -> None:
        problems = [*continuation_problems(n, logprobs, sampling)]
        vocab_size = self.model.config.vocab_size
        for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            beyond = ids[mask.bool() & ((ids < 0) | (ids >= vocab_size))].tolist()
            if beyond:
                text = self.tokenizer.convert_ids_to_tokens(beyond[0])
                name = f"prompt {i}" if text is None else f"prompt {i} ({shorten(repr(text))})"
                problems.append(out_of_vocabulary(beyond[0], name, vocab_size))
        on_device = self.model.neuron_config.on_device_sampling_config is not None
        if on_device and (sampling.has_penalties or sampling.min_p or logprobs is not None):
            problems.append(
                "penalties, min_p and logprobs with on_device_sampling_config: the device chooses tokens without them; "
                "set on_device_sampling_config=None"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def _run(
        self,
        inputs: dict[str, torch.Tensor],
        max_new_tokens: int,
        sampling: SamplingOptions,
        on_token: OnToken | None,
        stop: str | Sequence[str],
        logprobs: int | None,
    ) -> tuple[list[_RowResult], _TokenClock]:
        """What each row of a group gives, and when each step of it ended."""
        chosen: dict[str, Any] = {"do_sample": False}
        if not sampling.is_greedy:
            chosen = {"do_sample": True, "min_p": sampling.min_p or None}
            chosen |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
        penalties = _Penalties(inputs["input_ids"], inputs["attention_mask"], sampling)
        clock = _TokenClock(on_token, penalties, logprobs)
        stops = _StopOnText([StopStrings(self.tokenizer, stop) for _ in inputs["input_ids"]])
        sequences = self.adapter.generate(
            **inputs,
            generation_config=GenerationConfig(
                **chosen,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.eos_token_ids or None,
                pad_token_id=self.pad_token_id,
            ),
            logits_processor=[penalties] if sampling.has_penalties or logprobs is not None else [],
            stopping_criteria=[clock, stops],
        )
        results = []
        for i, row in enumerate(sequences[:, inputs["input_ids"].shape[1] :].tolist()):
            stopped = stops.rows[i].stopped
            tokens = self._until_eos(row[: stops.lengths[i]] if stopped else row)
            text = stops.rows[i].text if stopped else self.tokenizer.decode(tokens, skip_special_tokens=True)
            results.append(_RowResult(tokens, text, [step[i] for step in clock.logprobs[: len(tokens)]]))
        return results, clock

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text, of whatever the checkpoint says (`loading.eos_token_ids`); may be empty."""
        return [*self.generation_config.eos_token_id]

    @property
    def pad_token_id(self) -> int:
        return next(iter(self.eos_token_ids), 0)

    def _until_eos(self, row: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(row) if token in self.eos_token_ids]
        return row[: ends[0] + 1] if ends else row
