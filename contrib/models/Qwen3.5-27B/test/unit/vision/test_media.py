# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and frames from files and memory, and bad ones, whose place the processor's errors name."""

from __future__ import annotations

import base64
import io
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen35.vision.media import DEFAULT_SOURCE_FPS, MAX_IMAGE_PIXELS, Video, open_image, open_video
from qwen35.vision.processing import VisionInputError
from support.compare import assert_close
from support.pictures import PROCESSOR, picture


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


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    assert np.asarray(open_image(clear)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_frames_are_decoded_when_they_are_asked_for_and_only_those(tmp_path: Path) -> None:
    frames = [picture(20, 10, seed=i) for i in range(5)]
    video = open_video(Video(frames, fps=4))
    assert (video.count, video.fps, video.is_sampled) == (5, 4.0, True)
    (tmp_path / "b.png").write_bytes(b"no image")
    frames[2].save(tmp_path / "a.png")
    video = open_video(tmp_path)  # the bad frame is not noticed before it is read
    (first,) = video.decode([0])
    assert np.array_equal(np.asarray(first), np.asarray(frames[2]))
    with pytest.raises(ValueError, match="frame 1: not an image file"):
        list(video.decode([0, 1]))


def test_an_animation_without_durations_has_the_default_rate(tmp_path: Path) -> None:
    picture(20, 10).save(tmp_path / "still.png")
    video = open_video(tmp_path / "still.png")
    assert (video.count, video.fps, video.is_sampled) == (1, DEFAULT_SOURCE_FPS, False)


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
    by_its_bytes = PROCESSOR(videos=[path.read_bytes()])
    assert by_its_bytes.video_timestamps == inputs.video_timestamps
    assert torch.equal(by_its_bytes.pixel_values_videos, inputs.pixel_values_videos)


def test_a_directory_is_its_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    frames = [picture(64, 48, seed=i) for i in range(4)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i:03d}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    from_directory, from_list = PROCESSOR(videos=[tmp_path]), PROCESSOR(videos=[frames])
    assert_close(from_directory.pixel_values_videos, from_list.pixel_values_videos)
    assert PROCESSOR(videos=[Video(frames, fps=2.0)]).video_timestamps == [[0.25, 1.25]]


def address_of(image: Image.Image, kind: str = "PNG", head: str = "data:image/png;base64,") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return head + base64.b64encode(buffer.getvalue()).decode()


def test_addresses_of_files_and_of_data_give_what_is_there(tmp_path: Path) -> None:
    image = picture(40, 30)
    image.save(tmp_path / "a b%20.png")
    image.save(tmp_path / "c d.png")
    address = address_of(image)
    for source in (
        f"file://{tmp_path}/a b%20.png",
        f"file:{tmp_path}/a b%20.png",
        f"file://localhost{tmp_path}/c%20d.png",
        f"FILE://{tmp_path}/c d.png",
        address,
        address.replace("data:image/png;base64", "DATA:;charset=x;Base64"),
        address.rstrip("="),
        address.replace("+", "%2B")[:60] + "\n" + address.replace("+", "%2B")[60:],
        "data:image/png," + "".join(f"%{byte:02x}" for byte in base64.b64decode(address.partition(",")[2])),
    ):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image)), source[:40]


def test_an_animation_may_be_in_its_address(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), (10 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    data = "data:image/gif;base64," + base64.b64encode((tmp_path / "a.gif").read_bytes()).decode()
    by_file, by_data = PROCESSOR(videos=[tmp_path / "a.gif"]), PROCESSOR(videos=[data])
    assert_close(by_data.pixel_values_videos, by_file.pixel_values_videos)
    assert by_data.video_timestamps == by_file.video_timestamps
    frame = f"file://{tmp_path}/a.gif"
    assert PROCESSOR(videos=[[frame, frame]]).video_grid_thw.tolist() == [[1, 4, 4]]


LONG = "A" * 100_000


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.org/" + LONG, "https: addresses are not fetched; download it and give the path"),
        ("s3://example/" + LONG, "s3: addresses are not fetched"),
        ("data:image/png;base64," + LONG, "not an image file"),
        ("data:image/png;base64,*" + LONG, "the base64 of its data: address is corrupt"),
        ("data:image/png;base64,AAAAA", "the base64 of its data: address is corrupt"),
        ("data:image/png;base64" + LONG, "a data: address has a comma before its data"),
        ("data:image/png;base64,", "not an image file"),
        (LONG, "cannot be opened"),
        ("file:///nowhere/" + LONG, "cannot be opened"),
    ],
)
@pytest.mark.parametrize("medium", ["images", "videos"])
def test_an_address_that_cannot_be_used_is_named_without_its_data(medium: str, source: str, words: str) -> None:
    with pytest.raises(VisionInputError) as error:
        PROCESSOR(**{medium: [source]})
    assert words in str(error.value) and len(str(error.value)) < 600 and "AAAAAAAA" * 40 not in str(error.value)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    picture(80, 80).save(buffer, "PNG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda p: p / "absent.png", ("absent.png", "cannot be opened")),
        (lambda p: write(p / "a.png", b"no image"), ("a.png", "not an image file")),
        (lambda p: write(p / "b.png", truncated_png()), ("b.png", "truncated")),
        (lambda p: write(p / "c.png", b""), ("c.png", "not an image file")),
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
        (lambda p: write(p / "a.gif", b"GIF89a"), ("a.gif",)),
    ],
)
def test_a_bad_video_is_named_with_its_remedy(
    source: Callable[[Path], Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(VisionInputError) as error:
        PROCESSOR(videos=[[picture(40, 40)] * 2, source(tmp_path)])
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith("video 1")
    assert all(word in str(error.value) for word in words), error.value


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_damaged_files_never_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    generator, buffer = random.Random(seed), io.BytesIO()
    kind = generator.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
    picture(40, 30).save(buffer, kind, save_all=kind in ("GIF", "WEBP"))
    content = bytearray(buffer.getvalue())
    for _ in range(generator.randint(1, 8)):
        content[generator.randrange(len(content))] = generator.randrange(256)
    path = write(tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}", bytes(content))
    for arguments in (([path], []), ([], [path])):
        try:
            PROCESSOR(*arguments)
        except VisionInputError as error:
            assert "damaged" in str(error)


# Video files


def save_mp4(path: Path, frames: list[Image.Image], fps: int) -> Path:
    """MPEG-4 of high quality: its levels are off by a few of 255."""
    av = pytest.importorskip("av", reason="PyAV, the extra 'video', is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, width=frames[0].width, height=frames[0].height)
        stream.pix_fmt, stream.bit_rate = "yuv420p", 10_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_mp4(
        tmp_path / "clip.mp4", [Image.new("RGB", (64, 96), (6 * i, 255 - 6 * i, 40)) for i in range(40)], 10
    )


def test_a_video_file_is_sampled_as_transformers_samples_it(clip: Path) -> None:
    video_utils = pytest.importorskip("transformers.video_utils")
    video = open_video(clip)
    assert (video.count, video.fps, video.is_sampled) == (40, 10.0, False)
    indices = [int(i) for i in np.linspace(0, 39, 8).round()]  # two a second of four seconds
    pixels, metadata = video_utils.read_video_pyav(str(clip), lambda metadata, **kwargs: indices)
    assert (metadata.total_num_frames, metadata.fps) == (40, 10.0)
    data = clip.read_bytes()
    for source in (clip, f"file://{clip}", "data:video/mp4;base64," + base64.b64encode(data).decode(), data):
        inputs = PROCESSOR(videos=[source])
        expected = PROCESSOR(videos=[Video([*pixels], 10)])
        assert_close(inputs.pixel_values_videos, expected.pixel_values_videos, label=str(source)[:20])
        assert inputs.video_grid_thw.tolist() == expected.video_grid_thw.tolist()
        times = [(a + b) / 20 for a, b in zip(indices[::2], indices[1::2], strict=True)]
        assert inputs.video_timestamps == [pytest.approx(times)]


def test_frames_of_a_video_file_are_those_that_were_written(clip: Path) -> None:
    first, last = open_video(clip).decode([0, 39])
    for frame, i in ((first, 0), (last, 39)):
        assert np.abs(np.asarray(frame).mean((0, 1)) - [6 * i, 255 - 6 * i, 40]).max() < 8


def test_a_video_that_was_filmed_upright_is_turned_as_it_says(clip: Path) -> None:
    left = [Image.new("RGB", (64, 96)) for _ in range(4)]
    for frame in left:
        frame.paste((255, 255, 255), (0, 0, 64, 48))  # the upper half
    content = save_mp4(clip, left, 4).read_bytes()
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # of the track's header, ISO 14496-12
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    at = content.index(matrix, content.index(b"tkhd"))
    (frame,) = open_video(write(clip, content[:at] + clockwise + content[at + 36 :])).decode([0])
    assert frame.size == (96, 64)
    right, rest = np.asarray(frame)[:, 60:].mean(), np.asarray(frame)[:, :36].mean()
    assert right > 240 and rest < 15  # what was above is now on the right


def test_a_video_file_that_is_corrupt_is_named_with_its_remedy(clip: Path) -> None:
    whole = clip.read_bytes()
    for number, content in enumerate((b"", b"no video" * 50, whole[: len(whole) // 2], whole[:-2000])):
        with pytest.raises(VisionInputError, match=r"broken.mp4\): .*ffmpeg"):
            PROCESSOR(videos=[write(clip.with_name("broken.mp4"), content)])
            raise AssertionError(f"content {number} was taken")


def test_without_pyav_a_video_file_is_refused_with_both_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for source in (tmp_path / "clip.MKV", "data:video/webm;base64,AAAA"):
        with pytest.raises(
            VisionInputError, match=r"qwen35-neuron\[video\]'; or extract .*fps=2.*whose frames count as 2"
        ):
            PROCESSOR(videos=[source])
