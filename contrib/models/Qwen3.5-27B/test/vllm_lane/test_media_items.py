# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a request's `multi_modal_data` is taken for, and videos that are left as they are."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm")

from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from qwen35.vision.media import open_image
from qwen35_vllm.media_items import ImageItems, MediaParser, UndecodedVideo, VideoItems
from qwen35_vllm.options import VIDEO_LOADER
from support.pictures import picture

pytestmark = pytest.mark.vllm

FRAMES = [picture(40, 32, seed=i) for i in range(3)]
ARRAY = np.stack([np.asarray(frame) for frame in FRAMES])


def as_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GIF = as_file(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:], duration=100)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (FRAMES[0], 1),
        (ARRAY[0], 1),
        (ARRAY[0, :, :, 0], 1),
        (MediaWithBytes(FRAMES[0], b""), 1),
        (FRAMES, 3),
        ([ARRAY[0], FRAMES[1], MediaWithBytes(FRAMES[2], b"")], 3),
        ([], 0),
    ],
    ids=["image", "array", "grey array", "of a file", "images", "mixed", "none"],
)
def test_images_are_one_or_a_list(data: Any, count: int) -> None:
    items = MediaParser().parse_mm_data({"image": data})["image"]
    assert isinstance(items, ImageItems) and len(items) == count
    shapes = {np.asarray(item).shape[:2] for item in items}
    assert shapes <= {(32, 40)}


@pytest.mark.parametrize(
    ("data", "frames"),
    [
        (FRAMES, [3]),
        (ARRAY, [3]),
        ([*ARRAY], [3]),
        ((FRAMES, {"fps": 5.0}), [3]),
        ([FRAMES, ARRAY], [3, 3]),
        ([(FRAMES, {"fps": 5.0}), (ARRAY, None)], [3, 3]),
        ((GIF, {}), [len(GIF)]),
        ([(GIF, {}), FRAMES], [len(GIF), 3]),
        (MediaWithBytes((GIF, {}), GIF), [len(GIF)]),  # as vLLM 0.33 loads one
        ([], []),
    ],
    ids="images array arrays with-metadata two two-with-metadata file file-and-images of-a-loader none".split(),
)
def test_videos_are_one_or_a_list(data: Any, frames: list[int]) -> None:
    items = MediaParser().parse_mm_data({"video": data})["video"]
    assert isinstance(items, VideoItems) and [len(own) for own, _ in items] == frames
    assert all(isinstance(metadata, dict) for _, metadata in items)


def test_metadata_are_kept_for_the_hash_and_for_items_that_are_parsed_again() -> None:
    items = MediaParser().parse_mm_data({"video": (FRAMES, {"fps": 5.0})})["video"]
    assert items.get_all_items_for_hash() == [(FRAMES, {"fps": 5.0})]
    again = MediaParser().parse_mm_data({"video": [items[0]]})["video"]
    assert again[0] == (FRAMES, {"fps": 5.0})


def rgba() -> Image.Image:
    return picture(40, 32, mode="RGBA", seed=4)


def palette_with_a_transparent_colour() -> Image.Image:
    image = picture(40, 32, seed=5).quantize(8)
    image.info["transparency"] = 3
    return image


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(40 * 32, dtype=np.uint16).reshape(32, 40) * 51)


@pytest.mark.parametrize("make", [rgba, palette_with_a_transparent_colour, sixteen_bits])
def test_an_image_is_converted_from_its_file_and_not_from_what_vllm_made_of_it(make: Any) -> None:
    file = as_file(make(), "PNG")
    found = MediaParser().parse_mm_data({"image": MediaWithBytes(make().convert("RGB"), file)})["image"][0]
    expected = np.asarray(open_image(Image.open(io.BytesIO(file))))
    assert np.array_equal(np.asarray(open_image(found)), expected)


def test_an_image_of_plain_colours_is_not_decoded_again() -> None:
    decoded = FRAMES[0].copy()
    for kind in ("PNG", "JPEG"):
        item = MediaWithBytes(decoded, as_file(FRAMES[0], kind))
        assert MediaParser().parse_mm_data({"image": item})["image"][0] is decoded


def test_a_file_is_left_as_it_is() -> None:
    assert VIDEO_LOADER_REGISTRY.load(VIDEO_LOADER) is not None
    assert UndecodedVideo.load_bytes(GIF, num_frames=32) == (GIF, {})  # vLLM's own default
    assert UndecodedVideo.load_bytes(GIF, num_frames=-1, fps=1.5) == (GIF, {"fps": 1.5})


@pytest.mark.parametrize("asked", [{"num_frames": 8}, {"frame_recovery": True}])
def test_what_is_not_taken_of_media_io_kwargs_is_named(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"video: {next(iter(asked))} is not taken; give fps"):
        UndecodedVideo.load_bytes(GIF, **asked)


def test_without_pyav_a_video_file_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"^video files are decoded by PyAV, which this server lacks: pip .*jpeg$"):
        UndecodedVideo.load_bytes(b"\0\0\0\x20ftypisom")
    assert UndecodedVideo.load_bytes(GIF)[0] == GIF
