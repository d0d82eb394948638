# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and videos to patches, against transformers' processor and independent computations."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen35.vision.processing import (
    IMAGE_TOKEN,
    MAX_IMAGE_PIXELS,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    ImageSettings,
    Video,
    VideoSettings,
    VisionInputError,
    VisionProcessor,
    image_size,
    media_of,
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


@pytest.mark.parametrize("bits", [8, 16])
def test_sixteen_bit_grey_is_scaled_to_eight(bits: int, tmp_path: Path) -> None:
    levels = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    image = Image.fromarray(levels) if bits == 8 else Image.fromarray(levels.astype(np.uint16) * 257)
    image.save(tmp_path / "grey.png")
    expected = PROCESSOR([np.repeat(levels[..., None], 3, axis=-1)]).pixel_values
    for source in (image, tmp_path / "grey.png", np.asarray(image)):
        assert_close(PROCESSOR([source]).pixel_values, expected, label=f"{bits} bits")


def test_paths_pictures_and_arrays_give_the_same(tmp_path: Path) -> None:
    image = picture(70, 90)
    image.save(tmp_path / "a.png")
    inputs = PROCESSOR([image, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image)])
    first, *others = inputs.pixel_values.chunk(4)
    for other in others:
        assert_close(other, first, label="the same image from another source")
    assert inputs.pixel_values_videos is None and inputs.video_grid_thw is None


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image, exif = picture(90, 40), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert_close(PROCESSOR([tmp_path / "turned.png"]).pixel_values, PROCESSOR([upright]).pixel_values)


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


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("png", {}), ("webp", {"lossless": True})])
def test_an_animation_is_sampled_by_its_own_durations(suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), (10 * i, 255 - 10 * i, 5 * i)) for i in range(20)]
    path = tmp_path / f"clip.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
    inputs = PROCESSOR(videos=[path])
    # 20 frames in two seconds: four are taken, at two a second.
    indices = [0, 6, 13, 19]
    assert inputs.video_timestamps == [[0.3, 1.6]]
    expected = PROCESSOR(videos=[[frames[i] for i in indices]]).pixel_values_videos
    # GIF palettes round colours by a level or so of 255.
    assert_close(inputs.pixel_values_videos, expected, atol=0.05 if suffix == "gif" else 0.0, label=suffix)


def test_a_directory_is_its_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    frames = [picture(64, 48, seed=i) for i in range(4)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i:03d}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    from_directory, from_list = PROCESSOR(videos=[tmp_path]), PROCESSOR(videos=[frames])
    assert_close(from_directory.pixel_values_videos, from_list.pixel_values_videos)
    assert PROCESSOR(videos=[Video(frames, fps=2.0)]).video_timestamps == [[0.25, 1.25]]


# Bad input


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    picture(80, 80).save(buffer, "PNG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda p: p / "absent.png", ("absent.png", "cannot be opened")),
        (lambda p: _write(p / "a.png", b"no image"), ("a.png", "not an image file")),
        (lambda p: _write(p / "b.png", truncated_png()), ("b.png", "truncated")),
        (lambda p: _write(p / "c.png", b""), ("c.png", "not an image file")),
        (lambda p: "https://example.org/a.png", ("not fetched", "give the path")),
        (lambda p: Image.new("RGB", (0, 5)), ("0 by 5", "empty")),
        (lambda p: np.zeros((0, 4, 3), np.uint8), ("4 by 0", "empty")),
        (lambda p: Image.new("L", (MAX_IMAGE_PIXELS + 1, 1)), (str(MAX_IMAGE_PIXELS), "scale it down")),
        (lambda p: Image.new("RGB", (500, 2)), ("aspect ratio", "500 by 2")),
        (lambda p: Image.new("F", (50, 50)), ("floating-point", "convert")),
        (lambda p: Image.fromarray(np.full((9, 9), 70000, np.int32)), ("32-bit", "convert")),
        (lambda p: np.zeros((9, 9, 3)), ("float64", "uint8")),
        (lambda p: np.zeros((3, 90, 90), np.uint8), ("[3, 90, 90]", "channels last")),
        (lambda p: 7, ("int", "give a path")),
    ],
)
def test_a_bad_image_is_named_with_its_remedy(
    source: Callable[[Path], Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(VisionInputError) as error:
        PROCESSOR([picture(40, 40), source(tmp_path)])
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith("image 1")
    assert all(word in str(error.value) for word in words), error.value


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda p: p / "clip.mp4", ("clip.mp4", "ffmpeg", "frames")),
        (lambda p: [], ("no frames",)),
        (lambda p: p, ("no frames",)),
        (lambda p: [picture(40, 40), picture(50, 40)], ("frame 1 is 50 by 40", "frame 0 is 40 by 40")),
        (lambda p: [picture(40, 40), p / "absent.png"], ("frame 1", "absent.png")),
        (lambda p: [picture(2, 2)] * 769, ("769 frames", "max_frames=768")),
        (lambda p: Video([picture(40, 40)], fps=0), ("fps=0", "positive")),
        (lambda p: 7, ("int", "list of frames")),
        (lambda p: _write(p / "a.gif", b"GIF89a"), ("a.gif",)),
    ],
)
def test_a_bad_video_is_named_with_its_remedy(
    source: Callable[[Path], Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(VisionInputError) as error:
        PROCESSOR(videos=[[picture(40, 40)] * 2, source(tmp_path)])
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith("video 1")
    assert all(word in str(error.value) for word in words), error.value


def test_all_bad_items_of_a_batch_are_in_one_error() -> None:
    with pytest.raises(VisionInputError) as error:
        PROCESSOR([7, picture(40, 40), Image.new("F", (9, 9))], [[]])
    assert [problem.split(":")[0] for problem in error.value.problems] == ["image 0", "image 2", "video 0"]


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_damaged_files_never_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    generator, buffer = random.Random(seed), io.BytesIO()
    kind = generator.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
    picture(40, 30).save(buffer, kind, save_all=kind in ("GIF", "WEBP"))
    content = bytearray(buffer.getvalue())
    for _ in range(generator.randint(1, 8)):
        content[generator.randrange(len(content))] = generator.randrange(256)
    path = _write(tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}", bytes(content))
    for arguments in (([path], []), ([], [path])):
        try:
            PROCESSOR(*arguments)
        except VisionInputError as error:
            assert "damaged" in str(error)


# Settings, placeholders and messages


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


def test_media_are_taken_from_messages_in_order() -> None:
    first, second, frames = picture(8, 8), "b.png", [picture(8, 8)]
    messages = [
        {"role": "system", "content": "text"},
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "?"}]},
        {"role": "user", "content": [{"type": "video", "video": frames, "fps": 3}, {"type": "image", "path": second}]},
        {"role": "user", "content": [{"type": "video", "video": "clip.gif"}]},
    ]
    assert media_of(messages) == ([first, second], [Video(frames, 3), "clip.gif"])
    with pytest.raises(ValueError, match="'image'"):
        media_of([{"role": "user", "content": [{"type": "image"}]}])
