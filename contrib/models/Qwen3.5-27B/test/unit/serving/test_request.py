# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot run are told everything that is wrong with them, from the model's limits alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qwen35 import Request
from qwen35.serving.request import ModelLimits, checked_request

LIMITS = ModelLimits(vocab_size=160, seq_len=64)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1), r"prompt is empty: give at least one token"),
        (Request([1], 0), r"max_new_tokens=0: must be at least 1"),
        (Request([1] * 60, 5), r"prompt of 60 tokens and max_new_tokens=5 exceed seq_len=64: shorten .* raise seq_len"),
        (Request([1, 160], 1), r"token 160 of prompt or eos_token_ids is not in 0\.\.159"),
        (Request([1], 1, eos_token_ids=[-1]), r"token -1 of prompt or eos_token_ids is not in 0\.\.159"),
        (Request([1], 1, media={"pixel_values": torch.zeros(1, 1)}), r"media has pixel_values, .*load NeuronQwen35VL"),
        (Request([], 0), r"prompt is empty.*; max_new_tokens=0"),
    ],
)
def test_a_request_beyond_the_limits_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_request(request_, LIMITS)


def test_a_request_at_the_limits_can_run() -> None:
    checked_request(Request([0, 159] * 31, 2, eos_token_ids=[159]), LIMITS)


def test_the_length_of_prompts_in_one_piece_is_a_limit_of_its_own() -> None:
    checked_request(Request([1] * 32, 1), replace(LIMITS, max_prompt_tokens=32))
    with pytest.raises(ValueError, match=r"33 tokens exceeds max_context_length=32: raise it, or set prefill_chunk"):
        checked_request(Request([1] * 33, 1), replace(LIMITS, max_prompt_tokens=32))


def test_media_are_checked_against_the_prompt_by_the_model() -> None:
    seen: list[dict[str, Any]] = []

    def check_media(input_ids: torch.Tensor, **media: torch.Tensor) -> None:
        seen.append({"input_ids": input_ids.tolist(), **media})
        raise ValueError("one image too many")

    limits = replace(LIMITS, media_names=["pixel_values"], check_media=check_media)
    pixels = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"this request cannot run: max_new_tokens=0.*; media: one image too many"):
        checked_request(Request([1, 2], 0, media={"pixel_values": pixels}), limits)
    assert seen == [{"input_ids": [[1, 2]], "pixel_values": pixels}]
    with pytest.raises(ValueError, match=r"media has sound, which this model does not take: pass pixel_values"):
        checked_request(Request([1, 2], 1, media={"sound": pixels}), limits)


MEDIA_LIMITS = replace(LIMITS, media_names=["pixel_values", "image_grid_thw"], check_media=lambda *args, **media: None)
PIXELS, GRIDS = torch.zeros(4, 8), torch.tensor([[1, 2, 2]])


def failing_ids() -> Iterator[int]:
    yield 1
    raise RuntimeError("boom\nin two lines")


class WithoutToList(list[int]):
    def tolist(self) -> list[int]:
        raise RuntimeError("no list")


@pytest.mark.parametrize("given", [None, {}, {"prompt": [1]}, [1, 2]])
def test_what_is_no_request_is_refused(given: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"a request is .*{type(given).__name__.removesuffix('Type')}: pass a Request"
    ):
        checked_request(given, LIMITS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(prompt="Hello"), r"prompt is a str: pass a list of token ids"),
        (dict(prompt=None), r"prompt is None: pass a list of token ids"),
        (dict(prompt=b"ab"), r"prompt is a bytes: pass a list"),
        (dict(prompt={"input_ids": [1]}), r"prompt is a dict: pass a list"),
        (dict(prompt=7), r"prompt is a int: pass a list"),
        (dict(prompt=[1, True]), r"prompt\[1\] is a bool: pass token ids, which are ints"),
        (dict(prompt=[1.0]), r"prompt\[0\] is a float"),
        (dict(prompt=["1"]), r"prompt\[0\] is a str"),
        (dict(prompt=[[1, 2]]), r"prompt\[0\] is a list"),
        (dict(prompt=torch.tensor([[1, 2]])), r"prompt\[0\] is a list"),
        (dict(prompt=torch.tensor(1)), r"prompt is a Tensor"),
        (dict(prompt=torch.tensor([True])), r"prompt\[0\] is a bool"),
        (dict(prompt=np.array([1.5])), r"prompt\[0\] is a float"),
        (dict(prompt=[2**70]), r"token 1180591620717411303424 of prompt or eos_token_ids is not in"),
        (dict(prompt={5, 3}), r"prompt is a set: pass a list of token ids, in order"),
        (dict(prompt=frozenset([5])), r"prompt is a frozenset: pass a list of token ids, in order"),
        (dict(prompt={5: 1}.keys()), r"prompt is a dict_keys: pass a list of token ids, in order"),
        (dict(prompt=itertools.repeat(5)), r"prompt has more than 64 token ids: pass a list of at most 64"),
        (dict(eos_token_ids=itertools.repeat(5)), r"eos_token_ids has more than 160 token ids: pass a list"),
        (
            dict(prompt=failing_ids()),
            r"prompt cannot be read \(RuntimeError: boom in two lines\): pass a list of token",
        ),
        (dict(eos_token_ids=failing_ids()), r"eos_token_ids cannot be read \(RuntimeError: boom in two lines\)"),
        (dict(prompt=WithoutToList([1])), r"prompt cannot be read \(RuntimeError: no list\): pass a list of token ids"),
        (dict(prompt=torch.tensor([1], device="meta")), r"prompt cannot be read \(\w+: .*\): pass a list of token ids"),
        (dict(eos_token_ids=7), r"eos_token_ids is a int: pass a list of token ids"),
        (dict(eos_token_ids=None), r"eos_token_ids is None"),
        (dict(eos_token_ids="</s>"), r"eos_token_ids is a str"),
        (dict(eos_token_ids=[None]), r"eos_token_ids\[0\] is a NoneType|eos_token_ids\[0\] is None"),
        (dict(max_new_tokens=1.5), r"max_new_tokens=1\.5: must be at least 1, a whole number"),
        (dict(max_new_tokens=True), r"max_new_tokens=True: must be at least 1"),
        (dict(max_new_tokens=None), r"max_new_tokens=None: must be at least 1"),
        (dict(max_new_tokens=2**70), r"exceed seq_len=64"),
        (dict(sampling=None), r"sampling is None: pass SamplingOptions"),
        (dict(sampling={"temperature": 1}), r"sampling is a dict: pass SamplingOptions"),
        (dict(n=0), r"n=0: must be a whole number of 1\.\.1024"),
        (dict(n=2.0), r"n=2\.0: must be a whole number"),
        (dict(n=10**9), r"n=1000000000: must be"),
        (dict(n=2), r"n=2 with temperature=0\.0: greedy answers are all the same; set a temperature"),
        (dict(logprobs=-1), r"logprobs=-1: must be None or a whole number of at least 0"),
        (dict(logprobs=True), r"logprobs=True: must be None or"),
        (dict(media=None), r"media is None: pass a dict of tensors by name"),
        (dict(media=[PIXELS]), r"media is a list: pass a dict"),
        (dict(media={1: PIXELS}), r"media has 1, which this model does not take: pass pixel_values, image_grid_thw"),
        (dict(media={f"m{i}": PIXELS for i in range(9)}), r"media has m0, m1, m2 and 6 more, which this model"),
        (dict(media={"pixel_values": PIXELS.numpy()}), r"media: pixel_values is a ndarray: pass a torch\.Tensor"),
        (dict(media={"pixel_values": None}), r"media: pixel_values is None: pass a torch\.Tensor"),
        (dict(media={"pixel_values": PIXELS.long()}), r"pixel_values is torch\.int64: pass floating-point numbers"),
        (dict(media={"pixel_values": PIXELS.bool()}), r"pixel_values is torch\.bool"),
        (dict(media={"pixel_values": PIXELS.cfloat()}), r"pixel_values is torch\.complex64"),
        (dict(media={"pixel_values": PIXELS[0]}), r"pixel_values has shape \[8\]: pass \[patches, patch size\]"),
        (dict(media={"pixel_values": PIXELS.to("meta")}), r"pixel_values is on meta as torch\.strided: pass a dense"),
        (dict(media={"pixel_values": PIXELS.to_sparse()}), r"pixel_values is on cpu as torch\.sparse_coo"),
        (dict(media={"pixel_values": PIXELS + torch.nan}), r"pixel_values has values that are nan or infinite: check"),
        (dict(media={"pixel_values": PIXELS.double() + 1e300}), r"pixel_values has values that are nan or infinite"),
        (dict(media={"image_grid_thw": GRIDS.float()}), r"image_grid_thw is torch\.float32: pass whole numbers"),
        (dict(media={"image_grid_thw": GRIDS[0]}), r"image_grid_thw has shape \[3\]: pass \[N, 3\]"),
        (
            dict(media={"pixel_values": PIXELS, "image_grid_thw": torch.tensor([[10**12, 2, 2]])}),
            r"image_grid_thw has 1000000000000, more than there are patches \(4\)",
        ),
    ],
)
def test_what_a_request_holds_is_checked_by_type_and_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        checked_request(Request(**{"prompt": [1, 2], "max_new_tokens": 2, **fields}), MEDIA_LIMITS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_checked_request_has_the_types_that_are_declared_and_shares_nothing_that_may_change() -> None:
    prompt, eos, grids = np.array([3, 4]), [np.int32(5)], GRIDS.int()
    media = {"pixel_values": PIXELS.clone().requires_grad_(), "image_grid_thw": grids}
    checked = checked_request(Request(prompt, np.int64(2), eos_token_ids=eos, media=media, n=np.int8(1)), MEDIA_LIMITS)
    prompt[0], eos[0], grids[0] = 9, np.int32(9), 9
    media.clear()
    assert checked.prompt == (3, 4) and {*map(type, checked.prompt)} == {int}
    assert checked.eos_token_ids == {5} and [type(checked.max_new_tokens), type(checked.n)] == [int, int]
    assert torch.equal(checked.media["image_grid_thw"], GRIDS)
    assert not checked.media["pixel_values"].requires_grad
    assert checked_request(Request([3], 2, eos_token_ids={5, 6}), LIMITS).eos_token_ids == {5, 6}
    for ids in (torch.tensor([3, 4]), range(3, 5), iter([3, 4]), (np.uint8(3), 4)):
        assert checked_request(Request(ids, 2), LIMITS).prompt == (3, 4)  # type: ignore[arg-type]
