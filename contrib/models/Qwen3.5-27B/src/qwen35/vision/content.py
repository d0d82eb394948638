# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Content items of chat messages: which images and videos they name, and what they ask of each.

A message's content is a text, nothing, or a list of items:

    {"type": "text", "text": "..."}
    {"type": "image", "image": SOURCE}  {"type": "image_url", "image_url": ADDRESS or {"url": ADDRESS}}
    {"type": "video", "video": SOURCE}  {"type": "video_url", "video_url": ADDRESS or {"url": ADDRESS}}

SOURCE is what `media.open_image` and `media.open_video` take; `path`, `url` and, of an image, `base64` are further keys
for it. `ImageItem` and `VideoItem` list the keys that may stand beside it, which are those of qwen-vl-utils. Any other
key is an error: it would ask for something that nobody does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..error_text import shorten
from .media import MAX_IMAGE_PIXELS, ImageSource, Video, VideoSource

_KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""What an item of each type is; one without a type is what its first key of these is."""

_SOURCE_KEYS = {
    "image": ("image", "image_url", "path", "url", "base64"),
    "video": ("video", "video_url", "path", "url"),
}

_REMEDIES = {
    "raw_fps": "give sample_fps, the frames a second of a list or directory of frames",
    "video_start": "cut the video before",
    "video_end": "cut the video before",
    "num_frames": "give nframes",
    "image_patch_size": "the checkpoint's processor knows it",
}
"""For keys that are known elsewhere."""

_FPS = (1e-6, 1e6)
"""Least and most frames a second: beyond them times in seconds, and numbers of frames, overflow."""
_MOST = 2**31 - 1
"""Of pixels and frames: far above what is decoded, far below what a float cannot hold."""


@dataclass(frozen=True)
class ImageItem:
    """An image, and what its item asks; None leaves it to the processor's settings.

    Args:
        min_pixels, max_pixels: limits of the resized image's pixels; an image is enlarged to `media.MAX_IMAGE_PIXELS`
            at most.
        resized_height, resized_width: its size, rounded to whole merged tokens; both or neither.

    Raises:
        ValueError: a number is out of its range, or two contradict each other.
    """

    source: ImageSource
    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name == "fps":
                low, high = _FPS
                if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                    raise ValueError(f"fps={shorten(repr(value))} must be a positive number of {low}..{high}")
                continue
            most = MAX_IMAGE_PIXELS if field.name == "min_pixels" else _MOST
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(
                    f"{field.name}={shorten(repr(value))} must be a whole number of at least 1 and at most {most}"
                )
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError("resized_height and resized_width go together: give both, or max_pixels")
        _check_order("min_pixels", self.min_pixels, "max_pixels", self.max_pixels)


@dataclass(frozen=True)
class VideoItem(ImageItem):
    """A video, and what its item asks; None leaves it to the processor's settings.

    Args:
        source: as of `media.open_video`.
        min_pixels, max_pixels, resized_height, resized_width: as of an image, for each frame.
        total_pixels: as many pixels as `total_pixels` over merged tokens' pixels gives tokens of video, at most.
        fps: of a file or an animation, the frames a second to take; of frames, their rate. `sample_fps` in an item.
        nframes: frames to take, rounded to whole temporal patches; instead of fps, where that is frames to take.
        min_frames, max_frames: limits of the frames that fps takes.
    """

    source: VideoSource  # type: ignore[assignment]
    total_pixels: int | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order("min_frames", self.min_frames, "max_frames", self.max_frames)


def _check_order(low: str, least: int | None, high: str, most: int | None) -> None:
    if least is not None and most is not None and least > most:
        raise ValueError(f"{low}={least} is above {high}={most}")


def media_of(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[ImageSource | ImageItem], list[VideoSource | VideoItem]]:
    """The images and the videos of a chat, in order; a source alone where its item asks nothing else.

    Raises:
        ValueError: an item is none of the above; naming its place, key and remedy.
    """
    images: list[ImageSource | ImageItem] = []
    videos: list[VideoSource | VideoItem] = []
    for place, kind, item in _items(messages):
        try:
            if kind == "image":
                images.append(_image(item))
            elif kind == "video":
                videos.append(_video(item))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return images, videos


def template_content(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them: items of media without their sources, each with a type.

    Raises:
        ValueError: as `media_of`.
    """
    copies = [dict(message) for message in messages]
    for copy in copies:
        if isinstance(copy.get("content"), list | tuple):
            copy["content"] = []
    for (number, _), kind, item in _items(messages):
        shown = {"type": kind, kind: item["text"] if kind == "text" else ""}
        copies[number]["content"].append(shown)
    return copies


class _Place(tuple[int, int]):
    """Numbers of a message and of an item in it."""

    def __str__(self) -> str:
        return f"message {self[0]}, content item {self[1]}"


def _items(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[_Place, str, Mapping[str, Any]]]:
    """Place, kind and item of every item of every message whose content is a list."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list | tuple):
            raise ValueError(
                f"message {number}: content is a {type(content).__name__}; give a text, a list of items or null"
            )
        for position, item in enumerate(content):
            place = _Place((number, position))
            if not isinstance(item, Mapping):
                raise ValueError(f'{place} is a {type(item).__name__}; give {{"type": "text", "text": ...}}')
            yield place, _kind(place, item), item


def _kind(place: _Place, item: Mapping[str, Any]) -> str:
    given = item.get("type", next((key for key in item if key in _KINDS), None))
    kind = _KINDS.get(given) if isinstance(given, str) else None
    if kind is None:
        raise ValueError(f"{place}: type={shorten(repr(given))} is not known; give one of {', '.join(_KINDS)}")
    if kind == "text" and not isinstance(item.get("text"), str):
        raise ValueError(f"{place}: its text is a {type(item.get('text')).__name__}; give a text")
    return kind


def _image(item: Mapping[str, Any]) -> ImageSource | ImageItem:
    source, asked = _source_and_rest(item, "image")
    _check_keys(asked, ImageItem)
    return ImageItem(source, **asked) if asked else source


def _video(item: Mapping[str, Any]) -> VideoSource | VideoItem:
    source, asked = _source_and_rest(item, "video")
    if (sample_fps := asked.pop("sample_fps", None)) is not None:
        if asked.setdefault("fps", sample_fps) != sample_fps:
            raise ValueError(f"fps={asked['fps']} and sample_fps={sample_fps} are not the same; give one of them")
    _check_keys(asked, VideoItem)
    if not asked:
        return source
    video = VideoItem(source, **asked)
    if [*asked] == ["fps"] and not isinstance(source, str | os.PathLike | bytes | Video):
        return Video(source, video.fps or 0)
    return video


def _source_and_rest(item: Mapping[str, Any], kind: str) -> tuple[Any, dict[str, Any]]:
    """The source of an item, and its other keys that have a value."""
    keys = _SOURCE_KEYS[kind]
    key = next((key for key in keys if item.get(key) is not None), None)
    if key is None:
        raise ValueError(f"a content item of type {kind!r} has no {kind!r}; give a path, an image or frames")
    source = item[key]
    rest = {name: value for name, value in item.items() if name not in ("type", *keys) and value is not None}
    if isinstance(source, Mapping):  # as OpenAI's clients send addresses
        rest |= {name: value for name, value in source.items() if name != "url" and value is not None}
        source = source.get("url")
        if rest.get("detail") in ("auto", "high"):  # what is done anyway
            del rest["detail"]
        if "detail" in rest:
            raise ValueError(f"detail={shorten(repr(rest['detail']))} is not known here; give max_pixels")
        if not isinstance(source, str):
            raise ValueError(f"{key} has no url; give an address")
    if key == "base64":
        source = f"data:;base64,{source}"
    return source, rest


def _check_keys(asked: Mapping[str, Any], kind: type[ImageItem]) -> None:
    known = [field.name for field in fields(kind)[1:]]
    if unknown := [key for key in asked if key not in known]:
        key = shorten(str(unknown[0]))
        raise ValueError(f"{key} is not supported; {_REMEDIES.get(key, 'leave it out')}. Known: {', '.join(known)}")
