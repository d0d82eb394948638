# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips whose right answers are known: what the mini's vision tower is trained and tested on.

A picture shows a shape, or up to four of its kind, at most one in each corner; a clip shows a shape that moves or turns
another colour. Shade, place, size, background and picture size vary. Everything follows from a split and a number, so a
test can draw the same pictures again. No picture is in both splits: the red channel of the background is odd in all
pictures of the training split and even in all of the held-out one, and nothing else tells them apart.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from PIL import Image, ImageDraw

SHAPES = ("square", "circle", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 40),
}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
IMAGE_SIDES, CLIP_SIDES = (80, 136), (64, 104)  # pixels: two to four merged patches of 32 a side
FRAME_COUNTS, FRAMES_PER_SECOND = (4, 6), (1, 2, 4, 24)


class Split(Enum):
    """Which pictures: to train on, or kept for tests."""

    TRAIN = "train"
    HELD_OUT = "held out"


@dataclass(frozen=True)
class Question:
    """`text` is answered by `answer + "."`."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """A shape in a picture: centre and radius in pixels."""

    shape: str
    colour: str
    rgb: tuple[int, ...]
    x: float
    y: float
    radius: float
    place: str
    """The corner it stands in or, in a clip, the direction in which it moves; empty when it stays."""


@dataclass(frozen=True)
class Picture:
    """A still, or the frames of a clip in order, and everything that may be asked about it."""

    frames: tuple[Image.Image, ...]
    fps: int | None
    """Frames a second; None for a still."""
    things: tuple[tuple[Thing, ...], ...]
    """What each frame shows."""
    questions: tuple[Question, ...]


def image(split: Split, number: int) -> Picture:
    """Picture `number` of the split: a shape, or several of its kind, and every question that may be asked."""
    rng = random.Random(f"{split.value} image {number}")
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    size, things = _scatter(rng, rng.choice((1, 1, 1, 2, 3, 4)), [shape], [colour])
    shapes = "crosses" if shape == "cross" else f"{shape}s"
    questions = [Question("count", f"How many {shapes} are there?", str(len(things)))]
    if len(things) == 1:
        questions.append(Question("colour", f"What colour is the {shape}?", colour))
        questions.append(Question("position", f"Where is the {shape}?", things[0].place))
    else:
        questions.append(Question("colour", f"What colour are the {shapes}?", colour))
    return Picture((_draw(size, _background(rng, split), things),), None, (things,), tuple(questions))


def crowd(number: int) -> Picture:
    """Picture `number` of shapes of many kinds, to train the vision tower on; nothing is asked about it."""
    rng = random.Random(f"crowd {number}")
    size, things = _scatter(rng, rng.randint(1, len(CORNERS)), rng.sample(SHAPES, rng.randint(1, 3)), list(COLOURS))
    return Picture((_draw(size, _background(rng, Split.TRAIN), things),), None, (things,), ())


def clip(split: Split, number: int) -> Picture:
    """Clip `number` of the split: a shape crosses the picture (even numbers) or turns another colour (odd numbers)."""
    rng = random.Random(f"{split.value} clip {number}")
    width, height = (rng.randint(*CLIP_SIDES) for _ in range(2))
    background, frame_count, fps = _background(rng, split), rng.choice(FRAME_COUNTS), rng.choice(FRAMES_PER_SECOND)
    shape, radius = rng.choice(SHAPES), min(width, height) * rng.uniform(0.14, 0.24)
    colour, other_colour = rng.sample(list(COLOURS), 2)
    rgb = _shade(rng, colour)
    things = []
    if number % 2 == 0:
        direction = rng.choice(list(DIRECTIONS))
        across, down = DIRECTIONS[direction]
        start, drift = rng.uniform(0.2, 0.26), rng.uniform(0.35, 0.65)
        for step in range(frame_count):
            along = start + (1 - 2 * start) * step / (frame_count - 1)
            x = drift if across == 0 else along if across > 0 else 1 - along
            y = drift if down == 0 else along if down > 0 else 1 - along
            things.append(Thing(shape, colour, rgb, x * width, y * height, radius, direction))
        questions = [
            Question("motion", f"Which way does the {shape} move?", direction),
            Question("clip colour", f"What colour is the {shape}?", colour),
        ]
    else:
        x, y = width * rng.uniform(0.3, 0.7), height * rng.uniform(0.3, 0.7)
        other_rgb = _shade(rng, other_colour)
        turn = 2 * rng.randrange(1, frame_count // 2)  # between two pairs of frames: a pair becomes one patch
        for step in range(frame_count):
            now = (colour, rgb) if step < turn else (other_colour, other_rgb)
            things.append(Thing(shape, *now, x, y, radius, place=""))
        questions = [Question("turn", f"What colour does the {shape} turn?", other_colour)]
    frames = tuple(_draw((width, height), background, [thing]) for thing in things)
    return Picture(frames, fps, tuple((thing,) for thing in things), tuple(questions))


def held_out_images(count: int) -> list[tuple[Picture, Question]]:
    """Pictures that were not trained on, each with one question; every kind of question equally often."""
    return _ask(image, ("colour", "count", "position"), count)


def held_out_clips(count: int) -> list[tuple[Picture, Question]]:
    """Clips that were not trained on, each with one question; every kind of question equally often."""
    return _ask(clip, ("motion", "turn", "clip colour"), count)


def _ask(draw: Callable[[Split, int], Picture], kinds: Sequence[str], count: int) -> list[tuple[Picture, Question]]:
    """Questions of each kind in turn, about the next picture that allows one."""
    asked: list[tuple[Picture, Question]] = []
    for picture in (draw(Split.HELD_OUT, number) for number in itertools.count()):
        if len(asked) == count:
            break
        kind = kinds[len(asked) % len(kinds)]
        asked += [(picture, question) for question in picture.questions if question.kind == kind]
    return asked


def _scatter(
    rng: random.Random, count: int, shapes: Sequence[str], colours: Sequence[str]
) -> tuple[tuple[int, int], tuple[Thing, ...]]:
    """The size of a picture, and things in as many of its corners, their kinds drawn from those given."""
    width, height = (rng.randint(*IMAGE_SIDES) for _ in range(2))
    things = []
    for corner in rng.sample(CORNERS, count):
        radius = min(width, height) * rng.uniform(0.16, 0.22)
        x = width * ((0.26 if corner.endswith("left") else 0.74) + rng.uniform(-0.05, 0.05))
        y = height * ((0.26 if corner.startswith("top") else 0.74) + rng.uniform(-0.05, 0.05))
        shape, colour = rng.choice(shapes), rng.choice(colours)
        things.append(Thing(shape, colour, _shade(rng, colour), x, y, radius, corner))
    return (width, height), tuple(things)


def _shade(rng: random.Random, colour: str) -> tuple[int, ...]:
    """A lighter or darker shade of a named colour."""
    brightness = rng.uniform(0.75, 1.05)
    return tuple(max(0, min(255, round(channel * brightness + rng.uniform(-12, 12)))) for channel in COLOURS[colour])


def _background(rng: random.Random, split: Split) -> tuple[int, ...]:
    """A grey with a slight tint, its red channel odd for the training split and even for the other."""
    grey = rng.randint(20, 230)
    red, green, blue = (grey + rng.randint(-10, 10) for _ in range(3))
    return (red | 1 if split is Split.TRAIN else red & ~1, green, blue)


def _draw(size: tuple[int, int], background: tuple[int, ...], things: Sequence[Thing]) -> Image.Image:
    picture = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(picture)
    for thing in things:
        x, y, r = thing.x, thing.y, thing.radius
        if thing.shape == "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=thing.rgb)
        elif thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=thing.rgb)
        elif thing.shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=thing.rgb)
        else:
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=thing.rgb)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=thing.rgb)
    return picture
