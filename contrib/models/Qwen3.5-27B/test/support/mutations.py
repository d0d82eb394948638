# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Mutations of the files of a tiny checkpoint, each known by its schema to be harmless or not, and why.

The checkpoint has two shards, `FIRST` and `SECOND`, and an index. A mutation edits a copy of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .models import TINY, random_weights

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"

SIZES: dict[str, Any] = {
    **TINY,
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
}
FIELDS: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
    "dtype": "float32",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 7,
    **SIZES,
}
MTP = {"mtp.fc.weight": (32, 64), "mtp.norm.weight": (32,), "mtp.layers.0.mlp.up_proj.weight": (48, 32)}


@dataclass(frozen=True)
class Mutation:
    """An edit of a checkpoint's directory."""

    file: str
    """Which file it is about."""

    what: str
    harmless: bool
    """Whether the tokens must stay as they are; else one of our errors of one line must come."""

    why: str
    edit: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def save_tiny(directory: Path) -> None:
    """Write the checkpoint that mutations start from. Its weights are exact in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(FIELDS))
    weights = {name: tensor.bfloat16().float() for name, tensor in random_weights(5, **SIZES).items()}
    write_sharded(directory, weights)


def write_sharded(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    names = list(weights)
    parts = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file, held in parts.items():
        save_file({name: weights[name].contiguous() for name in held}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


# config.json

_SIZE_FIELDS = [name for name, value in SIZES.items() if isinstance(value, int)]
_WRONG_SIZES = (0, -4, 2.5, "32", None, True, [32], {"a": 1}, float("nan"), float("inf"), 10**30)
_OTHER_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
                "linear_value_head_dim", "linear_conv_kernel_dim")  # fmt: skip
_WRONG_NUMBERS = (0, -1.0, "1e-6", None, [1.0], {}, float("nan"), float("inf"), 10**400, True)
_WRONG_IDS = (-1, 1.5, "7", "<|im_end|>", True, {}, float("nan"), 10**30)
_NO_OBJECTS = (7, "x", [], [1], True, 1.5)
# Fields of other programs, and of transformers' that say nothing about a pass through the model.
_UNUSED = {
    "use_cache": (True, False, "yes", None, 3),
    "initializer_range": (0.02, "x", None, -1),
    "attention_dropout": (0.0, 0.5, [], "x"),
    "transformers_version": ("5.0.0", "", 5, None),
    "architectures": (["Qwen3_5ForConditionalGeneration"], None, [], ["Other"], 7),
    "mtp_num_hidden_layers": (1, 0, "one", None),
    "mtp_use_dedicated_embeddings": (False, True),
    "my_own_field": ("x", 1, None, [1, [2]], {"a": {"b": 1}}, float("nan"), 10**30, "\u00e4\u2603"),
    "validate_config": (5,),
    "rotary_dim": (99,),
    "neuron_config": ({"tp_degree": 99}, 7),
    "_name_or_path": ("/somewhere/else", 5, None),
    "quantization_config": (None,),
}


def _at(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _place(fields: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    *path, last = _at(name)
    for part in path:
        fields = fields[part]
    return fields, last


def _config(what: str, harmless: bool, why: str, edit: Callable[[dict[str, Any]], Any], nested: bool) -> Mutation:
    """A mutation of config.json; `nested` has the text config below `text_config`, as vision-language files do."""

    def apply(directory: Path) -> None:
        fields = json.loads(json.dumps(FIELDS))
        changed = edit(fields)
        fields = fields if changed is None else changed
        if nested:
            fields = {"model_type": "qwen3_5", "text_config": fields, "tie_word_embeddings": False}
        (directory / CONFIG).write_text(json.dumps(fields))

    return Mutation("text_config of config.json" if nested else CONFIG, what, harmless, why, apply)


def config_mutations(nested: bool) -> Iterator[Mutation]:
    """Of the fields in config.json, by the kind of each."""

    def put(name: str, value: Any, harmless: bool, why: str) -> Mutation:
        def edit(fields: dict[str, Any]) -> None:
            place, last = _place(fields, name)
            place[last] = value

        return _config(f"{name} = {value!r:.60}", harmless, why, edit, nested)

    def drop(name: str, harmless: bool, why: str) -> Mutation:
        def edit(fields: dict[str, Any]) -> None:
            place, last = _place(fields, name)
            del place[last]

        return _config(f"without {name}", harmless, why, edit, nested)

    for name in _SIZE_FIELDS:
        for value in _WRONG_SIZES:
            yield put(name, value, False, "not a size")
    for name in _OTHER_SIZES:
        yield put(name, 10**9, False, "the tensors have another size")
        yield put(name, SIZES[name] + 1, False, "the tensors have another size")
        yield put(name, 2 * SIZES[name], False, "the tensors have another size")
        yield drop(name, False, "a size that nothing else tells")
    yield put("num_hidden_layers", 10**9, False, "no model has as many layers")
    yield put("num_hidden_layers", 3, False, "the tensors of a layer are missing")
    yield put("max_position_embeddings", 8, False, "the compiled length exceeds it")
    for name in ("rms_norm_eps", "rope_parameters.rope_theta", "rope_parameters.partial_rotary_factor"):
        for value in _WRONG_NUMBERS:
            yield put(name, value, False, "not a positive number")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "image_token_id", "vision_end_token_id"):
        for value in _WRONG_IDS:
            yield put(name, value, False, "not a token id")
    for value in ([], [7, "8"], [[7]], [None], [-1]):
        yield put("eos_token_id", value, False, "not a list of token ids")
    for value in ("no", None, 1, [], {}):
        yield put("tie_word_embeddings", value, False, "not true or false")
    for value in ([4], [4, 0], [2, 2, 1], "211", [2.0, 1, 1], [2, True, 1], {}, 7, [-1, 4, 1]):
        yield put("rope_parameters.mrope_section", value, False, "not three counts of all frequencies")
    for value in ("linear_attention", ["linear_attention"], ["linear_attention", "sliding"], [1, 2], 7, {}, [[], []]):
        yield put("layer_types", value, False, "not one known kind a layer")
    yield put("layer_types", ["full_attention", "linear_attention"], False, "the layers' tensors are of the other kind")
    for place in ("rope_parameters", "rope_scaling"):
        for value in _NO_OBJECTS:
            yield put(place, value, False, "not an object")
        for kind in ("yarn", "linear", "dynamic", "longrope", "llama3", "su", "", 7, None, ["default"], {"a": 1}):
            settings = {**SIZES["rope_parameters"], "rope_type": kind, "factor": 4.0}
            yield put(place, settings, False, "a rope type that is not implemented")
            if kind is not None:
                older = {"type" if name == "rope_type" else name: value for name, value in settings.items()}
                yield put(place, older, False, "a rope type that is not implemented, under its older name")
    for value in ("x", "float6", "load", 7, [], {}, ["float32"], True, "torch.x", ""):
        yield put("dtype", value, False, "not a dtype of torch")
        yield put("torch_dtype", value, False, "not a dtype of torch")
    for name, values in (("hidden_act", ("gelu", None, 7, [])), ("attention_bias", (True, "x")),
                         ("attn_output_gate", (False, None)), ("rope_parameters.mrope_interleaved", (False, "x")),
                         ("model_type", ("llama", "qwen3_5_moe", None, 7, [], {}))):  # fmt: skip
        for value in values if not (nested and name == "model_type") else ():
            yield put(name, value, False, "another architecture")
    for method in ("awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors", "modelopt", "mxfp4", "hqq", "quanto"):
        yield put("quantization_config", {"quant_method": method, "bits": 4}, False, "a quantised checkpoint")
    yield put("quantization", {"group_size": 64, "bits": 4}, False, "a quantised checkpoint")
    for value in ("x", 7, {}):
        yield put("quantization_config", value, False, "a quantised checkpoint, of which nothing is known")

    for name, values in _UNUSED.items():
        for value in values:
            yield put(name, value, True, "nothing here reads the field")
    for name in ("architectures", "dtype", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
                 "eos_token_id", "rope_parameters.mrope_section", "rope_parameters.mrope_interleaved",
                 "rope_parameters.partial_rotary_factor", "rope_parameters.rope_type"):  # fmt: skip
        yield drop(name, True, "it has the default value")
    for name, value in (("eos_token_id", [7, 8]), ("eos_token_id", None), ("bos_token_id", 1), ("pad_token_id", 0),
                        ("pad_token_id", None), ("image_token_id", 40), ("max_position_embeddings", 10**6),
                        ("full_attention_interval", 2), ("dtype", "bfloat16"), ("dtype", "float16"), ("dtype", None),
                        ("torch_dtype", "float32"), ("dtype", "torch.float32"), ("attn_output_gate", True),
                        ("layer_types", ["linear_attention", "full_attention"]), ("layer_types", None),
                        ("rope_parameters.mrope_section", None), ("rope_scaling", None), ("rope_scaling", {}),
                        ("rope_parameters.type", "default"), ("rope_parameters.factor", 4.0), ("rope_theta", 5.0),
                        ("partial_rotary_factor", 0.5), ("tie_word_embeddings", True)):  # fmt: skip
        yield put(name, value, True, "another way to say the same, or not used in a pass through the model")
    for name, value in (("rope_type", "default"), ("type", "default"), ("type", "mrope"), ("rope_type", "mrope")):

        def older(fields: dict[str, Any], name: str = name, value: str = value, place: str = "rope_scaling") -> None:
            rope = {key: held for key, held in fields.pop("rope_parameters").items() if key != "rope_type"}
            fields[place] = {**rope, name: value}

        def beside(fields: dict[str, Any], name: str = name, value: str = value) -> None:
            rope = fields.pop("rope_parameters")
            fields |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
            fields["rope_scaling"] = {name: value, "mrope_section": rope["mrope_section"]}

        yield _config(f"rope_scaling with {name} = {value}", True, "an older place", older, nested)
        yield _config(f"rope_theta beside rope_scaling with {name} = {value}", True, "an older place", beside, nested)
    yield _config("fields in another order", True, "an object", lambda f: dict(reversed(f.items())), nested)


def text_mutations() -> Iterator[Mutation]:
    """Of config.json as a file, and of what stands around a text config."""

    def write(what: str, data: bytes, harmless: bool, why: str) -> Mutation:
        return Mutation(CONFIG, what, harmless, why, lambda directory: (directory / CONFIG).write_bytes(data) and None)

    text = json.dumps(FIELDS)
    opened = text[:-1].encode()
    for what, data in (("empty", b""), ("cut", text[:99].encode()), ("of no text", b"\xff\xfe\xfd"), ("a list", b"[]"),
                       ("null", b"null"), ("a number", b"7"), ("a string", b'"x"'), ("Python", b"{'a': 1}"),
                       ("nested 100000 levels", b"[" * 100_000), ("one bracket too many", (text + "}").encode()),
                       ("with a field nested 40 levels", opened + b', "x": ' + b"[" * 40 + b"]" * 40 + b"}"),
                       ("a number of 9999 digits", opened + b', "x": ' + b"9" * 9999 + b"}")):  # fmt: skip
        yield write(what, data, False, "not a config")
    for what, data in (("in several lines", json.dumps(FIELDS, indent=4).encode()),
                       ("with a mark", b"\xef\xbb\xbf" + text.encode()),
                       ("with spaces around", b" \n" + text.encode() + b"\n\n"), ("in UTF-16", text.encode("utf-16")),
                       ("with a field twice", b'{"hidden_size": 7, ' + text[1:].encode())):  # fmt: skip
        yield write(what, data, True, "the same object in JSON; of a field given twice, the last counts")
    yield Mutation(CONFIG, "missing", False, "no config", lambda d: (d / CONFIG).unlink())
    yield Mutation(CONFIG, "a directory", False, "no file", lambda d: replace(d / CONFIG, Path.mkdir))
    yield Mutation(CONFIG, "a pipe", False, "no file", lambda d: replace(d / CONFIG, os.mkfifo))
    yield Mutation(CONFIG, "a link to nothing", False, "no file", lambda d: replace(d / CONFIG, dangling))
    yield Mutation(CONFIG, "a link to a file", True, "as in a hub's cache", lambda d: behind_a_link(d / CONFIG))

    def around(what: str, harmless: bool, why: str, top: dict[str, Any], **text: Any) -> Mutation:
        outer = {"model_type": "qwen3_5", "text_config": {**FIELDS, **text}, **top}
        return write(f"around the text config: {what}", json.dumps(outer).encode(), harmless, why)

    for value in _NO_OBJECTS:
        yield around(f"text_config = {value!r}", False, "not an object", {"text_config": value})
        yield around(f"vision_config = {value!r}", False, "not an object", {"vision_config": value})
        yield around(f"rope_scaling = {value!r}", False, "not an object", {"rope_scaling": value})
    for kind in ("yarn", "linear", 7):
        rope = {"rope_type": kind, "factor": 2.0}
        yield around(f"rope_scaling of type {kind!r}", False, "not implemented", {"rope_scaling": rope})
    for value in ("x", 7, []):
        yield around(f"dtype = {value!r}", False, "not a dtype of torch", {"dtype": value})
    yield around("quantization_config", False, "quantised", {"quantization_config": {"quant_method": "awq"}})
    for top in (True, False, "absent"):
        for nested in (True, False):
            fields = {} if top == "absent" else {"tie_word_embeddings": top}
            why = "the file has a head of its own"
            yield around(f"tied: {top} at the top, {nested} below", True, why, fields, tie_word_embeddings=nested)
    for name, value in (("vision_config", {"depth": 1}), ("vision_config", None), ("rope_theta", 3.0),
                        ("hidden_size", 7), ("rope_parameters", {"rope_theta": 3.0}), ("image_token_id", 40),
                        ("dtype", "bfloat16"), ("num_hidden_layers", "x"), ("model_type", "qwen3_5_text"),
                        ("architectures", ["x"])):  # fmt: skip
        yield around(f"{name} = {value!r}", True, "the nested field counts, or vision is not used", {name: value})


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def behind_a_link(path: Path) -> None:
    path.rename(path.with_name("blob"))
    path.symlink_to("blob")


# model.safetensors.index.json


def index_mutations() -> Iterator[Mutation]:
    """Of the index: its text, its map, and the files that it names."""

    def write(what: str, data: bytes) -> Mutation:
        return Mutation(INDEX, what, False, "not an index", lambda d: (d / INDEX).write_bytes(data) and None)

    for text in ("", "{", "[]", "null", "7", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}',
                 '{"weight_map": "x"}', '{"weightmap": {"a": "b"}}', '{"weight_map": [["a", "b"]]}', "[" * 100_000,
                 '{"weight_map": {"a": {"b": "c"}}}', "\x80\x81"):  # fmt: skip
        yield write(f"{text[:40]!r}", text.encode("latin-1"))

    def edited(what: str, harmless: bool, why: str, edit: Callable[[dict[str, Any]], Any]) -> Mutation:
        def apply(directory: Path) -> None:
            index = json.loads((directory / INDEX).read_text())
            changed = edit(index)
            (directory / INDEX).write_text(json.dumps(index if changed is None else changed))

        return Mutation(INDEX, what, harmless, why, apply)

    def mapped(name: str, file: Any) -> Callable[[dict[str, Any]], None]:
        return lambda index: index["weight_map"].update({name: file})

    for file in (None, 7, [], {}, True, "", ".", "/etc/hostname", "../elsewhere.safetensors", "a\0b", "x" * 300, "gone",
                 "sub/gone.safetensors", CONFIG, INDEX, "model-00003-of-00002.safetensors", 1.5, [FIRST], "..",
                 "sub/../../x"):  # fmt: skip
        yield edited(f"a tensor in {file!r:.40}", False, "no file of tensors", mapped("model.norm.weight", file))
        yield edited(f"a tensor too many in {file!r:.40}", False, "no file of tensors", mapped("extra.weight", file))
    for kind in ("directory", "pipe", "link to nothing"):
        make = {"directory": Path.mkdir, "pipe": os.mkfifo, "link to nothing": dangling}[kind]
        for file in (INDEX, FIRST, SECOND):
            yield Mutation(INDEX, f"a {kind} as {file}", False, "no file", lambda d, m=make, f=file: replace(d / f, m))
    for file in (INDEX, FIRST, SECOND):
        yield Mutation(INDEX, f"without {file}", False, "half the weights", lambda d, file=file: (d / file).unlink())

    for name, files in (("mtp.fc.weight", (FIRST, SECOND, "mtp.safetensors")),
                        ("model.mtp.norm.weight", ("gone", SECOND)),
                        ("model.language_model.mtp.fc.weight", ("model-mtp.safetensors", FIRST)),
                        ("model.nextn.0.fc.weight", ("nextn.safetensors", SECOND)),
                        ("model.rotary_emb.inv_freq", (FIRST,)), ("model.visual.pos_embed.weight", (FIRST, SECOND)),
                        ("model.layers.9.mlp.up_proj.weight", (FIRST,)), ("score.weight", (SECOND,)),
                        ("anything.at.all", (FIRST, SECOND)), ("", (FIRST,)),
                        ("model.norm.bias", (SECOND,))):  # fmt: skip
        for file in files:
            yield edited(f"{name!r} listed in {file}", True, "no file has it, nothing needs it", mapped(name, file))
    for name in random_names():
        yield edited(f"{name} in the other shard", True, "every file says what it has", lambda i, n=name: _swap(i, n))
        yield edited(
            f"without {name}", True, "every file says what it has", lambda i, n=name: i["weight_map"].pop(n) and None
        )
    for value in (None, 7, "x", [], {"total_size": -1}, {"total_size": "x"}, {"a": {"b": 1}}):
        yield edited(f"metadata = {value!r}", True, "nothing reads it", lambda index, v=value: index.update(metadata=v))
    yield edited("without metadata", True, "nothing reads it", lambda index: index.pop("metadata") and None)
    yield edited("another field", True, "nothing reads it", lambda index: index.update(other=[1]))
    yield edited("in another order", True, "a map", lambda i: {"weight_map": dict(reversed(i["weight_map"].items()))})
    yield edited("with ./ before files", True, "the same files", lambda i: {"weight_map": _dotted(i["weight_map"])})
    for file in (INDEX, FIRST, SECOND):
        yield Mutation(INDEX, f"{file} behind a link", True, "a cache", lambda d, file=file: behind_a_link(d / file))


def random_names() -> list[str]:
    """Some of the checkpoint's tensors."""
    return [name for i, name in enumerate(random_weights(5, **SIZES)) if i % 3 == 0]


def _swap(index: dict[str, Any], name: str) -> None:
    weight_map = index["weight_map"]
    weight_map[name] = SECOND if weight_map[name] == FIRST else FIRST


def _dotted(weight_map: dict[str, str]) -> dict[str, str]:
    return {name: f"./{file}" for name, file in weight_map.items()}


# safetensors files


def header_mutations() -> Iterator[Mutation]:
    """Of the first shard: its header by the fields of an entry, its bytes, and the tensors in both shards."""

    def edited(what: str, harmless: bool, why: str, edit: Callable[[dict[str, Any]], Any]) -> Mutation:
        def apply(directory: Path) -> None:
            path = directory / FIRST
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            changed = edit(header)
            text = (
                changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
            )
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

        return Mutation(FIRST, what, harmless, why, apply)

    target = "model.embed_tokens.weight"

    def field(name: str, value: Any, harmless: bool = False, why: str = "no entry of this format") -> Mutation:
        return edited(f"{name} = {value!r:.40}", harmless, why, lambda header: header[target].update({name: value}))

    for dtype in (
        "F3",
        "",
        "f32",
        "torch.float32",
        7,
        None,
        [],
        {},
        True,
        "F64",
        "I32",
        "U32",
        "F16",
        "I8",
        "F4",
        "BOOL",
    ):
        yield field("dtype", dtype)
    for shape in ([32, 48], [48], [48, 32, 1], [48.0, 32], ["48", 32], [48, -32], [-48, -32], [True, 1536], 7, None,
                  "x", {}, [[48, 32]], [10**30, 1], [0], [], [None], [48, 33], [1, 48, 32]):  # fmt: skip
        yield field("shape", shape)
    size = 48 * 32 * 4
    for place in ([0], [0, size, 0], [size, 0], [-size, 0], [0, size + 4], [4, size + 4], [0, 10**30], ["0", size],
                  [0.0, size], None, {}, 7, [], [True, size], "01", [10**9, 10**9 + size]):  # fmt: skip
        yield field("data_offsets", place)
    for name in ("dtype", "shape", "data_offsets"):
        yield edited(f"without {name}", False, "half an entry", lambda h, name=name: h[target].pop(name) and None)
    for value in (None, 7, "x", [], [1], True):
        yield edited(f"an entry = {value!r}", False, "no entry", lambda h, value=value: h.update({target: value}))
    for value in (7, "x", [], {"format": 7}, {"a": None}, {"a": {"b": "c"}}, {"a": ["x"]}):
        yield edited(f"metadata = {value!r}", False, "no texts", lambda h, v=value: h.update(__metadata__=v))
    for name in (
        "embed.weight",
        "model.embed_tokens",
        "model.embed_tokens.Weight",
        "",
        "model.layers.0.embed",
        "\udc00",
    ):
        yield edited(f"named {name!r}", False, "a needed tensor", lambda h, n=name: h.update({n: h.pop(target)}))
    yield edited("without an entry", False, "a hole in the file", lambda h: h.pop(target) and None)
    for text in (b"", b"[]", b"null", b"{", b"{}", b" {}", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000):
        yield edited(f"header {text[:12]!r}", False, "no header", lambda h, text=text: text)
    yield edited("an entry twice", False, "two entries", lambda h: _doubled(h, target))
    for what, change in (
        ("empty", lambda data: b""), ("7 bytes", lambda data: data[:7]), ("8 bytes", lambda data: data[:8]),
        ("cut in the header", lambda data: data[:200]), ("cut in the tensors", lambda data: data[:-1]),
        ("a byte more", lambda data: data + b"x"), ("zeros", lambda data: bytes(len(data))),
        ("a longer header", lambda data: (2**40).to_bytes(8, "little") + data[8:]),
        ("a shorter header", lambda data: (100).to_bytes(8, "little") + data[8:]),
        ("a git-lfs pointer", lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("a page of HTML", lambda data: b"<!DOCTYPE html><html>" + b" " * 4000),
        ("a zip file", lambda data: b"PK\3\4" + data),
    ):  # fmt: skip

        def cut(directory: Path, change: Callable[[bytes], bytes] = change) -> None:
            (directory / FIRST).write_bytes(change((directory / FIRST).read_bytes()))

        yield Mutation(FIRST, what, False, "not the whole file", cut)

    for value in (None, {}, {"format": "pt"}, {"format": "mlx"}, {"a": "b", "c": "\u2603"}):
        yield edited(f"metadata = {value!r}", True, "it says nothing", lambda h, v=value: _with_metadata(h, v))
    yield edited("spaces", True, "JSON", lambda h: json.dumps(h).encode() + b" " * 40)
    yield edited("several lines", True, "JSON", lambda h: json.dumps(h, indent=2).encode())
    yield edited("another order", True, "a map", lambda h: dict(reversed(h.items())))
    for name in random_names():

        def tensors(what: str, why: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Mutation:
            def apply(directory: Path) -> None:
                weights = load_file(directory / FIRST) | load_file(directory / SECOND)
                changed = change(weights)
                write_sharded(directory, weights if changed is None else changed)

            return Mutation(FIRST, what, True, why, apply)

        def as_bfloat16(weights: dict[str, torch.Tensor], name: str = name) -> None:
            weights[name] = weights[name].bfloat16()

        yield tensors(f"{name} in bfloat16", "its values are exact in bfloat16", as_bfloat16)
    for prefix in ("_orig_mod.", "module.", "base_model.model.", "module.module.", "module._orig_mod.",
                   "_orig_mod.module.", "_fsdp_wrapped_module.", "_forward_module.",
                        "base_model.model._orig_mod."):  # fmt: skip
        why = "a wrapper around the model"
        yield tensors(f"{prefix} before names", why, lambda w, p=prefix: {p + name: t for name, t in w.items()})
    for prefix in ("", "language_model.", "model.language_model.", "language_model.model.", "model.model.",
                   "model.language_model.model.", "model._orig_mod.", "model.module.", "_orig_mod.model.",
                   "model.language_model._orig_mod.", "model._checkpoint_wrapped_module."):  # fmt: skip
        why = "a prefix of the decoder"
        yield tensors(f"{prefix or 'nothing'} for model.", why, lambda w, p=prefix: {
            name.replace("model.", p, 1) if name.startswith("model.") else name: t for name, t in w.items()
        })  # fmt: skip
    for prefix in ("", "model.", "model.language_model.", "language_model.", "_orig_mod.", "module.model."):
        why = "layers that predict several tokens"
        extra = {prefix + name: torch.ones(shape) for name, shape in MTP.items()}
        yield tensors(f"{prefix}mtp.*", why, lambda w, extra=extra: w | extra)
        fp8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in extra.items()}
        yield tensors(f"{prefix}mtp.* in fp8", why, lambda w, fp8=fp8: w | fp8)
    for extra_name in ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq",
                       "rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached",
                        "model.layers.1.self_attn.masked_bias",
                       "model.rotary_emb.original_inv_freq", "model.layers.2.mlp.up_proj.weight",
                       "model.nextn.0.x.weight", "model.layers.2.eh_proj.weight", "mtp_block.0.weight",
                        "v_head.summary.weight", "score.weight",
                       "model.visual.pos_embed.weight", "visual.blocks.0.norm1.bias", "model.visual.x.qweight",
                       "model.embed_tokens._extra_state", "model.position_ids"):  # fmt: skip
        why = "nothing that transformers' model has either"
        yield tensors(f"{extra_name} too", why, lambda w, n=extra_name: w | {n: torch.ones(4)})


def _doubled(header: dict[str, Any], name: str) -> bytes:
    entry = f"{json.dumps(name)}: {json.dumps(header[name])}"
    return ("{" + entry + ", " + json.dumps(header)[1:]).encode()


def _with_metadata(header: dict[str, Any], value: Any) -> None:
    del header["__metadata__"]
    if value is not None:
        header["__metadata__"] = value


def all_mutations() -> list[Mutation]:
    return [
        *config_mutations(nested=False),
        *config_mutations(nested=True),
        *text_mutations(),
        *index_mutations(),
        *header_mutations(),
    ]
