# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images, animations, video files and lists of frames as RGB Pillow images, from files or memory.

An image of more than `MAX_IMAGE_PIXELS` is refused before it is decoded. Transparency is laid on white, EXIF
orientation and a video's rotation are applied, and 16-bit grey levels are scaled to 8 bits. Errors show addresses
and texts in short (`shorten`), never the data in them.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..error_text import shorten

MAX_IMAGE_PIXELS = 1 << 26
DEFAULT_SOURCE_FPS = 24.0  # what transformers assumes of frames without a rate
DIRECTORY_FPS = 2.0  # of frames extracted as EXTRACT_FRAMES says; also what qwen-vl-utils assumes of frames

EXTRACT_FRAMES = (
    "extract frames ('ffmpeg -i FILE -vf fps=2 DIR/%06d.png') and give the directory, whose frames count as 2 a second "
    "(fps says otherwise), or Video(frames, fps=2)"
)
"""The remedy for a video file that cannot be decoded here."""

_FRAME_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_VIDEO_FILES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}
_ANIMATIONS = re.compile(rb"GIF8|\x89PNG|RIFF....WEBP", re.DOTALL)
"""How the files of animations begin."""
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow opens some 16-bit files as 32-bit "I"

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]"
VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | Video | Sequence[ImageSource]"


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
    with _open_file(content_of(source)) as image:
        return _to_rgb(_decoded(image))


def content_of(source: str | os.PathLike[str]) -> Path | io.BytesIO:
    """Where the bytes of a path, a file: or a data: address are (RFC 8089, RFC 2397).

    Raises:
        ValueError: it is an address of another kind, or its data are corrupt.
    """
    name = os.fspath(source)
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://|(data|file):", name, re.IGNORECASE)
    match (scheme[1] or scheme[2]).lower() if scheme is not None else None:
        case None:
            return Path(name)
        case "data":
            return io.BytesIO(_data(name))
        case "file":
            # As qwen-vl-utils: what follows file://, which may be relative; else as a browser writes it.
            rest = re.sub(r"^file:(//)?(localhost(?=/))?", "", name, flags=re.IGNORECASE)
            return Path(rest if os.path.exists(rest) else unquote(rest))  # of too long a name, exists() raises
        case other:
            raise ValueError(f"{other}: addresses are not fetched; download it and give the path, or a data: address")


def _data(address: str) -> bytes:
    head, comma, payload = address.partition(",")
    if not comma:
        raise ValueError("a data: address has a comma before its data: data:image/png;base64,...")
    content = unquote_to_bytes(payload)
    if not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return content
    content = b"".join(content.split()).rstrip(b"=")
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except binascii.Error:
        raise ValueError("the base64 of its data: address is corrupt; encode it again") from None


def _open_file(content: Path | io.BytesIO) -> Image.Image:
    try:
        image = Image.open(content)
    except UnidentifiedImageError:
        raise ValueError("not an image file, or a corrupt one; convert or download it again") from None
    except (OSError, Image.DecompressionBombError) as error:
        name = f": {shorten(str(content))}" if isinstance(content, Path) else ""
        raise ValueError(f"cannot be opened ({_reason(error)}{name})") from error
    _check_size(image.size)
    return image


def _reason(error: Exception) -> str:
    """What an error says, without the file's name, which may be anything."""
    return shorten(getattr(error, "strerror", None) or str(error))


def _decoded(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"corrupt or truncated image ({_reason(error)}); download it again") from error


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
        source: an animation (GIF, WebP, APNG) or a video file (MP4 and its like, with the extra `video`), a file: or
            data: address of one, its bytes, a directory of image files in the order of their names, a list of images,
            or a `Video`. Frames of a directory count as `DIRECTORY_FPS` a second, those of a list as
            `DEFAULT_SOURCE_FPS`.

    Raises:
        ValueError: it is no video, or has no frames; while decoding, a frame is no image.
    """
    if isinstance(source, bytes):
        return (_open_animation if is_animation(source) else _open_video_file)(io.BytesIO(source))
    if isinstance(source, str | os.PathLike):
        content = content_of(source)
        if isinstance(content, Path) and os.path.isdir(content):
            files = sorted(file for file in content.iterdir() if file.suffix.lower() in _FRAME_FILES)
            source = Video(files, DIRECTORY_FPS)
        elif _names_a_video_file(source):
            return _open_video_file(content)
        else:
            return _open_animation(content)
    video = source if isinstance(source, Video) else Video(source)
    if not isinstance(video.frames, Sequence) and not isinstance(video.frames, np.ndarray):
        raise ValueError(f"a {type(video.frames).__name__} is not a video; give a path or a list of frames")
    if not isinstance(video.fps, int | float) or not 0 < video.fps < math.inf:
        raise ValueError(f"fps={shorten(repr(video.fps))} must be a positive number")
    if not len(video.frames):
        raise ValueError("it has no frames; give at least one")

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        return _numbered(open_image(video.frames[i]) for i in indices)

    return OpenVideo(len(video.frames), float(video.fps), is_sampled=True, decode=decode)


def is_animation(file: bytes) -> bool:
    """Whether a file is an animation by how it begins; another one is left to PyAV."""
    return _ANIMATIONS.match(file) is not None


def _names_a_video_file(source: str | os.PathLike[str]) -> bool:
    name = os.fspath(source)
    if name[:5].lower() == "data:":
        return name[5:11].lower() == "video/"
    return Path(name).suffix.lower() in _VIDEO_FILES


def _open_video_file(content: Path | io.BytesIO) -> OpenVideo:
    """A container with a video stream, decoded by PyAV; frames are counted as transformers' `read_video_pyav` does."""
    try:
        import av
    except ImportError:
        raise ValueError(
            f"video files are decoded by PyAV: pip install 'qwen35-neuron[video]'; or {EXTRACT_FRAMES}"
        ) from None

    def frames() -> Generator[Any, None, None]:
        """The stream, then its frames."""
        if isinstance(content, io.BytesIO):
            content.seek(0)
        with av.open(content) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            yield container.streams.video[0]
            yield from container.decode(video=0)

    def failed(error: Exception) -> ValueError:
        return ValueError(f"cannot be decoded ({_reason(error)}); {EXTRACT_FRAMES}")

    try:
        with closing(frames()) as found:
            stream = next(found)
            _check_size((stream.width, stream.height))
            fps = float(stream.average_rate or DEFAULT_SOURCE_FPS)
            count = stream.frames or sum(1 for _ in found)  # some containers do not say how many they hold
    except Exception as error:  # FFmpeg's decoders raise nearly anything
        raise failed(error) from error
    if not count:
        raise ValueError(f"it has no frames; {EXTRACT_FRAMES}")

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        def chosen() -> Iterator[Image.Image]:
            wanted, decoded = {*indices}, 0
            try:
                with closing(frames()) as found:
                    next(found)
                    for frame in found:
                        if decoded in wanted:
                            # The display matrix turns counterclockwise, and so does Pillow.
                            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
                        decoded += 1
                        if decoded > max(wanted):
                            return
            except Exception as error:  # as above
                raise failed(error) from error
            raise ValueError(f"it ends after {decoded} of the {count} frames that it says it has; {EXTRACT_FRAMES}")

        return _numbered(chosen())

    return OpenVideo(count, fps, is_sampled=False, decode=decode)


def _open_animation(path: Path | io.BytesIO) -> OpenVideo:
    with _open_file(path) as image:
        count = getattr(image, "n_frames", 1)
        milliseconds = 0
        try:
            for i in range(count):
                image.seek(i)
                image.load()  # before this, some formats do not know the duration
                milliseconds += image.info.get("duration", 0)
        except Exception as error:  # as in _decoded
            raise ValueError(f"corrupt or truncated animation ({_reason(error)}); download it again") from error

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
