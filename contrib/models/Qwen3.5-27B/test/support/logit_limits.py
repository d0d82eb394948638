# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""How far a loaded model's logits are from a recording of transformers' float32 model, and how far they may be.

The recording also has how far transformers' own model in bfloat16 is from its float32 one, at the same positions. Ours
in bfloat16 rounds at other places, as often: it may be off `FACTOR` times as much. On the mini it is off 0.9 times as
much. With matrices in fp8 it is held against transformers with the same rounded matrices, within the same limits; with
keys and values in fp8, for which transformers has no form, within what such rounding of the matrices does.

Letters: P scored positions of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwen35.serving.generation import TextGenerator
from qwen35.serving.runner import ModelRunner, Row

from .integration import Settings, encode_rows, slots_of
from .recorded_logits import BFLOAT16, FLOAT32, FP8, EncodedPrompt, Errors, Recording, encode_prompts

FACTOR = 2.0
FLOAT32_STEPS = 2.0**-16 * 16
"""A step of float32 in those of bfloat16, and a factor: sums are in float32 in either form, and only here do they
count. Their error grows with the root of their length, 16 for 256 terms. On the mini all is off 4 times that step."""
LEAST_KL = 1e-9
"""Below it a divergence is of the arithmetic that computes it, from logits in float32."""


@dataclass(frozen=True)
class Limits:
    """How far logits may be off; as `Errors`, of all positions together. KL grows with the square of a difference."""

    largest: float
    mean: float
    kl: float

    @classmethod
    def of(cls, generator: TextGenerator, recording: Recording, names: Sequence[str]) -> Limits:
        """For the form that a model is in."""
        neuron = generator.model.neuron_config
        cache_in_fp8 = neuron.kv_cache_dtype is not None
        rounded = recording.errors(FP8 if cache_in_fp8 else BFLOAT16, names)
        times = FACTOR * (1.0 if cache_in_fp8 or neuron.torch_dtype is torch.bfloat16 else FLOAT32_STEPS)
        largest, mean, kl = (float(value) for value in (rounded.largest.max(), rounded.mean.mean(), rounded.kl.mean()))
        return cls(times * largest, times * mean, max(times**2 * kl, LEAST_KL))

    def check(self, errors: Errors) -> None:
        """Fail where errors are beyond the limits, or a likeliest token is another though it was no near tie."""
        for name, found in (("largest", errors.largest.max()), ("mean", errors.mean.mean()), ("kl", errors.kl.mean())):
            assert float(found) <= getattr(self, name), f"{name} error {float(found):.3g}, allowed {self}: {errors}"
        # Two logits that are off by `largest` each, in opposite directions, change places up to twice that apart.
        wrong = ~errors.same & (errors.margin > 2 * self.largest)
        assert not wrong.any(), f"other tokens where margins are {errors.margin[wrong].tolist()}: {errors}"


def forced_logits(generator: TextGenerator, prompts: Sequence[EncodedPrompt]) -> list[torch.Tensor]:
    """Logits [P, V] of each prompt's scored positions: prompts encoded, given tokens decoded, all rows together."""
    runner = ModelRunner(generator.model)
    rows = []
    for slot, prompt in enumerate(prompts):
        own = prompt.ids[: prompt.prompt_tokens]
        rows.append(Row(slot, [*own], placed=runner.place(own, prompt.media)))
    logits = [[own] for own in encode_rows(runner, rows)]
    following = [prompt.ids[prompt.prompt_tokens :] for prompt in prompts]
    for step in range(max(map(len, following))):
        active = [i for i, given in enumerate(following) if step < len(given)]
        for i in active:
            rows[i].tokens.append(following[i][step])
        for i, own in zip(active, runner.decode([rows[i] for i in active]).all_logits().float(), strict=True):
            logits[i].append(own)
    return [torch.stack(own) for own in logits]


def errors_of(
    generator: TextGenerator, settings: Settings, recording: Recording, names: Sequence[str] | None = None
) -> dict[str, Errors]:
    """Of every prompt that the model takes, or of those named, by name; against the reference with its matrices."""
    takes_pictures = bool(generator.model.get_required_kwargs())
    seq_len = generator.model.neuron_config.seq_len
    prompts = [
        prompt
        for prompt in encode_prompts(settings.model)
        if (names is None or prompt.name in names)
        and len(prompt.ids) <= seq_len
        and (takes_pictures or not prompt.media)
    ]
    slots, errors = slots_of(generator.model), {}
    for first in range(0, len(prompts), slots):
        group = prompts[first : first + slots]
        for prompt, logits in zip(group, forced_logits(generator, group), strict=True):
            errors[prompt.name] = Errors.of(recording.prompts[prompt.name].references[reference_of(generator)], logits)
    return errors


def reference_of(generator: TextGenerator) -> str:
    """The recorded form that computes in float32 with the matrices of a model."""
    return FLOAT32 if generator.model.neuron_config.weights_dtype is None else FP8


def form_of(generator: TextGenerator) -> str:
    """A model's form in words."""
    neuron = generator.model.neuron_config
    parts = [f"activations in {str(neuron.torch_dtype).removeprefix('torch.')}"]
    parts += ["matrices in fp8"] if neuron.weights_dtype else []
    parts += ["keys and values in fp8"] if neuron.kv_cache_dtype else []
    return ", ".join(parts)
