# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Content items of messages: the media they name, what they ask, and what is no item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen35.vision.content import ImageItem, VideoItem, media_of, template_content
from qwen35.vision.media import Video
from support.pictures import picture

MOST = 2**31 - 1
PAYLOAD = "iVBORw0KGgo" * 500


def of(*items: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*items]}]


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


def test_messages_without_items_have_no_media() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "tool"}]
    assert media_of(messages) == ([], [])
    assert template_content(messages) == messages


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": "a.png"},
        {"image": "a.png"},
        {"type": "image", "path": "a.png", "image": None},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
        {"type": "image", "image": "a.png", "max_pixels": None},
    ],
)
def test_an_image_is_named_in_any_clients_way(item: dict[str, Any]) -> None:
    assert media_of(of(item)) == (["a.png"], [])
    (message,) = template_content(of({"text": "?"}, item))
    assert message["content"] == [{"type": "text", "text": "?"}, {"type": "image", "image": ""}]


def test_a_video_is_named_in_any_clients_way() -> None:
    for item in ({"video": "a.gif"}, {"type": "video_url", "video_url": {"url": "a.gif"}}):
        assert media_of(of(item)) == ([], ["a.gif"])
        assert template_content(of(item))[0]["content"] == [{"type": "video", "video": ""}]


def test_what_an_item_asks_stands_beside_its_source() -> None:
    sized = {"min_pixels": 5, "max_pixels": 7}
    assert media_of(of({"image": "a", **sized}))[0] == [ImageItem("a", 5, 7)]
    asked = {"fps": 3.0, "sample_fps": 3, "total_pixels": 9, "min_frames": 2, "max_frames": 4, **sized}
    expected = VideoItem("a.gif", 5, 7, fps=3.0, total_pixels=9, min_frames=2, max_frames=4)
    assert media_of(of({"video": "a.gif", **asked}))[1] == [expected]
    assert media_of(of({"video": Path("d"), "fps": 3}))[1] == [VideoItem(Path("d"), fps=3)]
    assert media_of(of({"type": "image", "base64": "AAAA"}))[0] == ["data:;base64,AAAA"]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"type": "audio", "audio": PAYLOAD}, "type='audio' is not known; give one of text, image, image_url"),
        ({"audio": PAYLOAD}, "type=None is not known"),
        ({"type": ["text"]}, "is not known"),
        ({"type": PAYLOAD}, "is not known"),
        (PAYLOAD, 'is a str; give {"type": "text"'),
        ({"type": "text", "text": None}, "its text is a NoneType; give a text"),
        ({"type": "text", "content": PAYLOAD}, "its text is a NoneType; give a text"),
        ({"type": "image_url", "image_url": {"uri": PAYLOAD}}, "image_url has no url"),
        ({"type": "image_url", "image_url": {"url": PAYLOAD, "detail": "low"}}, "detail='low' is not known here; give"),
        ({"image": PAYLOAD, "max_pixel": 5}, "max_pixel is not supported"),
        ({"image": PAYLOAD, PAYLOAD: 5}, "is not supported"),
        ({"image": PAYLOAD, "nframes": 5}, "nframes is not supported"),
        ({"image": PAYLOAD, "fps": 5}, "fps is not supported"),
        ({"video": PAYLOAD, "video_start": 1.5}, "video_start is not supported; cut the video before"),
        ({"video": PAYLOAD, "raw_fps": 30}, "raw_fps is not supported; give sample_fps"),
        ({"video": PAYLOAD, "fps": 2, "sample_fps": 3}, "fps=2 and sample_fps=3 are not the same"),
        ({"video": PAYLOAD, "fps": 0}, "fps=0 must be a positive number"),
        ({"video": PAYLOAD, "fps": PAYLOAD}, "must be a positive number"),
        ({"video": PAYLOAD, "fps": float("nan")}, "fps=nan must be a positive number"),
        ({"image": PAYLOAD, "max_pixels": 1.5}, "max_pixels=1.5 must be a whole number of at least 1"),
        ({"image": PAYLOAD, "max_pixels": True}, "max_pixels=True must be a whole number"),
        *(
            ({"video": PAYLOAD, name: value}, f"{name}={value} must be a whole number of at least 1 and at most {MOST}")
            for name in ("max_pixels", "total_pixels", "nframes", "min_frames", "max_frames")
            for value in (MOST + 1, 0)
        ),
        (
            {"image": PAYLOAD, "min_pixels": 2**26 + 1},
            "min_pixels=67108865 must be a whole number of at least 1 and at most",
        ),
        ({"image": PAYLOAD, "resized_height": MOST + 1, "resized_width": 64}, f"at most {MOST}"),
        *(
            ({"video": PAYLOAD, "fps": fps}, f"fps={fps!r} must be a positive number of 1e-06..1000000.0")
            for fps in (1e-320, 1e-7, 1e7, 1e308, float("inf"))
        ),
        ({"image": PAYLOAD, "min_pixels": 9, "max_pixels": 8}, "min_pixels=9 is above max_pixels=8"),
        ({"video": PAYLOAD, "min_frames": 9, "max_frames": 8}, "min_frames=9 is above max_frames=8"),
        ({"image": PAYLOAD, "resized_height": 64}, "resized_height and resized_width go together"),
    ],
)
def test_what_is_no_item_is_named_with_its_place_and_without_its_payload(item: Any, words: str) -> None:
    messages = [{"role": "system", "content": "s"}, *of({"type": "text", "text": "t"}, item)]
    with pytest.raises(ValueError) as error:
        media_of(messages)
    message = str(error.value)
    assert message.startswith("message 1, content item 1") and words in message
    assert len(message) < 400


@pytest.mark.parametrize("content", [7, {"type": "text"}, b"bytes"])
def test_content_of_another_type_is_named(content: Any) -> None:
    with pytest.raises(ValueError, match=r"message 0: content is a \w+; give a text, a list of items or null"):
        template_content([{"role": "user", "content": content}])
