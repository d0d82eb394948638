# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that share an engine get the tokens they get alone, on the real NxDI and on the stand-ins.

What a request gets alone comes from the same weights without the engine, in one piece and a batch of one: through
transformers' `generate` where it is greedy, else by encoding the whole sequence anew for every token. Tokens are
compared: logits of order one differ by 2e-6 between slots and shapes, and no choice of these cases is as near as that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwen35 import (
    FinishReason,
    NeuronQwen35ForCausalLM,
    OnDeviceSamplingConfig,
    PrefixCache,
    Qwen35Engine,
    Request,
    StepOutput,
)
from qwen35.serving.sampling import GREEDY, SamplingOptions
from support.models import load_neuron, neuron_greedy, random_prompts, save_checkpoint
from support.schedules import Arrival, schedules, schedules_agree
from support.simulated_device import put_on_simulated_device
from support.vl_cases import EXAMPLE, IMAGE, START, Row, greedy, load, media, save_vl_checkpoint

pytestmark = pytest.mark.usefixtures("backend")

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
SEQ_LEN, STEPS = 64, 8
SAMPLING = [
    GREEDY,
    SamplingOptions(temperature=1.0, seed=1),
    SamplingOptions(temperature=0.7, top_k=5, seed=2),
    SamplingOptions(temperature=1.5, top_p=0.8, top_k=40, seed=3),
]
PROMPTS = random_prompts([1, 2, 7, 8, 9, 15, 16, 17, 33, 40, 24, 3])
# Beginnings that others share, for a prefix cache: to the end of a block, beyond it, and all but the last token.
PROMPTS += [PROMPTS[8][:16] + PROMPTS[3], PROMPTS[9][:21] + PROMPTS[4], [*PROMPTS[10][:-1], 5]]
CASES = [(prompt, SAMPLING[i % len(SAMPLING)]) for i, prompt in enumerate(PROMPTS)]
OPTIONS: dict[str, dict[str, Any]] = {
    "one prompt at a time": dict(batch_size=3, ctx_batch_size=1, is_continuous_batching=True, prefill_chunk_size=8),
    "two prompts at a time": dict(batch_size=4, ctx_batch_size=2, is_continuous_batching=True, prefill_chunk_size=16),
    "buckets": dict(
        batch_size=2,
        ctx_batch_size=2,
        is_continuous_batching=True,
        prefill_chunk_size=16,
        enable_bucketing=True,
        token_generation_buckets=[16, 32, 64],
    ),
    "whole prompts": dict(batch_size=2, ctx_batch_size=1, is_continuous_batching=True),
    "more slots than rows a call": dict(
        batch_size=2, kv_cache_batch_size=4, max_batch_size=4, ctx_batch_size=1, is_continuous_batching=True
    ),
    "static batch": dict(batch_size=2, prefill_chunk_size=8),
    "on a simulated device": dict(
        batch_size=3, ctx_batch_size=2, is_continuous_batching=True, prefill_chunk_size=8, enable_bucketing=True
    ),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, seed=1, num_hidden_layers=2, full_attention_interval=2)
    return path


@pytest.fixture(scope="module")
def model_of(path: Path) -> Callable[[str], NeuronQwen35ForCausalLM]:
    models: dict[str, NeuronQwen35ForCausalLM] = {}

    def get(name: str) -> NeuronQwen35ForCausalLM:
        if name not in models:
            model = load_neuron(path, seq_len=SEQ_LEN, **OPTIONS[name])
            models[name] = put_on_simulated_device(model) if name == "on a simulated device" else model
        return models[name]

    return get


@pytest.fixture(scope="module")
def alone(path: Path) -> list[list[int]]:
    """The tokens of each case without the engine."""
    model = load_neuron(path, seq_len=SEQ_LEN)
    return [
        sampled(model, prompt, sampling)
        if sampling.temperature
        else neuron_greedy(model, [prompt], STEPS)[0][0].tolist()
        for prompt, sampling in CASES
    ]


def sampled(model: NeuronQwen35ForCausalLM, prompt: list[int], sampling: SamplingOptions) -> list[int]:
    """STEPS tokens of temperature, top-k and top-p sampling (arXiv 1904.09751), each from a call for all before it."""
    assert sampling.seed is not None
    generator, tokens = torch.Generator().manual_seed(sampling.seed), [*prompt]
    for _ in range(STEPS):
        ids = torch.tensor([tokens])
        logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(tokens)).unsqueeze(0))
        scores = logits.logits[0, -1] / sampling.temperature
        ranks = scores.argsort(descending=True).argsort()
        scores[ranks >= (sampling.top_k or len(scores))] = -torch.inf
        probabilities, order = scores.softmax(-1).sort(descending=True)
        scores[order[probabilities.cumsum(-1) - probabilities >= sampling.top_p]] = -torch.inf
        tokens.append(int(torch.multinomial(scores.softmax(-1).unsqueeze(0), 1, generator=generator)))
    return tokens[len(prompt) :]


def every_option() -> Any:
    return pytest.mark.parametrize("options", OPTIONS)


@every_option()
def test_a_request_alone_gets_what_the_model_gives_without_the_engine(
    options: str, model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    for i, (prompt, sampling) in enumerate(CASES):
        engine = Qwen35Engine(model_of(options))
        outputs = [*engine.stream(engine.add(Request(prompt, STEPS, sampling)))]
        assert [output.token for output in outputs] == alone[i], f"case {i}"
        assert not engine.has_work


@every_option()
def test_a_schedule_gives_each_request_what_it_gets_alone(
    options: str, model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    @settings(max_examples=7, phases=WITHOUT_SHRINKING)
    @given(schedules(len(CASES), STEPS), st.booleans())
    def run(schedule: list[Arrival], cached: bool) -> None:
        schedules_agree(model_of(options), CASES, alone, schedule, cached)

    run()


@pytest.mark.slow
@every_option()
def test_500_schedules_give_each_request_what_it_gets_alone(
    options: str, model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    @settings(max_examples=72, phases=WITHOUT_SHRINKING)  # 504 over the seven configurations
    @given(schedules(len(CASES), STEPS), st.booleans())
    def run(schedule: list[Arrival], cached: bool) -> None:
        schedules_agree(model_of(options), CASES, alone, schedule, cached)

    run()


def tokens_on_rank(path: str, options: dict[str, Any]) -> list[list[int | None]]:
    engine = Qwen35Engine(load_neuron(Path(path), seq_len=SEQ_LEN, tp_degree=2, **options))
    ids = [engine.add(Request(prompt, STEPS, sampling)) for prompt, sampling in CASES]
    return [[output.token for output in engine.stream(i)] for i in ids]


def test_two_ranks_give_the_tokens_of_one(path: Path, rank_pool: Callable[[int], Any], alone: list[list[int]]) -> None:
    for tokens in rank_pool(2).call(tokens_on_rank, str(path), OPTIONS["two prompts at a time"]):
        assert tokens == alone


@pytest.mark.parametrize("options", ["one prompt at a time", "two prompts at a time"])
def test_neighbours_do_not_change_a_bit_of_the_logits_in_a_slot(
    options: str, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between slots there is rounding: a row's place in a matrix product decides how it is summed on a CPU."""
    model, call = model_of(options), model_of(options).forward
    logits: list[torch.Tensor] = []

    def listen(ids: torch.Tensor, seq_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = call(ids, seq_ids, *args, **kwargs)
        logits.extend(output.logits[seq_ids == 0])
        return output

    monkeypatch.setattr(model, "forward", listen)

    def run(neighbours: list[list[int]]) -> list[torch.Tensor]:
        logits.clear()
        engine = Qwen35Engine(model)
        stream = engine.stream(engine.add(Request(PROMPTS[8], STEPS)))
        for prompt in neighbours:  # the first is there from the beginning, the second enters later
            engine.add(Request(prompt, STEPS))
            next(stream)
        for _ in stream:
            pass
        return [*logits]

    quiet, busy = run([]), run([PROMPTS[9], PROMPTS[4]])
    for i, (one, other) in enumerate(zip(quiet, busy, strict=True)):
        assert torch.equal(one, other), f"call {i} for slot 0"


def test_a_long_prompt_delays_the_others_by_one_piece_a_token(model_of: Callable[[str], Any]) -> None:
    engine = Qwen35Engine(model_of("one prompt at a time"))
    running = engine.add(Request(PROMPTS[0], STEPS))
    assert [output.request_id for output in engine.step()] == [running]
    long = engine.add(Request(PROMPTS[9], 1))  # 40 tokens, 8 at a time
    behind = engine.add(Request(PROMPTS[1], 1))
    rounds = [[output.request_id for output in engine.step()] for _ in range(6)]
    assert rounds == [[running]] * 4 + [[running, long], [running, behind]]


def test_requests_that_wait_for_a_slot_get_it_in_order_of_arrival(model_of: Callable[[str], Any]) -> None:
    engine = Qwen35Engine(model_of("whole prompts"))
    ids = [engine.add(Request(prompt, 2)) for prompt in PROMPTS[:6]]
    first_tokens: list[int] = []
    while engine.has_work:
        first_tokens += [output.request_id for output in engine.step() if output.finish_reason is None]
    assert first_tokens == ids


def test_streams_may_be_read_one_after_another_and_in_turns(
    model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    engine = Qwen35Engine(model_of("whole prompts"))
    ids = [engine.add(Request(CASES[i][0], STEPS, CASES[i][1])) for i in range(4)]
    turns = [*zip(engine.stream(ids[0]), engine.stream(ids[1]), strict=True)]
    later = [[output.token for output in engine.stream(request_id)] for request_id in ids[2:]]
    assert [[output.token for output in outputs] for outputs in zip(*turns, strict=True)] + later == alone[:4]
    assert not engine.has_work and [*engine.stream(ids[0])] == []


def test_a_cancelled_request_makes_room_at_once(model_of: Callable[[str], Any], alone: list[list[int]]) -> None:
    engine = Qwen35Engine(model_of("whole prompts"))
    ids = [engine.add(Request(CASES[i][0], STEPS, CASES[i][1])) for i in range(4)]
    engine.step()
    stream = engine.stream(ids[0])
    engine.cancel(ids[0])  # decoding
    engine.cancel(ids[2])  # waiting
    engine.cancel(ids[2])  # twice does no more
    assert [*stream] == [StepOutput(ids[0], None, FinishReason.CANCELLED)]
    assert [*engine.stream(ids[2])] == [StepOutput(ids[2], None, FinishReason.CANCELLED)]
    assert engine.step() == [StepOutput(ids[1], alone[1][0])]
    assert StepOutput(ids[3], alone[3][0]) in engine.step()
    for call in (engine.cancel, engine.stream):
        with pytest.raises(KeyError, match=r"request_id=9 was given to no request: pass what add\(\) returned"):
            call(9)


def test_a_request_that_cannot_run_is_refused_when_it_is_added(model_of: Callable[[str], Any]) -> None:
    engine = Qwen35Engine(model_of("buckets"))
    with pytest.raises(ValueError, match=r"exceed seq_len=64: shorten"):
        engine.add(Request([1] * 60, 5))
    with pytest.raises(ValueError, match=r"token 160 of prompt or eos_token_ids is not in 0\.\.159"):
        engine.add(Request([1, 160], 1))
    with pytest.raises(ValueError, match=r"media has pixel_values, .*load NeuronQwen35VL"):
        engine.add(Request([1], 1, media={"pixel_values": torch.zeros(1, 1)}))
    assert not engine.has_work


def test_a_whole_prompt_beyond_the_context_is_refused(path: Path) -> None:
    engine = Qwen35Engine(load_neuron(path, seq_len=SEQ_LEN, max_context_length=32))
    with pytest.raises(ValueError, match=r"40 tokens exceeds max_context_length=32: raise it, or set prefill_chunk"):
        engine.add(Request(PROMPTS[9], 1))


def test_tokens_chosen_by_the_device_need_their_logits_too(path: Path, alone: list[list[int]]) -> None:
    options = dict(seq_len=SEQ_LEN, batch_size=2, on_device_sampling_config=OnDeviceSamplingConfig())
    with pytest.raises(ValueError, match=r"output_logits=False.*set output_logits=True"):
        Qwen35Engine(load_neuron(path, **options))
    engine = Qwen35Engine(load_neuron(path, **options, output_logits=True))
    ids = [engine.add(Request(prompt, STEPS, sampling)) for prompt, sampling in CASES[:3]]
    assert [[output.token for output in engine.stream(i)] for i in ids] == alone[:3]


def test_a_prefix_cache_of_another_model_is_refused(model_of: Callable[[str], NeuronQwen35ForCausalLM]) -> None:
    first, second = (model_of(options) for options in ("one prompt at a time", "two prompts at a time"))
    with pytest.raises(ValueError, match="prefix_cache is another model's"):
        Qwen35Engine(first, PrefixCache(second, budget_bytes=1))


def test_asynchronous_steps_are_refused(path: Path) -> None:
    model = load_neuron(path, seq_len=SEQ_LEN)
    model.neuron_config.async_mode = True  # a CPU has no such mode
    with pytest.raises(ValueError, match=r"async_mode=True: .* set it to False"):
        Qwen35Engine(model)


@pytest.mark.parametrize("ctx_batch_size", [1, 2])
@pytest.mark.parametrize("chunk", [None, 4])
def test_rows_with_images_share_the_engine_with_rows_of_text(
    chunk: int | None, ctx_batch_size: int, tmp_path: Path
) -> None:
    save_vl_checkpoint(tmp_path)
    model = load(str(tmp_path), is_continuous_batching=True, ctx_batch_size=ctx_batch_size, prefill_chunk_size=chunk)
    ends_in_image = Row([3, START, *[IMAGE] * 7], images=[(1, 4, 6), (1, 2, 2)], seed=5)  # 9 tokens: 4 + 4 + 1
    rows = [*EXAMPLE, ends_in_image, *EXAMPLE[::-1]]
    whole = load(str(tmp_path))
    expected = [greedy(whole, [row], STEPS)[0][0].tolist() for row in rows]
    engine = Qwen35Engine(model)
    ids = [engine.add(Request(row.ids, STEPS, media=media([row]))) for row in rows]
    assert [[output.token for output in engine.stream(i)] for i in ids] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda media: media.pop("pixel_values"), r"media: images have only one of pixels and grid_thw"),
        (
            lambda media: media.update(pixel_values=media["pixel_values"][:-1]),
            r"media: pixel_values has shape \[27, 96",
        ),
        (lambda media: media.update(image_grid_thw=torch.tensor([[1, 4, 6]])), r"its grid makes 0 tokens"),
    ],
)
def test_media_that_do_not_match_are_refused_when_they_are_added(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path
) -> None:
    save_vl_checkpoint(tmp_path)
    given = media([EXAMPLE[0]])
    change(given)
    with pytest.raises(ValueError, match=message):
        Qwen35Engine(load(str(tmp_path))).add(Request(EXAMPLE[0].ids, 1, media=given))


@pytest.mark.parametrize("options", ["one prompt at a time", "two prompts at a time", "on a simulated device"])
def test_a_prefix_cache_changes_no_token(options: str, model_of: Callable[[str], NeuronQwen35ForCausalLM]) -> None:
    model = model_of(options)
    (first,) = random_prompts([33], seed=9)
    # The turns of a conversation, a branch of it, and a prompt that shares nothing.
    prompts = [first, [*first, 1, 2, 3], [*first, 1, 2, 3, *first[:9]], [*first[:20], 7, 8], [5, *first[1:]], first]
    tokens = []
    chunk = model.config.prefill_chunk_size
    assert chunk is not None
    for cache in (None, PrefixCache(model, 1 << 30), PrefixCache(model, 1 << 30, block_tokens=2 * chunk)):
        engine = Qwen35Engine(model, cache)
        outputs: dict[int, list[int]] = {}
        for prompt in prompts:
            request_id = engine.add(Request(prompt, STEPS))
            outputs[request_id] = [output.token for output in engine.stream(request_id) if output.token is not None]
            if cache is not None:
                assert cache.restore(0, cache.chain([*prompt, 0])) == len(prompt) // cache.block * cache.block
        tokens.append([*outputs.values()])
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("simulated", [False, True], ids=["CPU", "simulated device"])
def test_a_prefix_with_another_image_is_not_restored(simulated: bool, tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    model: Any = load(str(tmp_path), batch_size=2, ctx_batch_size=1, is_continuous_batching=True, prefill_chunk_size=4)
    model = put_on_simulated_device(model) if simulated else model
    row = EXAMPLE[0]
    pixels = media([row])
    changed = {**pixels, "pixel_values": pixels["pixel_values"].roll(1, 0)}
    cold = [answer(Qwen35Engine(model), row.ids, given) for given in (pixels, changed)]
    engine = Qwen35Engine(model, PrefixCache(model, budget_bytes=1 << 30))
    assert [answer(engine, row.ids, given) for given in (pixels, changed, pixels)] == [*cold, cold[0]]
    assert cold[0] != cold[1], "the images do not matter here, and the test proves nothing"


def answer(engine: Qwen35Engine, prompt: list[int], given: dict[str, torch.Tensor]) -> list[int | None]:
    return [output.token for output in engine.stream(engine.add(Request(prompt, STEPS, media=given)))]
