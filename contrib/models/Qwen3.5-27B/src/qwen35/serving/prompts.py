# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Text to token ids: the tokenizer, the chat template, batches of prompts.

Letters: B prompts, S tokens of the longest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..configuration_qwen35 import is_count, is_number
from ..error_text import one_line, shorten, shown
from ..json_files import Rule, parse_json, read_object, require_regular, wrong_fields
from ..vision.content import media_of, template_content
from ..vision.processing import VisionProcessor

Messages = Sequence[Mapping[str, Any]]
"""A conversation: messages with `role`, `content` (see `vision.content`), and what else the template reads of them:
`tool_calls`, `reasoning_content`."""

Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]
"""What a model may call: JSON schemas, or functions of which transformers makes them."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
"""One of them holds the vocabulary."""

_SIDE_FILES = (
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
"""What transformers reads beside the vocabulary."""


def _is_token(value: Any) -> bool:
    """Whether it is a token as tokenizer_config.json has them: its text, or an object with it."""
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(_is_token, value.values() if isinstance(value, dict) else value))


def _are_tokens_by_id(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(key.isdecimal() and isinstance(token, dict) and _is_token(token) for key, token in value.items())


def _is_template(value: Any) -> bool:
    """Whether it is a chat template, or a list of named ones."""
    if not isinstance(value, list):
        return isinstance(value, str)
    return all(isinstance(one, dict) and {type(one.get(key)) for key in ("name", "template")} == {str} for one in value)


_TOKENIZER_FIELDS: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
        (_is_token, "a text, or an object with its text as content"),
    ),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"), (_are_tokens, "a list of tokens or an object of them")
    ),
    "added_tokens_decoder": (_are_tokens_by_id, "an object from ids to objects with the text as content"),
    **dict.fromkeys(
        ("add_prefix_space", "add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    "split_special_tokens": (lambda value: value is False, "false: the marks of a chat's turns would be split"),
    **dict.fromkeys(("padding_side", "truncation_side"), (lambda value: value in ("left", "right"), "left or right")),
    # transformers compares lengths of texts with it, and writes 1e30 for none.
    "model_max_length": (is_number, "a finite number"),
    "tokenizer_class": (lambda value: isinstance(value, str), "the name of a class"),
    "auto_map": (lambda value: isinstance(value, dict), "an object"),
    "model_input_names": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "chat_template": (_is_template, "a text, or a list of objects with name and template"),
}
"""The fields of tokenizer_config.json that transformers takes without a look at their types, or refuses in its own."""


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
    added = _added_tokens(model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="right", trust_remote_code=False)
    except Exception as error:  # tokenizers raises a plain Exception, transformers nearly anything
        raise ValueError(
            f"{model_path}: its tokenizer cannot be read ({shorten(str(error))}); download its files again"
        ) from error
    for text, token_id in added.items():
        # transformers renumbers special tokens, without a word, where its files differ in them.
        if (loaded := tokenizer.convert_tokens_to_ids(text)) != token_id:
            raise ValueError(
                f"{model_path}: {shown(text)} is token {token_id} in tokenizer.json, and loads as {loaded}: its files "
                "contradict each other; download them again"
            )
    return tokenizer


def _added_tokens(model_path: Path) -> dict[str, int]:
    """The ids of the added tokens in tokenizer.json, where there is one.

    All of the tokenizer's files are checked as far as transformers would go wrong later, or in silence.

    Raises:
        ValueError: a file is none, or what it holds is of a wrong type or contradicts itself.
    """
    for name in (*TOKENIZER_FILES, *_SIDE_FILES):
        if os.path.lexists(model_path / name):
            try:
                require_regular(model_path / name)
            except FileNotFoundError:
                raise ValueError(f"{model_path / name} is a link to nothing; download it again") from None
    file = model_path / "tokenizer_config.json"
    if problems := wrong_fields(read_object(file), _TOKENIZER_FIELDS):
        raise ValueError(f"{file}: {'; '.join(problems)}; correct it or download it again")
    file = model_path / "tokenizer.json"
    if not file.exists():
        return {}
    content = read_object(file)
    if (problem := next(_vocabulary_problems(content), None)) is not None:
        raise ValueError(f"{file} is corrupt ({one_line(problem)}); download it again")
    return {token["content"]: token["id"] for token in content["added_tokens"]}


def _vocabulary_problems(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the tokens in a tokenizer.json and their ids, which tokenizers takes as they are."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocabulary, dict) or not vocabulary:
        yield "it has no model with a vocab from tokens to ids"
        return
    if not isinstance(model.get("merges"), list) or not model["merges"]:
        yield "its model has no merges"
    if not isinstance(added, list) or not added:
        yield "it has no added_tokens, such as the marks of a chat's turns"
        return
    texts: dict[int, str] = {}
    tokens = list(vocabulary.items())
    for i, token in enumerate(added):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            yield f"added token {i} is {shown(token)}, an object without its text as content"
            return
        tokens.append((token["content"], token.get("id")))
    for text, token_id in tokens:
        if not is_count(token_id):
            yield f"{shown(text)} has the id {shown(token_id)}, which is no whole number of at least 0"
        elif texts.setdefault(token_id, text) != text:
            yield f"{shown(texts[token_id])} and {shown(text)} both have the id {token_id}"
    for text, token_id in tokens:
        if vocabulary.get(text, token_id) != token_id:
            yield f"{shown(text)} has two ids, {vocabulary[text]} and {token_id}"


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
            parse_json(json.dumps(tool))
        except RecursionError:
            raise ValueError(f"tool {i} is no JSON (it is nested too deeply): give its JSON schema") from None
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
                arguments = parse_json(arguments or "{}")
            except ValueError as error:
                raise ValueError(
                    f"{place}: arguments={shorten(arguments)} is no JSON ({shorten(str(error))}): give an object"
                ) from None
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(f"{place}: arguments is a {type(arguments).__name__}: give an object")
        copy["arguments"] = arguments or {}
        found.append({**call, "function": copy} if "function" in call else copy)
    return found
