# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Each of vLLM's sampling options gives what a plain computation gives, from the logits of a model of our own.

`Oracle` encodes whole prompts with answers, one row at a time: nothing of the worker, of its rows or of vLLM's sampler.
Its logits are the worker's within 1e-4 (float32), and the largest two are farther apart wherever tokens are compared.
Draws are compared in distribution: 2,000 draws of a token of probability p are within 5 standard deviations,
5 * sqrt(p (1 - p) / 2000), of which a wrong result is seen in fewer than one run of a million.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.runner import ModelRunner, Row
from qwen35_vllm.batch_sampler import BatchSampler, takes_most_likely
from support.models import TINY, load_neuron
from support.vllm_engines import add, answers, close, finish, make_engine, require_no_row_left, tokens_of

pytestmark = pytest.mark.vllm

PROMPT = [7, 3, 99, 42, 7, 7, 120, 15, 64, 3]
V, DRAWS, TOKENS = TINY["vocab_size"], 2000, 10
Choose = Callable[[torch.Tensor, list[int]], int]


class Oracle:
    """Logits [V] float32 after a sequence of tokens."""

    def __init__(self, path: Path) -> None:
        self._runner = ModelRunner(load_neuron(path, seq_len=128))

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return self._runner.encode([Row(0, [*tokens])]).all_logits()[0].float()

    def answer(self, choose: Choose, prompt: Sequence[int] = PROMPT, count: int = TOKENS) -> list[int]:
        """The tokens that `choose` takes from the logits and the answer so far."""
        answer: list[int] = []
        for _ in range(count):
            answer.append(choose(self.logits([*prompt, *answer]), answer))
        return answer


@pytest.fixture(scope="module")
def oracle(served_checkpoint: Path) -> Oracle:
    return Oracle(served_checkpoint)


@pytest.fixture(scope="module")
def engine(served_checkpoint: Path) -> Iterator[LLMEngine]:
    engine = make_engine(served_checkpoint, max_num_seqs=8, max_logprobs=V)
    yield engine
    require_no_row_left(engine)
    close(engine)


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **options})


def test_greedy_takes_the_most_likely_token(engine: LLMEngine, oracle: Oracle) -> None:
    assert answers(engine, [PROMPT], greedy()) == [oracle.answer(lambda logits, _: int(logits.argmax()))]


def penalised(logits: torch.Tensor, answer: list[int], repetition: float, frequency: float, presence: float) -> int:
    """Penalties as their papers and OpenAI's reference have them, a token at a time."""
    for token in {*PROMPT, *answer}:
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token, times in Counter(answer).items():
        logits[token] -= frequency * times + presence
    return int(logits.argmax())


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"), [(1.8, 0, 0), (0.6, 0, 0), (1, 1.5, 0), (1, 0, 1.8), (1.3, 0.7, -0.4)]
)
def test_penalties_change_the_logits_of_what_was_said(
    engine: LLMEngine, oracle: Oracle, repetition: float, frequency: float, presence: float
) -> None:
    params = greedy(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    expected = oracle.answer(lambda logits, answer: penalised(logits, answer, repetition, frequency, presence))
    assert answers(engine, [PROMPT], params) == [expected]


def test_logit_bias_is_added(engine: LLMEngine, oracle: Oracle) -> None:
    bias = {5: 3.0, 77: -2.5, 101: 2.0}
    added = torch.zeros(V).index_put_((torch.tensor([*bias]),), torch.tensor([*bias.values()]))
    expected = oracle.answer(lambda logits, _: int((logits + added).argmax()))
    assert answers(engine, [PROMPT], greedy(logit_bias=bias)) == [expected]


def test_only_allowed_tokens_are_taken(engine: LLMEngine, oracle: Oracle) -> None:
    allowed = [2, 30, 31, 90, 150]
    expected = oracle.answer(lambda logits, _: max(allowed, key=lambda token: float(logits[token])))
    assert answers(engine, [PROMPT], greedy(allowed_token_ids=allowed)) == [expected]


def test_stop_tokens_are_not_taken_before_min_tokens(engine: LLMEngine, oracle: Oracle) -> None:
    plain = oracle.answer(lambda logits, _: int(logits.argmax()))
    stops = plain[2:5]

    def choose(logits: torch.Tensor, answer: list[int]) -> int:
        if len(answer) < 6:
            logits[stops] = -math.inf
        return int(logits.argmax())

    expected = oracle.answer(choose)
    end = next((i + 1 for i, token in enumerate(expected) if token in stops), len(expected))
    assert answers(engine, [PROMPT], greedy(stop_token_ids=stops, min_tokens=6)) == [expected[:end]]
    first = plain.index(next(token for token in plain if token in stops))
    assert answers(engine, [PROMPT], greedy(stop_token_ids=stops)) == [plain[: first + 1]]


def state(request_id: str, params: SamplingParams) -> CachedRequestState:
    return CachedRequestState(
        req_id=request_id,
        prompt_token_ids=PROMPT,
        mm_features=[],
        sampling_params=params,
        generator=None if params.seed is None else torch.Generator().manual_seed(params.seed),
        block_ids=([0],),
        num_computed_tokens=0,
        output_token_ids=[],
    )


def test_a_request_gets_no_constraint_of_one_that_had_its_place_in_the_batch(engine: LLMEngine) -> None:
    sampler = BatchSampler(engine.vllm_config)
    constrained = {
        "allowed_token_ids": [3],
        "logit_bias": {3: 50.0},
        "repetition_penalty": 9.0,
        "bad_words": ["a"],
        "stop_token_ids": [9],
        "min_tokens": 5,
    }
    constraints = [
        state(name, greedy(**{name: value}) if name != "bad_words" else greedy()) for name, value in constrained.items()
    ]
    constraints[3].sampling_params._bad_words_token_ids = [[9]]
    plain = [state(str(i), greedy()) for i in range(8)]
    logits = torch.zeros(V)
    logits[9], logits[3] = 10.0, 1.0
    for other in constraints:
        for before, after in (([*plain[:2], other], [plain[0], other]), ([other, *plain[:2]], plain[:2])):
            sampler.hold(before)
            sampler.hold(after)
            order = sampler.hold([*after, *plain[2:6]])
            tokens = sampler.sample(logits.repeat(len(order), 1)).sampled_token_ids
            found = dict(zip(order, tokens[:, 0].tolist(), strict=True))
            assert all(found[each.req_id] == 9 for each in plain if each.req_id in found), other.req_id


def test_a_request_that_begins_anew_is_held_as_it_is_now(engine: LLMEngine) -> None:
    sampler, logits = BatchSampler(engine.vllm_config), torch.zeros(V)
    logits[9] = 10.0
    for params, expected in ((greedy(), 9), (greedy(allowed_token_ids=[3]), 3), (greedy(repetition_penalty=1.1), 9)):
        assert sampler.hold([state("before", greedy()), state("same", params)]) == ["before", "same"]
        tokens = sampler.sample(logits.repeat(2, 1)).sampled_token_ids
        assert tokens[:, 0].tolist() == [9, expected]


def drawn(vllm_config: Any, logits: torch.Tensor, **options: Any) -> Counter[int]:
    """How often each token was drawn from the same logits [V], by all rows of a batch."""
    sampler, rows = BatchSampler(vllm_config), 8
    states = [state(str(i), SamplingParams(**options)) for i in range(rows)]
    for i, each in enumerate(states):
        if each.generator is not None:
            each.generator.manual_seed(i)
    counts: Counter[int] = Counter()
    for _ in range(DRAWS // rows):
        sampler.hold(states)
        counts.update(sampler.sample(logits.repeat(rows, 1)).sampled_token_ids[:, 0].tolist())
    return counts


def kept(probabilities: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return (probabilities * keep) / (probabilities * keep).sum()


def top_k(logits: torch.Tensor) -> torch.Tensor:
    return kept(logits.softmax(-1), logits >= logits.sort(descending=True).values[4])


def top_p(logits: torch.Tensor) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(-1) - probabilities[order]
    return kept(probabilities, torch.zeros(V).index_put_((order[before < 0.6],), torch.tensor(1.0)))


def min_p(logits: torch.Tensor) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    return kept(probabilities, probabilities >= 0.2 * probabilities.max())


@pytest.mark.parametrize(
    ("options", "distribution"),
    [
        ({"temperature": 1.0}, lambda logits: logits.softmax(-1)),
        ({"temperature": 0.5}, lambda logits: (logits / 0.5).softmax(-1)),
        ({"temperature": 2.0}, lambda logits: (logits / 2.0).softmax(-1)),
        ({"temperature": 1.0, "top_k": 5}, top_k),
        ({"temperature": 1.0, "top_p": 0.6}, top_p),
        ({"temperature": 1.0, "min_p": 0.2}, min_p),
        ({"temperature": 1.0, "seed": 4}, lambda logits: logits.softmax(-1)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_draws_have_the_distribution_that_is_asked_for(
    engine: LLMEngine, oracle: Oracle, options: dict[str, Any], distribution: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    torch.manual_seed(5)
    logits = oracle.logits(PROMPT)
    counts, expected = drawn(engine.vllm_config, logits, **options), distribution(logits)
    for token, probability in enumerate(expected.tolist()):
        allowed = 5 * math.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(counts[token] / DRAWS - probability) <= allowed + 1 / DRAWS, f"token {token}, p={probability:.4f}"


def test_a_seed_repeats_an_answer_and_other_seeds_give_others(engine: LLMEngine) -> None:
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=20, ignore_eos=True) for seed in (1, 1, 2)]
    one, same, other = answers(engine, [PROMPT] * 3, params)
    assert one == same != other


def test_the_n_answers_of_a_seed_are_those_of_the_seeds_that_follow(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=1, seed=8, max_tokens=20, ignore_eos=True)
    several = params.clone()
    several.n, several.output_kind = 3, RequestOutputKind.FINAL_ONLY
    add(engine, "several", PROMPT, several)
    found = tokens_of(finish(engine)["several"])
    each = []
    for seed in (8, 9, 10):
        one = params.clone()
        one.seed = seed
        each += answers(engine, [PROMPT], one)
    assert found == each


def test_logprobs_are_those_of_the_logits_before_penalties(engine: LLMEngine, oracle: Oracle) -> None:
    add(engine, "a", PROMPT, greedy(logprobs=4, repetition_penalty=1.5))
    answer = finish(engine)["a"].outputs[0]
    assert answer.logprobs is not None and len(answer.logprobs) == TOKENS
    for i, entries in enumerate(answer.logprobs):
        expected = oracle.logits([*PROMPT, *answer.token_ids[:i]]).log_softmax(-1)
        best = expected.topk(4).indices.tolist()
        assert {*entries} == {*best, answer.token_ids[i]}
        for token, entry in entries.items():
            assert abs(entry.logprob - float(expected[token])) < 1e-4
            assert entry.rank == int((expected >= expected[token]).sum())


@pytest.mark.parametrize(("count", "budget"), [(0, 128), (3, 16), (-1, 64)])
def test_prompt_logprobs_are_those_of_all_beginnings_of_the_prompt(
    served_checkpoint: Path, oracle: Oracle, count: int, budget: int
) -> None:
    options = {"prompt_logprobs": True, "prefill_chunk_size": 16, "ctx_batch_size": 2}
    engine = make_engine(served_checkpoint, options, max_num_batched_tokens=budget, max_logprobs=V)
    prompts = {"long": [*PROMPT] * 4, "beside": [*reversed(PROMPT)], "one token": [5]}
    for name, prompt in prompts.items():
        add(engine, name, prompt, greedy(prompt_logprobs=count, max_tokens=2))
    add(engine, "without", PROMPT, greedy())
    outputs = finish(engine)
    close(engine)
    for name, prompt in prompts.items():
        found = outputs[name].prompt_logprobs
        assert found is not None and found[0] is None and len(found) == len(prompt)
        for i, entries in enumerate(found[1:], start=1):
            assert entries is not None
            expected = oracle.logits(prompt[:i]).log_softmax(-1)
            best = expected.topk(V if count == -1 else count).indices.tolist()
            assert {*entries} == {*best, prompt[i]}
            assert all(abs(entry.logprob - float(expected[token])) < 1e-4 for token, entry in entries.items())
            assert entries[prompt[i]].rank == int((expected >= expected[prompt[i]]).sum())
    assert outputs["without"].prompt_logprobs is None


@pytest.mark.parametrize(
    ("options", "field"),
    [({"prompt_logprobs": 1}, "prompt_logprobs"), ({"logprob_token_ids": [3]}, "logprob_token_ids")],
)
def test_what_is_not_served_is_refused_before_it_is_queued(
    served_checkpoint: Path, options: dict[str, Any], field: str
) -> None:
    engine = make_engine(served_checkpoint)
    with pytest.raises(VLLMValidationError, match=rf"^{field} is not served: [^\n]*$"):
        add(engine, "refused", PROMPT, greedy(**options))
    assert not engine.has_unfinished_requests()
    close(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"logit_bias": {1: 1.0}},
        {"bad_words": ["a"]},
        {"allowed_token_ids": [1]},
        {"min_tokens": 1},
        {"structured_outputs": StructuredOutputsParams(choice=["a"])},
        {"frequency_penalty": 1.0},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_a_request_that_wants_more_than_the_most_likely_token_is_told(options: dict[str, Any]) -> None:
    assert takes_most_likely(greedy())
    assert takes_most_likely(
        greedy(top_k=3, top_p=0.5, min_p=0.1, seed=1, stop_token_ids=[3], stop="a", detokenize=True)
    )
    assert not takes_most_likely(greedy(**options))


JSON_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= ("ab" | "cd") "=" [0-9]'


def is_object(text: str) -> bool:
    value = json.loads(text)
    return {*value} == {"a", "b"} and value["a"] in range(100) and value["b"] in ("x", "y")


@pytest.fixture(scope="module")
def mini() -> Iterator[LLMEngine]:
    engine = make_engine(
        MINI_CHECKPOINT,
        max_num_seqs=6,
        max_model_len=96,
        skip_tokenizer_init=False,
        # A grammar of JSON with any whitespace lets a small model write nothing else.
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    yield engine
    require_no_row_left(engine)
    close(engine)


def texts(engine: LLMEngine, prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[Any]:
    """The first answer to each prompt of text."""
    for i, (prompt, of_prompt) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), prompt, of_prompt)
    outputs = finish(engine)
    return [outputs[str(i)].outputs[0] for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        ({"json": JSON_SCHEMA}, is_object),
        ({"regex": "[a-c]{3}-[0-9]{2}"}, lambda text: re.fullmatch("[a-c]{3}-[0-9]{2}", text)),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": GRAMMAR}, lambda text: re.fullmatch("(ab|cd)=[0-9]", text)),
    ],
    ids=["json", "regex", "choice", "grammar"],
)
def test_structured_answers_fit_and_leave_their_neighbours_alone(
    mini: LLMEngine, constraint: dict[str, Any], fits: Callable[[str], Any]
) -> None:
    prompt = "The capital of France is"
    plain = greedy(max_tokens=12)
    bound = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=60, structured_outputs=StructuredOutputsParams(**constraint)
        )
        for temperature, seed in ((0, None), (1.0, 3), (1.0, 4), (1.0, 5))
    ]
    (alone,) = texts(mini, [prompt], [plain])
    first, *others, last = texts(mini, [prompt] * 6, [plain, *bound, plain])
    assert list(first.token_ids) == list(last.token_ids) == list(alone.token_ids)
    for answer in others:
        assert answer.finish_reason == "stop" and fits(answer.text), answer.text


def test_bad_words_are_left_out(mini: LLMEngine) -> None:
    prompt = "The capital of France is"
    plain, without = texts(mini, [prompt] * 2, [greedy(), greedy(bad_words=[" Paris"])])
    assert "Paris" in plain.text and "Paris" not in without.text


def test_stop_strings_end_an_answer(mini: LLMEngine) -> None:
    (plain,) = texts(mini, ["The capital of France is"], [greedy(max_tokens=30)])
    stop = plain.text[3:6]
    (stopped,) = texts(mini, ["The capital of France is"], [greedy(max_tokens=30, stop=[stop])])
    assert stopped.finish_reason == "stop" and stopped.stop_reason == stop
    assert stopped.text == plain.text[: plain.text.index(stop)]


def test_an_answer_ends_at_max_model_len(engine: LLMEngine, oracle: Oracle) -> None:
    prompt = [*PROMPT] * 12
    add(engine, "a", prompt, greedy(max_tokens=None))
    answer = finish(engine)["a"].outputs[0]
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == engine.vllm_config.model_config.max_model_len - len(prompt)
    assert list(answer.token_ids) == oracle.answer(
        lambda logits, _: int(logits.argmax()), prompt, len(answer.token_ids)
    )
