# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures for tests, and a processor with limits small enough for them."""

from __future__ import annotations

import numpy as np
from PIL import Image

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
