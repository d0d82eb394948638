# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the checks compare with: `recorded.json`, written by tools/record_selftest.py.

The mini's tokens are transformers' own, in float32; the times of kernels are the emulator's, modelled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

FILE = Path(__file__).with_name("recorded.json")


@dataclass(frozen=True)
class Rectangle:
    """A picture of one rectangle: sizes in pixels, colours as red, green and blue."""

    width: int
    height: int
    background: tuple[int, int, int]
    box: tuple[int, int, int, int]
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Answer:
    """What the mini says.

    Attributes:
        text: the prompt, or with a picture the question.
        prompt: its tokens; placeholders of a picture are among them.
        answer: the tokens that follow, the end token last.
        picture: what is asked about, or None.
    """

    text: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    picture: Rectangle | None = None


@dataclass(frozen=True)
class Recorded:
    """All of the file.

    Attributes:
        short: prompts of at most 100 tokens.
        long: prompts of 130 to 230 tokens; the second begins as the first does, for more than 128 tokens.
        pictures: questions about pictures.
        least_margin: the logit of a recorded token is larger than any other by this at least.
        modelled_us: time of each kernel's check in the emulator, by name, without the launch.
    """

    short: tuple[Answer, ...]
    long: tuple[Answer, ...]
    pictures: tuple[Answer, ...]
    least_margin: float
    modelled_us: Mapping[str, float]


@cache
def recorded() -> Recorded:
    """What the file has."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    groups = {name: tuple(map(_answer, content[name])) for name in ("short", "long", "pictures")}
    return Recorded(**groups, least_margin=content["least_margin"], modelled_us=content["modelled_us"])


def _answer(entry: dict[str, Any]) -> Answer:
    picture = entry.get("picture")
    return Answer(entry["text"], tuple(entry["prompt"]), tuple(entry["answer"]), picture and _rectangle(picture))


def _rectangle(fields: dict[str, Any]) -> Rectangle:
    """Colours and corners are tuples, as Pillow wants them."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Rectangle(**values)


def draw(picture: Rectangle) -> Image.Image:
    """The picture, for the model or its oracle."""
    image = Image.new("RGB", (picture.width, picture.height), picture.background)
    ImageDraw.Draw(image).rectangle(picture.box, fill=picture.colour)
    return image
