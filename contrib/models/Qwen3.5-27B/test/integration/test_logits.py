# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Logits against those recorded of transformers in float32: prompts of unequal lengths, long ones in chunks, pictures.

How far they may be off: `support/logit_limits.py`.
"""

from __future__ import annotations

import pytest

from qwen35.serving.generation import TextGenerator
from support.integration import Report, Settings
from support.logit_limits import Limits, errors_of, forced_logits, form_of, reference_of
from support.recorded_logits import EncodedPrompt, Errors, Recording, encode_prompts


def test_logits_are_as_near_to_transformers_as_rounding_allows(
    generator: TextGenerator, settings: Settings, recording: Recording, report: Report
) -> None:
    errors = errors_of(generator, settings, recording)
    heading = f"Logits with {form_of(generator)}, against transformers in float32 with the same matrices"
    for name, own in errors.items():
        report(heading, f"- {name}: {own}")
    Limits.of(generator, recording, [*errors]).check(Errors.together([*errors.values()]))


def test_logits_after_another_first_token_are_refused(
    generator: TextGenerator, settings: Settings, recording: Recording
) -> None:
    """The limits are no formality: one other token before them, and logits are beyond."""
    prompt = encode_prompts(settings.model)[0]
    other = EncodedPrompt(prompt.name, (prompt.ids[0] + 1, *prompt.ids[1:]), prompt.prompt_tokens)
    (logits,) = forced_logits(generator, [other])
    errors = Errors.of(recording.prompts[prompt.name].references[reference_of(generator)], logits)
    with pytest.raises(AssertionError, match="error"):
        Limits.of(generator, recording, [prompt.name]).check(errors)
