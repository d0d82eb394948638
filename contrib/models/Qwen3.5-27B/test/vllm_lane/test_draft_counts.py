# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM counts the drafts up to the end of an answer, and gets all of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import Request

from qwen35_vllm.draft_counts import end_of_answer
from support.models import random_prompts
from support.speculation import save_markov_checkpoint
from support.vllm_engines import answers, engine_of, nest_config

pytestmark = pytest.mark.vllm

DRAFTS = 3


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_end_is_where_vllm_s_scheduler_ends_the_answer(data: st.DataObject) -> None:
    eos, stops = data.draw(st.sampled_from([None, 1])), data.draw(st.lists(st.integers(2, 3), max_size=2))
    least = data.draw(st.integers(0, 6))
    params = SamplingParams(max_tokens=data.draw(st.integers(max(least, 1), 9)), min_tokens=least, stop_token_ids=stops)
    params._eos_token_id = eos
    prompt = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    max_model_len = len(prompt) + data.draw(st.integers(max(least, 1), 15))
    request = Request("a", prompt, params, None)
    # The sampler lets no answer end before min_tokens.
    tokens = [
        data.draw(st.integers(4, 9) if i + 1 < least else st.integers(0, 9))
        for i in range(data.draw(st.integers(1, 12)))
    ]
    ends = []
    for token in tokens:
        request.append_output_token_ids(token)
        ends.append(check_stop(request, max_model_len))
    first = ends.index(True) if True in ends else None
    answered = data.draw(st.integers(0, len(tokens) - 1 if first is None else first))
    found = end_of_answer(params, len(prompt), answered, tokens[answered:], max_model_len)
    assert found == (None if first is None else first - answered)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose drafts are all right."""
    path = tmp_path_factory.mktemp("drafting") / "right"
    save_markov_checkpoint(path, seed=4)
    nest_config(path)
    return path


@pytest.mark.parametrize("greedy", [True, False], ids=["one program", "two programs"])
def test_drafts_count_up_to_the_end_of_an_answer(right: Path, greedy: bool) -> None:
    (prompt,) = random_prompts([9])
    chosen: dict[str, Any] = {"temperature": 0} if greedy else {"temperature": 1, "top_k": 1, "seed": 1}

    def counted(engine: Any) -> tuple[int, int, int]:
        found = {metric.name: metric for metric in engine.get_metrics()}
        return tuple(
            found[f"vllm:spec_decode_num_{name}"].value for name in ("drafts", "draft_tokens", "accepted_tokens")
        )

    speculative = {"method": "mtp", "num_speculative_tokens": DRAFTS}
    with engine_of(right, speculative_config=speculative, disable_log_stats=False) as engine:
        whole = answers(engine, [prompt], SamplingParams(max_tokens=14, ignore_eos=True, **chosen))[0]
        ends = [(n, SamplingParams(max_tokens=n, ignore_eos=True, **chosen)) for n in range(1, 11)]
        for n in range(2, 11):
            if whole[n - 1] not in whole[: n - 1]:
                ends.append(
                    (n, SamplingParams(max_tokens=40, stop_token_ids=[whole[n - 1]], ignore_eos=True, **chosen))
                )
        assert len(ends) > 12, "answers that end at tokens, too"
        for n, params in ends:
            before = counted(engine)
            assert answers(engine, [prompt], params) == [whole[:n]]
            steps, drafted, accepted = (new - old for new, old in zip(counted(engine), before, strict=True))
            # The first token comes with the prompt; a step gives those of all its drafts, and one more.
            full, rest = divmod(n - 1, DRAFTS + 1)
            assert (steps, drafted, accepted) == (full + (rest > 0), *[DRAFTS * full + rest] * 2), params
