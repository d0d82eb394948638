# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A request's tokens, pixels and grids are those that `TextGenerator` gives its model; bad ones are told in a line."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("vllm")

from vllm import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import encode
from qwen35.vision.content import ImageItem, VideoItem
from qwen35.vision.media import Video
from qwen35.vision.processing import VisionInputs, timestamps_of
from qwen35_vllm.media_items import UndecodedVideo
from support.pictures import picture
from support.vllm_media import PROCESSOR, TOKENIZER, conversation, expected_inputs, prompt_of

pytestmark = pytest.mark.vllm

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
FRAMES = [picture(90, 70, seed=i) for i in range(5)]


@pytest.fixture(scope="module")
def processor() -> Any:
    """vLLM's, for the mini."""
    arguments = EngineArgs(model=str(MINI_CHECKPOINT), max_model_len=512, max_num_seqs=2, dtype="float32")
    config = arguments.create_engine_config().model_config
    return MULTIMODAL_REGISTRY.create_processor(config, tokenizer=TOKENIZER)


def process(processor: Any, text: str, data: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """What vLLM queues for a prompt: its tokens as input_ids, pixels and grids, placeholders by modality."""
    items = processor.info.parse_mm_data(data)
    ids = encode(TOKENIZER, [text])["input_ids"][0].tolist()
    output = processor(ids, mm_items=items, hf_processor_mm_kwargs=options)
    found = {"input_ids": torch.tensor([output["prompt_token_ids"]]), "placeholders": output["mm_placeholders"]}
    for modality, suffix in (("image", ""), ("video", "_videos")):
        if own := output["mm_kwargs"].get(modality):
            found[f"pixel_values{suffix}"] = torch.cat([item[f"pixel_values{suffix}"].data for item in own])
            found[f"{modality}_grid_thw"] = torch.stack([item[f"{modality}_grid_thw"].data for item in own])
    return found


def require_same(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that tokens, pixels and grids are equal to the bit, and that placeholders are where the tokens are."""
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    names = {name for name in expected if name.startswith("pixel") or name.endswith("thw")}
    assert names == {name for name in found if name.startswith("pixel") or name.endswith("thw")}
    for name in names:
        assert torch.equal(found[name], expected[name]), name
    for modality, token in (("image", "<|image_pad|>"), ("video", "<|video_pad|>")):
        here = torch.zeros(found["input_ids"].shape[1], dtype=torch.bool)
        for place in found["placeholders"].get(modality, ()):
            own = here[place.offset : place.offset + place.length]
            own[:] = True if place.is_embed is None else place.is_embed
        assert torch.equal(here, found["input_ids"][0] == TOKENIZER.convert_tokens_to_ids(token))


@pytest.mark.parametrize(
    "content",
    [
        [picture(90, 70), "What is this?"],
        ["Compare", picture(33, 200, seed=1), " with ", picture(400, 90, "RGBA", seed=2), picture(7, 9, "L", seed=3)],
        [Video(FRAMES, 2), "What happens?"],
        ["Look:", Video(FRAMES[:1], 24.0)],
        [picture(64, 64), Video(FRAMES[:4], 3.7), "and", Video(FRAMES[1:3], 0.5), picture(100, 64), "?"],
    ],
    ids=["a picture", "pictures", "a clip", "a frame after text", "pictures and clips"],
)
def test_tokens_pixels_and_grids_are_those_of_a_text_generator(processor: Any, content: Sequence[Any]) -> None:
    messages = conversation(*content)
    prompt = prompt_of(messages)
    require_same(process(processor, prompt["prompt"], prompt["multi_modal_data"]), expected_inputs(messages))


@settings(max_examples=60, deadline=None)
@given(before=st.text(max_size=12), between=st.sampled_from(["", "<", ". <", "\n", " <0.5 ", "a<"]))
def test_the_time_of_a_clip_is_joined_to_the_text_before_as_in_the_whole_text(
    processor: Any, before: str, between: str
) -> None:
    text = f"{before}{between}{CLIP}{between}{PICTURE}{CLIP}."
    data = {"video": [(FRAMES[:2], {"fps": 2.0}), (FRAMES[:3], {"fps": 9.0})], "image": FRAMES[0]}
    media = PROCESSOR([FRAMES[0]], [Video(FRAMES[:2], 2), Video(FRAMES[:3], 9)])
    require_same(process(processor, text, data), expected_of(text, media))


def expected_of(text: str, media: VisionInputs) -> dict[str, torch.Tensor]:
    tensors = {name: value for name, value in vars(media).items() if isinstance(value, torch.Tensor)}
    return {**encode(TOKENIZER, PROCESSOR.expand_placeholders([text], media)), **tensors}


def test_a_placeholder_of_a_video_without_marks_is_expanded_too(processor: Any) -> None:
    text = f"See <|video_pad|> and {CLIP}"
    found = process(processor, text, {"video": [FRAMES[:2], FRAMES[:2]]})
    require_same(found, expected_of(text, PROCESSOR([], [FRAMES[:2], FRAMES[:2]])))


def test_tokens_of_a_client_s_own_before_a_clip_are_kept(processor: Any) -> None:
    before = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "The"]  # the tokenizer has one for the word
    assert TOKENIZER.encode("The") != before
    ids = before + TOKENIZER.encode(CLIP)
    found = processor(ids, mm_items=processor.info.parse_mm_data({"video": FRAMES[:2]}))["prompt_token_ids"]
    assert found[:3] == before and TOKENIZER.decode(found).startswith("The<0.0 seconds>")


def animation(path: Path) -> Path:
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:], duration=125)
    return path


def video_file(path: Path) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 90, 70, "yuv420p"
        for i in range(24):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(90, 70, seed=i))))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("make", "name"), [(animation, "clip.gif"), (animation, "clip.webp"), (video_file, "clip.mp4")]
)
@pytest.mark.parametrize("fps", [None, 4])
def test_files_are_sampled_as_a_text_generator_samples_them(
    processor: Any, make: Any, name: str, fps: int | None, tmp_path: Path
) -> None:
    path = make(tmp_path / name)
    asked = {} if fps is None else {"fps": fps}
    expected = expected_of(CLIP, PROCESSOR([], [VideoItem(path, fps=fps)]))
    by_loader = {"video": UndecodedVideo.load_bytes(path.read_bytes(), **asked)}
    require_same(process(processor, CLIP, by_loader), expected)
    by_request = {"video": UndecodedVideo.load_bytes(path.read_bytes())}
    require_same(process(processor, CLIP, by_request, **asked), expected)


def test_frames_that_vllm_s_loaders_chose_keep_their_times(processor: Any) -> None:
    metadata = {"fps": 10.0, "frames_indices": [0, 7, 19], "do_sample_frames": False, "total_num_frames": 20}
    media = PROCESSOR([], [Video(FRAMES[:3], 10)])
    media.video_timestamps = [timestamps_of([0, 7, 19], 10, 2)]
    require_same(process(processor, CLIP, {"video": (FRAMES[:3], metadata)}), expected_of(CLIP, media))


def test_another_of_vllm_s_loaders_may_be_named(processor: Any, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 8, (90, 70))
    for i in range(24):
        writer.write(np.asarray(picture(90, 70, seed=i)))
    writer.release()
    frames, metadata = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(path.read_bytes(), num_frames=6)
    assert len(frames) == 6 and metadata["fps"] == 8
    media = PROCESSOR([], [Video([*frames], 8)])
    media.video_timestamps = [timestamps_of(metadata["frames_indices"], 8, 2)]
    require_same(process(processor, CLIP, {"video": (frames, metadata)}), expected_of(CLIP, media))


def test_all_frames_of_a_source_are_sampled_where_their_metadata_ask_for_it(processor: Any, tmp_path: Path) -> None:
    frames = [np.asarray(picture(90, 70, seed=i)) for i in range(20)]
    data = {"video": (np.stack(frames), {"fps": 8.0, "do_sample_frames": True})}
    indices = [0, 5, 10, 14, 19]  # two a second of 2.5 s: np.linspace(0, 19, 5), rounded to even
    media = PROCESSOR([], [Video([frames[i] for i in [0, 5, 10, 14, 19]], 8)])
    media.video_timestamps = [timestamps_of(indices, 8, 2)]
    require_same(process(processor, CLIP, data), expected_of(CLIP, media))


def test_limits_of_pixels_may_be_asked_for(processor: Any) -> None:
    image = picture(300, 300)
    expected = expected_of(PICTURE, PROCESSOR([ImageItem(image, max_pixels=6400)]))
    found = process(processor, PICTURE, {"image": image}, max_pixels=6400)
    require_same(found, expected)
    assert found["input_ids"].shape != process(processor, PICTURE, {"image": image})["input_ids"].shape


def truncated() -> Image.Image:
    file = io.BytesIO()
    picture(200, 200).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


@pytest.mark.parametrize(
    ("text", "data", "options", "told"),
    [
        (PICTURE, {}, {}, r"the prompt has 1 <\|image_pad\|> for 0 images: give one apiece"),
        (PICTURE, {"image": FRAMES[:2]}, {}, r"the prompt has 1 <\|image_pad\|> for 2 images: give one apiece"),
        (PICTURE + CLIP, {"image": FRAMES[0]}, {}, r"the prompt has 1 <\|video_pad\|> for 0 videos: give one apiece"),
        (PICTURE, {"image": truncated()}, {}, "image 0: corrupt or truncated image .*; download it again"),
        (PICTURE, {"image": Image.new("1", (8200, 8200))}, {}, "8200 by 8200 pixels exceed the limit of 67108864 pi"),
        (PICTURE, {"image": Image.new("L", (1000, 2))}, {}, "1000 by 2 pixels is an aspect ratio above 200"),
        (PICTURE, {"image": np.zeros((4, 4, 7), np.uint8)}, {}, r"an array of shape \[4, 4, 7\] is not"),
        (CLIP, {"video": [[FRAMES[0], picture(40, 40)]]}, {}, "video 0: frame 1 is 40 by 40 pixels, frame 0 is 90 by"),
        (CLIP, {"video": (b"no video", {})}, {}, "video 0: (cannot be decoded|video files are decoded by PyAV)"),
        (CLIP, {"video": (FRAMES, {"fps": 0.0})}, {"fps": -1}, "fps=-1 must be a positive number"),
        (PICTURE, {"image": FRAMES[0]}, {"size": 3}, "'size' is not taken; give min_pixels, max_pixels, fps"),
        (PICTURE, {"image": FRAMES[0]}, {"max_pixels": 0}, "max_pixels=0 must be a whole number"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_line(
    processor: Any, text: str, data: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(VLLMValidationError, match=told) as refused:
        process(processor, text, data, **options)
    assert len(str(refused.value.args[0]).splitlines()) == 1


def test_the_largest_items_are_those_of_the_limits_in_pixels(processor: Any) -> None:
    both = {"image": 1, "video": 1}
    # The mini's longest edges: 16384 and 147456 pixels, of 32 by 32 and, of two frames each, 2 * 32 * 32 a token.
    assert processor.info.get_mm_max_tokens_per_item(512, both) == {"image": 16, "video": 72}
    assert processor.info.get_mm_max_tokens_per_item(20, both) == {"image": 16, "video": 20}
    assert processor.info.get_mm_max_tokens_per_item(512, {"image": 1, "video": 0}) == {"image": 16}
    found = process(processor, PICTURE, {"image": picture(900, 900)})
    assert found["placeholders"]["image"][0].length == 16


def test_a_checkpoint_without_a_vision_encoder_takes_none(served_checkpoint: Path) -> None:
    config = EngineArgs(
        model=str(served_checkpoint), max_model_len=64, max_num_seqs=2, skip_tokenizer_init=True
    ).create_engine_config()
    assert MULTIMODAL_REGISTRY.get_processing_info(config.model_config).supported_mm_limits == {}
