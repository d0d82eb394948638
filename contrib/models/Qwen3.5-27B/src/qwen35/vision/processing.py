# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and videos to patches, with Pillow and PyTorch alone.

Images equal transformers' `Qwen2VLImageProcessorPil` and videos its `Qwen3VLVideoProcessor`, bit for bit.

Memory: one image is decoded at a time, of `media.MAX_IMAGE_PIXELS` at most and at 16 bytes per pixel or less: 1.1 GB.
What is kept is bounded by `max_pixels`: 24 bytes per pixel of an image (0.4 GB by default), 12 bytes per pixel of all
frames of a video (0.3 GB).

Letters: P patches, N images or videos, T frames.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..configuration_qwen35 import is_number, is_size
from ..error_text import shorten, shown
from ..json_files import Rule, read_object, wrong_fields
from .content import ImageItem, VideoItem
from .media import MAX_IMAGE_PIXELS, ImageSource, OpenVideo, VideoSource, open_image, open_video, show_size
from .media import Video as Video  # a processor's callers make them

MAX_ASPECT_RATIO = 200  # transformers' smart_resize
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"

RESIZED_TOKENS = (4, 16384)
"""Merged tokens of an image or a frame whose item gives its size, at least and at most: qwen-vl-utils' limits."""


class VisionInputError(ValueError):
    """Images or videos that cannot be used; `problems` holds one line for each, with its place and a remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("cannot use the images or videos:\n" + "\n".join(f"  - {line}" for line in problems))


@dataclass(frozen=True)
class ImageSettings:
    """`preprocessor_config.json`; the defaults are those of the published Qwen3.5 checkpoints."""

    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    @property
    def factor(self) -> int:
        """Pixels on a side of a merged token."""
        return self.patch_size * self.merge_size

    def levels(self) -> np.ndarray[Any, Any]:
        """[3, 256] float32, the normalised value of each 8-bit level; roundings as in the image processor."""
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.image_mean, self.image_std))
        return np.asarray((scaled - mean) / std, dtype=np.float32)


@dataclass(frozen=True)
class VideoSettings(ImageSettings):
    """`video_preprocessor_config.json`; pixels are counted over all frames."""

    min_pixels: int = 4 * 32 * 32
    max_pixels: int = 24576 * 32 * 32
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def levels(self) -> np.ndarray[Any, Any]:
        """[3, 256] float32; the video processor rescales and normalises in one step, with its own roundings."""
        mean, std = (torch.tensor(v) * (1.0 / self.rescale_factor) for v in (self.image_mean, self.image_std))
        return np.asarray((torch.arange(256.0) - mean[:, None]).div(std[:, None]))


@dataclass
class VisionInputs:
    """What the model takes, under the names of the Hugging Face processor; None where there is no such medium."""

    pixel_values: torch.Tensor | None = None  # [P, channels * frames * height * width of a patch] float32
    image_grid_thw: torch.Tensor | None = None  # [N, 3] int64: frames, rows, columns of patches
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    video_timestamps: list[list[float]] = field(default_factory=list)  # seconds, one per temporal patch of each video


@dataclass(frozen=True)
class VisionProcessor:
    """Images and videos to `VisionInputs`, and placeholders in a text to as many tokens."""

    image: ImageSettings = field(default_factory=ImageSettings)
    video: VideoSettings = field(default_factory=VideoSettings)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> VisionProcessor:
        """The settings beside a checkpoint, in the files of transformers 4 or 5; defaults for what they do not say.

        Raises:
            VisionInputError: a file is not JSON, or a setting is of a wrong type or not implemented; all of a file's
                settings are named.
        """
        return cls(
            _settings(ImageSettings, *_given(Path(path), "image_processor", "preprocessor_config.json")),
            _settings(VideoSettings, *_given(Path(path), "video_processor", "video_preprocessor_config.json")),
        )

    def __call__(
        self, images: Sequence[ImageSource | ImageItem] = (), videos: Sequence[VideoSource | VideoItem] = ()
    ) -> VisionInputs:
        """Process everything, or nothing.

        Args:
            images: as of `media.open_image`, or with limits of their own.
            videos: as of `media.open_video`, or with limits of their own. Animations and video files are sampled at
                `video.fps`; of a directory, a list or a `Video` all frames are used.

        Raises:
            VisionInputError: some cannot be used; all are listed.
        """
        problems: list[str] = []
        patches, grids, clips, clip_grids = [], [], [], []
        inputs = VisionInputs()
        for i, image in enumerate(images):
            try:
                values, grid = self._process_image(image)
            except ValueError as error:
                problems.append(f"image {i}{_place(image)}: {error}")
            else:
                patches.append(values)
                grids.append(grid)
        for i, video in enumerate(videos):
            try:
                values, grid, timestamps = self._process_video(video)
            except ValueError as error:
                problems.append(f"video {i}{_place(video)}: {error}")
            else:
                clips.append(values)
                clip_grids.append(grid)
                inputs.video_timestamps.append(timestamps)
        if problems:
            raise VisionInputError(problems)
        if patches:
            inputs.pixel_values, inputs.image_grid_thw = torch.cat(patches), torch.tensor(grids)
        if clips:
            inputs.pixel_values_videos, inputs.video_grid_thw = torch.cat(clips), torch.tensor(clip_grids)
        return inputs

    def _process_image(self, asked: ImageSource | ImageItem) -> tuple[torch.Tensor, list[int]]:
        item = asked if isinstance(asked, ImageItem) else ImageItem(asked)
        image, settings = open_image(item.source), self.image
        height, width = _size_given(item, settings) or image_size(
            image.height, image.width, _within(settings, item.min_pixels, item.max_pixels)
        )
        pixels = np.asarray(image.resize((width, height), Image.Resampling(settings.resample)))
        return _patchify(np.repeat(pixels[None], settings.temporal_patch_size, axis=0), settings)

    def _process_video(self, asked: VideoSource | VideoItem) -> tuple[torch.Tensor, list[int], list[float]]:
        item = asked if isinstance(asked, VideoItem) else VideoItem(asked)
        video, settings, indices = _frames_asked(item, self.video)
        pixels, size = [], None
        for i, frame in enumerate(video.decode(indices)):
            if size is None:
                size = frame.size
                # A single frame counts as a whole temporal patch, where transformers stops.
                count = max(len(indices), settings.temporal_patch_size)
                height, width = _video_size_asked(item, count, frame.size, settings)
            elif frame.size != size:
                raise ValueError(
                    f"frame {i} is {show_size(frame.size)} pixels, frame 0 is {show_size(size)}; make them one size"
                )
            pixels.append(_resize_like_torchvision(frame, height, width, settings))
        pixels += [pixels[-1]] * (-len(pixels) % settings.temporal_patch_size)
        values, grid = _patchify(np.stack(pixels), settings)
        return values, grid, timestamps_of(indices, video.fps, settings.temporal_patch_size)

    def expand_placeholders(self, texts: Sequence[str], inputs: VisionInputs) -> list[str]:
        """Repeat each placeholder as often as its medium has tokens, as transformers 4.57's Qwen3VLProcessor does.

        A video's placeholder, with the marks around it, becomes one run of placeholders for every temporal patch, each
        between marks of its own and after its time in seconds.

        Raises:
            ValueError: the texts have not as many placeholders as there are images and videos.
        """
        images = [] if inputs.image_grid_thw is None else inputs.image_grid_thw.tolist()
        videos = [] if inputs.video_grid_thw is None else inputs.video_grid_thw.tolist()
        for token, media, what in ((IMAGE_TOKEN, images, "images"), (VIDEO_TOKEN, videos, "videos")):
            found = sum(text.count(token) for text in texts)
            if found != len(media):
                raise ValueError(f"the prompt has {found} {token} for {len(media)} {what}; give one a piece")
        image_texts = (IMAGE_TOKEN * (t * h * w // self.image.merge_size**2) for t, h, w in images)
        video_texts = (
            "".join(
                f"<{time:.1f} seconds>{VISION_START}{VIDEO_TOKEN * (h * w // self.video.merge_size**2)}{VISION_END}"
                for time in times
            )
            for (_, h, w), times in zip(videos, inputs.video_timestamps, strict=True)
        )
        marked = re.escape(VISION_START + VIDEO_TOKEN + VISION_END)
        pattern = re.compile(f"{re.escape(IMAGE_TOKEN)}|{marked}|{re.escape(VIDEO_TOKEN)}")
        return [
            pattern.sub(lambda match: next(image_texts if match[0] == IMAGE_TOKEN else video_texts), text)
            for text in texts
        ]


def image_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """Height and width to resize an image to: multiples of a merged token, within the pixel limits.

    transformers' `smart_resize`.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    return _fit(1, height, width, settings, rounded=1)


def video_size(frames: int, height: int, width: int, settings: VideoSettings) -> tuple[int, int]:
    """Height and width to resize frames to: as `image_size`, with limits for the pixels of all frames together.

    Frames smaller than a merged token are scaled up first.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    factor = settings.factor
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    temporal = settings.temporal_patch_size
    return _fit(frames, height, width, settings, rounded=round(frames / temporal) * temporal)


def _fit(frames: int, height: int, width: int, settings: ImageSettings, rounded: int) -> tuple[int, int]:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"{width} by {height} pixels is an aspect ratio above {MAX_ASPECT_RATIO}; cut or pad it to a stouter one"
        )
    factor = settings.factor
    high, wide = (round(side / factor) * factor for side in (height, width))
    if rounded * high * wide > settings.max_pixels:
        shrink = math.sqrt(frames * height * width / settings.max_pixels)
        high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rounded * high * wide < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (frames * height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide


def sampled_indices(total: int, source_fps: float, settings: VideoSettings) -> list[int]:
    """Numbers of the frames to use of `total`: evenly spaced, `settings.fps` per second within the frame limits."""
    count = min(max(int(total / source_fps * settings.fps), settings.min_frames), settings.max_frames, total)
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


_Settings = TypeVar("_Settings", bound=ImageSettings)


def _frames_asked(item: VideoItem, settings: VideoSettings) -> tuple[OpenVideo, VideoSettings, list[int]]:
    """A video at the rate that its item gives, its settings, and the numbers of the frames to use."""
    video = open_video(item.source)
    if item.fps is not None and video.is_sampled:
        video = replace(video, fps=float(item.fps))
    elif item.fps is not None:
        if item.nframes is not None:
            raise ValueError(f"fps={item.fps} and nframes={item.nframes} both say how many frames to take; give one")
        settings = replace(settings, fps=item.fps)
    most = item.max_frames or max(settings.max_frames, item.min_frames or 0)
    settings = replace(settings, min_frames=min(item.min_frames or settings.min_frames, most), max_frames=most)
    if item.nframes is not None:
        temporal = settings.temporal_patch_size
        count = round(item.nframes / temporal) * temporal  # as qwen-vl-utils
        if not temporal <= count <= min(video.count, settings.max_frames):
            raise ValueError(
                f"nframes={item.nframes} is not in {temporal}..{min(video.count, settings.max_frames)}, the frames "
                "that there are and max_frames"
            )
        indices = [int(i) for i in np.linspace(0, video.count - 1, count).round()]
    elif not video.is_sampled:
        indices = sampled_indices(video.count, video.fps, settings)
    elif video.count > settings.max_frames:
        raise ValueError(f"{video.count} frames exceed max_frames={settings.max_frames}; sample fewer a second")
    else:
        indices = list(range(video.count))
    return video, settings, indices


def _within(settings: _Settings, least: int | None, most: int | None) -> _Settings:
    """The settings with the pixel limits that an item gives; one that it does not give makes way."""
    return replace(
        settings,
        min_pixels=least or min(settings.min_pixels, most or settings.min_pixels),
        max_pixels=most or max(settings.max_pixels, least or settings.max_pixels),
    )


def _size_given(item: ImageItem, settings: ImageSettings) -> tuple[int, int] | None:
    """Height and width that an item gives, as qwen-vl-utils rounds them; None where it gives none."""
    if item.resized_height is None or item.resized_width is None:
        return None
    least, most = (tokens * settings.factor**2 for tokens in RESIZED_TOKENS)
    return _fit(1, item.resized_height, item.resized_width, _within(settings, least, most), rounded=1)


def _video_size_asked(item: VideoItem, frames: int, size: tuple[int, int], settings: VideoSettings) -> tuple[int, int]:
    """Height and width to resize frames of `size` (width, height) to."""
    temporal = settings.temporal_patch_size
    rounded = round(frames / temporal) * temporal
    if (given := _size_given(item, settings)) is not None:
        allowed = max(settings.max_pixels, VideoSettings.max_pixels)
        if rounded * math.prod(given) > allowed:
            raise ValueError(
                f"resized_height={item.resized_height} and resized_width={item.resized_width} of {frames} frames "
                f"exceed {allowed} pixels together; make them smaller or take fewer frames"
            )
        return given
    least = None if item.min_pixels is None else rounded * item.min_pixels
    limits = [
        settings.max_pixels,
        *([] if item.max_pixels is None else [rounded * item.max_pixels]),
        *([] if item.total_pixels is None else [temporal * item.total_pixels]),  # a token covers `temporal` frames
    ]
    if least is not None and least > min(limits):
        raise ValueError(f"min_pixels={item.min_pixels} of {frames} frames exceeds {min(limits)} pixels together")
    return video_size(frames, size[1], size[0], _within(settings, least, min(limits)))


def timestamps_of(indices: Sequence[int], fps: float, temporal_patch_size: int) -> list[float]:
    """Seconds of each temporal patch: halfway between its first and last frame.

    The last patch is padded with copies of the last frame.
    """
    padded = [*indices, *[indices[-1]] * (-len(indices) % temporal_patch_size)]
    firsts, lasts = padded[::temporal_patch_size], padded[temporal_patch_size - 1 :: temporal_patch_size]
    return [(first / fps + last / fps) / 2 for first, last in zip(firsts, lasts, strict=True)]


def _patchify(frames: np.ndarray[Any, Any], settings: ImageSettings) -> tuple[torch.Tensor, list[int]]:
    """frames [T, height, width, 3] uint8 -> patches [P, 3 * frames * height * width] float32, merged block by block."""
    size, temporal, merge = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    count, height, width, channels = frames.shape
    grid = [count // temporal, height // size, width // size]
    blocks = frames.reshape(
        grid[0], temporal, grid[1] // merge, merge, size, grid[2] // merge, merge, size, channels
    ).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    values = np.empty((math.prod(grid), channels, temporal * size * size), dtype=np.float32)
    for channel, levels in enumerate(settings.levels()):
        values[:, channel] = levels[blocks[..., channel, :, :, :].reshape(len(values), -1)]
    return torch.from_numpy(values).flatten(1), grid


def _resize_like_torchvision(
    frame: Image.Image, height: int, width: int, settings: VideoSettings
) -> np.ndarray[Any, Any]:
    """[height, width, 3] uint8, rounded as torchvision's resize rounds and Pillow's does not."""
    if frame.size == (width, height):
        return np.asarray(frame)
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0))


def _place(asked: Any) -> str:
    source = asked.source if isinstance(asked, ImageItem) else asked
    return f" ({shorten(os.fspath(source))})" if isinstance(source, str | os.PathLike) else ""


def _given(directory: Path, part: str, name: str) -> tuple[str, dict[str, Any]]:
    """The settings of a processor and where they are: `part` of transformers 5's file, or the file `name`.

    Raises:
        VisionInputError: a file is corrupt.
    """
    both = "processor_config.json"
    try:
        given = read_object(directory / both).get(part)
        if not given:
            return name, read_object(directory / name)
    except ValueError as error:
        raise VisionInputError([str(error)]) from error
    if not isinstance(given, dict):
        raise VisionInputError([f"{both}: {part}={shown(given)} must be an object; download it again"])
    return f"{both}, {part}", given


_LONGEST = 1 << 7
"""Of `patch_size`, `temporal_patch_size` and `merge_size`; published processors have 16, 2 and 2."""


def _are_channels(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a number above `least` for each of red, green and blue."""
    return isinstance(value, list) and len(value) == 3 and all(is_number(level) and level > least for level in value)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


_RULES: Mapping[str, Rule] = {
    "min_pixels": (lambda value: is_size(value, MAX_IMAGE_PIXELS), f"a whole number of 1..{MAX_IMAGE_PIXELS}"),
    "max_pixels": (is_size, "a positive whole number"),
    **dict.fromkeys(
        ("patch_size", "temporal_patch_size", "merge_size"),
        (lambda value: is_size(value, _LONGEST), f"a whole number of 1..{_LONGEST}"),
    ),
    "image_mean": (_are_channels, "a list of three numbers"),
    "image_std": (lambda value: _are_channels(value, 0.0), "a list of three positive numbers"),
    "rescale_factor": (_is_positive, "a positive number"),
    "resample": (
        lambda value: type(value) is int and value in {*Image.Resampling},
        f"one of Pillow's filters, 0..{max(Image.Resampling)}",
    ),
}
_VIDEO_RULES: Mapping[str, Rule] = {
    **_RULES,
    "resample": (
        lambda value: type(value) is int and value == Image.Resampling.BICUBIC,
        f"{int(Image.Resampling.BICUBIC)}: frames are resized bicubically",
    ),
    "fps": (_is_positive, "a positive number"),
    **dict.fromkeys(("min_frames", "max_frames"), (is_size, "a positive whole number")),
}


def _settings(cls: type[_Settings], place: str, given: Mapping[str, Any]) -> _Settings:
    """`ImageSettings` or `VideoSettings` of a processor's JSON, whose `size` holds the pixel limits.

    Raises:
        VisionInputError: naming `place` and every setting that is wrong or not implemented.
    """
    problems = [
        f"{name}={shown(given[name])} is not supported; the processor resizes, rescales, normalises and converts to RGB"
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
        if given.get(name, True) is not True
    ]
    if given.get("cap_pixels_per_frame"):
        problems.append(
            f"cap_pixels_per_frame={shown(given['cap_pixels_per_frame'])} is not supported; lower size.longest_edge "
            "instead"
        )
    size = {} if given.get("size") is None else given["size"]
    if not isinstance(size, dict) or (size and not size.keys() & {"shortest_edge", "longest_edge"}):
        problems.append(f"size={shown(size)} must be an object with shortest_edge and longest_edge, in pixels")
        size = {}
    values: dict[str, Any] = {f.name: given.get(f.name) for f in fields(cls)}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if values[name] is None:
            values[name] = size.get(edge)
    values = {name: value for name, value in values.items() if value is not None}
    wrong = wrong_fields(values, _VIDEO_RULES if issubclass(cls, VideoSettings) else _RULES)
    problems += [f"{problem}; correct it or leave it out" for problem in wrong]
    settings = cls() if problems else cls(**values)
    problems += [
        f"{least}={getattr(settings, least)} exceeds {most}={getattr(settings, most)}; correct one of them"
        for least, most in (("min_pixels", "max_pixels"), ("min_frames", "max_frames"))
        if hasattr(settings, least) and getattr(settings, least) > getattr(settings, most)
    ]
    if settings.factor**2 > settings.max_pixels:
        problems.append(
            f"max_pixels={settings.max_pixels} is less than a merged token of {settings.factor} by {settings.factor} "
            "pixels; correct it, patch_size or merge_size"
        )
    if problems:
        raise VisionInputError([f"{place}: {problem}" for problem in problems])
    return settings
