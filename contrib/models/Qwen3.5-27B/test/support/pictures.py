# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures for tests, and a processor with limits small enough for them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from qwen35.vision.processing import ImageSettings, VideoSettings, VisionProcessor

SMALL = ImageSettings(min_pixels=32 * 32, max_pixels=128 * 128)
SMALL_VIDEO = VideoSettings(min_pixels=32 * 32, max_pixels=6 * 96 * 96)
PROCESSOR = VisionProcessor(SMALL, SMALL_VIDEO)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that resizing matters and does not average everything to grey."""
    generator = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = generator.integers(0, 256, (3, 4, channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[..., c]).resize((width, height)) for c in range(channels)]
    noise = generator.integers(-20, 20, (height, width, channels))
    levels = (np.stack([np.asarray(band) for band in bands], axis=-1) + noise).clip(0, 255).astype(np.uint8)
    return Image.merge(mode, [Image.fromarray(levels[..., c]) for c in range(channels)])


def photograph(seed: int) -> Image.Image:
    """A picture of its own size and ratio: a gradient, shapes over it, and noise over all; of two in ten no colour."""
    generator = np.random.default_rng(seed)
    width, height = (int(side) for side in generator.integers(20, 420, 2))
    corners = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    scene = corners.resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(scene)
    for _ in range(int(generator.integers(1, 7))):
        x, y = int(generator.integers(0, width)), int(generator.integers(0, height))
        box = (x, y, x + int(generator.integers(1, width)), y + int(generator.integers(1, height)))
        (draw.ellipse, draw.rectangle)[int(generator.integers(2))](
            box, fill=tuple(int(level) for level in generator.integers(0, 256, 3))
        )
    noise = generator.normal(0, generator.uniform(0, 25), (height, width, 3))
    noisy = Image.fromarray((np.asarray(scene) + noise).clip(0, 255).astype(np.uint8))
    return noisy.convert("L") if generator.random() < 0.2 else noisy
