# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and videos of a request to patches, and placeholders to as many tokens: vLLM's interface to `qwen35.vision`.

It runs in the process that takes requests in. Pixels, grids and tokens are those of `qwen35.serving.prompts`. No
processor of transformers is loaded: it would need torchvision.

Letters: P patches of an image or a video, T temporal patches of a video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from qwen35.configuration_qwen35 import read_config
from qwen35.error_text import one_line, shown
from qwen35.vision.content import ImageItem, VideoItem
from qwen35.vision.media import DEFAULT_SOURCE_FPS, Video
from qwen35.vision.processing import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    VideoSettings,
    VisionInputError,
    VisionInputs,
    VisionProcessor,
    sampled_indices,
    timestamps_of,
)

from .media_items import MediaParser
from .options import MEDIA_OPTIONS, MODALITIES, checkpoint_of, has_vision

PLACEHOLDERS = {
    "image": f"{VISION_START}{IMAGE_TOKEN}{VISION_END}",
    "video": f"{VISION_START}{VIDEO_TOKEN}{VISION_END}",
}
"""What stands for one of them in a prompt."""

_TOKENS = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}


class MediaInfo(BaseProcessingInfo):
    """What vLLM asks about the media of a checkpoint."""

    def get_data_parser(self) -> MediaParser:
        return MediaParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images and videos; none where the checkpoint has no vision encoder."""
        return dict.fromkeys(MODALITIES) if has_vision(self.checkpoint) else {}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Tokens of the largest image, and of the longest video; no more than a prompt can have."""
        image, video = self.processor.image, self.processor.video
        most = {
            "image": image.max_pixels // image.factor**2,
            "video": video.max_pixels // (video.temporal_patch_size * video.factor**2),
        }
        return {modality: min(tokens, seq_len) for modality, tokens in most.items() if mm_counts.get(modality)}

    @cached_property
    def checkpoint(self) -> Any:
        return checkpoint_of(self.ctx.model_config)

    @cached_property
    def processor(self) -> VisionProcessor:
        """With the checkpoint's settings."""
        return VisionProcessor.from_pretrained(self.checkpoint)

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """The ids of placeholders, and of the marks around them, by name."""
        config = read_config(self.checkpoint)
        named = {"image": "image", "video": "video", "start": "vision_start", "end": "vision_end"}
        return {name: config[f"{field}_token_id"] for name, field in named.items()}

    @cached_property
    def added_token_ids(self) -> set[int]:
        """Of tokens that no text around them is merged with."""
        return {*self.get_tokenizer().get_added_vocab().values()}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with no special tokens but those it spells out."""
        return [*self.get_tokenizer().encode(text, add_special_tokens=False)]


class DummyMedia(BaseDummyInputsBuilder[MediaInfo]):
    """Small media, with which vLLM warms the processor up; how large they can be `MediaInfo` says."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(PLACEHOLDERS[modality] * count for modality, count in mm_counts.items())

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any = None) -> dict[str, Any]:
        image = Image.new("RGB", (64, 64))
        one = {"image": image, "video": ([image, image], {})}
        return {modality: [one[modality]] * count for modality, count in mm_counts.items()}


class MediaProcessor(BaseMultiModalProcessor[MediaInfo]):
    """Patches, grids and placeholder tokens of the media of a request; vLLM keeps them by their hashes."""

    requires_tokenizer = False

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As the base class, once there is a placeholder apiece.

        Raises:
            VLLMValidationError: there is not, or an image or a video cannot be used; the client is told in a line.
        """
        for modality, token in _TOKENS.items():
            of_text = isinstance(inputs.prompt, str)
            found = inputs.prompt.count(token if of_text else self.info.token_ids[modality])
            given = inputs.mm_data_items.get_count(modality, strict=False)
            if found != given:
                raise VLLMValidationError(
                    f"the prompt has {found} {token} for {given} {modality}s: give one apiece", parameter="prompt"
                )
        return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, *, mm_items: Any, prompt: Any = None, **options: Any) -> Any:
        """Patches and grids of some media. vLLM 0.23 passes the prompt, too, and takes its tokens with them."""
        features = self._features(mm_items, options.get("hf_kwargs", options.get("hf_processor_mm_kwargs", {})))
        if prompt is None:
            return features
        return (self.info.encode(prompt) if isinstance(prompt, str) else [*prompt]), features, False

    def _features(self, mm_items: Any, asked: Mapping[str, object]) -> BatchFeature:
        """Under the names of `VisionInputs`, what there is; timestamps as a list of tensors [T]."""
        options = _checked_options(self.info.ctx.get_mm_config().merge_mm_processor_kwargs(asked))
        images = [*mm_items.get("image", ())]
        videos = [*mm_items.get("video", ())]
        try:
            inputs = self._process(images, videos, options)
        except VisionInputError as error:
            raise VLLMValidationError(one_line("; ".join(error.problems)), parameter="multi_modal_data") from error
        except ValueError as error:
            raise VLLMValidationError(one_line(str(error)), parameter="mm_processor_kwargs") from error
        found: dict[str, Any] = {name: value for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
        if videos:
            found["video_timestamps"] = [torch.tensor(times, dtype=torch.float64) for times in inputs.video_timestamps]
        return BatchFeature(found)

    def _process(
        self, images: Sequence[Any], videos: Sequence[tuple[Any, Mapping[str, Any]]], options: Mapping[str, Any]
    ) -> VisionInputs:
        of_image = {name: value for name, value in options.items() if name != "fps"}
        clips = [_clip(*video, options.get("fps"), self.info.processor.video) for video in videos]
        inputs = self.info.processor(
            [ImageItem(image, **of_image) if of_image else image for image in images], [clip.source for clip in clips]
        )
        size = self.info.processor.video.temporal_patch_size
        inputs.video_timestamps = [
            times if clip.indices is None else timestamps_of(clip.indices, clip.fps, size)
            for clip, times in zip(clips, inputs.video_timestamps, strict=True)
        ]
        return inputs

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        fields: dict[str, MultiModalFieldConfig] = {}
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            grids = f"{modality}_grid_thw"
            if grids in hf_inputs:
                fields[pixels] = MultiModalFieldConfig.flat_from_sizes(modality, hf_inputs[grids].prod(dim=1))
                fields[grids] = MultiModalFieldConfig.batched(modality)
        if "video_timestamps" in hf_inputs:
            fields["video_timestamps"] = MultiModalFieldConfig.batched("video")
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        ids, processor = self.info.token_ids, self.info.processor

        def image(i: int) -> list[int]:
            grid = out_mm_kwargs["image"][i]["image_grid_thw"].data
            return [ids["image"]] * (int(grid.prod()) // processor.image.merge_size**2)

        def video(i: int) -> list[int]:
            item = out_mm_kwargs["video"][i]
            _, rows, columns = item["video_grid_thw"].data.tolist()
            run = [ids["start"], *[ids["video"]] * (rows * columns // processor.video.merge_size**2), ids["end"]]
            times = item["video_timestamps"].data.tolist()
            return [token for time in times for token in (*self.info.encode(f"<{time:.1f} seconds>"), *run)]

        return [
            PromptReplacement(modality, [ids[modality]], of_item)
            for modality, of_item in (("image", image), ("video", video))
            if mm_items.get(modality)
        ]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Mapping[str, Any]) -> Any:
        """The prompt's tokens with each placeholder repeated, and where each medium is.

        As `VisionProcessor.expand_placeholders` does it on text, so that the tokens are those of the whole text: a
        video takes the place of the marks around its placeholder, too, and its first time is joined to the text before.
        """
        ids = self.info.token_ids
        left = {ids[modality]: (modality, _contents(updates)) for modality, updates in mm_prompt_updates.items()}
        found: list[int] = []
        placed: dict[str, list[PlaceholderFeaturesInfo]] = {modality: [] for modality in mm_prompt_updates}
        position = 0
        while position < len(token_ids):
            token = token_ids[position]
            position += 1
            if token not in left:
                found.append(token)
                continue
            modality, contents = left[token]
            tokens = next(contents)
            if modality == "video":
                if found[-1:] == [ids["start"]] and token_ids[position : position + 1] == [ids["end"]]:
                    found.pop()
                    position += 1
                first = tokens.index(ids["start"])
                found, tokens = self._joined(found, tokens[:first]), tokens[first:]
            is_embed = torch.tensor(tokens) == token
            own = placed[modality]
            own.append(
                PlaceholderFeaturesInfo(modality, len(own), len(found), tokens, None if is_embed.all() else is_embed)
            )
            found += tokens
        return found, {modality: own for modality, own in placed.items() if own}

    def _joined(self, tokens: list[int], more: list[int]) -> list[int]:
        """Two texts as one: tokens at the seam may merge, up to the last one before that is not of text."""
        added, tokenizer = self.info.added_token_ids, self.info.get_tokenizer()
        start = next((i + 1 for i in reversed(range(len(tokens))) if tokens[i] in added), 0)
        text = tokenizer.decode(tokens[start:])
        if self.info.encode(text) != tokens[start:]:  # a client's own tokens
            return tokens + more
        return tokens[:start] + self.info.encode(text + tokenizer.decode(more))


class _Clip(NamedTuple):
    """A video as `VisionProcessor` takes it; where that is known, which frames it has of a source of `fps` a second."""

    source: VideoItem | Video
    fps: float
    indices: Sequence[int] | None = None


def _clip(frames: Any, metadata: Mapping[str, Any], fps: float | None, settings: VideoSettings) -> _Clip:
    """A video of a request. Of frames all are used, unless `do_sample_frames` is set in their metadata.

    Args:
        frames: or the file.
        metadata: `fps` of the source, `frames_indices` in it: as vLLM's loaders give them. Of a file, `fps` to take.
        fps: what `mm_processor_kwargs` asks: frames a second to take, or of frames that are all used their rate.

    Raises:
        ValueError: a rate is none.
    """
    if isinstance(frames, bytes):
        return _Clip(VideoItem(frames, fps=fps or metadata.get("fps")), DEFAULT_SOURCE_FPS)
    rate = metadata.get("fps") or fps or DEFAULT_SOURCE_FPS
    for given in (rate, fps or rate):
        if not isinstance(given, int | float) or not 0 < given < math.inf:
            raise ValueError(f"video, fps={shown(given)} must be a positive number")
    indices = metadata.get("frames_indices")
    if metadata.get("do_sample_frames"):
        chosen = sampled_indices(len(frames), rate, replace(settings, fps=fps or settings.fps))
        frames, indices = [frames[i] for i in chosen], [i if indices is None else indices[i] for i in chosen]
    return _Clip(Video(frames, rate), rate, indices)


def _contents(updates: Sequence[Sequence[Any]]) -> Iterator[list[int]]:
    """The tokens of each item of a modality."""
    return ([*update.content.full] for (update,) in updates)


def _checked_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`mm_processor_kwargs`, of which only some are taken.

    Raises:
        VLLMValidationError: naming the others.
    """
    if unknown := sorted({*options} - {*MEDIA_OPTIONS}):
        raise VLLMValidationError(
            f"mm_processor_kwargs: {shown(unknown[0])} is not taken; give {', '.join(MEDIA_OPTIONS)}",
            parameter="mm_processor_kwargs",
        )
    return options
