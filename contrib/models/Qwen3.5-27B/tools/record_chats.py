# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Record what transformers 5 makes of random conversations: their text in the mini's chat template, and its tokens.

`test/unit/serving/test_prompts.py` compares ours with them under whichever transformers runs the tests.

    python tools/record_chats.py
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "test" / "data" / "chats.json"
COUNT = 200
SEED = 5

_WORDS = (
    "The capital of France is Paris What 3 + 4 = weather naïve 東京 🚀🏽 <b>&amp;'\" {} [] \\ 100% \t x\ny \n\n "
    "<think> </think> <tool_response> <|im_end|> <|endoftext|> None null café\u0301 {{ messages }} {% raw %}"
).split(" ")


def random_chats(seed: int = SEED, count: int = COUNT) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Conversations as clients send them, each with the same in the form that a chat template takes.

    Both are the keywords of `apply_chat_template`: conversation and, of some, tools and enable_thinking.
    """
    rng = random.Random(seed)
    return [_chat(rng) for _ in range(count)]


def _chat(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    options: dict[str, Any] = {}
    if rng.random() < 0.4:
        options["tools"] = [_tool(rng) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.5:
        options["enable_thinking"] = rng.random() < 0.5
    pairs = []
    if rng.random() < 0.4:
        pairs.append(_message(rng, "system", _content(rng, media=False)))
    for _ in range(rng.randint(1, 3)):
        pairs.append(_message(rng, "user", _content(rng, media=True)))
        while rng.random() < 0.3:
            pairs.append(_calling(rng))
            pairs += [_result(rng) for _ in range(rng.randint(1, 2))]
        pairs.append(_message(rng, "assistant", _content(rng, media=False)))
        if rng.random() < 0.2:
            for message in pairs[-1]:
                message["reasoning_content"] = "3 + 4\nis 7"
    if rng.random() < 0.7:  # else the assistant speaks again
        pairs.append(_message(rng, "user", _content(rng, media=True)))
    sent, taken = ([pair[i] for pair in pairs] for i in (0, 1))
    return {"conversation": sent, **options}, {"conversation": taken, **options}


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(0, 8)))


def _message(rng: random.Random, role: str, content: tuple[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    sent, taken = ({"role": role, "content": form} for form in content)
    return sent, taken


def _content(rng: random.Random, media: bool) -> tuple[Any, Any]:
    """A content as it is sent, and as a template takes it."""
    if rng.random() < 0.5:
        return (_text(rng),) * 2
    items = []
    for _ in range(rng.randint(0, 3)):
        kind = rng.choice(("text", "image", "image_url", "video")) if media else "text"
        if kind == "text":
            items.append(({"text": (text := _text(rng)), "type": "text"}, {"type": "text", "text": text}))
        elif kind == "image_url":
            address = "data:image/png;base64,AAAA"
            items.append(({"type": kind, kind: {"url": address}}, {"type": "image", "image": address}))
        else:
            typed = {"type": kind} if rng.random() < 0.7 else {}
            items.append(({**typed, kind: f"a.{kind}"}, {"type": kind, kind: f"a.{kind}"}))
    return [sent for sent, _ in items], [taken for _, taken in items]


def _calling(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A turn of the assistant that calls, with its content absent, null, empty or a text."""
    content = rng.choice(({}, {"content": None}, {"content": ""}, {"content": _text(rng)}))
    calls = []
    for number in range(rng.randint(1, 2)):
        values = ("Paris", 3, 2.5, True, None, [1, "é"], {"a": {"b": "<&>"}}, "two\nlines")
        arguments = {f"p{i}": rng.choice(values) for i in range(rng.randint(0, 3))}
        as_sent = json.dumps(arguments) if rng.random() < 0.5 else arguments
        sent, taken = ({"name": f"function_{number}", "arguments": form} for form in (as_sent, arguments))
        if rng.random() < 0.8:
            calls.append(tuple({"id": "1", "type": "function", "function": form} for form in (sent, taken)))
        else:
            calls.append((sent, taken))
    as_taken = {"role": "assistant", **content, "tool_calls": [taken for _, taken in calls]}
    if len(calls) == 1 and "function" not in calls[0][0] and rng.random() < 0.5:
        return {"role": "assistant", **content, "function_call": calls[0][0]}, as_taken
    return {"role": "assistant", **content, "tool_calls": [sent for sent, _ in calls]}, as_taken


def _result(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    sent, taken = _message(rng, "tool", _content(rng, media=False))
    named = {"name": "function_0", "tool_call_id": "1"} if rng.random() < 0.5 else {}
    return {**sent, **named, "role": rng.choice(("tool", "function"))}, {**taken, **named}


def _tool(rng: random.Random) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": _text(rng)}}}
    function = {"name": f"function_{rng.randint(0, 3)}", "description": _text(rng), "parameters": parameters}
    return {"type": "function", "function": function}


def record() -> dict[str, Any]:
    """The chats as sent, with the text and the tokens that transformers makes of what its template takes."""
    import transformers

    from qwen35.serving.loading import MINI_CHECKPOINT

    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_CHECKPOINT)
    chats = []
    for sent, taken in random_chats():
        text = tokenizer.apply_chat_template(**taken, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer.apply_chat_template(**taken, add_generation_prompt=True, return_dict=True)
        chats.append({**sent, "text": text, "ids": encoded["input_ids"]})
    return {"transformers": transformers.__version__, "chats": chats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FILE", help=f"({DEFAULT_OUT})")
    out = parser.parse_args().out
    recorded = record()
    lines = ",\n".join(json.dumps(chat, ensure_ascii=False, separators=(",", ":")) for chat in recorded["chats"])
    out.write_text(f'{{"transformers": "{recorded["transformers"]}", "chats": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{out}: {len(recorded['chats'])} chats of transformers {recorded['transformers']}")


if __name__ == "__main__":
    main()
