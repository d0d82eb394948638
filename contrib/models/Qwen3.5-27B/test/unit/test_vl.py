# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and video among text, against transformers: positions, logits, greedy tokens.

Tolerance: 1e-4 on float32 logits of order one, as for text; the encoder in front of the decoder adds less than 1e-5.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from _compare import assert_close
from models import TINY, random_weights
from qwen35 import (
    HuggingFaceGenerationAdapter,
    NeuronQwen35VLForCausalLM,
    Qwen35NeuronConfig,
    Qwen35VLInferenceConfig,
)
from qwen35.configuration_qwen35 import Qwen35ConfigError
from qwen35.modeling_qwen35_vl import get_rope_index

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import GenerationConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration  # noqa: E402

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
START, END, IMAGE, VIDEO = 150, 151, 152, 153
VISION = dict(
    depth=2,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    out_hidden_size=TINY["hidden_size"],
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_position_embeddings=64,
)
PATCH_DIM = 3 * 2 * 4 * 4
SEQ_LEN, ROWS, STEPS = 320, 3, 32


@dataclass
class Row:
    """Token ids, and the pixels and grids of the images and videos among them, each in order."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, int, int]] = field(default_factory=list)
    videos: list[tuple[int, int, int]] = field(default_factory=list)
    seed: int = 0

    def pixels(self, grids: list[tuple[int, int, int]], offset: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2 * self.seed + offset)
        return torch.randn(sum(t * h * w for t, h, w in grids), PATCH_DIM, generator=generator)


def media(rows: list[Row]) -> dict[str, torch.Tensor]:
    """The keyword arguments of all images and videos of a batch, as the processor gives them."""
    found = {}
    if any(row.images for row in rows):
        found["pixel_values"] = torch.cat([row.pixels(row.images, 0) for row in rows])
        found["image_grid_thw"] = torch.tensor([grid for row in rows for grid in row.images])
    if any(row.videos for row in rows):
        found["pixel_values_videos"] = torch.cat([row.pixels(row.videos, 1) for row in rows])
        found["video_grid_thw"] = torch.tensor([grid for row in rows for grid in row.videos])
    return found


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    """One to three rows of text with up to four images and videos each, of mixed sizes."""
    sides = st.sampled_from([2, 4, 6])
    rows = []
    for _ in range(draw(st.integers(1, ROWS))):
        row = Row(seed=draw(st.integers(0, 2**16)))
        for kind in draw(st.lists(st.sampled_from("iv"), max_size=4)):
            row.ids += draw(st.lists(st.integers(0, 149), max_size=5))
            height, width, frames = draw(sides), draw(sides), draw(st.integers(1, 3)) if kind == "v" else 1
            (row.images if kind == "i" else row.videos).append((frames, height, width))
            for _ in range(frames):  # a timestamp before each frame of a video
                row.ids += draw(st.lists(st.integers(0, 149), min_size=kind == "v", max_size=2))
                row.ids += [START, *[IMAGE if kind == "i" else VIDEO] * (height * width // 4), END]
        row.ids += draw(st.lists(st.integers(0, 149), min_size=1, max_size=12))
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    """transformers' model, with the path of its checkpoint."""
    rope = TINY["rope_parameters"]
    config = Qwen3_5Config(
        text_config={**TINY, "rope_parameters": rope},
        vision_config=VISION,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(config).eval()
    text = {name.replace("model.", "model.language_model.", 1): t for name, t in random_weights(3).items()}
    missing, unexpected = model.load_state_dict(text, strict=False)
    assert not unexpected and all(name.startswith("model.visual.") for name in missing)
    for name, parameter in model.model.visual.named_parameters():
        if parameter.dim() > 1 and "pos_embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        model.path = path
        yield model


def load(path: str, **options: Any) -> NeuronQwen35VLForCausalLM:
    options = {"torch_dtype": torch.float32, "on_cpu": True, "seq_len": SEQ_LEN, "batch_size": ROWS, **options}
    config = Qwen35VLInferenceConfig.from_pretrained(path, neuron_config=Qwen35NeuronConfig(**options))
    model = NeuronQwen35VLForCausalLM(path, config)
    model.to_cpu()
    return model


@pytest.fixture(scope="module")
def model(reference: Any) -> NeuronQwen35VLForCausalLM:
    return load(reference.path)


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [IMAGE] * (length - len(row.ids)) for row in rows])  # padding that looks like more
    return ids, torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows])


def greedy(model: NeuronQwen35VLForCausalLM, rows: list[Row], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = padded(rows)
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None
    output = adapter.generate(ids, attention_mask=mask, generation_config=options(steps), **media(rows))
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def options(steps: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=steps, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )


@torch.no_grad()
def reference_greedy(reference: Any, row: Row, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row alone and unpadded."""
    ids = torch.tensor([row.ids])
    output = reference.generate(
        ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types(ids), generation_config=options(steps),
        **media([row]),
    )  # fmt: skip
    return output.sequences[0, ids.shape[1] :], torch.stack(output.logits, dim=1)[0]


def types(ids: torch.Tensor) -> torch.Tensor:
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def check(reference: Any, rows: list[Row], tokens: torch.Tensor, logits: torch.Tensor, steps: int) -> None:
    for i, row in enumerate(rows):
        expected_tokens, expected_logits = reference_greedy(reference, row, steps)
        assert_close(logits[i], expected_logits, atol=1e-4, label=f"logits of row {i}")
        assert torch.equal(tokens[i], expected_tokens), f"greedy tokens of row {i}"


def positions_and_logits_agree(reference: Any, model: NeuronQwen35VLForCausalLM, rows: list[Row]) -> None:
    ids, mask = padded(rows)
    grids = {name: grid for name, grid in media(rows).items() if "grid" in name}
    image, video = grids.get("image_grid_thw"), grids.get("video_grid_thw")
    ours = get_rope_index(model.config, ids, mask, image, video)
    theirs = reference.model.get_rope_index(ids, types(ids), attention_mask=mask, **grids)
    assert torch.equal(ours[0], theirs[0].movedim(0, 1)) and torch.equal(ours[1], theirs[1][:, 0])
    check(reference, rows, *greedy(model, rows, 4), 4)


def test_positions_logits_and_tokens_equal_transformers(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    @settings(max_examples=25, phases=WITHOUT_SHRINKING)
    @given(batches())
    def run(rows: list[Row]) -> None:
        positions_and_logits_agree(reference, model, rows)

    run()


@pytest.mark.slow
def test_200_batches_equal_transformers(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    @settings(max_examples=200, phases=WITHOUT_SHRINKING)
    @given(batches())
    def run(rows: list[Row]) -> None:
        positions_and_logits_agree(reference, model, rows)

    run()


EXAMPLE = [
    Row([7, START, *[IMAGE] * 6, END, 3, START, IMAGE, END, 9], images=[(1, 4, 6), (1, 2, 2)], seed=1),
    Row([1, 2, 3], seed=2),
    Row(
        [START, *[VIDEO] * 2, END, 5, START, *[VIDEO] * 2, END, 8, START, *[IMAGE] * 4, END, 4, 4],
        images=[(1, 4, 4)],
        videos=[(2, 4, 2)],
        seed=3,
    ),
]


def test_32_steps_of_a_ragged_batch_equal_transformers(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    check(reference, EXAMPLE, *greedy(model, EXAMPLE, STEPS), STEPS)


def greedy_on_rank(path: str, rows: list[Row], steps: int, options: dict[str, Any]) -> Any:
    return greedy(load(path, **options), rows, steps)


def test_two_ranks_equal_transformers(reference: Any, rank_pool: Callable[[int], Any]) -> None:
    for output in rank_pool(2).call(greedy_on_rank, reference.path, EXAMPLE, 8, dict(tp_degree=2)):
        check(reference, EXAMPLE, *output, 8)


def test_rows_with_images_enter_and_leave_beside_rows_without(reference: Any) -> None:
    model = load(reference.path, ctx_batch_size=1, is_continuous_batching=True, enable_bucketing=True)
    expected = [reference_greedy(reference, row, 4) for row in EXAMPLE]

    def enter(line: int, row: Row) -> torch.Tensor:
        ids = torch.tensor([row.ids])
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        return model(ids, torch.tensor([line]), torch.ones_like(ids), positions, **media([row])).logits[0, -1]

    for line, row in ((2, EXAMPLE[2]), (0, EXAMPLE[0]), (1, EXAMPLE[1])):
        assert_close(enter(line, row), expected[line][1][0], atol=1e-4, label=f"prompt of line {line}")
    for step, order in enumerate([[2, 0], [1, 0, 2], [0, 1]], start=1):
        taken = [sum(line in done for done in [[2, 0], [1, 0, 2], [0, 1]][: step - 1]) for line in order]
        ids = torch.stack([expected[line][0][n] for line, n in zip(order, taken, strict=True)]).unsqueeze(1)
        positions = torch.tensor([[len(EXAMPLE[line].ids) + n] for line, n in zip(order, taken, strict=True)])
        mask = (torch.arange(int(positions.max())) < positions).long()
        logits = model(ids, torch.tensor(order), mask, positions).logits[:, -1]
        for i, (line, n) in enumerate(zip(order, taken, strict=True)):
            assert_close(logits[i], expected[line][1][n + 1], atol=1e-4, label=f"line {line}, step {n + 1}")


def test_a_second_call_starts_from_its_own_prompt(reference: Any, model: NeuronQwen35VLForCausalLM) -> None:
    for rows in (EXAMPLE, EXAMPLE[1:2], EXAMPLE[::-1], EXAMPLE[:1]):
        check(reference, rows, *greedy(model, rows, 4), 4)


def test_a_prompt_of_text_takes_the_submodel_of_text(
    model: NeuronQwen35VLForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the submodel of images ran")

    monkeypatch.setattr(model.vision_context_encoding_model, "forward", refuse)
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


def test_a_text_only_checkpoint_is_refused_with_the_class_to_use(tmp_path: Path) -> None:
    with pytest.raises(Qwen35ConfigError, match=r"vision_config is missing.*NeuronQwen35ForCausalLM"):
        Qwen35VLInferenceConfig(Qwen35NeuronConfig(), **TINY)


def test_every_submodel_is_walked_as_nxdi_would_trace_it(reference: Any) -> None:
    neuron_config = Qwen35NeuronConfig(batch_size=2, seq_len=256, enable_bucketing=True)
    config = Qwen35VLInferenceConfig.from_pretrained(reference.path, neuron_config=neuron_config)
    app = NeuronQwen35VLForCausalLM(reference.path, config)
    app.get_builder().trace()
    walked = {key: len(container.example_inputs[0]) for key, container in app.get_builder().model_collection.items()}
    assert walked == {
        "context_encoding_model": 7,
        "vision_context_encoding_model": 24,
        "token_generation_model": 22,
    }
