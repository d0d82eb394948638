# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and videos to patches, against transformers' processor and independent computations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen35.vision.content import ImageItem, VideoItem
from qwen35.vision.media import Video
from qwen35.vision.processing import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    ImageSettings,
    VideoSettings,
    VisionInputError,
    VisionProcessor,
    image_size,
    sampled_indices,
    timestamps_of,
    video_size,
)
from support.compare import assert_close

pytest.importorskip("transformers", minversion="5.0")
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from support.pictures import PROCESSOR, SMALL, SMALL_VIDEO, picture


def oracle(settings: ImageSettings) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.merge_size,
        image_mean=list(settings.image_mean),
        image_std=list(settings.image_std),
    )


def check_image(image: Image.Image, settings: ImageSettings) -> None:
    inputs = VisionProcessor(settings)([image])
    expected = oracle(settings)([image], return_tensors="pt")
    assert inputs.image_grid_thw.tolist() == expected["image_grid_thw"].tolist()
    assert_close(inputs.pixel_values, expected["pixel_values"], label=f"{image.mode} {image.size}")


@settings(max_examples=40)
@given(st.integers(2, 300), st.integers(2, 300), st.integers(0, 99))
def test_images_of_any_size_equal_transformers_bit_for_bit(width: int, height: int, seed: int) -> None:
    check_image(picture(width, height, seed=seed), SMALL)


@settings(max_examples=20)
@given(
    st.sampled_from([4, 7, 14, 16]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(*[st.floats(0.1, 0.9)] * 6),
)
def test_any_patch_sizes_and_norms_equal_transformers(
    patch: int, temporal: int, merge: int, norms: tuple[float, ...]
) -> None:
    settings = ImageSettings(
        20 * patch**2 * merge**2, 60 * patch**2 * merge**2, patch, temporal, merge, norms[:3], norms[3:]
    )
    check_image(picture(90, 60), settings)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_colours_equals_transformers(mode: str) -> None:
    check_image(picture(80, 50, mode), SMALL)


def test_palettes_with_and_without_transparency_and_bitmaps_equal_transformers() -> None:
    palette = picture(60, 50).quantize(16)
    check_image(palette, SMALL)
    palette.info["transparency"] = 3
    check_image(palette, SMALL)
    check_image(picture(60, 50, "L").convert("1"), SMALL)


def test_the_default_settings_are_those_of_the_published_checkpoints() -> None:
    check_image(picture(100, 60), ImageSettings())
    assert (ImageSettings().min_pixels, ImageSettings().max_pixels) == (65536, 16777216)
    assert (VideoSettings().min_pixels, VideoSettings().max_pixels) == (4096, 25165824)


@settings(max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_image_sizes_are_those_of_smart_resize(height: int, width: int) -> None:
    limits = ImageSettings()
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            image_size(height, width, limits)
        return
    expected = smart_resize(height, width, 32, limits.min_pixels, limits.max_pixels)
    assert image_size(height, width, limits) == expected


@pytest.mark.parametrize(
    ("asked", "grid"),
    [
        ({}, [1, 6, 8]),  # 96 by 128 as it is
        ({"max_pixels": 64 * 64}, [1, 2, 4]),
        ({"min_pixels": 200 * 200}, [1, 12, 16]),
        ({"min_pixels": 96 * 96, "max_pixels": 96 * 128}, [1, 6, 8]),
        ({"resized_height": 64, "resized_width": 100}, [1, 4, 6]),
        ({"resized_height": 8, "resized_width": 8}, [1, 4, 4]),  # qwen-vl-utils' least is four merged tokens
    ],
)
def test_an_image_has_the_size_that_its_item_asks(asked: dict[str, int], grid: list[int]) -> None:
    settings = ImageSettings(96 * 96, 128 * 128)
    image = picture(128, 96)
    inputs = VisionProcessor(settings)([ImageItem(image, **asked)])
    assert inputs.image_grid_thw.tolist() == [grid]
    height, width = (patches * 16 for patches in grid[1:])
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = VisionProcessor(ImageSettings(1, 1 << 24))([resized])
    assert_close(inputs.pixel_values, expected.pixel_values, label=str(asked))


@settings(max_examples=60)
@given(st.integers(20, 400), st.integers(20, 400), st.integers(1, 300_000), st.integers(1, 300_000))
def test_limits_of_an_image_are_those_of_smart_resize(height: int, width: int, one: int, other: int) -> None:
    least, most = sorted((one, other))
    inputs = VisionProcessor(SMALL)([ImageItem(picture(width, height), least, most)])
    high, wide = smart_resize(height, width, 32, least, most)
    assert inputs.image_grid_thw.tolist() == [[1, high // 16, wide // 16]]


# Videos. transformers' processor needs torchvision, so the oracle here is written from its definition.


def slow_video_patches(frames: list[np.ndarray], height: int, width: int, config: VideoSettings) -> torch.Tensor:
    """Patches one by one: rows and columns of merged blocks, then inside a block; a patch is channel, frame, y, x."""
    size, merge, temporal = config.patch_size, config.merge_size, config.temporal_patch_size
    clip = torch.stack([torch.from_numpy(frame.copy()).permute(2, 0, 1) for frame in frames])
    if clip.shape[-2:] != (height, width):
        clip = torch.nn.functional.interpolate(clip, (height, width), mode="bicubic", antialias=True)
    while len(clip) % temporal:
        clip = torch.cat([clip, clip[-1:]])
    clip = (clip.float() - 127.5) / 127.5  # rescaling by 1/255 and normalising by 0.5, fused
    patches = [
        clip[t : t + temporal, :, y : y + size, x : x + size].transpose(0, 1).flatten()
        for t in range(0, len(clip), temporal)
        for block_y in range(0, height, merge * size)
        for block_x in range(0, width, merge * size)
        for y in range(block_y, block_y + merge * size, size)
        for x in range(block_x, block_x + merge * size, size)
    ]
    return torch.stack(patches)


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(20, 150), st.integers(20, 150), st.integers(0, 99))
def test_videos_equal_an_independent_computation(count: int, width: int, height: int, seed: int) -> None:
    frames = [np.asarray(picture(width, height, seed=seed + i)) for i in range(count)]
    inputs = PROCESSOR(videos=[frames])
    high, wide = video_size(max(count, 2), height, width, SMALL_VIDEO)
    assert inputs.video_grid_thw.tolist() == [[(count + 1) // 2, high // 16, wide // 16]]
    # Equal but for the rounding of 127.5 = 0.5 * (1 / (1 / 255)).
    assert_close(
        inputs.pixel_values_videos,
        slow_video_patches(frames, high, wide, SMALL_VIDEO),
        atol=1e-6,
        label=f"{count} frames",
    )


def test_video_pixels_are_counted_over_all_frames() -> None:
    for count, height, width in ((2, 10, 40), (9, 200, 333), (100, 720, 1280), (768, 1080, 1920)):
        high, wide = video_size(count, height, width, VideoSettings())
        assert high % 32 == wide % 32 == 0 and high > 0 and wide > 0
        assert 4096 <= count * high * wide <= 25165824
        assert 0.6 < (high / wide) / (height / width) < 1.7


def test_frames_are_sampled_evenly_at_the_rate_of_the_processor() -> None:
    assert sampled_indices(48, 24.0, VideoSettings()) == [0, 16, 31, 47]
    assert sampled_indices(3, 24.0, VideoSettings()) == [0, 1, 2]
    assert sampled_indices(240, 24.0, VideoSettings())[:3] == [0, 13, 25]
    assert len(sampled_indices(100_000, 24.0, VideoSettings())) == 768


def test_timestamps_are_halfway_between_the_frames_of_a_patch() -> None:
    assert timestamps_of([0, 12, 24, 36, 48], 24.0, 2) == [0.25, 1.25, 2.0]
    assert timestamps_of([0], 24.0, 2) == [0.0]


def test_all_bad_items_of_a_batch_are_in_one_error() -> None:
    with pytest.raises(VisionInputError) as error:
        PROCESSOR([7, picture(40, 40), Image.new("F", (9, 9))], [[]])
    assert [problem.split(":")[0] for problem in error.value.problems] == ["image 0", "image 2", "video 0"]


@pytest.mark.parametrize(
    ("asked", "grid"),
    [
        ({}, [4, 6, 8]),  # 8 frames of 96 by 128
        ({"max_pixels": 64 * 64}, [4, 2, 4]),  # of a frame
        ({"min_pixels": 200 * 200}, [4, 12, 16]),
        ({"total_pixels": 4 * 64 * 64}, [4, 2, 4]),  # 16 tokens at most: two frames share one
        ({"resized_height": 64, "resized_width": 100}, [4, 4, 6]),
        ({"nframes": 4}, [2, 6, 8]),
        ({"nframes": 5, "max_pixels": 64 * 64}, [2, 2, 4]),  # rounded to whole temporal patches
    ],
)
def test_a_video_has_the_size_and_the_frames_that_its_item_asks(asked: dict[str, int], grid: list[int]) -> None:
    frames = [picture(128, 96, seed=i) for i in range(8)]
    processor = VisionProcessor(video=VideoSettings(96 * 96, 1 << 20))
    assert processor(videos=[VideoItem(frames, **asked)]).video_grid_thw.tolist() == [grid]


def test_an_animation_is_sampled_as_its_item_asks(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (10 * i, 0, 0)) for i in range(20)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)

    def times(**asked: float) -> list[float]:
        (found,) = VisionProcessor()(videos=[VideoItem(tmp_path / "a.gif", **asked)]).video_timestamps  # type: ignore[arg-type]
        return found

    assert times() == times(fps=2) == times(nframes=4) == [0.3, 1.6]
    assert len(times(fps=5)) == 5 and len(times(fps=5, max_frames=6)) == 3 and len(times(fps=1, min_frames=8)) == 4
    assert times(fps=10) == pytest.approx([i / 5 + 0.05 for i in range(10)])


def test_the_rate_of_frames_is_what_the_item_says(tmp_path: Path) -> None:
    frames = [picture(64, 64)] * 4
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    inputs = PROCESSOR(videos=[VideoItem(source, fps=1) for source in (frames, tmp_path, Video(frames, 7))])
    assert inputs.video_timestamps == [[0.5, 2.5]] * 3
    assert PROCESSOR(videos=[VideoItem(frames, fps=1, nframes=2)]).video_timestamps == [[1.5]]
    assert PROCESSOR(videos=[tmp_path]).video_timestamps == [[0.25, 1.25]]  # two a second, as the mp4's remedy says


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"nframes": 1}, "nframes=1 is not in 2..8"),
        ({"nframes": 10}, "nframes=10 is not in 2..8"),
        ({"max_frames": 7}, "8 frames exceed max_frames=7"),
        ({"min_pixels": 1 << 24}, "min_pixels=16777216 of 8 frames exceeds"),
        ({"resized_height": 4096, "resized_width": 4096}, "resized_height=4096 and resized_width=4096 of 8 frames"),
    ],
)
def test_what_a_video_cannot_have_is_named(asked: dict[str, int], words: str) -> None:
    with pytest.raises(VisionInputError, match=words):
        PROCESSOR(videos=[VideoItem([picture(64, 64)] * 8, **asked)])


# Settings and placeholders


def test_settings_are_read_from_the_files_of_transformers_4_and_5(tmp_path: Path) -> None:
    assert VisionProcessor.from_pretrained(tmp_path) == VisionProcessor()
    image = {"size": {"shortest_edge": 100, "longest_edge": 9999}, "patch_size": 14, "image_mean": [0.1, 0.2, 0.3]}
    video = {"size": {"shortest_edge": 5, "longest_edge": 77777}, "fps": 4, "max_frames": 9}
    expected = VisionProcessor(
        ImageSettings(100, 9999, patch_size=14, image_mean=[0.1, 0.2, 0.3]),
        VideoSettings(5, 77777, fps=4, max_frames=9),
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    assert VisionProcessor.from_pretrained(tmp_path) == expected
    both = {"image_processor": image, "video_processor": video}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    (tmp_path / "preprocessor_config.json").unlink()
    assert VisionProcessor.from_pretrained(tmp_path) == expected


@pytest.mark.parametrize("content", ["not JSON", '{"do_resize": false}', '{"cap_pixels_per_frame": true}'])
def test_settings_that_are_not_implemented_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(VisionInputError):
        VisionProcessor.from_pretrained(tmp_path)


def test_placeholders_become_as_many_as_tokens_with_the_times_of_video_frames() -> None:
    frames = [picture(64, 64)] * 4
    inputs = PROCESSOR([picture(64, 64), picture(96, 64)], [Video(frames, fps=1.0)])
    marked = VISION_START + VIDEO_TOKEN + VISION_END
    texts = PROCESSOR.expand_placeholders([f"a{IMAGE_TOKEN}b{marked}c", f"d{IMAGE_TOKEN}"], inputs)
    tokens = [math.prod(grid) // 4 for grid in inputs.image_grid_thw.tolist()]
    assert tokens == [4, 6]
    frame = VISION_START + VIDEO_TOKEN * 4 + VISION_END
    assert texts == [
        f"a{IMAGE_TOKEN * 4}b<0.5 seconds>{frame}<2.5 seconds>{frame}c",
        f"d{IMAGE_TOKEN * 6}",
    ]


@pytest.mark.parametrize(("text", "words"), [("", "0 <|image_pad|> for 1"), (IMAGE_TOKEN * 2, "2 <|image_pad|> for 1")])
def test_placeholders_that_do_not_match_the_images_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        PROCESSOR.expand_placeholders([text], PROCESSOR([picture(64, 64)]))


def test_sizes_at_the_limits_of_an_item_are_computed_or_refused() -> None:
    """None is an OverflowError, and none takes memory beyond that of the largest image."""
    most = 2**31 - 1
    with pytest.raises(VisionInputError, match=r"image 0: .* is an aspect ratio above 200"):
        PROCESSOR([ImageItem(picture(64, 64), resized_height=most, resized_width=64)])
    large = PROCESSOR([ImageItem(picture(64, 64), max_pixels=most)]).image_grid_thw
    assert large is not None and large.tolist() == [[1, 64 // 16, 64 // 16]]
    for asked in ({"fps": 1e-6}, {"fps": 1e6}, {"max_frames": most}, {"total_pixels": most}):
        frames = [picture(64, 64)] * 4
        inputs = PROCESSOR([], [VideoItem(frames, **asked)])  # type: ignore[arg-type]
        assert inputs.video_grid_thw is not None and inputs.video_grid_thw[0, 0] == 2
        assert all(math.isfinite(time) for time in inputs.video_timestamps[0])
