# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a configuration reads, derives, refuses and keeps through JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35 import configuration_qwen35 as configuration
from qwen35.configuration_qwen35 import (
    QWEN35_PRESETS,
    Qwen35ConfigError,
    Qwen35InferenceConfig,
    Qwen35NeuronConfig,
)
from qwen35.nxdi import NeuronConfig, OnDeviceSamplingConfig, load_pretrained_config

ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": ROPE,
    "eos_token_id": 7,
}
VISION = {"model_type": "qwen3_5_vision", "depth": 2, "hidden_size": 16, "rope_parameters": {"rope_theta": 500.0}}
VL: dict[str, Any] = {
    "model_type": "qwen3_5",
    "text_config": TEXT,
    "vision_config": VISION,
    "tie_word_embeddings": True,
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def make(neuron: dict[str, Any] | None = None, **fields: Any) -> Qwen35InferenceConfig:
    return Qwen35InferenceConfig(Qwen35NeuronConfig(**(neuron or {})), **{**TEXT, **fields})


def refuse(after: dict[str, Any] | None = None, remove: tuple[str, ...] = (), **fields: Any) -> list[str]:
    """The problems of TEXT with `fields` changed; `after` goes onto the NeuronConfig past its own checks."""
    neuron = Qwen35NeuronConfig()
    for name, value in (after or {}).items():
        setattr(neuron, name, value)
    kept = {name: value for name, value in {**copy.deepcopy(TEXT), **fields}.items() if name not in remove}
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig(neuron, **kept)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def the_only(problems: list[str], *words: str) -> None:
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0], f"{word!r} is not in: {problems[0]}"


def write_config(directory: Path, fields: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


# Reading


def test_a_text_only_checkpoint_is_read_flat(tmp_path: Path) -> None:
    config = Qwen35InferenceConfig.from_pretrained(write_config(tmp_path, TEXT))
    for name in TEXT.keys() - {"rope_parameters"}:
        assert getattr(config, name) == TEXT[name]
    for name, value in ROPE.items():
        assert getattr(config, name) == value
    assert config.vision_config is None and config.image_token_id is None


def test_a_vision_language_checkpoint_is_flattened_and_keeps_its_vision_fields(tmp_path: Path) -> None:
    config = Qwen35InferenceConfig.from_pretrained(write_config(tmp_path, VL))
    assert config.model_type == "qwen3_5" and config.hidden_size == 64 and config.rope_theta == 10000.0
    assert config.vision_config == VISION
    assert [config.image_token_id, config.video_token_id] == [90, 91]
    assert [config.vision_start_token_id, config.vision_end_token_id] == [92, 93]


def test_nothing_nested_is_left_for_nxdi_to_follow(tmp_path: Path) -> None:
    config = Qwen35InferenceConfig.from_pretrained(write_config(tmp_path, VL))
    assert not hasattr(config, "text_config") and config.get_text_config() is config
    assert not vars(config).keys() & {"rope_parameters", "rope_scaling", "dtype", "torch_dtype"}


def test_the_top_level_decides_on_tied_embeddings_as_in_transformers(tmp_path: Path) -> None:
    assert Qwen35InferenceConfig.from_pretrained(write_config(tmp_path, VL)).tie_word_embeddings is True
    silent = {name: value for name, value in VL.items() if name != "tie_word_embeddings"}
    assert Qwen35InferenceConfig.from_pretrained(write_config(tmp_path, silent)).tie_word_embeddings is False


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_a_load_config_hook_may_nest_the_text_config_as_dict_or_namespace(kind: type) -> None:
    def load(config: Any) -> None:
        config.__dict__.update({**VL, "text_config": kind(**TEXT), "vision_config": kind(**VISION)})

    config = Qwen35InferenceConfig(Qwen35NeuronConfig(), load_config=load)
    assert config.num_hidden_layers == 4 and config.mrope_section == [2, 1, 1] and config.vision_config == VISION


def test_keyword_arguments_win_over_nested_values() -> None:
    config = Qwen35InferenceConfig(
        Qwen35NeuronConfig(), load_config=lambda c: vars(c).update(copy.deepcopy(VL)), rope_theta=5.0, vocab_size=200
    )
    assert config.rope_theta == 5.0 and config.vocab_size == 200


@pytest.mark.parametrize("vision_language", [False, True])
def test_from_pretrained_equals_loading_through_transformers(tmp_path: Path, vision_language: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.qwen3_5")
    text = {name: value for name, value in TEXT.items() if name != "model_type"}
    hf = transformers.Qwen3_5TextConfig(**text, dtype="float32")
    if vision_language:
        hf = transformers.Qwen3_5Config(text_config=text, vision_config={"depth": 1}, dtype="float32")
    hf.save_pretrained(tmp_path)
    ours = Qwen35InferenceConfig.from_pretrained(tmp_path)
    nxdi = Qwen35InferenceConfig(Qwen35NeuronConfig(), load_config=load_pretrained_config(str(tmp_path)))
    for config in (ours, nxdi):
        assert config.neuron_config.torch_dtype == torch.float32
    # transformers adds bookkeeping of its own; what both know must agree.
    for name in vars(ours).keys() - {"neuron_config", "vision_config", "architectures"}:
        assert getattr(ours, name) == getattr(nxdi, name), name
    assert (ours.vision_config is None) == (nxdi.vision_config is None) == (not vision_language)


def test_the_packaged_checkpoint_is_read() -> None:
    path = Path(configuration.__file__).parent / "mini"
    if not (path / "config.json").exists():
        pytest.skip("the mini checkpoint is not installed")
    config = Qwen35InferenceConfig.from_pretrained(path)
    assert config.num_hidden_layers == len(config.layer_types)


def test_rope_settings_are_found_in_all_three_places() -> None:
    bare = {name: value for name, value in TEXT.items() if name != "rope_parameters"}
    neuron = Qwen35NeuronConfig()
    places: list[dict[str, Any]] = [{"rope_parameters": ROPE}, {"rope_scaling": ROPE}, ROPE]
    for place in places:
        config = Qwen35InferenceConfig(neuron, **bare, **place)
        assert {name: getattr(config, name) for name in ROPE} == ROPE


def test_rope_scaling_wins_over_rope_parameters_and_older_fields_as_in_transformers() -> None:
    assert make(rope_scaling={"rope_theta": 2.0}, rope_theta=3.0).rope_theta == 2.0
    assert make(rope_theta=3.0).rope_theta == ROPE["rope_theta"]


def test_the_older_rope_type_mrope_means_the_default_frequencies() -> None:
    assert make(rope_parameters={"type": "mrope", "rope_theta": 1e4}).rope_type == "default"


def test_layer_types_follow_the_interval_when_absent() -> None:
    assert make().layer_types == ["linear_attention"] * 3 + ["full_attention"]
    config = make(full_attention_interval=2)
    assert config.full_attention_layers == [1, 3] and config.linear_attention_layers == [0, 2]


def test_explicit_layer_types_win_over_the_interval() -> None:
    kinds = ["full_attention", "linear_attention", "linear_attention", "linear_attention"]
    assert make(layer_types=kinds, full_attention_interval=2).full_attention_layers == [0]


def test_fields_that_config_json_may_omit_get_the_defaults_of_transformers() -> None:
    omitted = {"tie_word_embeddings", "hidden_act", "rms_norm_eps", "eos_token_id"}
    fields = {name: value for name, value in TEXT.items() if name not in omitted}
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(), **{**fields, "rope_parameters": {"rope_theta": 1.0}})
    assert config.partial_rotary_factor == 0.25 and config.tie_word_embeddings is False
    assert config.pad_token_id is None and config.eos_token_id is None and config.mrope_section == [2, 1, 1]
    assert config.output_attentions is False and config.output_hidden_states is False


@pytest.mark.parametrize("pairs", range(1, 33))
def test_absent_mrope_sections_deal_frequencies_as_the_default_of_transformers(pairs: int) -> None:
    config = make(head_dim=2 * pairs, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0})
    # transformers falls back to [11, 11, 10] whatever the head: index i is height's when i % 3 == 1 and i < 33, ...
    height = [i for i in range(pairs) if i % 3 == 1 and i < 33]
    width = [i for i in range(pairs) if i % 3 == 2 and i < 30]
    assert config.mrope_section == [pairs - len(height) - len(width), len(height), len(width)]


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_dtype_of_the_checkpoint_is_taken_unless_one_was_asked_for(tmp_path: Path, field: str) -> None:
    path = write_config(tmp_path, {**VL, "text_config": {**TEXT, field: "float32"}})
    assert Qwen35InferenceConfig.from_pretrained(path).neuron_config.torch_dtype == torch.float32
    asked = Qwen35NeuronConfig(torch_dtype="bfloat16")
    assert Qwen35InferenceConfig.from_pretrained(path, asked).neuron_config.torch_dtype == torch.bfloat16


def test_modules_keep_their_declared_dtypes_under_any_neuron_config() -> None:
    assert Qwen35NeuronConfig().cast_type == "as-declared"
    plain = NeuronConfig()
    assert plain.cast_type == "config"
    assert Qwen35InferenceConfig(plain, **TEXT).neuron_config.cast_type == "as-declared"


# JSON


@pytest.mark.parametrize("fields", [TEXT, VL, QWEN35_PRESETS["9B"]], ids=["text", "vision-language", "preset"])
def test_a_saved_config_is_loaded_equal(tmp_path: Path, fields: dict[str, Any]) -> None:
    neuron = Qwen35NeuronConfig(
        seq_len=64, max_context_length=32, torch_dtype="float32", on_device_sampling_config={"top_k": 5},
        enable_bucketing=True, context_encoding_buckets=[32, 16],
    )  # fmt: skip
    config = Qwen35InferenceConfig(neuron, **copy.deepcopy(fields))
    config.save(tmp_path / "new" / "folder")
    loaded = Qwen35InferenceConfig.load(tmp_path / "new" / "folder")
    assert isinstance(loaded, Qwen35InferenceConfig) and isinstance(loaded.neuron_config, Qwen35NeuronConfig)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.neuron_config.torch_dtype == torch.float32
    assert loaded.neuron_config.context_encoding_buckets == [16, 32]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["neuron_config.json"]


def test_keyword_arguments_override_a_saved_config() -> None:
    saved = make().to_json_string()
    assert Qwen35InferenceConfig.from_json_string(saved, rope_theta=3.0).rope_theta == 3.0


def test_a_config_without_vision_says_nothing_of_it_in_json() -> None:
    # NxDI's adapter to transformers pops from vision_config whenever the key is there.
    assert "vision_config" not in json.loads(make().to_json_string())


def test_a_config_can_be_deep_copied_for_a_submodel() -> None:
    config = make()
    other = copy.deepcopy(config)
    other.neuron_config.batch_size = 5
    assert config.neuron_config.batch_size == 1 and other.layer_types == config.layer_types


# Derived sizes


def test_derived_sizes_of_the_tiny_config() -> None:
    config = make()
    assert (config.rotary_dim, config.key_dim, config.value_dim, config.conv_dim) == (8, 64, 192, 320)
    assert config.num_cores_per_group == 1


def test_the_27b_preset_has_the_published_sizes() -> None:
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(), **QWEN35_PRESETS["27B"])
    assert (config.rotary_dim, config.key_dim, config.value_dim, config.conv_dim) == (64, 2048, 6144, 10240)
    assert len(config.full_attention_layers) == 16 and config.full_attention_layers[0] == 3
    assert config.valid_tp_degrees() == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(("tp", "heads"), [(1, 24), (2, 24), (4, 24), (8, 24), (16, 32)])
def test_heads_of_27b_are_padded_only_at_16_ranks(tp: int, heads: int) -> None:
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(), **QWEN35_PRESETS["27B"])
    assert config.padded_num_attention_heads(tp) == heads


@given(
    tp=st.integers(1, 24), key_heads=st.integers(1, 24), values_per_key=st.integers(1, 3),
    kv_heads=st.integers(1, 8), queries_per_kv=st.integers(1, 6), width=st.sampled_from([48, 64, 96]),
)  # fmt: skip
def test_valid_tp_degrees_are_those_that_give_every_rank_equal_work(
    tp: int, key_heads: int, values_per_key: int, kv_heads: int, queries_per_kv: int, width: int
) -> None:
    heads = kv_heads * queries_per_kv
    config = make(
        linear_num_key_heads=key_heads, linear_num_value_heads=key_heads * values_per_key, hidden_size=width,
        num_key_value_heads=kv_heads, num_attention_heads=heads, intermediate_size=96,
    )  # fmt: skip
    # Deal heads out by hand: a rank's queries must all belong to the KV heads it holds, and all ranks hold as many.
    whole = key_heads % tp == width % tp == 96 % tp == 0
    if kv_heads % tp == 0:
        dealt = True
    elif tp % kv_heads == 0:
        ranks_per_kv = tp // kv_heads
        per_rank = -(-queries_per_kv // ranks_per_kv)
        dealt = config.padded_num_attention_heads(tp) == per_rank * tp
    else:
        dealt = False
    assert (tp in config.valid_tp_degrees()) == (whole and dealt)


# Refusals


@pytest.mark.parametrize("field", sorted(set(configuration._SIZES) - {"full_attention_interval"}))
def test_a_missing_size_is_named(field: str) -> None:
    the_only(refuse(remove=(field,)), f"{field} is missing", "config.json")


def test_logits_of_all_tokens_and_a_device_that_chooses_after_the_last_are_refused_together() -> None:
    both = {"output_prompt_logits": True, "on_device_sampling_config": OnDeviceSamplingConfig(), "output_logits": True}
    the_only(refuse(after=both), "output_prompt_logits=True", "on_device_sampling_config", "set one of them only")
    assert Qwen35InferenceConfig(Qwen35NeuronConfig(output_prompt_logits=True), **TEXT).output_prompt_logits
    assert not Qwen35InferenceConfig(NeuronConfig(), **TEXT).output_prompt_logits


@pytest.mark.parametrize("value", [0, -4, 2.5, "4", None, True])
def test_a_size_that_is_no_positive_integer_is_refused(value: Any) -> None:
    the_only(refuse(hidden_size=value), f"hidden_size={value!r}", "positive integer", "config.json")


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("rms_norm_eps", 0.0, "positive number"),
        ("tie_word_embeddings", "no", "true or false"),
        ("layer_types", ["linear_attention"] * 3 + ["sliding_attention"], "'full_attention'"),
        ("layer_types", "full_attention", "list"),
        ("pad_token_id", -1, "token id or null"),
    ],
)
def test_an_ill_typed_field_is_named_with_what_it_must_be(field: str, value: Any, remedy: str) -> None:
    the_only(refuse(**{field: value}), f"{field}={value!r}", remedy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": -1.0}, ("rope_theta=-1.0", "positive")),
        ({"partial_rotary_factor": 1.5}, ("partial_rotary_factor=1.5", "(0, 1]")),
        ({"partial_rotary_factor": 0.1}, ("partial_rotary_factor=0.1", "head_dim=32", "positive even integer")),
        ({"partial_rotary_factor": 0.09375}, ("partial_rotary_factor=0.09375", "3.0 dims", "even")),
        ({"mrope_section": [2, 2, 1]}, ("mrope_section=[2, 2, 1]", "sums to 5", "must sum to 4")),
        ({"mrope_section": [4]}, ("mrope_section=[4]", "three integers")),
        ({"mrope_interleaved": False}, ("mrope_interleaved=False", "only True")),
        ({"rope_type": "yarn"}, ("rope_type='yarn'", "only 'default'", "drop the rope scaling")),
    ],
)
def test_rope_settings_that_are_not_implemented_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    the_only(refuse(rope_parameters={**ROPE, **change}), *words)


def test_an_interval_that_gives_no_layer_types_is_named() -> None:
    the_only(refuse(full_attention_interval=0), "full_attention_interval=0", "positive integer")


def test_a_missing_rope_theta_is_named_with_its_place() -> None:
    the_only(refuse(rope_parameters={"partial_rotary_factor": 0.25}), "rope_theta is missing", "rope_parameters")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_act", "gelu", ("only 'silu'",)),
        ("attention_bias", True, ("only False", "no bias")),
        ("attn_output_gate", False, ("only True", "query and gate")),
        ("quantization_config", {"quant_method": "fp8"}, ("fp8", "bf16 checkpoint")),
    ],
)
def test_another_architecture_variant_is_refused(field: str, value: Any, words: tuple[str, ...]) -> None:
    the_only(refuse(**{field: value}), f"{field}={value!r}", *words)


def test_value_heads_must_be_a_multiple_of_key_heads() -> None:
    the_only(refuse(linear_num_value_heads=6), "linear_num_value_heads=6", "linear_num_key_heads=4", "correct")


def test_attention_heads_must_be_a_multiple_of_kv_heads() -> None:
    the_only(refuse(num_attention_heads=5), "num_attention_heads=5", "num_key_value_heads=2", "correct")


def test_layer_types_must_be_as_many_as_the_layers() -> None:
    words = "layer_types has 1 entries", "num_hidden_layers=4", "one entry per layer"
    the_only(refuse(layer_types=["full_attention"]), *words)


def test_a_convolution_without_a_past_is_refused() -> None:
    the_only(refuse(linear_conv_kernel_dim=1), "linear_conv_kernel_dim=1", "2 or more")


def test_a_pad_token_outside_the_vocabulary_is_refused() -> None:
    the_only(refuse(pad_token_id=96), "pad_token_id=96", "vocab_size=96", "null")


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [("qwen3_5_moe", "not supported"), ("qwen3_5_moe_text", "not supported"), ("llama", "dense"), (None, "dense")],
)
def test_another_model_type_is_refused_alone_with_a_hint(tmp_path: Path, model_type: str | None, hint: str) -> None:
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig.from_pretrained(write_config(tmp_path, {"model_type": model_type}))
    the_only(caught.value.problems, f"model_type={model_type!r}", "qwen3_5, qwen3_5_text", hint)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ("does not exist", "directory")), ("{", ("not valid JSON", "again")), ("[]", ("list", "again"))],
)
def test_an_unreadable_config_json_is_named(tmp_path: Path, content: str | None, words: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig.from_pretrained(tmp_path)
    the_only(caught.value.problems, str(tmp_path / "config.json"), *words)


def test_a_file_in_place_of_the_checkpoint_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Qwen35ConfigError, match="pass a downloaded checkpoint's directory"):
        Qwen35InferenceConfig.from_pretrained(tmp_path / "file")


@pytest.mark.parametrize("tp", [3, 5, 32])
def test_a_tp_degree_that_does_not_divide_is_refused_with_the_valid_ones(tp: int) -> None:
    with pytest.raises(Qwen35ConfigError) as caught:
        Qwen35InferenceConfig(Qwen35NeuronConfig(tp_degree=tp), **QWEN35_PRESETS["27B"])
    assert caught.value.problems == [
        f"tp_degree={tp} does not divide the 16 key heads of this checkpoint; valid degrees: 1, 2, 4, 8, 16"
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"linear_num_key_heads": 3, "linear_num_value_heads": 3, "num_key_value_heads": 2, "num_attention_heads": 6},
         "neither divides the 2 KV heads"),
        ({"linear_num_key_heads": 3, "linear_num_value_heads": 3, "num_key_value_heads": 3, "num_attention_heads": 3,
          "intermediate_size": 128}, "128 intermediate_size columns"),
        ({"linear_num_key_heads": 3, "linear_num_value_heads": 3, "hidden_size": 64}, "64 hidden_size columns"),
    ],
)  # fmt: skip
def test_a_tp_degree_is_refused_for_the_first_size_it_does_not_fit(fields: dict[str, Any], reason: str) -> None:
    problems = refuse({"tp_degree": 3}, **{"hidden_size": 96, "intermediate_size": 96, **fields})
    the_only(problems, "tp_degree=3", reason, "valid degrees: 1")


def test_sequence_lengths_are_held_against_the_checkpoint_and_each_other() -> None:
    the_only(refuse({"seq_len": 1024}), "seq_len=1024", "max_position_embeddings=512", "lower seq_len")
    problems = refuse({"seq_len": 64, "max_context_length": 128})
    the_only(problems, "max_context_length=128", "seq_len=64", "raise seq_len")


@pytest.mark.parametrize("field", ["batch_size", "ctx_batch_size", "max_batch_size", "seq_len", "tp_degree"])
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_run_sizes_must_be_positive_integers(field: str, value: Any) -> None:
    problems = refuse({field: value, "is_continuous_batching": True})
    the_only(problems, f"{field}={value!r}", "positive integer")


@pytest.mark.parametrize("value", [-1, 8, 1.5, True, "3", None])
def test_a_number_of_drafts_is_0_to_7(value: Any) -> None:
    problems = refuse({"num_speculative_tokens": value})
    the_only(problems, f"num_speculative_tokens={value!r}", "whole number of 0..7", "0 decodes without drafts")


@pytest.mark.parametrize(
    ("neuron", "fields", "words"),
    [
        ({"on_device_sampling_config": OnDeviceSamplingConfig()}, {}, ("on_device_sampling_config=None",)),
        ({"async_mode": True}, {}, ("async_mode=True", "set it to False")),
        ({}, {"mtp_num_hidden_layers": 2}, ("mtp_num_hidden_layers=2", "num_speculative_tokens=0")),
        ({}, {"mtp_use_dedicated_embeddings": True}, ("mtp_use_dedicated_embeddings", "num_speculative_tokens=0")),
    ],
)
def test_what_drafts_do_not_go_with_is_refused(
    neuron: dict[str, Any], fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    the_only(refuse({"num_speculative_tokens": 3, **neuron}, **fields), "num_speculative_tokens=3", *words)
    make(neuron, **fields)


def test_the_number_of_drafts_outlives_a_saved_configuration(tmp_path: Path) -> None:
    make({"num_speculative_tokens": 3}).save(tmp_path)
    loaded = Qwen35InferenceConfig.load(tmp_path)
    assert loaded.num_speculative_tokens == 3 and make().num_speculative_tokens == 0
    assert loaded.cached_layer_types == [*loaded.layer_types, "full_attention"]


def test_every_sequence_needs_a_cache_line() -> None:
    problems = refuse({"tkg_batch_size": 4, "is_continuous_batching": True})
    the_only(problems, "tkg_batch_size=4", "kv_cache_batch_size=1", "raise kv_cache_batch_size")


def test_unequal_batches_need_continuous_batching() -> None:
    words = "ctx_batch_size=1", "tkg_batch_size=4", "is_continuous_batching=True"
    the_only(refuse({"batch_size": 4, "tkg_batch_size": 4, "kv_cache_batch_size": 4}), *words)
    continuous = make({"batch_size": 4, "ctx_batch_size": 1, "is_continuous_batching": True})
    assert continuous.neuron_config.tkg_batch_size == 4


def test_float16_is_refused_because_gates_overflow() -> None:
    the_only(refuse({"torch_dtype": torch.float16}), "torch_dtype=torch.float16", "overflow", "bfloat16 or float32")
    the_only(refuse({"torch_dtype": torch.float8_e4m3fn}), "float8_e4m3fn", "bfloat16 or float32")
    the_only(refuse({"attention_dtype": torch.float32}), "attention_dtype=torch.float32", "leave it unset")


def test_a_dtype_of_the_checkpoint_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Qwen35ConfigError, match=r"torch_dtype=float6_x is not supported.*bfloat16 or float32"):
        Qwen35InferenceConfig.from_pretrained(write_config(tmp_path, {**TEXT, "dtype": "float6_x"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("padding_side", "left"), ("fused_qkv", True), ("sequence_parallel_enabled", True), ("vocab_parallel", True),
        ("flash_decoding_enabled", True), ("is_medusa", True), ("speculation_length", 4),
        ("enable_fused_speculation", True), ("enable_eagle_speculation", True), ("token_tree_config", {"a": 1}),
        ("quantized", True), ("kv_cache_quant", True), ("kv_quant_config", {"direct_cast": True}),
        ("activation_quantization_type", "dynamic"), ("quantized_mlp_kernel_enabled", True), ("lora_config", {"r": 8}),
        ("is_block_kv_layout", True), ("is_prefix_caching", True), ("is_chunked_prefill", True),
        ("windowed_context_encoding_size", 64), ("token_generation_batches", [1]), ("cp_degree", 2),
        ("attention_dp_degree", 2), ("pp_degree", 2), ("ep_degree", 2), ("mlp_cp_degree", 2),
        ("k_cache_transposed", True), ("layer_boundary_markers", True), ("attn_kernel_enabled", True),
        ("attn_tkg_nki_kernel_enabled", True), ("attn_block_tkg_nki_kernel_enabled", True),
        ("attn_block_cte_nki_kernel_enabled", True), ("qkv_kernel_enabled", True), ("qkv_nki_kernel_enabled", True),
        ("mlp_kernel_enabled", True), ("out_proj_kernel_enabled", True), ("tensor_capture_config", {"x": 1}),
    ],
)  # fmt: skip
def test_an_unsupported_feature_is_refused_with_reason_and_remedy(field: str, value: Any) -> None:
    the_only(refuse({field: value}), f"{field}={value!r} is not supported: ", f"; set {field}=")


@pytest.mark.parametrize("field", ["weights_dtype", "kv_cache_dtype"])
@pytest.mark.parametrize("value", ["int8", "FP8", "float8_e4m3fn", torch.float8_e4m3fn, 8, True])
def test_weights_and_caches_are_in_fp8_or_in_torch_dtype(field: str, value: Any) -> None:
    the_only(refuse({field: value}), f"{field}={value!r} is not supported", "set it to 'fp8', or None")


def test_fp8_sets_what_nxdi_asks_for_and_survives_saving(tmp_path: Path) -> None:
    config = make({"weights_dtype": "fp8", "kv_cache_dtype": "fp8"})
    config.save(str(tmp_path))
    for neuron in (config.neuron_config, Qwen35InferenceConfig.load(str(tmp_path)).neuron_config):
        assert (neuron.weights_dtype, neuron.kv_cache_dtype) == ("fp8", "fp8")
        assert neuron.quantized is True and neuron.quantization_type == "per_channel_symmetric"
        # With another name NxDI passes no flag that lets the compiler take torch's e4m3 for Trainium's.
        assert neuron.quantization_dtype == "f8e4m3" and neuron.kv_cache_quant is True
        assert neuron.kv_quant_config.quant_dtype == torch.float8_e4m3fn and neuron.kv_quant_config.direct_cast
        assert {"lm_head", "in_proj_ba"} <= set(neuron.modules_to_not_convert)
    assert config.matrix_dtype == torch.float8_e4m3fn
    assert make().matrix_dtype == torch.bfloat16 and make().neuron_config.kv_quant_config is None


def test_false_is_as_good_as_none_for_a_feature_left_out() -> None:
    assert make({"attn_kernel_enabled": False}).neuron_config.attn_kernel_enabled is False


def test_fused_speculation_configs_are_refused() -> None:
    with pytest.raises(Qwen35ConfigError, match=r"fused_spec_config is not supported.*leave it out"):
        Qwen35InferenceConfig(Qwen35NeuronConfig(), fused_spec_config=object(), **TEXT)


def test_a_missing_neuron_config_is_a_problem_not_a_crash() -> None:
    with pytest.raises(Qwen35ConfigError, match="neuron_config=None: pass a Qwen35NeuronConfig"):
        Qwen35InferenceConfig(None, **TEXT)  # type: ignore[arg-type]


def test_all_problems_are_reported_at_once() -> None:
    problems = refuse(
        {"padding_side": "left", "tp_degree": 3, "seq_len": 4096, "torch_dtype": torch.float16},
        hidden_act="relu", vocab_size=0, num_attention_heads=5, layer_types=["full_attention"],
    )  # fmt: skip
    architecture = ("vocab_size", "hidden_act", "num_attention_heads", "layer_types")
    for field in (*architecture, "padding_side", "torch_dtype", "seq_len", "tp_degree"):
        assert any(problem.startswith(field) for problem in problems), field
    assert len(problems) == 8


# The stand-in for NxDI's own classes
