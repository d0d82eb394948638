# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and videos as requests bring them, kept as they are: `qwen35.vision` decodes, samples and resizes them.

vLLM would decode videos itself, with OpenCV and at other frames than the model's processor takes. Its registry of
loaders has one here that leaves the file as it is.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from qwen35.vision.media import is_animation

from .options import VIDEO_LOADER

_PLAIN_MODES = ("RGB", "L", "CMYK", "YCbCr")
"""Modes of images whose conversion to RGB leaves nothing to decide."""

_FORMATS = ("PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "AVIF")
"""Formats of images of other modes: with transparency, or 16 bits a channel."""

_VLLM_NUM_FRAMES = 32
"""What vLLM passes as num_frames where nobody asks for a number."""


@VIDEO_LOADER_REGISTRY.register(VIDEO_LOADER)
class UndecodedVideo(VideoLoader):
    """The file of a video as it is, and the frames a second that are asked of it."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = _VLLM_NUM_FRAMES, **asked: Any) -> tuple[bytes, dict[str, Any]]:
        """The file and `fps`, where it is given.

        Raises:
            ValueError: it cannot be decoded here, or something else is asked of it.
        """
        if num_frames not in (-1, _VLLM_NUM_FRAMES):
            asked["num_frames"] = num_frames
        if unknown := sorted({*asked} - {"fps"}):
            raise ValueError(f"media_io_kwargs, video: {', '.join(unknown)} is not taken; give fps, or leave it out")
        if not is_animation(data) and not _has_pyav():
            raise ValueError(
                "video files are decoded by PyAV, which this server lacks: pip install 'qwen35-neuron[video]'; else "
                "send a GIF, WebP or APNG, or frames as data:video/jpeg"
            )
        return bytes(data), asked


def _has_pyav() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


class ImageItems(ProcessorBatchItems[Any]):
    """Images of a request: Pillow images, arrays, or either with the bytes of its file."""

    def __init__(self, data: Sequence[Any]) -> None:
        super().__init__(data, "image")

    def get(self, index: int) -> Any:
        """An image; of one with its file, in the file's own mode, where vLLM has converted it to RGB in its way."""
        item = self.data[index]
        if isinstance(item, MediaWithBytes) and isinstance(item.media, Image.Image):
            try:
                own = Image.open(io.BytesIO(item.original_bytes), formats=_FORMATS)
            except (UnidentifiedImageError, OSError):
                return item.media
            return item.media if own.mode in _PLAIN_MODES and "transparency" not in own.info else own
        return self._unwrap(item)


class VideoItems(ProcessorBatchItems[Any]):
    """Videos of a request, each (frames, metadata): a list of images, an array [T, height, width, 3], or a file."""

    def __init__(self, data: Sequence[Any]) -> None:
        super().__init__([_with_metadata(item) for item in data], "video")


class MediaParser(MultiModalDataParser):
    """What `multi_modal_data` of a request holds, without decoding or converting it."""

    def _parse_image_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        if data is None or self.is_embeddings(data):
            return super()._parse_image_data(data)
        is_one = isinstance(data, Image.Image | MediaWithBytes) or (isinstance(data, np.ndarray) and data.ndim <= 3)
        return ImageItems([data] if is_one else [*data])

    def _parse_video_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        if data is None or self.is_embeddings(data):
            return super()._parse_video_data(data)
        return VideoItems([data] if _is_video(data) else [*data])


def _is_video(data: Any) -> bool:
    """Whether it is one video, and not a list of some."""
    if isinstance(data, MediaWithBytes | bytes):
        return True
    if isinstance(data, tuple):
        return len(data) == 2 and isinstance(data[1], Mapping)
    if isinstance(data, np.ndarray):
        return data.ndim <= 4
    return bool(len(data)) and all(
        isinstance(frame, Image.Image) or (isinstance(frame, np.ndarray) and frame.ndim <= 3) for frame in data
    )


def _with_metadata(item: Any) -> tuple[Any, Mapping[str, Any]] | None:
    """A video as (frames, metadata); None where only an earlier one is named."""
    media = item.media if isinstance(item, MediaWithBytes) else item
    if media is None:
        return None
    if isinstance(media, tuple) and len(media) == 2 and isinstance(media[1], Mapping | None):
        return media[0], media[1] or {}
    return media, {}
