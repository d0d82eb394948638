# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and video among text, against transformers: logits and greedy tokens.

Tolerance: 1e-4 on float32 logits of order one, as for text; the encoder in front of the decoder adds less than 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings

from qwen35 import NeuronQwen35VLForCausalLM, Qwen35NeuronConfig, Qwen35VLInferenceConfig
from qwen35.configuration_qwen35 import Qwen35ConfigError
from qwen35.phase import Phase, Submodel
from support.compare import assert_close
from support.models import TINY
from support.oracle import transformers_model, vl_reference_greedy
from support.vl_cases import (
    EXAMPLE,
    IMAGE,
    VIDEO,
    Row,
    batches,
    greedy,
    load,
    media,
    save_vl_checkpoint,
)

WITHOUT_SHRINKING = (HypothesisPhase.explicit, HypothesisPhase.generate)
STEPS = 32


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random checkpoint on disk."""
    path = tmp_path_factory.mktemp("vision-language")
    save_vl_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def reference(path: str) -> Any:
    return transformers_model(Path(path))


@pytest.fixture(scope="module")
def model(path: str) -> NeuronQwen35VLForCausalLM:
    return load(path)


def check(reference: Any, rows: list[Row], tokens: torch.Tensor, logits: torch.Tensor, steps: int) -> None:
    for i, row in enumerate(rows):
        expected_tokens, expected_logits = vl_reference_greedy(reference, row, steps)
        assert_close(logits[i], expected_logits, atol=1e-4, label=f"logits of row {i}")
        assert torch.equal(tokens[i], expected_tokens), f"greedy tokens of row {i}"


def test_logits_and_tokens_equal_transformers(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    @settings(max_examples=25, phases=WITHOUT_SHRINKING)
    @given(batches())
    def run(rows: list[Row]) -> None:
        check(reference, rows, *greedy(model, rows, 4), 4)

    run()


@pytest.mark.slow
def test_200_batches_equal_transformers(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    @settings(max_examples=200, phases=WITHOUT_SHRINKING)
    @given(batches())
    def run(rows: list[Row]) -> None:
        check(reference, rows, *greedy(model, rows, 4), 4)

    run()


def test_32_steps_of_a_ragged_batch_equal_transformers(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    check(reference, EXAMPLE, *greedy(model, EXAMPLE, STEPS), STEPS)


def test_a_second_call_starts_from_its_own_prompt(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    for rows in (EXAMPLE, EXAMPLE[1:2], EXAMPLE[::-1], EXAMPLE[:1]):
        check(reference, rows, *greedy(model, rows, 4), 4)


def test_a_prompt_of_text_takes_the_submodel_of_text(
    model: NeuronQwen35VLForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the submodel of images ran")

    monkeypatch.setattr(model.submodel(Submodel(Phase.CONTEXT_ENCODING, with_media=True)), "forward", refuse)
    greedy(model, EXAMPLE[1:2], 2)
    with pytest.raises(AssertionError, match="the submodel of images ran"):
        greedy(model, EXAMPLE[:1], 2)
    text = model.context_encoding_model.input_generator()[0]
    assert len(text) == 7, "NxDI's own arguments, nothing for images"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.ids.remove(IMAGE), r"row 0 has 5 image placeholders at token 2, its grid makes 6 tokens"),
        (lambda row: row.images.append((1, 2, 2)), r"image_grid_thw has 1 frames more than input_ids have runs"),
        (lambda row: row.images.pop(), r"row 0 has 1 image placeholders at token 11, its grid makes 0 tokens"),
        (
            lambda row: row.images.__setitem__(1, (1, 3, 2)),
            r"\[1, 3, 2\]: rows and columns must be positive multiples of 2",
        ),
        (
            lambda row: row.ids.__setitem__(2, VIDEO),
            r"row 0 has 1 video placeholders at token 2, its grid makes 0 tokens",
        ),
    ],
)
def test_placeholders_that_do_not_match_are_named_before_the_encoder_runs(
    change: Callable[[Row], Any], message: str, model: NeuronQwen35VLForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row([*EXAMPLE[0].ids], [*EXAMPLE[0].images], seed=1)
    change(row)
    monkeypatch.setattr(type(model.vision), "forward", lambda *args: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match=message):
        greedy(model, [row], 1)


@pytest.mark.parametrize("given", ["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"])
def test_pixels_without_grids_and_grids_without_pixels_are_refused(
    given: str, model: NeuronQwen35VLForCausalLM
) -> None:
    ids = torch.tensor([EXAMPLE[2].ids])
    name = "videos" if "video" in given else "images"
    with pytest.raises(ValueError, match=f"{name} have only one of pixels and grid_thw"):
        model(ids, position_ids=torch.arange(ids.shape[1])[None], **{given: media(EXAMPLE[2:])[given]})


def test_a_text_only_checkpoint_is_refused_with_the_class_to_use(tmp_path: Path) -> None:
    with pytest.raises(Qwen35ConfigError, match=r"vision_config is missing.*NeuronQwen35ForCausalLM"):
        Qwen35VLInferenceConfig(Qwen35NeuronConfig(), **TINY)


def test_every_submodel_is_walked_as_nxdi_would_trace_it(path: str) -> None:
    neuron_config = Qwen35NeuronConfig(batch_size=2, seq_len=256, enable_bucketing=True)
    config = Qwen35VLInferenceConfig.from_pretrained(path, neuron_config=neuron_config)
    app = NeuronQwen35VLForCausalLM(path, config)
    app.get_builder().trace()
    walked = {key: len(container.example_inputs[0]) for key, container in app.get_builder().model_collection.items()}
    assert walked == {
        "context_encoding_model": 7,
        "vision_context_encoding_model": 24,
        "token_generation_model": 22,
    }
