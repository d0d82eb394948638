# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Record what the CPU stand-ins imitate: the signatures, hook order and defaults of the real NxDI and NxD.

Needs both importable, on a Neuron machine or with their sources on the path; `test/unit/nxdi_cpu/test_signatures.py`
compares the stand-ins with the file that this writes wherever they are not. Some defaults follow the platform:

    NEURON_PLATFORM_TARGET_OVERRIDE=trn2 python tools/record_nxdi_signatures.py --nxdi 0.9.0 --nxd 0.18.0
"""

from __future__ import annotations

import argparse
import ast
import copy
import enum
import inspect
import json
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from nxdi_cpu.config import to_dict

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "test" / "data" / "nxdi_signatures.json"

_NXD, _NXDI = "neuronx_distributed", "neuronx_distributed_inference"
REAL_MODULES = {
    "application_base": [f"{_NXDI}.models.application_base"],
    "attention": [f"{_NXDI}.modules.attention.{name}" for name in ("attention_base", "gqa", "utils")],
    "autobucketing": [f"{_NXDI}.modules.autobucketing"],
    "config": [f"{_NXDI}.models.config"],
    "hf_adapter": [f"{_NXDI}.utils.hf_adapter"],
    "kv_cache": [f"{_NXDI}.modules.kvcache.kv_cache_manager"],
    "layers": [f"{_NXD}.parallel_layers.layers", f"{_NXD}.parallel_layers.utils"],
    "model_base": [f"{_NXDI}.models.model_base"],
    "model_builder": [f"{_NXD}.trace.model_builder"],
    "model_wrapper": [f"{_NXDI}.models.model_wrapper"],
    "parallel_state": [f"{_NXD}.parallel_layers.parallel_state", f"{_NXD}.parallel_layers.mappings"],
    "quantization": [
        f"{_NXD}.quantization.{name}" for name in ("quantization_layers", "quantization_config", "quantize")
    ],
    "sampling": [f"{_NXDI}.modules.generation.sampling"],
    "sharding": [f"{_NXD}.trace.trace"],
}
"""Modules of `nxdi_cpu`, and the real ones whose names each holds."""

NEURON_CONFIGS: list[dict[str, Any]] = [
    {},
    {"batch_size": 3, "max_context_length": 48, "seq_len": 64, "tp_degree": 4},
    {"batch_size": 2, "ctx_batch_size": 1, "enable_bucketing": True, "is_continuous_batching": True},
    {"seq_len": 32768, "torch_dtype": "float32"},
    {"logical_nc_config": 1, "on_device_sampling_config": {"do_sample": True, "top_k": 5}},
    {"logical_nc_config": 2, "rpl_reduce_dtype": "float32"},
]
"""Arguments for which every field of a NeuronConfig is recorded: between them they move each derived default."""

# The dunders by which callers use an object; the others come from dataclass and enum machinery.
_DUNDERS = {"__init__", "__iter__", "__getitem__"}

Facts = dict[str, Any]


def stand_ins() -> dict[str, Any]:
    """Every public class, function and constant that `nxdi_cpu` defines, by "module.name"."""
    found = {}
    for module_name in REAL_MODULES:
        module = import_module(f"nxdi_cpu.{module_name}")
        for name, value in vars(module).items():
            is_constant = isinstance(value, str | int) and f"\n{name} = " in inspect.getsource(module)
            is_own = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
            if not name.startswith("_") and (is_constant or is_own):
                found[f"{module_name}.{name}"] = value
    return found


def real_counterparts(names: Collection[str]) -> dict[str, tuple[str, Any]]:
    """(importable path, object) of NxDI or NxD for each "module.name" that has one."""
    found = {}
    for full_name in names:
        module_name, name = full_name.split(".")
        for real_module in REAL_MODULES[module_name]:
            if hasattr(import_module(real_module), name):
                value = getattr(import_module(real_module), name)
                # Where it is defined, when it only passes through the module that was looked into.
                found[full_name] = (f"{getattr(value, '__module__', None) or real_module}.{name}", value)
                break
    return found


def own_members(cls: type) -> Iterator[str]:
    """Names of the methods, properties and enumeration members that `cls` itself defines."""
    for name, value in vars(cls).items():
        is_code = isinstance(value, staticmethod | classmethod | property) or inspect.isfunction(value)
        if issubclass(cls, enum.Enum):
            if name in cls.__members__:
                yield name
        elif is_code and (name in _DUNDERS or not name.startswith("__")):
            yield name


def describe(value: Any, members: Collection[str] = ()) -> Facts:
    """Parameters of a function, value of a constant, or those of a class's `members` (missing ones left out)."""
    if not callable(value):
        return {"value": value}
    if not inspect.isclass(value):
        return {"parameters": parameters(value)}
    found = {name: _member(value, name) for name in members}
    return {"members": {name: _describe_member(member) for name, member in found.items() if member is not None}}


def _describe_member(member: Any) -> Any:
    if isinstance(member, enum.Enum):
        return member.value if isinstance(member.value, str | int) else repr(member.value)
    return "property" if isinstance(member, property) else parameters(_function(member))


def _member(cls: type, name: str) -> Any:
    """What NxDI, NxD or the stand-ins define as `cls.name`; None for what comes from torch or transformers."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name] if base.__module__.split(".")[0] in (_NXD, _NXDI, "nxdi_cpu") else None
    return None


def _function(member: Any) -> Any:
    return inspect.unwrap(member.__func__ if isinstance(member, staticmethod | classmethod) else member)


def parameters(function: Callable[..., Any]) -> list[str]:
    """Parameters in Python's own notation, one string each: `["self", "a=1", "*", "b=None", "**kwargs"]`."""
    kinds, written = inspect.Parameter, list[str]()
    previous: Any = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind != previous == kinds.POSITIONAL_ONLY:
            written.append("/")
        if parameter.kind == kinds.KEYWORD_ONLY and previous not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL):
            written.append("*")
        stars = "*" if parameter.kind == kinds.VAR_POSITIONAL else "**" if parameter.kind == kinds.VAR_KEYWORD else ""
        default = "" if parameter.default is kinds.empty else f"={_text(parameter.default)}"
        written.append(f"{stars}{parameter.name}{default}")
        previous = parameter.kind
    return written


def _text(default: Any) -> str:
    """A default without addresses or angle brackets."""
    if inspect.isfunction(default):
        return f"{default.__module__}.{default.__qualname__}"
    return str(default) if isinstance(default, enum.Enum) else repr(default)


def hook_calls(cls: type, name: str, hooks: Collection[str]) -> list[str]:
    """The methods among `hooks` that `cls.name` calls (or hands on), in source order, without immediate repetitions.

    Other methods of the class count as what they call, so that it does not matter how a body is cut up.
    """
    return [hook for hook, _ in groupby(_walk_calls(cls, name, hooks, ()))]


def _walk_calls(cls: type, name: str, hooks: Collection[str], above: tuple[str, ...]) -> Iterator[str]:
    function = _function(_member(cls, name))
    if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":  # made by dataclass
        return
    calls: list[tuple[tuple[int, int], str]] = []
    ends: dict[ast.AST, tuple[int, int]] = {}  # of a call, by what it calls: an argument is made before its call
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Call(func=callee):
                ends[callee] = (node.end_lineno or 0, node.end_col_offset or 0)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=called, ctx=ast.Load()):
                calls.append((ends.get(node, (node.end_lineno or 0, node.end_col_offset or 0)), called))
    for _, called in sorted(calls):
        if called in hooks:
            yield called
        elif called not in above:
            yield from _walk_calls(cls, called, hooks, (*above, called))


def layer_keywords(model_cls: type) -> list[str]:
    """Keywords that the decoder loop of `get_model_output` passes to each of `self.layers`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(_function(_member(model_cls, "get_model_output")))))
    for loop in ast.walk(tree):
        match loop:
            case ast.For(
                target=ast.Tuple(elts=[_, ast.Name(id=layer)]),
                iter=ast.Call(func=ast.Name(id="enumerate"), args=[ast.Attribute(attr="layers")]),
            ):
                calls = [n for n in ast.walk(loop) if isinstance(n, ast.Call) and ast.unparse(n.func) == layer]
                return [f"{keyword.arg}=" if keyword.arg else "**" for keyword in calls[0].keywords]
    raise ValueError(f"{model_cls.__qualname__}.get_model_output has no 'for ..., layer in enumerate(self.layers)'")


def neuron_config_fields(neuron_config_cls: Any, names: Collection[str]) -> list[Facts]:
    """The fields `names` of a NeuronConfig made with each of NEURON_CONFIGS."""
    recorded = []
    for arguments in NEURON_CONFIGS:
        fields = to_dict(neuron_config_cls(**copy.deepcopy(arguments)))
        recorded.append({"arguments": arguments, "fields": {name: fields[name] for name in names if name in fields}})
    return recorded


def record(subjects: Mapping[str, Any], members: Mapping[str, Collection[str]]) -> Facts:
    """Facts of `subjects`, real classes or stand-ins, by "module.name"; of a class, those about `members`."""
    ours = stand_ins()
    facts = {name: describe(value, members.get(name, ())) for name, value in subjects.items()}
    for name, value in subjects.items():
        if not inspect.isclass(value) or issubclass(value, enum.Enum):
            continue
        lineage = [key for key, base in ours.items() if base in ours[name].__mro__]
        bases = [key for key in lineage if key != name and key in subjects]
        facts[name]["bases"] = [key for key in bases if subjects[key] in value.__mro__]
        hooks = {hook for key in lineage for hook in facts.get(key, {}).get("members", ())} - _DUNDERS
        calls = {member: hook_calls(value, member, hooks) for member in facts[name]["members"]}
        facts[name]["calls"] = {member: called for member, called in calls.items() if called}
    return {
        "names": facts,
        "layer_keywords": layer_keywords(subjects["model_base.NeuronBaseModel"]),
        "neuron_config": neuron_config_fields(
            subjects["config.NeuronConfig"], ours["config.NeuronConfig"].__annotations__
        ),
    }


def record_real() -> Facts:
    """Facts of the real counterparts of every stand-in.

    Raises:
        ImportError: NxDI or NxD is not importable.
    """
    ours = stand_ins()
    real = real_counterparts(ours)
    facts = record(
        {name: value for name, (_, value) in real.items()},
        {name: list(own_members(value)) for name, value in ours.items() if inspect.isclass(value)},
    )
    for name, (path, _) in real.items():
        facts["names"][name]["real"] = path
    return {"platform": import_module("torch_neuronx.utils").get_platform_target(), **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--nxdi", required=True, help="version or commit of neuronx-distributed-inference")
    parser.add_argument("--nxd", required=True, help="version or commit of neuronx-distributed")
    args = parser.parse_args()
    sources = {"neuronx-distributed": args.nxd, "neuronx-distributed-inference": args.nxdi}
    facts = {"sources": sources, **record_real()}
    args.out.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
