# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Texts, images and videos that share beginnings and slots: each request gets the tokens it gets alone.

What a request gets alone is what transformers' `generate` gives over the model in one piece (`support.vl_cases.greedy`,
which test_vl.py compares with transformers' own model); of requests that sample, what an engine with nothing else to do
gives over a model of its own, without a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwen35 import FinishReason, NeuronQwen35VLForCausalLM, PrefixCache, Qwen35Engine, Request, StepOutput
from qwen35.nxdi import HuggingFaceGenerationAdapter
from qwen35.serving.sampling import SamplingOptions
from support.simulated_device import put_on_simulated_device
from support.vl_cases import END, IMAGE, PATCH_DIM, START, VIDEO, load, save_vl_checkpoint
from support.vl_cases import options as generation_options

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
STEPS, SEQ_LEN, CHUNK = 5, 96, 4


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt: text, an image or a video; the pixels follow from its number."""

    ids: tuple[int, ...]
    kind: str = "text"
    grid: tuple[int, int, int] | None = None
    number: int = 0

    @property
    def pixels(self) -> torch.Tensor:
        assert self.grid is not None
        generator = torch.Generator().manual_seed(self.number)
        frames, height, width = self.grid
        return torch.randn(frames * height * width, PATCH_DIM, generator=generator)


def image(number: int, height: int, width: int) -> Piece:
    return Piece((START, *[IMAGE] * (height * width // 4), END), "image", (1, height, width), number)


def video(number: int, frames: int, height: int, width: int) -> Piece:
    frame = (7, START, *[VIDEO] * (height * width // 4), END)  # a timestamp before each
    return Piece(frame * frames, "video", (frames, height, width), number)


PIECES = [
    Piece((1, 2, 3, 4, 5)),
    Piece((1, 2, 3, 4)),
    Piece((9,)),
    Piece((8, 11, 12, 13, 14, 15, 16, 17, 18)),
    image(1, 4, 6),
    image(2, 4, 6),  # the same placeholders, another picture
    image(3, 6, 4),  # and another shape
    image(4, 2, 2),  # of which the positions of a text are as without a picture
    image(5, 2, 6),
    video(6, 2, 4, 2),
    video(7, 2, 4, 2),
]


def prompt_of(pieces: tuple[Piece, ...]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


def media_of(pieces: tuple[Piece, ...]) -> dict[str, torch.Tensor]:
    found = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if of_kind := [piece for piece in pieces if piece.kind == kind]:
            found[pixels] = torch.cat([piece.pixels for piece in of_kind])
            found[grids] = torch.tensor([piece.grid for piece in of_kind])
    return found


class Alone:
    """The tokens of a request by itself, computed once."""

    def __init__(self, path: str) -> None:
        self.whole = load(path, batch_size=1, seq_len=SEQ_LEN)
        self.known: dict[Any, list[int]] = {}

    def __call__(self, pieces: tuple[Piece, ...], sampling: SamplingOptions) -> list[int]:
        if (pieces, sampling) not in self.known:
            self.known[pieces, sampling] = self._compute(pieces, sampling)
        return self.known[pieces, sampling]

    def _compute(self, pieces: tuple[Piece, ...], sampling: SamplingOptions) -> list[int]:
        if not sampling.is_greedy:
            engine = Qwen35Engine(self.whole)
            request = Request(prompt_of(pieces), STEPS, sampling, media=media_of(pieces))
            return [output.token for output in engine.stream(engine.add(request)) if output.token is not None]
        ids = torch.tensor([prompt_of(pieces)])
        adapter = HuggingFaceGenerationAdapter(self.whole)
        adapter.generation_config.eos_token_id = None
        output = adapter.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=generation_options(STEPS),
            **media_of(pieces),
        )
        tokens: list[int] = output.sequences[0, ids.shape[1] :].tolist()
        return tokens


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("vision-language")
    save_vl_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def alone(path: str) -> Alone:
    return Alone(path)


OPTIONS: dict[str, dict[str, Any]] = {
    "one slot": dict(batch_size=1, ctx_batch_size=1),
    "two slots": dict(batch_size=2, ctx_batch_size=1),
    "two prompts at a time": dict(batch_size=3, ctx_batch_size=2),
    "as on a device": dict(batch_size=2, ctx_batch_size=1),
}


@pytest.fixture(scope="module")
def model_of(path: str) -> Callable[[str], NeuronQwen35VLForCausalLM]:
    models: dict[str, Any] = {}

    def get(name: str) -> NeuronQwen35VLForCausalLM:
        if name not in models:
            chunks = dict(is_continuous_batching=True, prefill_chunk_size=CHUNK, seq_len=SEQ_LEN)
            model: Any = load(path, **OPTIONS[name], **chunks)
            models[name] = put_on_simulated_device(model) if name == "as on a device" else model
        return models[name]

    return get


@dataclass(frozen=True)
class Arrival:
    """A request of a schedule, `pause` rounds after the last; cancelled so many rounds after it, or never."""

    pieces: tuple[Piece, ...]
    pause: int
    seed: int | None
    n: int
    cancel_after: int | None


@st.composite
def schedules(draw: st.DrawFn) -> list[Arrival]:
    """Requests of few prompts, so that some repeat, fork from others, and meet pictures in their slots."""
    pieces = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(tuple)
    prompts: list[tuple[Piece, ...]] = draw(st.lists(pieces, min_size=2, max_size=3))
    for _ in range(draw(st.integers(0, 2))):
        beginning = draw(st.sampled_from(prompts))
        prompts.append((*beginning[: draw(st.integers(1, len(beginning)))], *draw(pieces)[:2]))
    found = []
    for _ in range(draw(st.integers(3, 8))):
        seed = draw(st.sampled_from([None, None, None, 1, 2]))
        found.append(
            Arrival(
                pieces=draw(st.sampled_from(prompts)),
                pause=draw(st.sampled_from([0, 0, 1, 3, 12])),
                seed=seed,
                n=1 if seed is None else draw(st.integers(1, 3)),
                cancel_after=draw(st.sampled_from([None] * 6 + [0, 1, 2, 4])),
            )
        )
    return found


def sampling_of(arrival: Arrival) -> SamplingOptions:
    return SamplingOptions() if arrival.seed is None else SamplingOptions(temperature=1.0, seed=arrival.seed)


def schedule_agrees(
    model: NeuronQwen35VLForCausalLM, alone: Alone, schedule: list[Arrival], budget: int | None, block: int
) -> None:
    cache = None if budget is None else PrefixCache(model, budget, block)
    engine = Qwen35Engine(model, cache)
    outputs: dict[tuple[int, int], list[StepOutput]] = {}
    cancels: dict[int, list[int]] = {}
    rounds = 0

    def one_round() -> None:
        nonlocal rounds
        for request_id in cancels.pop(rounds, ()):
            engine.cancel(request_id)
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        assert cache is None or cache.nbytes <= cache.budget_bytes
        rounds += 1

    for arrival in schedule:
        for _ in range(arrival.pause):
            one_round()
        media = media_of(arrival.pieces)
        added = engine.add(Request(prompt_of(arrival.pieces), STEPS, sampling_of(arrival), (), media, arrival.n))
        if arrival.cancel_after is not None:
            cancels.setdefault(rounds + arrival.cancel_after, []).append(added)
    while engine.has_work:
        one_round()

    for i, arrival in enumerate(schedule):
        for index in range(arrival.n):
            tokens = alone(arrival.pieces, sampling_of(arrival).of_continuation(index))
            *earlier, last = outputs[i, index]
            got = [output.token for output in (*earlier, last) if output.token is not None]
            assert not any(output.finish_reason for output in earlier)
            if last.finish_reason is FinishReason.CANCELLED and arrival.cancel_after is not None:
                assert got == tokens[: len(got)], f"request {i}, continuation {index}"
            else:
                assert (got, last.finish_reason, last.error) == (tokens, FinishReason.LENGTH, None), f"{i}, {index}"


BUDGETS = st.sampled_from([None, 1 << 13, 1 << 16, 1 << 17, 1 << 18, 1 << 30])
BLOCKS = st.sampled_from([CHUNK, 2 * CHUNK])


@pytest.mark.parametrize("options", OPTIONS)
def test_mixed_requests_get_what_they_get_alone(
    options: str, model_of: Callable[[str], NeuronQwen35VLForCausalLM], alone: Alone
) -> None:
    @settings(max_examples=10, phases=WITHOUT_SHRINKING)
    @given(schedules(), BUDGETS, BLOCKS)
    def run(schedule: list[Arrival], budget: int | None, block: int) -> None:
        schedule_agrees(model_of(options), alone, schedule, budget, block)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_400_mixed_schedules_get_what_they_get_alone(
    options: str, model_of: Callable[[str], NeuronQwen35VLForCausalLM], alone: Alone
) -> None:
    @settings(max_examples=100, phases=WITHOUT_SHRINKING)
    @given(schedules(), BUDGETS, BLOCKS)
    def run(schedule: list[Arrival], budget: int | None, block: int) -> None:
        schedule_agrees(model_of(options), alone, schedule, budget, block)

    run()


TEXT, PICTURE, FILM = (PIECES[0], PIECES[3]), (PIECES[0], PIECES[4], PIECES[2]), (PIECES[9], PIECES[0])
LATER_PICTURE = (PIECES[0], PIECES[3], PIECES[4], PIECES[2])


@pytest.mark.parametrize("on_device", [False, True], ids=["CPU", "device"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "prompts",
    [
        (TEXT, PICTURE, TEXT, TEXT),
        (TEXT, LATER_PICTURE, TEXT, LATER_PICTURE),
        (FILM, TEXT, FILM, PICTURE, FILM),
        (PICTURE, (*PICTURE, PIECES[3]), (*PICTURE, PIECES[5]), PICTURE),
    ],
    ids=["text after a picture", "a picture after a cached text", "film", "forks of a picture"],
)
def test_what_a_slot_held_before_does_not_matter(
    prompts: tuple[tuple[Piece, ...], ...],
    cached: bool,
    on_device: bool,
    model_of: Callable[[str], NeuronQwen35VLForCausalLM],
    path: str,
    alone: Alone,
) -> None:
    options = dict(is_continuous_batching=True, prefill_chunk_size=CHUNK, seq_len=SEQ_LEN)
    model = model_of("one slot") if not on_device else load(path, batch_size=1, ctx_batch_size=1, **options)
    model = put_on_simulated_device(model) if on_device else model  # type: ignore[assignment]
    cache = PrefixCache(model, 1 << 30) if cached else None
    engine = Qwen35Engine(model, cache)
    for pieces in prompts:
        request = Request(prompt_of(pieces), STEPS, media=media_of(pieces))
        outputs = [*engine.stream(engine.add(request))]
        assert [(output.token, output.error) for output in outputs] == [(t, None) for t in alone(pieces, GREEDY)]


GREEDY = SamplingOptions()


@pytest.mark.parametrize("rounds", range(14))
@pytest.mark.parametrize("cached", [False, True])
def test_a_request_may_be_cancelled_in_every_state(
    cached: bool, rounds: int, model_of: Callable[[str], NeuronQwen35VLForCausalLM], alone: Alone
) -> None:
    model = model_of("two slots")
    engine = Qwen35Engine(model, PrefixCache(model, 1 << 30) if cached else None)

    def add(pieces: tuple[Piece, ...]) -> int:
        return engine.add(Request(prompt_of(pieces), STEPS, media=media_of(pieces)))

    if cached:  # so that the one that is cancelled was restored
        for _ in engine.stream(add(PICTURE)):
            pass
    before, cancelled, after = add(TEXT), add(PICTURE), add(LATER_PICTURE)
    outputs: dict[int, list[StepOutput]] = {}
    for _ in range(rounds):
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    engine.cancel(cancelled)
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    for request_id, pieces in ((before, TEXT), (after, LATER_PICTURE)):
        assert [output.token for output in outputs[request_id]] == alone(pieces, GREEDY)
    assert outputs[cancelled][-1].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)


def test_continuations_share_the_media_and_the_prompt(
    model_of: Callable[[str], NeuronQwen35VLForCausalLM], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("two prompts at a time")
    calls: list[tuple[int, ...]] = []
    vision, forward = type(model.vision).forward, model.forward
    encoded: list[int] = []
    monkeypatch.setattr(type(model.vision), "forward", lambda *args: encoded.append(1) or vision(*args))  # type: ignore[func-returns-value]

    def listen(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(ids.shape))
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "forward", listen)
    engine = Qwen35Engine(model)
    sampling = SamplingOptions(temperature=1.0, seed=3)
    prompt = prompt_of(PICTURE)
    request_id = engine.add(Request(prompt, STEPS, sampling, media=media_of(PICTURE), n=3))
    tokens: dict[int, list[int | None]] = {0: [], 1: [], 2: []}
    for output in engine.stream(request_id):
        tokens[output.index].append(output.token)
    monkeypatch.undo()
    assert tokens == {i: alone(PICTURE, sampling.of_continuation(i)) for i in range(3)}
    assert len({*map(tuple, tokens.values())}) == 3
    assert len(encoded) == 1
    assert sum(rows * width for rows, width in calls if width > 1 or rows == 1) == len(prompt)
    assert calls.count((3, 1)) == STEPS - 1
