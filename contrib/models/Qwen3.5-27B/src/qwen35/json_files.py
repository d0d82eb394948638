# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""JSON from files that others wrote: whatever it is, a problem is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .error_text import shown

_MOST_LEVELS = 32  # published files have five; copying and printing a config descend by recursion

Rule = tuple[Callable[[Any], bool], str]
"""Whether a field's value is one of the kind that it must be, and that kind in words."""


def read_json(path: Path, remedy: str = "download it again") -> Any:
    """The value in a JSON file, in UTF-8 with or without a byte order mark.

    Args:
        remedy: what to do about a file that holds no JSON.

    Raises:
        FileNotFoundError: nothing has this name.
        ValueError: it cannot be read, holds no JSON, or is nested too deeply; the message names the file.
    """
    require_regular(path)
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct its permissions") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where nothing has this name.

    Raises:
        ValueError: it cannot be read, holds something else, or is nested too deeply; the message names the file.
    """
    if not os.path.lexists(path):
        return {}
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is a link to nothing; download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; download it again")
    return content


def wrong_fields(fields: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """What is wrong with fields of a JSON object, a phrase each; null stands for a field that is not there."""
    return [
        f"{name}={shown(fields[name])} must be {words}"
        for name, (is_right, words) in rules.items()
        if fields.get(name) is not None and not is_right(fields[name])
    ]


def parse_json(data: bytes | str) -> Any:
    """`json.loads`, which also refuses what is nested too deeply.

    Raises:
        ValueError: the data is no JSON, no text, or nested too deeply.
    """
    too_deep = f"nested more than {_MOST_LEVELS} levels deep"
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [item for container in level for item in _items(container)]
        if not level:
            return value
    raise ValueError(too_deep)


def _items(value: Any) -> Iterable[Any]:
    """What a container holds."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def require_regular(path: Path) -> None:
    """Refuse what cannot be opened and read to its end, such as a directory or a pipe, before it is opened.

    Raises:
        FileNotFoundError: nothing has this name, or a link leads nowhere.
        ValueError: something else than a file has this name, or it cannot be looked at.
    """
    try:
        if path.is_file():
            return
        exists = path.exists()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct its permissions") from error
    if exists:
        raise ValueError(f"{path} is not a file but a directory, a pipe or a device; replace it by the file")
    raise FileNotFoundError(f"{path} does not exist")
