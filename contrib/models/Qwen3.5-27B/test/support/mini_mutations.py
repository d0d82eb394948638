# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Mutations of the files beside the mini's weights: generation, tokenizer, chat template and processors.

Each is known to be harmless or not, and why. A mutation edits a copy of the mini. What is harmless is so under every
supported transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.weights.checkpoint import is_mtp
from qwen35.weights.text_rules import conversion_plan

from .mutations import Mutation, behind_a_link, dangling, replace

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
IMAGE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"

_NAN, _INFINITY = float("nan"), float("inf")
_NO_OBJECTS = (7, "x", [], [1], True, 1.5)


def copy_of_the_mini(directory: Path) -> Path:
    """A copy of the mini, with a link to its weights."""
    directory.mkdir()
    for file in MINI_CHECKPOINT.iterdir():
        if file.suffix == ".safetensors":
            (directory / file.name).symlink_to(file)
        else:
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


def with_random_head(directory: Path) -> Path:
    """A copy of the mini with an MTP head that guesses at random."""
    copy_of_the_mini(directory)
    config = Qwen35InferenceConfig.from_pretrained(directory, Qwen35NeuronConfig(num_speculative_tokens=1))
    generator = torch.Generator().manual_seed(0)
    head = {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        for rule in conversion_plan(config)
        for name, shape in rule.sources.items()
        if name.startswith("mtp.")
    }
    weights = {
        name: tensor for name, tensor in load_file(MINI_CHECKPOINT / "model.safetensors").items() if not is_mtp(name)
    }
    (directory / "model.safetensors").unlink()
    save_file({**weights, **head}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _edited(
    file: str, what: str, harmless: bool, why: str, edit: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> Mutation:
    """Of the object in a JSON file, which `edit` changes or replaces."""

    def apply(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        changed = edit(content)
        (directory / file).write_text(json.dumps(content if changed is None else changed))

    return Mutation(file, what, harmless, why, apply)


def _put(file: str, name: str, value: Any, harmless: bool, why: str) -> Mutation:
    return _edited(file, f"{name} = {value!r:.60}", harmless, why, lambda content: content.update({name: value}))


def _drop(file: str, name: str, harmless: bool, why: str) -> Mutation:
    return _edited(
        file,
        f"without {name}",
        harmless,
        why,
        lambda content: {field: value for field, value in content.items() if field != name},
    )


def _written(file: str, what: str, data: bytes, harmless: bool, why: str) -> Mutation:
    return Mutation(file, what, harmless, why, lambda directory: (directory / file).write_bytes(data) and None)


def _as_files(file: str) -> Iterator[Mutation]:
    """What is in the file's place."""
    for what, make in (("a directory", Path.mkdir), ("a pipe", os.mkfifo), ("a link to nothing", dangling)):
        yield Mutation(file, what, False, "no file", lambda d, make=make: replace(d / file, make))
    yield Mutation(file, "behind a link", True, "as in a hub's cache", lambda d: behind_a_link(d / file))


def _as_json(file: str) -> Iterator[Mutation]:
    """The file's text, and what is in its place."""
    text = (MINI_CHECKPOINT / file).read_text().strip()
    opened = text.removesuffix("}").rstrip()
    for what, data in (("empty", b""), ("cut", text[: len(text) // 2].encode()), ("of no text", b"\xff\xfe\xfd"),
                       ("a list", b"[]"), ("a list of pairs", b'[["a", 1]]'), ("null", b"null"), ("a number", b"7"),
                       ("a string", b'"ab"'), ("Python", b"{'a': 1}"), ("nested 100000 levels", b"[" * 100_000),
                       ("one bracket too many", (text + "}").encode()),
                       ("a field nested 40 levels", f'{opened}, "x": {"[" * 40}{"]" * 40}}}'.encode()),
                       ("a number of 9999 digits", f'{opened}, "x": {"9" * 9999}}}'.encode())):  # fmt: skip
        yield _written(file, what, data, False, "no object in JSON")
    yield _written(file, "in one line", json.dumps(json.loads(text)).encode(), True, "the same object")
    yield _written(file, "with spaces around", f" \n{text}\n\n".encode(), True, "the same object")
    yield _edited(file, "in another order", True, "an object", lambda content: dict(reversed(content.items())))
    yield from _as_files(file)


# generation_config.json


def generation_mutations() -> Iterator[Mutation]:
    """Of generation_config.json, for greedy tokens."""
    yield from _as_json(GENERATION)
    for value in ("<|im_end|>", -1, 1.5, True, {}, _NAN, 10**30, 1024, [5, "6"], [[5]], [None], [-1], [True]):
        yield _put(GENERATION, "eos_token_id", value, False, "no token ids of this vocabulary")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        for value in ("x", True, [], {}, [1.0], _NAN, _INFINITY, 10**400):
            yield _put(GENERATION, name, value, False, "no number")
    for name in ("top_k", "max_new_tokens", "max_length", "pad_token_id", "bos_token_id"):
        for value in ("x", -1, True, [], {}, [1], 1.5, _NAN):
            yield _put(GENERATION, name, value, False, "no whole number")
    for value in ("x", "true", 0, 1, [], {}, 1.5):
        yield _put(GENERATION, "do_sample", value, False, "not true or false")
    for name in ("max_new_tokens", "max_length"):
        yield _put(GENERATION, name, 0, False, "no tokens")

    for value in ([1014, 1016], [1016], 1016, 1014, [1016, 1016, 1014], None, []):
        yield _put(GENERATION, "eos_token_id", value, True, "the tokenizer and config.json say the rest")
    for name in ("eos_token_id", "pad_token_id", "do_sample"):
        yield _drop(GENERATION, name, True, "said elsewhere, or the default")
    for name, values in (("temperature", (0.6, 1, 0, None)), ("top_p", (0.95, 1)), ("top_k", (20, 0, None)),
                         ("min_p", (0.1,)), ("do_sample", (True, None)), ("repetition_penalty", (1.1,)),
                         ("max_new_tokens", (1, 10**6)), ("max_length", (20,)),
                         ("pad_token_id", (5, None))):  # fmt: skip
        for value in values:
            yield _put(GENERATION, name, value, True, "the command line says how tokens are chosen")
    for name, values in (("transformers_version", ("5.0.0", 5, None, [])), ("cache_implementation", ("x", 7)),
                         ("compile_config", ({}, 7)), ("watermarking_config", ("x", {})), ("dtype", (0, "x", [])),
                         ("num_beams", (4, "x")), ("num_return_sequences", (2, "x", [])), ("early_stopping", ("x", [])),
                         ("suppress_tokens", (1, [5])), ("bad_words_ids", ([[5]], "x")), ("use_cache", (False, "x")),
                         ("validate", (1,)), ("to_dict", (None,)), ("_from_model_config", (True,)),
                         ("my_own_field", ({"a": [1]}, "\u2603"))):  # fmt: skip
        for value in values:
            yield _put(GENERATION, name, value, True, "of transformers' own generation, which does not run")
    yield Mutation(GENERATION, "missing", True, "others say what ends a text", lambda d: (d / GENERATION).unlink())


# tokenizer_config.json


def tokenizer_config_mutations() -> Iterator[Mutation]:
    """Of tokenizer_config.json."""
    file = TOKENIZER_CONFIG
    yield from _as_json(file)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"):
        for value in (-1, 0, True, [], {}, [1], 1.5, {"content": 7}):
            yield _put(file, name, value, False, "no token")
    for name in ("additional_special_tokens", "extra_special_tokens"):
        for value in ("x", -1, True, [1], 1.5, [None], {"a": 7}):
            yield _put(file, name, value, False, "no list of tokens")
    token = {"content": "<|im_end|>", "special": True}
    for value in ("x", 7, [], {"1016": 7}, {"1016": {}}, {"x": token}, {"-1": token}, {"1016": "<|im_end|>"}, [token]):
        yield _put(file, "added_tokens_decoder", value, False, "no tokens by their ids")
    for value in ({}, {"1016": token}, {"1000": token}):
        yield _put(file, "added_tokens_decoder", value, False, "other ids than in tokenizer.json")
    for name in ("add_prefix_space", "add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"):
        for value in ("x", 0, [], {}):
            yield _put(file, name, value, False, "not true or false")
    for value in (True, "x", 1, None):
        yield _put(file, "split_special_tokens", value, False, "the marks of turns would be split")
    for name in ("padding_side", "truncation_side"):
        for value in ("x", 7, [], True):
            yield _put(file, name, value, False, "neither left nor right")
    for value in ("x", [], {}, [1], True, _NAN, _INFINITY, "32768"):
        yield _put(file, "model_max_length", value, False, "no number")
    for value in (-1, 0, True, [], {}, 1.5):
        yield _put(file, "tokenizer_class", value, False, "no name")
    for value in ("x", 7, [], None):
        yield _put(file, "auto_map", value, False, "no object")
    for value in ("x", 7, [7], {}):
        yield _put(file, "model_input_names", value, False, "no names")
    for value in (7, True, {}, [7], ["x"], [{"name": "default"}], [{"name": 7, "template": "x"}]):
        yield _put(file, "chat_template", value, False, "no template")
    for name in ("decode", "get_vocab"):
        yield _put(file, name, 7, False, "the name of a method")

    yield Mutation(file, "missing", True, "tokenizer.json has all tokens", lambda d: (d / file).unlink())
    for name in ("bos_token", "unk_token", "pad_token", "errors", "clean_up_tokenization_spaces", "add_prefix_space",
                 "model_max_length", "additional_special_tokens"):  # fmt: skip
        yield _drop(file, name, True, "it has the default value, or tokenizer.json says it")
    for name, values in (("model_max_length", (10**30, 1e30, 1, 0, -1, None)), ("padding_side", ("left", "right")),
                         ("truncation_side", ("left", "right")), ("errors", ("strict", "ignore")),
                         ("eos_token", ({"content": "<|im_end|>", "__type": "AddedToken"}, "<|endoftext|>")),
                         ("pad_token", ("<|im_end|>", None)), ("bos_token", ("<|endoftext|>", None)),
                         ("add_bos_token", (False, None)), ("add_eos_token", (False, None)),
                         ("split_special_tokens", (False,)), ("chat_template", ("{{ 7 }}", None)),
                         ("legacy", (True, "x")), ("processor_class", ("x", 7, None)), ("use_fast", (True,)),
                         ("image_token", ("<|image_pad|>",)), ("name_or_path", ("/nowhere", 7)),
                         ("tokenizer_file", ("/nowhere", None)), ("special_tokens_map_file", ("/nowhere", 7)),
                         ("verbose", (False,)), ("is_local", (False,)), ("response_schema", ({}, 7)),
                         ("model_input_names", (["input_ids", "attention_mask"],)), ("auto_map", ({},)),
                         ("my_own_field", ("x", 7, None, [1, [2]], {"a": {"b": 1}}, "\u2603"))):  # fmt: skip
        for value in values:
            yield _put(file, name, value, True, "another way to say the same, or not used for texts and ids")


# tokenizer.json


def tokenizer_mutations() -> Iterator[Mutation]:
    """Of tokenizer.json."""
    file = TOKENIZER
    yield from _as_json(file)
    yield Mutation(file, "missing", False, "no vocabulary", lambda d: (d / file).unlink())

    def of_model(name: str, value: Any, harmless: bool, why: str) -> Mutation:
        what = f"model.{name} = {value!r:.60}"
        return _edited(file, what, harmless, why, lambda content: content["model"].update({name: value}))

    def of_added(i: int, name: str, value: Any, harmless: bool, why: str) -> Mutation:
        what = f"added token {i}: {name} = {value!r:.60}"
        return _edited(file, what, harmless, why, lambda content: content["added_tokens"][i].update({name: value}))

    def of_vocabulary(text: str, value: Any, harmless: bool, why: str) -> Mutation:
        what = f"the id of {text!r} = {value!r:.60}"
        return _edited(file, what, harmless, why, lambda content: content["model"]["vocab"].update({text: value}))

    for value in ("x", 7, None, [], {}, True):
        yield _put(file, "model", value, False, "no model")
        yield _put(file, "added_tokens", value, False, "no added tokens")
        yield of_model("vocab", value, False, "no vocabulary")
        yield of_model("merges", value, False, "no merges")
    for name in ("model", "added_tokens"):
        yield _drop(file, name, False, "half a tokenizer")
    for name in ("vocab", "merges"):
        what = f"without model.{name}"
        yield _edited(file, what, False, "half a model", lambda c, name=name: c["model"].pop(name) and None)
    for value in ([1], [["a"]], ["ab"], [["i", "no such token"]], [None]):
        yield of_model("merges", value, False, "no pairs of tokens")
    for value in (7, "Other", None, []):
        yield of_model("type", value, False, "another model")
    for value in ("x", 7, [], True):
        yield _put(file, "pre_tokenizer", value, False, "no part of a tokenizer")
        yield _put(file, "decoder", value, False, "no part of a tokenizer")
    for value in (-1, 1.5, "5", None, True, [], 10**30, 0, 1014):
        yield of_added(2, "id", value, False, "no id of its own")
    for value in (5000, 2048):
        yield of_added(2, "id", value, False, "no id of the model's vocabulary")
    for value in (7, None, "", [], "<|im_start|>", "x"):
        yield of_added(2, "content", value, False, "no text of its own")
    for value in (7, "x", None, [], ["<|im_end|>"]):
        what = f"added token 2 = {value!r:.60}"
        yield _edited(file, what, False, "no token", lambda c, value=value: c["added_tokens"].__setitem__(2, value))
    for value in (-1, 1.5, "5", None, True, [], 10**30, 5):
        yield of_vocabulary("S", value, False, "no id of its own")
    yield of_vocabulary("<|im_end|>", 7, False, "an added token has another")
    yield of_vocabulary("\u2603", 7, False, "another token has it")

    for i in range(8):
        for name in ("special", "normalized"):
            yield of_added(i, name, name == "special", True, "its value already, or no normaliser changes the text")
    for value in ("x", 7, None, [1], {"a": 1}):
        yield of_model("my_own_field", value, True, "nothing reads it")
    for name in ("fuse_unk", "byte_fallback"):
        yield of_model(name, False, True, "its value already")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        yield of_model(name, None, True, "its value already")
    for name in ("truncation", "padding", "post_processor"):
        yield _put(file, name, None, True, "its value already")
    yield of_vocabulary("S", 1_000_000, True, "no text here has the token")

    def spaced(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    yield _edited(file, "merges as texts", True, "the older form", spaced)

    def shuffled(content: dict[str, Any]) -> None:
        content["model"]["vocab"] = dict(sorted(content["model"]["vocab"].items()))

    yield _edited(file, "the vocabulary in another order", True, "ids count", shuffled)


# chat_template.jinja


def template_mutations() -> Iterator[Mutation]:
    """Of chat_template.jinja."""
    text = (MINI_CHECKPOINT / TEMPLATE).read_text()
    yield from _as_files(TEMPLATE)
    for broken in ("{% if %}", "{% for x in messages %}", "{{ messages[0].content + 1 }}", "{{ nothing.at_all }}",
                   "{{ 1 // 0 }}", "{{ raise_exception('No.\n' ~ 'A' * 9999) }}", "{% include 'x' %}", "{{ f() }}",
                   "{% import 'os' as os %}", "{{ ''.__class__.__mro__[1]() }}", "{{ 'x' | nofilter }}",
                   "{{ messages | first | items | list | tojson | int // 0 }}", "{% extends 'x' %}", "{{", "{%",
                   "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ messages['a']['b'] }}",
                   "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):  # fmt: skip
        yield _written(TEMPLATE, f"{broken!r:.60}", broken.encode(), False, "no program that takes a conversation")
    yield _written(TEMPLATE, "empty", b"", False, "no template")
    yield _written(TEMPLATE, "cut", text[: len(text) // 2].encode(), False, "half a program")
    yield _written(TEMPLATE, "of no text", b"\xff\xfe\xfd", False, "no UTF-8")
    yield Mutation(TEMPLATE, "missing", False, "no template", lambda d: (d / TEMPLATE).unlink())

    same = (("a comment before", "{#- a comment -#}" + text), ("a comment after", text + "{#- a comment -#}"),
            ("a variable set", "{%- set unused = 7 -%}" + text), ("a newline after", text + "\n"),
            ("a branch for what is not given", text + "{%- if my_argument is defined -%}x{%- endif -%}"),
            ("a macro that nothing calls", "{%- macro unused() -%}x{%- endmacro -%}" + text),
            ("an empty loop", text + "{%- for x in [] -%}x{%- endfor -%}"),
            ("quotes", text.replace("'<|im_start|>'", '"<|im_start|>"')),
            ("lines of Windows", text.replace("\n", "\r\n")))  # fmt: skip
    for what, changed in same:
        yield _written(TEMPLATE, what, changed.encode(), True, "the same program")

    def to_config(directory: Path) -> None:
        (directory / TEMPLATE).unlink()
        file = directory / TOKENIZER_CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": text}))

    def named(directory: Path) -> None:
        (directory / TEMPLATE).unlink()
        file = directory / TOKENIZER_CONFIG
        templates = [{"name": "default", "template": text}, {"name": "other", "template": "x"}]
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))

    yield Mutation(TEMPLATE, "in tokenizer_config.json", True, "its older place", to_config)
    yield Mutation(TEMPLATE, "as one of several in tokenizer_config.json", True, "its older place", named)


# preprocessor_config.json, video_preprocessor_config.json


def processor_mutations(file: str) -> Iterator[Mutation]:
    """Of the settings of images (`IMAGE`) or of videos (`VIDEO`)."""
    yield from _as_json(file)
    not_sizes: Sequence[Any] = ("x", 0, -1, True, [], {}, [16], 1.5, _NAN, _INFINITY, 10**400, "16")
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        for value in (*not_sizes, 10**9):
            yield _put(file, name, value, False, "no size of a patch")
    for name in ("min_pixels", "max_pixels"):
        for value in not_sizes:
            yield _put(file, name, value, False, "no count of pixels")
        edge = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}[name]
        for value in not_sizes:
            limits = {"shortest_edge": 4096, "longest_edge": 16384, edge: value}
            yield _put(file, "size", limits, False, "no count of pixels")
    yield _put(file, "min_pixels", 10**9, False, "more than any picture has")
    yield _put(file, "max_pixels", 4095, False, "less than at least")
    yield _put(file, "size", {"shortest_edge": 10**8, "longest_edge": 10**9}, False, "more than any picture has")
    yield _put(file, "size", {"shortest_edge": 1, "longest_edge": 1023}, False, "less than a token")
    for value in ({"height": 64, "width": 64}, *_NO_OBJECTS):
        yield _put(file, "size", value, False, "no limits of pixels")
    for name in ("image_mean", "image_std"):
        for value in ("x", -1, 0.5, [], {}, [0.5], [0.5, 0.5], [0.5, 0.5, "x"], [0.5, 0.5, None], [0.5] * 4,
                      [[0.5] * 3], [0.5, 0.5, _NAN], [10**400] * 3, True, [True] * 3):  # fmt: skip
            yield _put(file, name, value, False, "no number for each of three channels")
    for value in ([0.0] * 3, [0.5, 0.5, 0], [-0.5] * 3):
        yield _put(file, "image_std", value, False, "nothing to divide by")
    for value in ("x", 0, -1, True, [], {}, _NAN, _INFINITY, 10**400):
        yield _put(file, "rescale_factor", value, False, "no positive number")
    for value in ("x", -1, 99, True, [], {}, 3.0, "bicubic"):
        yield _put(file, "resample", value, False, "no filter")
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        for value in (False, 0, 1, "x", None, [], {}):
            yield _put(file, name, value, False, "not implemented, or not true or false")
    for value in (True, "x", 1):
        yield _put(file, "cap_pixels_per_frame", value, False, "not implemented")
    if file == VIDEO:
        for value in ("x", 0, -1, True, [], {}, _NAN, _INFINITY, 10**400):
            yield _put(file, "fps", value, False, "no rate")
        for name in ("min_frames", "max_frames"):
            for value in ("x", 0, -1, True, [], {}, 1.5, _NAN, 10**30):
                yield _put(file, name, value, False, "no count of frames")
        yield _put(file, "max_frames", 3, False, "less than at least")
        yield _put(file, "resample", 0, False, "frames are resized bicubically")

    limits = {IMAGE: (4096, 16384), VIDEO: (4096, 147456)}[file]
    yield _edited(file, "limits as fields", True, "the older form", _limits_as_fields)
    yield _put(file, "min_pixels", limits[0], True, "the same limit twice")
    yield _put(file, "max_pixels", limits[1], True, "the same limit twice")
    same: Mapping[str, Sequence[Any]] = {
        "rescale_factor": (1 / 255, None),
        "resample": (3, None),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
        "cap_pixels_per_frame": (False, None, 0),
        "patch_size": (16, None),
        "merge_size": (2, None),
        "temporal_patch_size": (2, None),
        "image_mean": ([0.5] * 3, None),
        "image_std": ([0.5] * 3, None),
        "processor_class": ("x", 7, None),
        "image_processor_type": ("x", 7, None),
        "video_processor_type": ("x", 7),
        "my_own_field": ("x", {"a": [1]}, "\u2603"),
        **({} if file == IMAGE else {"fps": (2, 2.0, None), "min_frames": (4, None), "max_frames": (768, None)}),
    }
    for name, values in same.items():
        for value in values:
            yield _put(file, name, value, True, "its value already, or nothing here reads it")
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "processor_class"):
        yield _drop(file, name, True, "it has the default value")
    part = {IMAGE: "image_processor", VIDEO: "video_processor"}[file]

    def to_one_file(directory: Path) -> None:
        settings = json.loads((directory / file).read_text())
        (directory / file).unlink()
        (directory / "processor_config.json").write_text(json.dumps({part: settings}))

    yield Mutation(file, "in processor_config.json", True, "the form of transformers 5", to_one_file)
    for value in (7, "x", [1], True):
        both = json.dumps({part: value})
        yield Mutation(
            file,
            f"{value!r} in processor_config.json",
            False,
            "no settings",
            lambda d, both=both: (d / "processor_config.json").write_text(both) and None,
        )


def _limits_as_fields(content: dict[str, Any]) -> None:
    size = content.pop("size")
    content |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def text_mutations() -> list[Mutation]:
    """Of the files that turn text into ids and say when to stop."""
    return [
        *generation_mutations(),
        *tokenizer_config_mutations(),
        *tokenizer_mutations(),
        *template_mutations(),
    ]


def media_mutations() -> list[Mutation]:
    """Of the files that turn images and videos into pixels."""
    return [*processor_mutations(IMAGE), *processor_mutations(VIDEO)]
