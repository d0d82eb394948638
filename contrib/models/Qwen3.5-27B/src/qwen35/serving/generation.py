# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts and conversations in, text out: what the command line and the integration tests share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, StoppingCriteria

from ..configuration_qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..nxdi import NXDI_AVAILABLE, HuggingFaceGenerationAdapter
from ..vision.processing import VisionProcessor, media_of

MINI_CHECKPOINT = Path(__file__).parent.parent / "mini"
"""The small trained checkpoint that ships with the package: a test vehicle with the architecture of the real ones."""

OnToken = Callable[[torch.Tensor], None]
Messages = Sequence[Mapping[str, Any]]
"""A conversation: messages with `role` and `content`."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; temperature 0 is greedy, and top_p and top_k then do not matter."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or positive")


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
        return cls(model, model_path, load_tokenizer(model_path), _load_generation_config(model_path, config))

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_token: OnToken | None = None,
    ) -> Generation:
        """Complete all prompts as one right-padded batch; `on_token` gets the tokens [B] of each step as they come."""
        return self.complete(encode(self.tokenizer, prompts), max_new_tokens, sampling, on_token)

    def chat(
        self,
        conversations: Sequence[Messages],
        max_new_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_token: OnToken | None = None,
    ) -> Generation:
        """Answer conversations whose messages may hold images and videos (`encode_chat`), as one batch.

        Raises:
            VisionInputError: an image or a video cannot be used; all are listed, before the model runs.
        """
        inputs = encode_chat(self.tokenizer, VisionProcessor.from_pretrained(self.model_path), conversations)
        return self.complete(inputs, max_new_tokens, sampling, on_token)

    def complete(
        self,
        inputs: dict[str, torch.Tensor],
        max_new_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_token: OnToken | None = None,
    ) -> Generation:
        """Complete encoded prompts: input_ids and attention_mask [B, S], and pixels and grids as a processor gives."""
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
                eos_token_id=self.generation_config.eos_token_id,
                pad_token_id=self.pad_token_id,
            ),
            stopping_criteria=[clock],
        )
        tokens = [self._until_eos(row) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        steps = len(clock.times) - 1
        return Generation(
            tokens=tokens,
            texts=[self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens],
            time_to_first_token=clock.times[0] - start,
            time_per_output_token=(clock.times[-1] - clock.times[0]) / steps if steps else None,
        )

    @property
    def eos_token_ids(self) -> list[int]:
        eos = self.generation_config.eos_token_id
        return list(eos) if isinstance(eos, (list, tuple)) else [eos]

    @property
    def pad_token_id(self) -> int:
        return self.eos_token_ids[0]

    def _until_eos(self, row: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(row) if token in self.eos_token_ids]
        return row[: ends[0] + 1] if ends else row


def load_tokenizer(model_path: Path) -> Any:
    """The checkpoint's tokenizer, set to right padding."""
    return AutoTokenizer.from_pretrained(model_path, padding_side="right")


def encode(tokenizer: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, S], right-padded.

    Raises:
        ValueError: a prompt is empty.
    """
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty: give at least one token to continue")
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }


def encode_chat(
    tokenizer: Any, processor: VisionProcessor, conversations: Sequence[Messages]
) -> dict[str, torch.Tensor]:
    """Conversations in the checkpoint's chat template, up to where the assistant speaks, with their media.

    A message's content is a text, or a list of {"type": "text", "text": ...}, {"type": "image", "image": a path, a
    Pillow image or an array} and {"type": "video", "video": a path, a directory of frames or a list of them}.

    Returns:
        input_ids and attention_mask [B, S], right-padded, and of `VisionInputs` the tensors there are.

    Raises:
        VisionInputError: an image or a video cannot be used; all are listed.
    """
    images, videos = media_of(message for conversation in conversations for message in conversation)
    media = processor(images, videos)
    texts = [
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for conversation in conversations
    ]
    tensors = {name: value for name, value in vars(media).items() if isinstance(value, torch.Tensor)}
    return {**encode(tokenizer, processor.expand_placeholders(texts, media)), **tensors}


def as_chat(tokenizer: Any, prompt: str) -> str:
    """One user turn in the checkpoint's chat template, up to where the assistant speaks."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def load_compiled_config(compiled_path: Path) -> Qwen35InferenceConfig:
    """The configuration that a compiled model was saved with.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (compiled_path / "neuron_config.json").exists():
        raise FileNotFoundError(f"{compiled_path}: no neuron_config.json there; name what 'qwen35 compile' wrote")
    fields = json.loads((compiled_path / "neuron_config.json").read_text(encoding="utf-8"))
    config_cls = Qwen35VLInferenceConfig if fields.get("takes_images") else Qwen35InferenceConfig
    config = config_cls.load(str(compiled_path))
    assert isinstance(config, Qwen35InferenceConfig)
    return config


def checkpoint_of(compiled_path: Path) -> Path:
    """The checkpoint that a compiled model was made of: its tokenizer is there.

    Raises:
        FileNotFoundError: it is not where it was.
    """
    path = Path(load_compiled_config(compiled_path)._name_or_path)
    if not path.exists():
        raise FileNotFoundError(f"{compiled_path} was compiled of {path}, which is gone: pass --model")
    return path


def default_neuron_config(
    seq_len: int,
    batch_size: int = 1,
    tp_degree: int = 1,
    torch_dtype: torch.dtype | None = None,
    prefill_chunk_size: int | None = None,
) -> Qwen35NeuronConfig:
    """Options for prompts and answers of `seq_len` tokens together: float32 on a CPU, bfloat16 on Neuron."""
    return Qwen35NeuronConfig(
        tp_degree=tp_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        max_context_length=seq_len,
        prefill_chunk_size=prefill_chunk_size,
        torch_dtype=torch_dtype or (torch.bfloat16 if NXDI_AVAILABLE else torch.float32),
        on_cpu=not NXDI_AVAILABLE,
        enable_bucketing=True,
    )


def _load_generation_config(model_path: Path, config: Qwen35InferenceConfig) -> GenerationConfig:
    if (model_path / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(model_path)
    return GenerationConfig(eos_token_id=config.eos_token_id)
