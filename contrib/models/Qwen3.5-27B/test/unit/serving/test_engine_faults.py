# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What fails for one request ends it alone: the others get the tokens they get alone, and the engine goes on.

Each failure is made below the package: a program of the simulated device that raises, or gives logits that are no
numbers, a function of PyTorch that fails in the sampling, in the encoder of images or in a copy of a block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35 import FinishReason, NeuronQwen35ForCausalLM, PrefixCache, Qwen35Engine, Request, StepOutput
from qwen35.phase import Phase
from qwen35.serving.sampling import GREEDY, SamplingOptions
from support.models import load_neuron, random_prompts, save_checkpoint
from support.simulated_device import faults, put_on_simulated_device
from support.vl_cases import EXAMPLE, load, media, save_vl_checkpoint

pytestmark = pytest.mark.usefixtures("backend")

WITHOUT_SHRINKING = (HypothesisPhase.explicit, HypothesisPhase.generate)
SEQ_LEN, STEPS = 64, 6
OPTIONS: dict[str, Any] = dict(batch_size=3, ctx_batch_size=2, is_continuous_batching=True, prefill_chunk_size=8)
PROMPTS = random_prompts([3, 20, 9, 33, 16, 1])
PROMPTS += [PROMPTS[3][:24] + PROMPTS[0], PROMPTS[1][:16] + PROMPTS[2]]
SAMPLING = [GREEDY, SamplingOptions(temperature=1.0, seed=1), GREEDY, SamplingOptions(temperature=0.8, top_k=9, seed=2)]
REQUESTS = [Request(prompt, STEPS, SAMPLING[i % 4]) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, seed=1, num_hidden_layers=2, full_attention_interval=2)
    return path


@pytest.fixture(scope="module", params=["CPU", "device"])
def model(request: pytest.FixtureRequest, path: Path) -> NeuronQwen35ForCausalLM:
    model = load_neuron(path, seq_len=SEQ_LEN, **OPTIONS)
    return put_on_simulated_device(model) if request.param == "device" else model


@pytest.fixture(scope="module")
def alone(model: NeuronQwen35ForCausalLM) -> list[list[int]]:
    """The tokens of each request by itself, where nothing fails; test_engine.py has the oracle of these."""
    return [tokens_of([*engine.stream(engine.add(each))]) for each in REQUESTS for engine in [Qwen35Engine(model)]]


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [output.token for output in outputs if output.token is not None]


def run(engine: Qwen35Engine, rounds: int = 200) -> dict[int, list[StepOutput]]:
    """All outputs by request, until the engine has nothing to do."""
    outputs: dict[int, list[StepOutput]] = {}
    for _ in range(rounds):
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        if not engine.has_work:
            return outputs
    raise AssertionError(f"the engine still has work after {rounds} rounds")


def failed(outputs: dict[int, list[StepOutput]]) -> dict[int, str]:
    """Which requests ended with an error, and its message."""
    found = {}
    for request_id, of_request in outputs.items():
        *earlier, last = of_request
        assert not any(output.finish_reason for output in earlier), f"request {request_id} continues after its end"
        if last.finish_reason is FinishReason.ERROR:
            assert last.token is None and last.error is not None and "\n" not in last.error
            found[request_id] = last.error
        else:
            assert last.error is None
    return found


def others_are_as_alone(outputs: dict[int, list[StepOutput]], alone: list[list[int]]) -> None:
    errors = failed(outputs)
    for request_id, tokens in enumerate(alone[: len(outputs)]):
        got = tokens_of(outputs[request_id])
        assert got == (tokens[: len(got)] if request_id in errors else tokens), f"request {request_id}"


@contextmanager
def failing(function: str, module: str, calls: Callable[[int], bool]) -> Iterator[list[int]]:
    """Let a function of PyTorch fail when a module of the package makes the n-th call of it, for n that `calls` takes.

    Yields the numbers of the calls that failed.
    """
    owner = torch.Tensor if hasattr(torch.Tensor, function) and not hasattr(torch, function) else torch
    owner = torch.nn.functional if hasattr(torch.nn.functional, function) else owner
    original, count, hits = getattr(owner, function), 0, []

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if sys._getframe(1).f_globals["__name__"] == module:
            count += 1
            if calls(count):
                hits.append(count)
                raise RuntimeError(f"{function} failed\nin two lines")
        return original(*args, **kwargs)

    setattr(owner, function, patched)
    try:
        yield hits
    finally:
        setattr(owner, function, original)


def test_a_failed_decoding_call_ends_the_rows_in_it_and_no_others(
    model: NeuronQwen35ForCausalLM, alone: list[list[int]]
) -> None:
    engine = Qwen35Engine(model)
    steps = 0

    def fault(phase: Phase, slots: list[int], logits: torch.Tensor) -> None:
        nonlocal steps
        steps += phase is Phase.TOKEN_GENERATION
        if phase is Phase.TOKEN_GENERATION and steps == 3:
            raise RuntimeError("NRT_EXEC_UNIT_FAILED")

    for request in REQUESTS:
        engine.add(request)
    with faults(model, fault):
        outputs = run(engine)
    others_are_as_alone(outputs, alone)
    assert failed(outputs) == dict.fromkeys([0, 1], "RuntimeError: NRT_EXEC_UNIT_FAILED"), "2 is still being encoded"
    assert steps > 3, "the engine went on"


def test_a_failed_encoding_call_ends_the_rows_in_it_and_decoding_goes_on(
    model: NeuronQwen35ForCausalLM, alone: list[list[int]]
) -> None:
    cache = PrefixCache(model, 1 << 30)
    engine = Qwen35Engine(model, cache)
    kept: list[int] = []

    def fault(phase: Phase, slots: list[int], logits: torch.Tensor) -> None:
        if phase is Phase.CONTINUATION and not kept:
            kept.append(cache.blocks)
            raise RuntimeError("failed")

    engine.add(REQUESTS[0])
    early = engine.step()
    for case in (1, 3, 2):
        engine.add(REQUESTS[case])
    with faults(model, fault):
        early += engine.step()  # the first pieces of two prompts
        early += engine.step()  # their next pieces
        assert kept == [2] and cache.blocks == 2, "no piece of the call that failed is kept"
        outputs = run(engine)
    for output in reversed(early):
        outputs.setdefault(output.request_id, []).insert(0, output)
    assert [*sorted(failed(outputs))] == [1, 2]
    others_are_as_alone(outputs, [alone[case] for case in (0, 1, 3, 2)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("phase", [phase for phase in Phase if not phase.drafts])
def test_logits_that_are_no_numbers_end_their_row_alone(
    phase: Phase, value: float, model: NeuronQwen35ForCausalLM, alone: list[list[int]]
) -> None:
    cache = PrefixCache(model, 1 << 30)
    engine = Qwen35Engine(model, cache)
    victims: list[int] = []

    def fault(called: Phase, slots: list[int], logits: torch.Tensor) -> None:
        if called is phase and not victims and 1 in slots:
            victims.append(next(s.id for s in engine._sequences if s.row is not None and s.row.slot == 1))
            logits[slots.index(1), -1, 7] = value
            # As after an overflow: what was cached of it is no number either.
            for entries in model.cache_entries():
                for view in model.cache_layout.slot(entries, 1).key_values:
                    view.fill_(torch.nan)

    for request in REQUESTS:
        engine.add(request)
    with faults(model, fault):
        outputs = run(engine)
    others_are_as_alone(outputs, alone)
    assert [*failed(outputs)] == victims
    assert failed(outputs)[victims[0]].startswith("ValueError: 1 of 160 logits are nan or infinite: ")
    for request in REQUESTS:
        engine.add(request)
    later = run(engine)
    assert [tokens_of(later[i]) for i in sorted(later)] == alone, "neither the slot nor the cache kept any of it"


def test_an_engine_over_slots_that_hold_no_numbers_gives_the_tokens_of_a_clean_one(
    model: NeuronQwen35ForCausalLM, alone: list[list[int]]
) -> None:
    """Whoever ran the model before, an engine or an adapter, may have left them so."""
    for entries in model.cache_entries():
        for slot in range(OPTIONS["batch_size"]):
            for views in model.cache_layout.slot(entries, slot):
                for view in views:
                    view.fill_(torch.nan)
    engine = Qwen35Engine(model)
    for request in REQUESTS:
        engine.add(request)
    outputs = run(engine)
    assert [tokens_of(outputs[i]) for i in sorted(outputs)] == alone and not failed(outputs)


def test_failed_sampling_ends_its_row_alone(model: NeuronQwen35ForCausalLM, alone: list[list[int]]) -> None:
    engine = Qwen35Engine(model)
    for request in REQUESTS:
        engine.add(request)
    with failing("multinomial", "qwen35.serving.sampling", lambda call: call == 3) as hits:
        outputs = run(engine)
    others_are_as_alone(outputs, alone)
    assert hits and [*failed(outputs).values()] == ["RuntimeError: multinomial failed in two lines"]


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_a_failed_copy_of_a_block_ends_its_row_alone(
    call: int, model: NeuronQwen35ForCausalLM, alone: list[list[int]]
) -> None:
    """Of a block that is stored, in the first run, and of one that is restored, in the second."""
    engine = Qwen35Engine(model, PrefixCache(model, 1 << 30))
    for _ in range(2):
        first = engine._next_id
        for request in REQUESTS:
            engine.add(request)
        with failing("copy_", "qwen35.serving.prefix_cache", lambda count: count == call) as hits:
            outputs = {request_id - first: each for request_id, each in run(engine).items()}
        others_are_as_alone(outputs, alone)
        assert hits == [call] and [*failed(outputs).values()] == ["RuntimeError: copy_ failed in two lines"]
    for i, request in enumerate(REQUESTS):
        assert tokens_of([*engine.stream(engine.add(request))]) == alone[i]


def test_a_device_that_fails_for_ever_ends_every_request_once(model: NeuronQwen35ForCausalLM) -> None:
    calls = 0

    def fault(phase: Phase, slots: list[int], logits: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("NRT_CLOSED")

    engine = Qwen35Engine(model)
    for request in REQUESTS:
        engine.add(request)
    with faults(model, fault):
        outputs = run(engine)
    assert [[o.error for o in outputs[i]] for i in sorted(outputs)] == [["RuntimeError: NRT_CLOSED"]] * len(REQUESTS)
    assert calls <= len(REQUESTS), "no call is tried again"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("phase", [phase for phase in Phase if not phase.drafts])
def test_an_interrupt_passes_through_and_ends_the_rows_whose_step_it_cut_off(
    phase: Phase, interrupt: type[BaseException], model: NeuronQwen35ForCausalLM, alone: list[list[int]]
) -> None:
    engine = Qwen35Engine(model, PrefixCache(model, 1 << 30))
    cut: list[int] = []

    def fault(called: Phase, slots: list[int], logits: torch.Tensor) -> None:
        if called is phase and not cut:
            cut.extend(s.id for s in engine._sequences if s.row is not None and s.row.slot in slots)
            raise interrupt

    for request in REQUESTS:
        engine.add(request)
    outputs: dict[int, list[StepOutput]] = {}
    with faults(model, fault), pytest.raises(interrupt):
        while True:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
    for request_id, later in run(engine).items():
        outputs.setdefault(request_id, []).extend(later)
    others_are_as_alone(outputs, alone)
    assert {*failed(outputs)} == {*cut} and cut


def test_an_interrupt_in_the_sampling_of_a_row_leaves_the_engine_right(
    model: NeuronQwen35ForCausalLM, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Qwen35Engine(model)
    for request in REQUESTS:
        engine.add(request)
    outputs: dict[int, list[StepOutput]] = {}

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    for _ in range(6):
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "multinomial", interrupted)
        while True:
            engine.step()
    for request_id, later in run(engine).items():
        outputs.setdefault(request_id, []).extend(later)
    others_are_as_alone(outputs, alone)
    assert 1 <= len(failed(outputs)) <= OPTIONS["batch_size"]


@pytest.mark.parametrize("request_id", [-1, 10**6, "0", None, 0.5, [0], True])
def test_an_id_that_no_request_has_is_refused(request_id: Any, model: NeuronQwen35ForCausalLM) -> None:
    engine = Qwen35Engine(model)
    for request in REQUESTS[:2]:
        engine.add(request)
    for use in (engine.stream, engine.cancel):
        with pytest.raises(KeyError, match=r"was given to no request: pass what add\(\) returned"):
            use(request_id)


INTERRUPTED = [
    Request(PROMPTS[0], 2, SAMPLING[1], n=2),
    Request(PROMPTS[2], 3, SAMPLING[0]),
    Request(PROMPTS[5], 1, SAMPLING[3]),
]


def run_interrupted(model: NeuronQwen35ForCausalLM, line: int) -> tuple[dict[tuple[int, int], list[StepOutput]], int]:
    """Outputs by request and continuation, where a KeyboardInterrupt comes before the n-th line run of these methods.

    Also returns how many lines were run by then.
    """
    methods = [getattr(Qwen35Engine, name).__code__ for name in ("_call", "_after_piece", "_choose", "_emit", "cancel")]
    engine, lines = Qwen35Engine(model), 0
    outputs: dict[tuple[int, int], list[StepOutput]] = {}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code not in methods:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    def finish() -> None:
        while engine.has_work:
            for output in engine.step():
                outputs.setdefault((output.request_id, output.index), []).append(output)

    for request in INTERRUPTED:
        engine.add(request)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        finish()
        engine.cancel(engine.add(INTERRUPTED[1]))
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    finish()
    assert not engine._sequences
    return outputs, lines


def test_an_interrupt_at_any_line_ends_requests_once_and_changes_no_others(model: NeuronQwen35ForCausalLM) -> None:
    expected, lines = run_interrupted(model, 0)
    assert lines > 100
    for line in range(1, lines + 1):
        outputs, _ = run_interrupted(model, line)
        for key, of_sequence in outputs.items():
            *earlier, last = of_sequence
            assert last.finish_reason is not None, f"line {line}: {key} does not end"
            assert not any(output.finish_reason for output in earlier), f"line {line}: {key} ends twice"
            # The last is a copy of the second, and runs when the interrupt came before it was cancelled.
            got, whole = tokens_of(of_sequence), tokens_of(expected[(1, 0) if key == (3, 0) else key])
            is_cut = last.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED)
            assert got == (whole[: len(got)] if is_cut else whole), f"line {line}: {key}"
        assert {*expected} - {(3, 0)} <= {*outputs}, f"line {line}: a request is lost"


def faults_agree(model: NeuronQwen35ForCausalLM, alone: list[list[int]], data: st.DataObject) -> None:
    """Requests beside failures of all kinds; then all requests again, which must find nothing of them."""
    cached = data.draw(st.sampled_from([None, 1 << 14, 1 << 17, 1 << 30]))
    engine = Qwen35Engine(model, None if cached is None else PrefixCache(model, cached))
    kinds = st.sampled_from(["raise", "nan", "poison"])
    planned: dict[int, str] = data.draw(st.dictionaries(st.integers(1, 25), kinds, max_size=3))
    sampling_fails = data.draw(st.sets(st.integers(1, 12), max_size=2))
    copy_fails = data.draw(st.sets(st.integers(1, 30), max_size=2))
    order = data.draw(st.lists(st.integers(0, len(REQUESTS) - 1), min_size=2, max_size=8))
    ended_by_calls: set[int] = set()
    calls = 0

    def fault(phase: Phase, slots: list[int], logits: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        kind = planned.get(calls)
        if kind is None:
            return
        rows = {s.row.slot: s.id for s in engine._sequences if s.row is not None and s.row.slot in slots}
        if kind == "raise":
            ended_by_calls.update(rows.values())
            raise RuntimeError("failed")
        slot = min(rows)
        ended_by_calls.add(rows[slot])
        logits[slots.index(slot)] = torch.nan
        if kind == "poison":
            for entries in model.cache_entries():
                for view in model.cache_layout.slot(entries, slot).key_values:
                    view.fill_(torch.nan)

    for case in order:
        engine.add(REQUESTS[case])
    with (
        faults(model, fault),
        failing("multinomial", "qwen35.serving.sampling", lambda call: call in sampling_fails) as of_sampling,
        failing("copy_", "qwen35.serving.prefix_cache", lambda call: call in copy_fails) as of_copies,
    ):
        outputs = run(engine)
    errors = failed(outputs)
    assert ended_by_calls <= {*errors}
    assert len(errors) == len(ended_by_calls) + len(of_sampling) + len(of_copies), "one request for each failure"
    others_are_as_alone(outputs, [alone[case] for case in order])
    first = engine._next_id
    for request in REQUESTS:
        engine.add(request)
    later = run(engine)
    assert [tokens_of(later[first + i]) for i in range(len(REQUESTS))] == alone


def test_requests_beside_failures_of_all_kinds_get_what_they_get_alone(
    model: NeuronQwen35ForCausalLM, alone: list[list[int]]
) -> None:
    @settings(max_examples=25, phases=WITHOUT_SHRINKING)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        faults_agree(model, alone, data)

    check()


@pytest.mark.slow
def test_400_schedules_of_failures(model: NeuronQwen35ForCausalLM, alone: list[list[int]]) -> None:
    @settings(max_examples=200, phases=WITHOUT_SHRINKING)  # on a CPU, and on the device
    @given(st.data())
    def check(data: st.DataObject) -> None:
        faults_agree(model, alone, data)

    check()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("on_device", [False, True], ids=["CPU", "device"])
def test_a_picture_that_fails_in_the_encoder_ends_its_request_alone(
    on_device: bool, cached: bool, tmp_path: Path
) -> None:
    save_vl_checkpoint(tmp_path)
    model: Any = load(str(tmp_path), batch_size=2, ctx_batch_size=1, is_continuous_batching=True, prefill_chunk_size=8)
    model = put_on_simulated_device(model) if on_device else model
    requests = [Request(row.ids, STEPS, media=media([row])) for row in (*EXAMPLE, EXAMPLE[0])]
    expected = [tokens_of([*engine.stream(engine.add(r))]) for r in requests for engine in [Qwen35Engine(model)]]
    engine = Qwen35Engine(model, PrefixCache(model, 1 << 30) if cached else None)
    for request in requests:
        engine.add(request)
    # Two blocks of the encoder, a call each: the first picture runs through, the second fails in its second block.
    with failing("scaled_dot_product_attention", "qwen35.vision.encoder", lambda call: call == 6) as hits:
        outputs = run(engine)
    assert len(hits) == 1 and [*failed(outputs)] == [2]
    others_are_as_alone(outputs, expected)


@pytest.fixture(scope="module")
def vl_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("vision-language")
    save_vl_checkpoint(path)
    return load(str(path), batch_size=2, ctx_batch_size=1, is_continuous_batching=True, prefill_chunk_size=8)


ROW = EXAMPLE[0]
IDS = st.lists(st.integers(-2, 170), max_size=12)
PROMPT_LIKE = st.one_of(
    st.just(ROW.ids),
    st.just(np.array(ROW.ids, dtype=np.int32)),
    st.just(torch.tensor(ROW.ids)),
    st.just(ROW.ids[:-3]),
    IDS,
    IDS.map(np.array),
    st.lists(st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=2)), max_size=4),
    st.sampled_from([None, "text", b"bytes", 3, {}, [[1]], torch.zeros(2, 2)]),
)
NUMBER_LIKE = st.one_of(
    st.sampled_from([1, 2, 3, np.int64(2), None, True, "3", 2.0, torch.tensor(2), 10**9]),
    st.integers(-1, 9),
    st.floats(),
)
GRID_LIKE = st.one_of(
    st.lists(st.tuples(*[st.integers(-1, 8)] * 3), max_size=3).map(lambda grids: torch.tensor(grids).reshape(-1, 3)),
    st.sampled_from([None, torch.tensor([[10**9, 2, 2]]), torch.ones(3), torch.ones(1, 3), "grid", [[1, 4, 6]]]),
)
PIXELS = media([ROW])["pixel_values"]
PIXEL_LIKE = st.sampled_from(
    [
        *(
            PIXELS,
            PIXELS.half(),
            PIXELS.double(),
            PIXELS.bfloat16(),
            PIXELS[1:],
            PIXELS[:, 1:],
            PIXELS[0],
            PIXELS * 1e30,
        ),
        *(PIXELS.int(), PIXELS / 0, PIXELS.clone().requires_grad_(), PIXELS.t(), PIXELS.t().contiguous().t()),
        *(PIXELS[:0], PIXELS.numpy(), None, "pixels", PIXELS.to("meta"), PIXELS.to_sparse(), PIXELS.cfloat()),
    ]
)
MEDIA_LIKE = st.one_of(
    st.just(media([ROW])),
    st.just({}),
    st.fixed_dictionaries({"pixel_values": PIXEL_LIKE, "image_grid_thw": st.just(media([ROW])["image_grid_thw"])}),
    st.fixed_dictionaries({"pixel_values": st.just(PIXELS), "image_grid_thw": GRID_LIKE}),
    st.dictionaries(
        st.sampled_from(["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "sound", 3]),
        st.one_of(PIXEL_LIKE, GRID_LIKE),
        max_size=3,
    ),
    st.sampled_from([None, [], "media"]),
)
FIELDS = {
    "prompt": PROMPT_LIKE,
    "max_new_tokens": NUMBER_LIKE,
    "sampling": st.sampled_from([GREEDY, SAMPLING[1], SAMPLING[3], None, {}, 0.5]),
    "eos_token_ids": st.one_of(st.just(()), PROMPT_LIKE),
    "media": MEDIA_LIKE,
    "n": st.one_of(st.just(1), NUMBER_LIKE),
    "logprobs": st.one_of(st.none(), NUMBER_LIKE),
}
VALID: dict[str, Any] = dict(prompt=ROW.ids, max_new_tokens=3, media=media([ROW]))


def anything_is_refused_or_ends(model: Any, expected: list[int], fields: dict[str, Any], cached: bool) -> None:
    engine = Qwen35Engine(model, PrefixCache(model, 1 << 20) if cached else None)
    neighbour = engine.add(Request(EXAMPLE[2].ids, STEPS, media=media([EXAMPLE[2]])))
    outputs = {neighbour: engine.step()}
    try:
        engine.add(Request(**{**VALID, **fields}))
    except ValueError as error:
        assert str(error).startswith("this request cannot run: ") and "\n" not in str(error) and len(str(error)) < 1000
    for request_id, later in run(engine, rounds=1000).items():
        outputs.setdefault(request_id, []).extend(later)
    assert tokens_of(outputs[neighbour]) == expected
    for request_id, error in failed({i: [o for o in each if o.index == 0] for i, each in outputs.items()}).items():
        assert request_id != neighbour and "logits are nan or infinite" in error, error


@pytest.fixture(scope="module")
def expected(vl_model: Any) -> list[int]:
    engine = Qwen35Engine(vl_model)
    return tokens_of([*engine.stream(engine.add(Request(EXAMPLE[2].ids, STEPS, media=media([EXAMPLE[2]]))))])


FIELD_CHANGES = st.lists(st.sampled_from([*FIELDS]), min_size=1, max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


def test_a_request_of_anything_is_refused_in_a_line_or_ends(vl_model: Any, expected: list[int]) -> None:
    @settings(max_examples=100, phases=WITHOUT_SHRINKING)
    @given(FIELD_CHANGES, st.booleans())
    def check(fields: dict[str, Any], cached: bool) -> None:
        anything_is_refused_or_ends(vl_model, expected, fields, cached)

    check()


@pytest.mark.slow
def test_1000_requests_of_anything_are_refused_in_a_line_or_end(vl_model: Any, expected: list[int]) -> None:
    @settings(max_examples=1000, phases=WITHOUT_SHRINKING)
    @given(FIELD_CHANGES, st.booleans())
    def check(fields: dict[str, Any], cached: bool) -> None:
        anything_is_refused_or_ends(vl_model, expected, fields, cached)

    check()
