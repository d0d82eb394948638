# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Text to token ids: the tokenizer, the chat template, batches of prompts.

Letters: B prompts, S tokens of the longest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..error_text import shorten
from ..vision.content import media_of, template_content
from ..vision.processing import VisionProcessor

Messages = Sequence[Mapping[str, Any]]
"""A conversation: messages with `role`, `content` (see `vision.content`), and what else the template reads of them:
`tool_calls`, `reasoning_content`."""

Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]
"""What a model may call: JSON schemas, or functions of which transformers makes them."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
"""One of them holds the vocabulary."""


def load_tokenizer(model_path: Path) -> Any:
    """The checkpoint's tokenizer, set to right padding.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files are corrupt, or need code of their own.
    """
    if not any((model_path / name).exists() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{model_path}: no tokenizer there ({' or '.join(TOKENIZER_FILES)}); copy the tokenizer's files from the "
            "model it was made of"
        )
    try:
        return AutoTokenizer.from_pretrained(model_path, padding_side="right", trust_remote_code=False)
    except Exception as error:  # tokenizers raises a plain Exception, transformers nearly anything
        raise ValueError(
            f"{model_path}: its tokenizer cannot be read ({shorten(str(error))}); download its files again"
        ) from error


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with no special tokens but those it spells out.

    Raises:
        ValueError: it is no text, or has half a surrogate pair, which no UTF-8 has.
    """
    if not isinstance(text, str):
        raise ValueError(f"a prompt is a {type(text).__name__}: give a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text has the lone surrogate {text[error.start]!r} at character {error.start}: it was cut or was no "
            "UTF-8; decode it with errors='replace'"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(tokenizer: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, S] int64, right-padded.

    Raises:
        ValueError: there is no prompt, or one is empty or no text.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts={shorten(repr(prompts))}: give a list of at least one text")
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            rows.append(token_ids(tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty: give at least one token to continue")
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }


def encode_chat(
    tokenizer: Any,
    processor: VisionProcessor,
    conversations: Sequence[Messages],
    *,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Conversations in the checkpoint's chat template, up to where the assistant speaks, with their media.

    Args:
        conversations: messages whose content is as `vision.content` says.
        tools, enable_thinking, chat_template_kwargs: as of `chat_text`, for all conversations.

    Returns:
        input_ids and attention_mask [B, S] int64, right-padded, and of `VisionInputs` the tensors there are.

    Raises:
        VisionInputError: an image or a video cannot be used; all are listed.
        ValueError: a conversation is not one, or the template refuses it.
    """
    texts, images, videos = [], [], []
    for i, conversation in enumerate(conversations):
        try:
            texts.append(
                chat_text(
                    tokenizer,
                    conversation,
                    tools=tools,
                    enable_thinking=enable_thinking,
                    chat_template_kwargs=chat_template_kwargs,
                )
            )
            more_images, more_videos = media_of(conversation)
        except ValueError as error:
            raise ValueError(f"conversation {i}: {error}") from error
        images += more_images
        videos += more_videos
    media = processor(images, videos)
    tensors = {name: value for name, value in vars(media).items() if isinstance(value, torch.Tensor)}
    return {**encode(tokenizer, processor.expand_placeholders(texts, media)), **tensors}


def chat_text(
    tokenizer: Any,
    messages: Messages,
    *,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A conversation in the checkpoint's chat template, up to where the assistant speaks.

    Messages are taken as clients of OpenAI's API send them: arguments of a tool call may be the text of a JSON object,
    role "function" is a tool's, and `function_call` a call. Otherwise the text is that of transformers'
    `apply_chat_template`.

    Args:
        tools: what the model may call.
        enable_thinking: whether the model thinks before it answers; None is the template's default.
        chat_template_kwargs: further arguments of the template.

    Raises:
        ValueError: the messages are no conversation, the checkpoint has no template, or the template refuses them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the checkpoint has no chat template: add its chat_template.jinja, or give prompts of text")
    arguments = _template_arguments(tools, enable_thinking, chat_template_kwargs)
    checked = template_content(_as_the_family_has_them(messages))
    try:
        text: str = tokenizer.apply_chat_template(checked, **arguments, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's, and raises anything
        raise ValueError(
            f"the chat template refuses this conversation ({type(error).__name__}: {shorten(str(error), 200)}): "
            "check roles, their order and tools against chat_template.jinja"
        ) from error
    return text


def as_chat(
    tokenizer: Any,
    prompt: str,
    *,
    system: str | None = None,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """One user turn, after `system`, in the checkpoint's chat template; as `chat_text`."""
    return chat_text(
        tokenizer,
        [*system_turn(system), {"role": "user", "content": prompt}],
        tools=tools,
        enable_thinking=enable_thinking,
        chat_template_kwargs=chat_template_kwargs,
    )


def system_turn(system: str | None) -> list[dict[str, Any]]:
    """What a conversation begins with: the system's message, or nothing."""
    return [] if system is None else [{"role": "system", "content": system}]


_NOT_FOR_TEMPLATES = frozenset(
    "conversation messages tools chat_template tokenize add_generation_prompt continue_final_message padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""Arguments of `apply_chat_template` that are its own, and the template's variables that have another way in."""


def _template_arguments(
    tools: Tools | None, enable_thinking: bool | None, chat_template_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    arguments = dict(chat_template_kwargs or {})
    if reserved := sorted(_NOT_FOR_TEMPLATES & arguments.keys()):
        raise ValueError(f"chat_template_kwargs has {', '.join(reserved)}, which is no argument of a template")
    if enable_thinking is not None:
        if arguments.setdefault("enable_thinking", enable_thinking) != enable_thinking:
            raise ValueError(
                f"enable_thinking={enable_thinking} and chat_template_kwargs with "
                f"enable_thinking={arguments['enable_thinking']}: give one of them"
            )
    if tools is not None:
        arguments["tools"] = check_tools(tools)
    return arguments


def check_tools(tools: Tools) -> list[Any]:
    """The tools as a list.

    Raises:
        ValueError: they are no list of JSON schemas and functions.
    """
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools is a {type(tools).__name__}: give a list of JSON schemas")
    for i, tool in enumerate(tools):
        if callable(tool):
            continue
        if not isinstance(tool, Mapping):
            raise ValueError(f"tool {i} is a {type(tool).__name__}: give its JSON schema")
        try:
            json.dumps(tool)
        except (TypeError, ValueError) as error:
            raise ValueError(f"tool {i} is no JSON ({shorten(str(error))}): give its JSON schema") from error
    return [*tools]


def _as_the_family_has_them(messages: Messages) -> list[dict[str, Any]]:
    """Messages in the family's form: a tool's result of role "tool", calls in `tool_calls`, arguments as mappings."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not len(messages):
        raise ValueError(f"a conversation is a {type(messages).__name__}: give a list of at least one message")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f'message {i} is a {type(message).__name__}: give {{"role": ..., "content": ...}}')
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {i}: role={shorten(repr(message.get('role')))}: give user, assistant or system")
        turn = dict(message)
        if turn["role"] == "function":
            turn["role"] = "tool"
        call = turn.pop("function_call", None)
        calls = turn.pop("tool_calls", None) or ([] if call is None else [{"type": "function", "function": call}])
        if calls:
            turn["tool_calls"] = _calls(i, calls)
        found.append(turn)
    return found


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """The calls of message `number`, with arguments as mappings."""
    if not isinstance(calls, list | tuple):
        raise ValueError(f"message {number}: tool_calls is a {type(calls).__name__}: give a list of calls")
    found = []
    for i, call in enumerate(calls):
        place = f"message {number}, tool call {i}"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f'{place} has no name: give {{"function": {{"name": ..., "arguments": {{...}}}}}}')
        copy = {**function}
        if isinstance(arguments := copy.get("arguments", {}), str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise ValueError(f"{place}: arguments={shorten(arguments)} is no JSON: give an object") from None
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(f"{place}: arguments is a {type(arguments).__name__}: give an object")
        copy["arguments"] = arguments or {}
        found.append({**call, "function": copy} if "function" in call else copy)
    return found
