# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""transformers' `generate` over a model that drafts tokens gives what it gives without drafts, in fewer calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from qwen35 import HuggingFaceGenerationAdapter, NeuronQwen35ForCausalLM
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.phase import Phase
from support import vl_cases
from support.models import load_neuron, random_prompts, right_padded
from support.simulated_device import faults, put_on_simulated_device
from support.speculation import save_markov_checkpoint

pytestmark = pytest.mark.usefixtures("backend")

NEW = 20
IDS, MASK = right_padded(random_prompts([5, 1, 17]))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_markov_checkpoint(path, seed=1, branch=0.15, num_hidden_layers=2, full_attention_interval=2)
    return path


@pytest.fixture(scope="module")
def models(path: Path) -> tuple[NeuronQwen35ForCausalLM, NeuronQwen35ForCausalLM]:
    """Without drafts, and with."""
    return load_neuron(path, batch_size=3), load_neuron(path, batch_size=3, num_speculative_tokens=3)


@contextmanager
def counted(model: NeuronQwen35ForCausalLM) -> Iterator[list[Phase]]:
    seen: list[Phase] = []
    with faults(model, lambda phase, slots, outputs: seen.append(phase)):
        yield seen


def generate(model: NeuronQwen35ForCausalLM, eos: list[int] | None = None, **options: Any) -> Any:
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None
    torch.manual_seed(7)
    processors, criteria = options.pop("logits_processor", []), options.pop("stopping_criteria", [])
    config = GenerationConfig(max_new_tokens=NEW, pad_token_id=0, eos_token_id=eos, **options)
    output = adapter.generate(
        IDS, attention_mask=MASK, generation_config=config, logits_processor=processors, stopping_criteria=criteria
    )
    return adapter, output


@pytest.mark.parametrize(
    "options",
    [dict(do_sample=False), dict(do_sample=True, temperature=0.4), dict(do_sample=False, repetition_penalty=1.2)],
    ids=["greedy", "sampled", "penalised"],
)
@pytest.mark.parametrize("ends", [False, True], ids=["all tokens", "rows end"])
def test_tokens_are_those_without_drafts(models: Any, options: dict[str, Any], ends: bool) -> None:
    if NXDI_AVAILABLE and options["do_sample"]:
        pytest.skip("NxDI's own sampler looks for 256 tokens, of a vocabulary of 160")
    plain, drafting = models
    eos = None
    if ends:
        tokens = generate(plain, **options)[1][:, IDS.shape[1] :]
        eos = [int(tokens[0, 4]), int(tokens[1, 11])]
    expected = generate(plain, eos, **options)[1]
    adapter, tokens = generate(drafting, eos, **options)
    assert torch.equal(tokens, expected)
    assert adapter.acceptance is not None and adapter.acceptance.tokens_per_step > 1.2
    new = expected[:, IDS.shape[1] :]
    given = sum(len(row) - 1 - row.flip(0).tolist().index(next(t for t in row.flip(0).tolist() if t)) for row in new)
    assert adapter.acceptance.tokens == given, "the first token is no step's, and nothing comes after an end"


class EndsRows(StoppingCriteria):
    """Ends each row after so many tokens, whatever they are."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.lengths <= input_ids.shape[1] - IDS.shape[1]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}], ids=["greedy", "penalised"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])
def test_nothing_is_counted_after_the_end_of_a_row_that_a_criterion_ends(
    models: Any, options: dict[str, Any], padded: bool
) -> None:
    lengths = [3, 9, 14]
    every, unseen = generate(models[0], **options)[1], 159
    assert not (every == unseen).any()
    expected, (adapter, tokens) = (
        generate(model, [unseen] if padded else None, stopping_criteria=[EndsRows(lengths)], **options)
        for model in models
    )
    assert torch.equal(tokens, expected[1]), "transformers pads rows that have ended where there is an end token"
    given = sum(lengths) if padded else 3 * max(lengths)
    assert adapter.acceptance is not None and adapter.acceptance.tokens == given - 3, "the first token is no step's"


def test_a_greedy_batch_takes_one_program_a_step_and_rows_go_ahead(models: Any) -> None:
    _, drafting = models
    with counted(drafting) as programs:
        generate(drafting)
    assert programs[:2] == [Phase.CONTEXT_ENCODING, Phase.DRAFT]
    assert {*programs[2:]} == {Phase.SPECULATION}
    assert len(programs) - 2 < 0.8 * (NEW - 1), "rows that wait for others are ahead, not in the way"


def test_logits_that_are_asked_for_are_the_models(models: Any) -> None:
    expected, ours = (generate(model, return_dict_in_generate=True, output_logits=True)[1] for model in models)
    assert torch.equal(ours.sequences, expected.sequences)
    for one, other in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)  # float32, logits of order ten


def test_a_model_without_drafts_counts_none(models: Any) -> None:
    adapter, _ = generate(models[0])
    assert adapter.acceptance is None


def test_images_have_drafts_too(tmp_path: Path) -> None:
    vl_cases.save_vl_checkpoint(tmp_path, mtp=True)
    options = dict(prefill_chunk_size=16)
    expected, _ = vl_cases.greedy(vl_cases.load(str(tmp_path), **options), vl_cases.EXAMPLE, 8)
    for on_device in (False, True):
        model = vl_cases.load(str(tmp_path), num_speculative_tokens=2, **options)
        tokens, _ = vl_cases.greedy(put_on_simulated_device(model) if on_device else model, vl_cases.EXAMPLE, 8)
        assert torch.equal(tokens, expected)
