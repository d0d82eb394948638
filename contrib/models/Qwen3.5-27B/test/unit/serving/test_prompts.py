# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Texts to tokens and back, with the shipped checkpoint's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import (
    as_chat,
    chat_text,
    check_tools,
    encode,
    encode_chat,
    load_tokenizer,
    token_ids,
)
from support.pictures import PROCESSOR, picture

CHATS = Path(__file__).parents[2] / "data" / "chats.json"

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MINI_CHECKPOINT)


def test_prompts_become_one_right_padded_batch(tokenizer: Any) -> None:
    texts = ["The capital of France is", "3", "naïve 東京"]
    encoded = encode(tokenizer, texts)
    for text, ids, mask in zip(texts, encoded["input_ids"], encoded["attention_mask"], strict=True):
        tokens = token_ids(tokenizer, text)
        assert ids.tolist() == tokens + [0] * (len(ids) - len(tokens))
        assert mask.tolist() == [1] * len(tokens) + [0] * (len(ids) - len(tokens))
        assert tokenizer.decode(tokens) == text


def test_an_empty_prompt_is_an_error_that_names_it(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty: give at least one token"):
        encode(tokenizer, ["The", ""])


def test_one_question_is_a_conversation_of_one_turn(tokenizer: Any) -> None:
    text = as_chat(tokenizer, "How are you?")
    assert text == chat_text(tokenizer, [{"role": "user", "content": "How are you?"}])
    assert text.startswith("<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d", "a\udfff\ud800b"])
def test_a_lone_surrogate_is_named_with_its_place(text: str, tokenizer: Any) -> None:
    at = min(i for i, character in enumerate(text) if 0xD800 <= ord(character) < 0xE000)
    with pytest.raises(ValueError, match=rf"prompt 1: a text has the lone surrogate '\\u\w+' at character {at}: "):
        encode(tokenizer, ["The", text])
    with pytest.raises(ValueError, match="lone surrogate"):
        encode_chat(tokenizer, PROCESSOR, [[{"role": "user", "content": text}]])


@pytest.mark.parametrize("prompts", ["The capital", [], ["The", None], ["The", b"The"], [["The"]]])
def test_prompts_that_are_no_texts_are_named(prompts: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"give a (list of at least one )?text"):
        encode(tokenizer, prompts)


# Conversations


def test_200_random_chats_are_what_transformers_5_makes_of_them(tokenizer: Any) -> None:
    chats = json.loads(CHATS.read_text(encoding="utf-8"))["chats"]
    for number, chat in enumerate(chats):
        options = {name: chat[name] for name in ("tools", "enable_thinking") if name in chat}
        text = chat_text(tokenizer, chat["conversation"], **options)
        assert text == chat["text"], number
        assert token_ids(tokenizer, text) == chat["ids"], number
    assert len(chats) == 200
    assert sum("tools" in chat for chat in chats) > 50 and sum("enable_thinking" in chat for chat in chats) > 50


def test_the_recorded_chats_are_those_that_the_recorder_makes() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from record_chats import record

    assert record()["chats"] == json.loads(CHATS.read_text(encoding="utf-8"))["chats"]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_the_minis_template_has_tools_in_the_familys_form(tokenizer: Any) -> None:
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris", "days": [1]}'},
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "sunny"},
        {"role": "function", "name": "weather", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "?"},
    ]
    called = (
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n[1]\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    text = chat_text(tokenizer, messages, tools=[TOOL])
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\n# Tools\n") and system.endswith("\n\nBe brief.")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in system
    assert rest == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{called}\n{called}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nSunny.<|im_end|>\n"
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_thinking_is_asked_for_in_either_way_and_not_kept_of_earlier_turns(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n1."},
        {"role": "user", "content": "2?"},
    ]
    plain = chat_text(tokenizer, messages)
    assert "hm" not in plain and "<|im_start|>assistant\n1.<|im_end|>" in plain
    thinking = chat_text(tokenizer, messages, enable_thinking=True)
    assert thinking == plain.removesuffix("\n</think>\n\n") and thinking.endswith("<think>\n")
    assert thinking == chat_text(tokenizer, messages, chat_template_kwargs={"enable_thinking": True})
    assert plain == chat_text(tokenizer, messages, enable_thinking=False)
    with pytest.raises(ValueError, match="enable_thinking=True and chat_template_kwargs with enable_thinking=False"):
        chat_text(tokenizer, messages, enable_thinking=True, chat_template_kwargs={"enable_thinking": False})


def test_any_argument_of_a_template_reaches_it(tmp_path: Path) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ mood }} {{ documents | length }} {{ messages[0].content }}")
    messages = [{"role": "user", "content": "x"}]
    asked = {"mood": "kind", "documents": [{"text": "a"}]}
    assert chat_text(load_tokenizer(tmp_path), messages, chat_template_kwargs=asked) == "kind 1 x"
    assert as_chat(load_tokenizer(tmp_path), "x", chat_template_kwargs=asked) == "kind 1 x"
    with pytest.raises(ValueError, match="has return_tensors, tokenize, which is no argument of a template"):
        chat_text(load_tokenizer(tmp_path), messages, chat_template_kwargs={"tokenize": True, "return_tensors": "pt"})


def test_media_of_conversations_become_as_many_placeholders(tokenizer: Any) -> None:
    image, small = picture(64, 64), {"resized_height": 64, "resized_width": 128}
    conversations = [
        [
            {"role": "user", "content": [{"type": "image_url", "image_url": image}, {"text": "?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": [{"type": "image", "image": image, **small}]},
        ],
        [{"role": "user", "content": [{"type": "image", "image": image}]}],
    ]
    inputs = encode_chat(tokenizer, PROCESSOR, conversations, tools=[TOOL], enable_thinking=False)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8], [1, 4, 4]]
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (inputs["input_ids"] == token).sum(1).tolist() == [4 + 8, 4]


LONG = "A" * 100_000


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "a conversation is a list: give a list of at least one message"),
        ({"role": "user", "content": LONG}, "a conversation is a dict"),
        (LONG, "a conversation is a str"),
        ([LONG], "message 0 is a str: give"),
        ([{"content": LONG}], "message 0: role=None: give user"),
        ([{"role": LONG, "content": "x"}], "the chat template refuses this conversation (TemplateError: unknown role"),
        ([{"role": "developer", "content": LONG}], "unknown role: developer"),
        ([{"role": "user", "content": [{"type": LONG}]}], "message 0, content item 0: type='AAA"),
        ([{"role": "assistant", "tool_calls": LONG}], "message 0: tool_calls is a str: give a list of calls"),
        ([{"role": "assistant", "tool_calls": [LONG]}], "message 0, tool call 0 has no name"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], "tool call 0 has no name"),
        ([{"role": "assistant", "function_call": {"name": "f", "arguments": LONG}}], "arguments=AAA"),
        (
            [{"role": "assistant", "function_call": {"name": "f", "arguments": "[1]"}}],
            "arguments is a list: give an object",
        ),
        *(
            (
                [
                    {
                        "role": "assistant",
                        "function_call": {"name": "f", "arguments": '{"a":' * depth + "1" + "}" * depth},
                    }
                ],
                "nested more than 32 levels deep",
            )
            for depth in (33, 50_000)
        ),
    ],
)
def test_what_is_no_conversation_is_named_in_one_short_line(messages: Any, words: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError) as error:
        encode_chat(tokenizer, PROCESSOR, [[{"role": "user", "content": "fine"}], messages])
    message = str(error.value)
    assert message.startswith("conversation 1: ") and words in message
    assert "\n" not in message and len(message) < 500


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("weather", "tools is a str: give a list"),
        ({"name": "f"}, "tools is a dict: give a list"),
        (["f"], "tool 0 is a str: give its JSON schema"),
        ([TOOL, {"name": {1, 2}}], "tool 1 is no JSON"),
        ([TOOL, nested(40)], r"tool 1 is no JSON \(nested more than 32 levels deep\)"),
        ([TOOL, nested(3000)], r"tool 1 is no JSON \(.*nested"),
    ],
)
def test_tools_that_are_no_list_of_schemas_are_named(tools: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_tools(tools)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('No.\\n' ~ 'A' * 9999) }}", "TemplateError: No. AAA"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.at_all }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("", "has no chat template"),
    ],
)
def test_a_template_that_fails_is_said_in_one_line(template: str, words: str, tmp_path: Path) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=words) as error:
        as_chat(load_tokenizer(tmp_path), "x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_checkpoint_without_a_tokenizer_or_with_a_corrupt_one_is_named(tmp_path: Path) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    for content in ("", "{", '{"version": "1.0"}', "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"tokenizer\.json (is not valid JSON|is corrupt|holds a list).*; download"
        ):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer there \(tokenizer.json or vocab.json\); copy"):
        load_tokenizer(tmp_path)


# Stop strings
