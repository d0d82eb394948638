# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images, animations and lists of frames as RGB Pillow images, from files or memory.

An image of more than `MAX_IMAGE_PIXELS` is refused before it is decoded. Transparency is laid on white, EXIF
orientation is applied, and 16-bit grey levels are scaled to 8 bits.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 1 << 26
DEFAULT_SOURCE_FPS = 24.0  # what transformers assumes of frames without a rate

_FRAME_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_VIDEO_FILES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow opens some 16-bit files as 32-bit "I"

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]"
VideoSource: TypeAlias = "str | os.PathLike[str] | Video | Sequence[ImageSource]"


@dataclass(frozen=True)
class Video:
    """Frames that were already sampled, all of which are used, `fps` of them per second."""

    frames: Sequence[ImageSource]
    fps: float = DEFAULT_SOURCE_FPS


@dataclass(frozen=True)
class OpenVideo:
    """A video whose frames can be decoded."""

    count: int  # frames
    fps: float  # frames per second
    is_sampled: bool  # whether the caller chose the frames, so that all are to be used
    decode: Callable[[Sequence[int]], Iterator[Image.Image]]  # frames of these numbers as RGB, one in memory at a time


def open_image(source: ImageSource) -> Image.Image:
    """Read an image as RGB, upright by its EXIF orientation and on white where it is transparent.

    Args:
        source: a path, a Pillow image or an array [height, width(, 1, 3 or 4)] of uint8 or uint16.

    Raises:
        ValueError: it is no image, too large, or of a mode whose levels have no certain range.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        _check_size(source.size)
        return _to_rgb(_decoded(source))
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"a {type(source).__name__} is not an image; give a path, a Pillow image or an array")
    with _open_file(source) as image:
        return _to_rgb(_decoded(image))


def _open_file(source: str | os.PathLike[str]) -> Image.Image:
    name = os.fspath(source)
    if re.match(r"[a-z]+://|data:", name):
        raise ValueError("addresses are not fetched; download it and give the path")
    try:
        image = Image.open(name)
    except UnidentifiedImageError:
        raise ValueError("not an image file, or a corrupt one; convert or download it again") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be opened ({error})") from error
    _check_size(image.size)
    return image


def _decoded(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"corrupt or truncated image ({error}); download it again") from error


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise ValueError(f"{show_size(size)} pixels: it is empty")
    if math.prod(size) > MAX_IMAGE_PIXELS:
        raise ValueError(f"{show_size(size)} pixels exceed the limit of {MAX_IMAGE_PIXELS} pixels; scale it down")


def show_size(size: Sequence[int]) -> str:
    """(width, height) as errors show it."""
    return f"{size[0]} by {size[1]}"


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an array of shape {list(array.shape)} is not [height, width] with 1, 3 or 4 channels last")
    _check_size((array.shape[1], array.shape[0]))
    if array.dtype == np.uint16:
        array = _to_8_bits(array)
    if array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype} has no certain range; convert it to uint8 levels from 0 to 255")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _to_8_bits(levels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 is 255 * 257


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit levels beyond 16 bits have no certain range; convert it to 8 or 16 bits")
        image = Image.fromarray(_to_8_bits(levels))
    if image.mode == "F":
        raise ValueError("floating-point levels have no certain range; convert it to 8 or 16 bits")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def open_video(source: VideoSource) -> OpenVideo:
    """Find the frames of a video without keeping any decoded.

    Args:
        source: an animation (GIF, WebP, APNG), a directory of image files in the order of their names, a list of
            images, or a `Video`.

    Raises:
        ValueError: it is no video, or has no frames; while decoding, a frame is no image.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            source = sorted(file for file in path.iterdir() if file.suffix.lower() in _FRAME_FILES)
        elif path.suffix.lower() in _VIDEO_FILES:
            raise ValueError(
                "video files are not decoded here; extract frames ('ffmpeg -i FILE -vf fps=2 DIR/%06d.png') "
                "and give the directory, or Video(frames, fps=2)"
            )
        else:
            return _open_animation(path)
    video = source if isinstance(source, Video) else Video(source)
    if not isinstance(video.frames, Sequence) and not isinstance(video.frames, np.ndarray):
        raise ValueError(f"a {type(video.frames).__name__} is not a video; give a path or a list of frames")
    if not isinstance(video.fps, int | float) or not 0 < video.fps < math.inf:
        raise ValueError(f"fps={video.fps!r} must be a positive number")
    if not len(video.frames):
        raise ValueError("it has no frames; give at least one")

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        return _numbered(open_image(video.frames[i]) for i in indices)

    return OpenVideo(len(video.frames), float(video.fps), is_sampled=True, decode=decode)


def _open_animation(path: Path) -> OpenVideo:
    with _open_file(path) as image:
        count = getattr(image, "n_frames", 1)
        milliseconds = 0
        try:
            for i in range(count):
                image.seek(i)
                image.load()  # before this, some formats do not know the duration
                milliseconds += image.info.get("duration", 0)
        except Exception as error:  # as in _decoded
            raise ValueError(f"corrupt or truncated animation ({error}); download it again") from error

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        def frames() -> Iterator[Image.Image]:
            with _open_file(path) as image:
                for i in indices:
                    image.seek(i)
                    yield _to_rgb(_decoded(image))

        return _numbered(frames())

    fps = 1000 * count / milliseconds if milliseconds > 0 else DEFAULT_SOURCE_FPS
    return OpenVideo(count, fps, is_sampled=False, decode=decode)


def _numbered(frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
    """The same frames; an error of one gets its number in front."""
    i = 0
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except ValueError as error:
            raise ValueError(f"frame {i}: {error}") from error
        yield frame
        i += 1
