# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as people have them: what transformers' model answers to each, ours does, or refuses it in a line."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35 import (
    NeuronQwen35ForCausalLM,
    NeuronQwen35VLForCausalLM,
    Qwen35InferenceConfig,
    Qwen35NeuronConfig,
)
from qwen35.configuration_qwen35 import Qwen35ConfigError
from qwen35.configuration_qwen35_vl import Qwen35VLInferenceConfig
from qwen35.weights.checkpoint import CheckpointError, CheckpointReader
from qwen35.weights.conversion import ConversionError, Skipped, unwrapped
from qwen35.weights.text_rules import convert_checkpoint
from support.compare import assert_close
from support.models import TINY, load_neuron, random_weights, save_checkpoint
from support.vl_cases import VISION, load, save_vl_checkpoint

transformers = pytest.importorskip("transformers", minversion="5.0")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PROMPT = torch.randint(0, TINY["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(1))
MTP = {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.mlp.up_proj.weight": torch.ones(96, 64)}
Fields = dict[str, Any]


def config_of(directory: Path) -> Fields:
    fields: Fields = json.loads((directory / "config.json").read_text())
    return fields


def rewrite(directory: Path, fields: Fields | None = None, **weights: torch.Tensor | None) -> None:
    """Replace config.json, and add or (None) remove tensors."""
    if fields is not None:
        (directory / "config.json").write_text(json.dumps(fields))
    held = {**load_file(directory / "model.safetensors"), **weights}
    kept = {name: tensor.clone() for name, tensor in held.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def around(text: Fields, **top: Any) -> Fields:
    """A vision-language config.json with this text config."""
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1, "out_hidden_size": 64}, **top}


def our_logits(model: NeuronQwen35ForCausalLM) -> torch.Tensor:
    mask = torch.ones_like(PROMPT)
    logits: torch.Tensor = model(PROMPT, attention_mask=mask, position_ids=mask.cumsum(1) - 1).logits[:, -1]
    return logits


@torch.no_grad()
def their_logits(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits: torch.Tensor = model(PROMPT).logits[:, -1]
    return logits


def assert_same_answer(directory: Path) -> None:
    # Two float32 passes through four layers; logits are of order ten.
    assert_close(our_logits(load_neuron(directory)), their_logits(directory), atol=1e-4, label="logits")


# The embedding and the head


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("there", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)])
def test_the_tables_of_a_text_checkpoint_are_used_as_in_transformers(
    tmp_path: Path, tied: bool | None, there: tuple[str, ...]
) -> None:
    save_checkpoint(tmp_path)
    fields = config_of(tmp_path)
    if tied is not None:
        fields["tie_word_embeddings"] = tied
    rewrite(tmp_path, fields, **{name: None for name in (EMBEDDING, HEAD) if name not in there})
    if tied or len(there) == 2:
        assert_same_answer(tmp_path)
    else:  # transformers fills the gap with random numbers and says so
        with pytest.raises(ConversionError, match="is missing, shape"):
            load_neuron(tmp_path)


@pytest.mark.parametrize(("top", "nested"), list(itertools.product([True, False, None], repeat=2)))
@pytest.mark.parametrize("own_head", [True, False])
def test_the_head_of_a_vision_language_checkpoint_is_that_of_the_class_of_transformers_that_has_one(
    tmp_path: Path, top: bool | None, nested: bool | None, own_head: bool
) -> None:
    save_vl_checkpoint(tmp_path)
    fields = config_of(tmp_path)
    del fields["tie_word_embeddings"]
    for place, flag in ((fields, top), (fields["text_config"], nested)):
        place.update({} if flag is None else {"tie_word_embeddings": flag})
    rewrite(tmp_path, fields, **({} if own_head else {HEAD: None}))
    answers = []
    for name in ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"):
        model = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float32)
        tensors = load_file(tmp_path / "model.safetensors")
        answers += [
            t for t in tensors.values() if t.shape == model.lm_head.weight.shape and t.equal(model.lm_head.weight)
        ]
    config = Qwen35InferenceConfig.from_pretrained(tmp_path, Qwen35NeuronConfig(torch_dtype="float32"))
    if answers:
        converted = convert_checkpoint(CheckpointReader(tmp_path), config)
        assert all(converted["lm_head.weight"].equal(answer) for answer in answers)
    else:  # both classes have a random one
        with pytest.raises(ConversionError, match=r"lm_head\.weight is missing"):
            convert_checkpoint(CheckpointReader(tmp_path), config)


# Rope settings

ROPE: Fields = dict(TINY["rope_parameters"])
OTHER = {**ROPE, "rope_theta": 500.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]}
BARE = {name: value for name, value in ROPE.items() if name != "rope_type"}
PLACES: dict[str, Fields] = {
    "rope_parameters": {"rope_parameters": OTHER},
    "rope_scaling": {"rope_scaling": OTHER},
    "rope_scaling beside rope_parameters": {"rope_scaling": OTHER, "rope_parameters": ROPE},
    "an empty rope_scaling beside rope_parameters": {"rope_scaling": {}, "rope_parameters": OTHER},
    "a null rope_scaling beside rope_parameters": {"rope_scaling": None, "rope_parameters": OTHER},
    "type for rope_type": {"rope_scaling": {**BARE, "type": "default", "rope_theta": 500.0}},
    "no type": {"rope_parameters": {**BARE, "rope_theta": 500.0}},
    "plain theta beside rope_scaling": {"rope_scaling": {"type": "default"}, "rope_theta": 500.0},
    "plain factor beside rope_parameters": {"rope_parameters": {"rope_theta": 500.0}, "partial_rotary_factor": 0.5},
    "plain theta that rope_parameters has too": {"rope_parameters": OTHER, "rope_theta": 7.0},
    "plain fields alone": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "a factor that the default type does not use": {"rope_parameters": {**OTHER, "factor": 4.0}},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_rope_settings_are_taken_from_where_transformers_takes_them(tmp_path: Path, place: str, nested: bool) -> None:
    save_checkpoint(tmp_path)
    fields = {name: value for name, value in config_of(tmp_path).items() if name != "rope_parameters"}
    fields |= PLACES[place]
    top = {"rope_theta": 3.0, "partial_rotary_factor": 1.0}  # which transformers' text model never sees
    rewrite(tmp_path, around(fields, **top) if nested else fields)
    assert_same_answer(tmp_path)


@pytest.mark.parametrize("settings", [{"rope_theta": 500.0}, {"rope_parameters": OTHER}, {"rope_scaling": OTHER}])
def test_rope_settings_at_the_top_serve_a_text_config_without_any(settings: Fields) -> None:
    text = {name: value for name, value in TINY.items() if name != "rope_parameters"}
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(), model_type="qwen3_5", text_config=text, **settings)
    assert config.rope_theta == 500.0


def test_a_theta_that_rope_scaling_leaves_to_rope_parameters_is_refused() -> None:
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig(Qwen35NeuronConfig(), **TINY, rope_scaling={"type": "default"})
    assert caught.value.problems[0].startswith("rope_scaling has no rope_theta and takes the place of rope_parameters")


@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope", "llama3", "proportional", "axial", "ntk", 7])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", "sparse", "text_config", "top", "both"])
def test_a_rope_type_that_is_not_implemented_is_refused_wherever_it_stands(kind: Any, name: str, place: str) -> None:
    scaled = {**BARE, name: kind, "factor": 4.0}
    text = {name: value for name, value in TINY.items() if name != "rope_parameters"}
    fields: Fields = {
        "rope_parameters": {**text, "rope_parameters": scaled},
        "rope_scaling": {**text, "rope_parameters": ROPE, "rope_scaling": scaled},
        "sparse": {**text, "rope_parameters": ROPE, "rope_scaling": {name: kind, "factor": 4.0}},
        "text_config": around({**text, "rope_parameters": ROPE, "rope_scaling": scaled}),
        "top": around({**text, "rope_parameters": ROPE}, rope_scaling=scaled),
        "both": {**text, "rope_parameters": scaled, "rope_scaling": ROPE},
    }[place]
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig(Qwen35NeuronConfig(), **fields)
    (problem,) = caught.value.problems
    assert f"rope_type={kind!r} is not supported" in problem


# Names


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("_orig_mod.model.layers.0.A_log", "model.layers.0.A_log"),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("base_model.model.lm_head.weight", "model.lm_head.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.model.norm.weight", "model.norm.weight"),
        ("model.visual.blocks.0.norm1.bias", "model.visual.blocks.0.norm1.bias"),
        ("_orig_mod.model.visual.pos_embed.weight", "model.visual.pos_embed.weight"),
        ("visual.pos_embed.weight", "visual.pos_embed.weight"),
        ("norm.weight", "norm.weight"),
    ],
)
def test_wrappers_are_cut_off(name: str, bare: str) -> None:
    assert unwrapped(name) == bare


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_a_wrapped_vision_language_model_is_read_whole(tmp_path: Path, prefix: str) -> None:
    save_vl_checkpoint(tmp_path)
    config = Qwen35VLInferenceConfig.from_pretrained(tmp_path, Qwen35NeuronConfig(torch_dtype="float32"))
    wanted = dict(NeuronQwen35VLForCausalLM.get_state_dict(tmp_path, config))
    tensors = {prefix + name: t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = NeuronQwen35VLForCausalLM.get_state_dict(tmp_path, config)
    for name in wanted:
        assert_close(found[name], wanted[name], label=name)


def test_a_prefix_that_nobody_knows_is_named_in_one_line() -> None:
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(torch_dtype="float32"), **TINY)
    renamed = {f"thinker.{name}": tensor for name, tensor in random_weights().items()}
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint({name.replace("thinker.model", "thinker.core"): t for name, t in renamed.items()}, config)
    assert len(caught.value.problems) <= 8  # two prefixes: three names of each kind and how many more
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint({name.replace("model.", "core."): t for name, t in random_weights().items()}, config)
    (problem,) = caught.value.problems
    assert "start with 'core.' (core." in problem and "save them without it" in problem


# What transformers skips


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mtp.fc.weight", Skipped.MTP),
        ("model.mtp.fc.weight", Skipped.MTP),
        ("model.language_model.mtp.layers.0.input_layernorm.weight", Skipped.MTP),
        ("model.nextn.0.fc.weight", Skipped.MTP),
        ("model.mtp_layers.0.fc.weight", Skipped.MTP),
        ("_orig_mod.mtp.fc.weight", Skipped.MTP),
        ("model.layers.4.mlp.up_proj.weight", Skipped.LAYER),
        ("model.layers.10.eh_proj.weight", Skipped.LAYER),
        ("model.rotary_emb.inv_freq", Skipped.BUFFER),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", Skipped.BUFFER),
        ("model.layers.3.self_attn.rotary_emb.cos_cached", Skipped.BUFFER),
        ("model.position_ids", Skipped.BUFFER),
        ("model.visual.rotary_pos_emb.inv_freq", Skipped.VISION),
        ("v_head.summary.weight", Skipped.HEAD),
        ("score.weight", Skipped.HEAD),
    ],
)
def test_tensors_that_transformers_does_not_use_are_skipped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, reason: Skipped
) -> None:
    save_checkpoint(tmp_path)
    rewrite(tmp_path, **{name: torch.ones(3)})
    config = Qwen35InferenceConfig.from_pretrained(tmp_path, Qwen35NeuronConfig(torch_dtype="float32"))
    with caplog.at_level(logging.INFO):
        report = convert_checkpoint(CheckpointReader(tmp_path), config).report
    assert report.skipped[reason].names == [name]
    assert f"{reason.value} 1 tensors" in caplog.text
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    usual = reason in (Skipped.MTP, Skipped.VISION)
    assert warned == ([] if usual else [f"skipped {reason.value}: {name}"])
    if reason is not Skipped.VISION:
        assert_same_answer(tmp_path)


INDEX = "model.safetensors.index.json"
EDITS: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "MTP tensors that their shard lacks": lambda m: m | dict.fromkeys(MTP, "a.safetensors"),
    "an MTP file that was not uploaded": lambda m: m | dict.fromkeys(MTP, "mtp.safetensors"),
    "a buffer that nobody saved": lambda m: m | {"model.rotary_emb.inv_freq": "a.safetensors"},
    "a tensor of another model": lambda m: m | {"some.other.weight": "a.safetensors"},
    "the wrong one of two shards": lambda m: m | {next(iter(m)): "b.safetensors"},
    "half of the tensors": lambda m: dict([*m.items()][::2]),
}


def save_sharded(directory: Path) -> dict[str, str]:
    save_checkpoint(directory)
    tensors = list(load_file(directory / "model.safetensors").items())
    (directory / "model.safetensors").unlink()
    parts = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for file, part in parts.items():
        save_file({name: t.clone() for name, t in part.items()}, directory / file, metadata={"format": "pt"})
    return {name: file for file, part in parts.items() for name in part}


@pytest.mark.parametrize("edit", EDITS)
def test_an_index_may_list_more_or_less_than_there_is(
    tmp_path: Path, edit: str, caplog: pytest.LogCaptureFixture
) -> None:
    weight_map = EDITS[edit](save_sharded(tmp_path))
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    ours = our_logits(load_neuron(tmp_path))
    absent = [name for name in weight_map if name not in random_weights()]
    assert ("lists and no file has: " + ", ".join(absent) in caplog.text) == bool(absent)
    if "mtp.safetensors" in weight_map.values():  # transformers wants the file, and then reads nothing from it
        save_file({name: t.clone() for name, t in MTP.items()}, tmp_path / "mtp.safetensors", metadata={"format": "pt"})
    assert_close(ours, their_logits(tmp_path), atol=1e-4, label="logits")


@pytest.mark.parametrize("file", ["a.safetensors", "mtp.safetensors"])
def test_a_head_that_is_in_the_index_alone_is_refused_before_anything_is_loaded(tmp_path: Path, file: str) -> None:
    weight_map = save_sharded(tmp_path) | dict.fromkeys(MTP, file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ConversionError) as caught:
        load_neuron(tmp_path, num_speculative_tokens=3)
    (line,) = caught.value.problems
    assert f"num_speculative_tokens=3 needs the tensors mtp.*, which {INDEX} puts in {file}" in line


def test_a_needed_tensor_that_the_index_lists_and_no_file_has_is_named_with_the_file(tmp_path: Path) -> None:
    weight_map = save_sharded(tmp_path)
    tensors = load_file(tmp_path / "a.safetensors")
    gone = next(iter(tensors))
    save_file({name: t.clone() for name, t in tensors.items() if name != gone}, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConversionError) as caught:
        load_neuron(tmp_path)
    (problem,) = caught.value.problems
    assert problem.endswith(f"{INDEX} puts it in a.safetensors, which lacks it; download both again")


def test_long_lists_are_summed_up(tmp_path: Path) -> None:
    weight_map = save_sharded(tmp_path)
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {n: f"{i:02}.safetensors" for i, n in enumerate(weight_map)}})
    )
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    more = len(weight_map) - 3
    assert caught.value.problems == [
        f"{INDEX} names files that are missing: 00.safetensors, 01.safetensors, 02.safetensors and {more} more; "
        "download them"
    ]
    with pytest.raises(ConversionError) as conversion:
        convert_checkpoint({}, Qwen35InferenceConfig(Qwen35NeuronConfig(), **TINY))
    assert conversion.value.problems[-1] == f"{len(random_weights()) - 3} more tensors are missing"
    assert len(conversion.value.problems) == 4


def test_shards_without_an_index_are_named(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    with pytest.raises(CheckpointError, match=r"it has a\.safetensors, b\.safetensors: download the index too"):
        CheckpointReader(tmp_path)


# Vision fields of a wrong type

_SIZES = [name for name, value in VISION.items() if isinstance(value, int)]
_WRONG: list[tuple[str, Any]] = [
    *itertools.product(_SIZES, (0, -1, 2.5, "4", True, {}, float("nan"), 10**30)),
    *itertools.product(("patch_size", "temporal_patch_size"), ([], [2, 3], [[2], [2]], ["2", "2"], [None])),
    *itertools.product(("rope_parameters",), (7, "x", [1], {"rope_theta": float("inf")}, {"rope_type": "yarn"})),
    *itertools.product(("hidden_act",), ("silu", 7, None, [])),
    *itertools.product(("model_type",), ("clip", 7, [])),
    ("depth", 10**9),
    ("num_position_embeddings", 50),
    ("num_heads", 3),
    ("deepstack_visual_indexes", [1]),
]


@pytest.mark.parametrize(("name", "value"), _WRONG, ids=lambda value: f"{value!r:.40}")
def test_a_wrong_vision_field_is_refused_with_the_config(tmp_path: Path, name: str, value: Any) -> None:
    save_vl_checkpoint(tmp_path)
    fields = config_of(tmp_path)
    fields["vision_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35VLInferenceConfig.from_pretrained(tmp_path)
    assert all(problem.startswith("vision_config.") and "\n" not in problem for problem in caught.value.problems)


@pytest.mark.parametrize("name", ["image_token_id", "video_token_id"])
@pytest.mark.parametrize("value", [10**6, -1, "x", None, 1.5])
def test_a_placeholder_token_that_has_no_embedding_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    save_vl_checkpoint(tmp_path)
    fields = config_of(tmp_path) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        Qwen35ConfigError, match=f"{name}( is missing|=.* is outside vocab_size|=.* must be a token id)"
    ):
        Qwen35VLInferenceConfig.from_pretrained(tmp_path)


def test_vision_tensors_are_held_against_the_config_before_the_decoder_is_made(tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    fields = config_of(tmp_path)
    fields["vision_config"]["intermediate_size"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConversionError, match="expected \\[1000000000"):
        load(str(tmp_path))


# Tokens


@pytest.mark.parametrize("token", [TINY["vocab_size"], -1, 10**6])
def test_a_prompt_with_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    save_checkpoint(tmp_path)
    model = load_neuron(tmp_path)
    ids = PROMPT.clone()
    ids[0, 5] = token
    with pytest.raises(ValueError, match=f"token {token}, which is not in 0..{TINY['vocab_size'] - 1}"):
        model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(40)[None])
