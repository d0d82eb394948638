# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The decoder's rules against naive loops over heads and ranks; comparisons are bit-exact, since rows only move."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwen35.configuration_qwen35 import QWEN35_PRESETS, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.weights.checkpoint import CheckpointReader
from qwen35.weights.conversion import ConversionError, Skipped
from qwen35.weights.text_rules import conversion_plan, convert_checkpoint, gate_rows
from support.compare import assert_close

SIZES: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "rope_theta": 1e4,
}
# N = 6 query heads on 2 KV heads are padded to 8 on 4 ranks, as 24 on 4 are to 32 on 16 in the 27B model.
PADDED = {"num_attention_heads": 6, "num_key_value_heads": 2}
Tensors = dict[str, torch.Tensor]


def make_config(tp: int = 1, dtype: str = "float32", **fields: Any) -> Qwen35InferenceConfig:
    return Qwen35InferenceConfig(Qwen35NeuronConfig(tp_degree=tp, torch_dtype=dtype), **{**SIZES, **fields})


def hf_shapes(c: Qwen35InferenceConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoints, written out once more; prefix-free."""
    D, I, H = c.hidden_size, c.intermediate_size, c.linear_num_value_heads  # noqa: E741
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    key, value = c.linear_num_key_heads * c.linear_key_head_dim, H * c.linear_value_head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocab_size, D), "norm.weight": (D,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, D)
    for i, kind in enumerate(c.layer_types):
        names = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        names |= {"mlp.gate_proj.weight": (I, D), "mlp.up_proj.weight": (I, D), "mlp.down_proj.weight": (D, I)}
        if kind == "full_attention":
            names |= {"self_attn.q_proj.weight": (2 * heads, D), "self_attn.o_proj.weight": (D, heads)}
            names |= {"self_attn.k_proj.weight": (kv, D), "self_attn.v_proj.weight": (kv, D)}
            names |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
        else:
            names |= {"linear_attn.in_proj_qkv.weight": (2 * key + value, D)}
            names |= {"linear_attn.in_proj_z.weight": (value, D), "linear_attn.out_proj.weight": (D, value)}
            names |= {"linear_attn.in_proj_a.weight": (H, D), "linear_attn.in_proj_b.weight": (H, D)}
            names |= {"linear_attn.conv1d.weight": (2 * key + value, 1, c.linear_conv_kernel_dim)}
            names |= {"linear_attn.A_log": (H,), "linear_attn.dt_bias": (H,)}
            names |= {"linear_attn.norm.weight": (c.linear_value_head_dim,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in names.items()}
    return shapes


def random_source(c: Qwen35InferenceConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_shapes(c).items()}


def prefixed(source: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {name if name == "lm_head.weight" else prefix + name: tensor for name, tensor in source.items()}


def refuse(source: Mapping[str, torch.Tensor], config: Qwen35InferenceConfig) -> list[str]:
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(source, config)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert "config.json" in str(caught.value)  # the remedy
    return caught.value.problems


def naive(source: Tensors, c: Qwen35InferenceConfig, tp: int) -> Tensors:
    """The targets by loops over layers, ranks and heads, all in the dtype of the source."""
    K, V, Hk = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_num_key_heads
    H, P, N, kv = c.linear_num_value_heads, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    key, padded = Hk * K, c.padded_num_attention_heads(tp)
    wanted: Tensors = {}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        wanted[name] = source.get(name, source["embed_tokens.weight"])
    wanted["norm.weight"] = 1 + source["norm.weight"].float()
    wanted["rank_util.rank"] = torch.tensor(list(range(tp)), dtype=torch.int32)
    for i, kind in enumerate(c.layer_types):
        layer = f"layers.{i}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            wanted[layer + name] = 1 + source[layer + name].float()
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
            wanted[layer + name] = source[layer + name]
        if kind == "full_attention":
            attn = layer + "self_attn."
            q_proj = source[attn + "q_proj.weight"]
            query, gate = [], []
            for head in range(N):
                query.append(q_proj[2 * head * P : (2 * head + 1) * P])
                gate.append(q_proj[(2 * head + 1) * P : (2 * head + 2) * P])
                if (head + 1) % (N // kv) == 0:  # the end of a KV group takes the group's share of zero heads
                    gate += [torch.zeros(P, c.hidden_size, dtype=q_proj.dtype)] * ((padded - N) // kv)
            wanted[attn + "q_proj.weight"], wanted[attn + "gate_proj.weight"] = torch.cat(query), torch.cat(gate)
            for name in ("k_proj.weight", "v_proj.weight", "o_proj.weight"):
                wanted[attn + name] = source[attn + name]
            for name in "qk":
                wanted[f"{attn}{name}_layernorm.weight"] = 1 + source[f"{attn}{name}_norm.weight"].float()
            wanted[attn + "rank_util.rank"] = wanted["rank_util.rank"]
            continue
        attn = layer + "linear_attn."
        qkv, z, conv = (source[attn + f"{name}.weight"] for name in ("in_proj_qkv", "in_proj_z", "conv1d"))
        b, a = source[attn + "in_proj_b.weight"], source[attn + "in_proj_a.weight"]
        rows, channels, gates = [], [], []
        for rank in range(tp):
            key_heads = range(rank * Hk // tp, (rank + 1) * Hk // tp)
            value_heads = range(rank * H // tp, (rank + 1) * H // tp)
            own = [start + head * K + j for start in (0, key) for head in key_heads for j in range(K)]
            own += [2 * key + head * V + j for head in value_heads for j in range(V)]
            rows += [qkv[own], z[[head * V + j for head in value_heads for j in range(V)]]]
            channels += [conv[own, 0]]
            gates += [b[list(value_heads)], a[list(value_heads)]]
        wanted[attn + "in_proj_qkvz.weight"], wanted[attn + "in_proj_ba.weight"] = torch.cat(rows), torch.cat(gates)
        wanted[attn + "conv1d.weight"] = torch.cat(channels)
        for name in ("A_log", "dt_bias"):
            wanted[f"{attn}{name}.weight"] = source[attn + name].float()
        wanted[attn + "norm.weight"] = source[attn + "norm.weight"].float()
        wanted[attn + "out_proj.weight"] = source[attn + "out_proj.weight"]
    return wanted


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name in expected:
        tensor = actual[name]
        assert tensor.is_contiguous() and tensor.dtype == expected[name].dtype, f"{name}: {tensor.dtype}"
        assert_close(tensor, expected[name], label=name)


# What is built


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    tp=st.sampled_from([1, 2, 3, 4]), keys_per_rank=st.integers(1, 3), values_per_key=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]), queries_per_kv=st.integers(1, 4), K=st.integers(1, 5), V=st.integers(1, 5),
    kernel=st.integers(2, 5), tied=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_target_equals_the_naive_loops(
    tp: int, keys_per_rank: int, values_per_key: int, kv_heads: int, queries_per_kv: int, K: int, V: int, kernel: int,
    tied: bool, seed: int,
) -> None:  # fmt: skip
    kv_heads = kv_heads if kv_heads % tp == 0 or tp % kv_heads == 0 else 1
    config = make_config(
        tp, linear_num_key_heads=tp * keys_per_rank, linear_num_value_heads=tp * keys_per_rank * values_per_key,
        num_key_value_heads=kv_heads, num_attention_heads=kv_heads * queries_per_kv, linear_key_head_dim=K,
        linear_value_head_dim=V, linear_conv_kernel_dim=kernel, tie_word_embeddings=tied, hidden_size=12,
        layer_types=["full_attention", "linear_attention"], num_hidden_layers=2,
    )  # fmt: skip
    source = random_source(config, seed=seed)
    assert_same(convert_checkpoint(source, config).materialise(), naive(source, config, tp))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_are_in_place_for_each_degree_with_padded_heads(tp: int) -> None:
    config = make_config(tp, **PADDED)
    source = random_source(config)
    converted = convert_checkpoint(source, config)
    assert_same(converted, naive(source, config, tp))
    heads = converted["layers.3.self_attn.gate_proj.weight"].unflatten(0, (-1, config.head_dim))
    zero = [h for h in range(len(heads)) if not heads[h].any()]
    assert zero == ([3, 7] if tp == 4 else [])


def test_the_gate_of_the_27b_geometry_is_padded_from_6_to_8_heads_a_group() -> None:
    rows = torch.arange(24.0).repeat_interleave(2)[:, None]  # head_dim 1: query and gate row of head h hold h
    gate = gate_rows(rows + 1, head_dim=1, kv_heads=4, padded_heads=32).flatten().tolist()
    assert gate == [head for group in range(4) for head in (*range(6 * group + 1, 6 * group + 7), 0, 0)]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_computes_its_value_heads_from_its_own_block_alone(tp: int) -> None:
    config = make_config(tp)
    source = random_source(config)
    converted = convert_checkpoint(source, config)
    name = "layers.1.linear_attn."
    fused = converted[name + "in_proj_qkvz.weight"].double()
    hidden = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (source[name + "in_proj_qkv.weight"].double() @ hidden).split([24, 24, 40])
    z = source[name + "in_proj_z.weight"].double() @ hidden
    per_key = 8 // 4
    for rank, block in enumerate(fused.chunk(tp)):
        local = (block @ hidden).split([24 // tp, 24 // tp, 40 // tp, 40 // tp])
        for j in range(8 // tp):
            head = rank * 8 // tp + j
            for ours, theirs, width, mine, global_ in (
                (local[0], q, 6, j // per_key, head // per_key), (local[1], k, 6, j // per_key, head // per_key),
                (local[2], v, 5, j, head), (local[3], z, 5, j, head),
            ):  # fmt: skip
                actual, expected = ours[mine * width :][:width], theirs[global_ * width :][:width]
                # A block's matrix product may sum in another order: one float64 rounding or two.
                assert_close(actual, expected, atol=1e-13, label=f"rank {rank} head {head}")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_layout_can_be_undone(tp: int) -> None:
    config = make_config(tp, **PADDED)
    source = random_source(config)
    converted = convert_checkpoint(source, config)
    key, value, P = config.key_dim, config.value_dim, config.head_dim
    for i, kind in enumerate(config.layer_types):
        if kind == "full_attention":
            attn = f"layers.{i}.self_attn."
            query = converted[attn + "q_proj.weight"].unflatten(0, (-1, P))
            gate = converted[attn + "gate_proj.weight"].unflatten(0, (config.num_key_value_heads, -1, P))
            gate = gate[:, : config.num_attention_heads // config.num_key_value_heads].flatten(0, 1)
            assert_close(torch.stack([query, gate], 1).flatten(0, 2), source[attn + "q_proj.weight"], label=attn)
            continue
        attn = f"layers.{i}.linear_attn."
        ranks = [block.split([key // tp, key // tp, value // tp, value // tp])
                 for block in converted[attn + "in_proj_qkvz.weight"].chunk(tp)]  # fmt: skip
        parts = [torch.cat([rank[part] for rank in ranks]) for part in range(4)]
        assert_close(torch.cat(parts[:3]), source[attn + "in_proj_qkv.weight"], label="qkv")
        assert_close(parts[3], source[attn + "in_proj_z.weight"], label="z")


@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_take_the_asked_dtype_and_sensitive_tensors_float32(source_dtype: torch.dtype, dtype: str) -> None:
    config = make_config(2, dtype)
    source = random_source(config, source_dtype)
    for name, tensor in convert_checkpoint(source, config).items():
        exact = any(part in name for part in ("norm", "A_log", "dt_bias"))
        wanted = torch.int32 if "rank_util" in name else torch.float32 if exact else config.neuron_config.torch_dtype
        assert tensor.dtype == wanted, name


def test_one_is_added_to_norms_in_float32_and_not_to_the_deltanet_norm() -> None:
    config = make_config()
    source = random_source(config, torch.bfloat16)
    small = torch.full((16,), 2.0**-10, dtype=torch.bfloat16)  # 1 + w would be 1 in bfloat16
    source["norm.weight"] = small
    converted = convert_checkpoint(source, config)
    assert_close(converted["norm.weight"], torch.full((16,), 1 + 2.0**-10), label="norm")
    deltanet = "layers.0.linear_attn.norm.weight"
    assert_close(converted[deltanet], source[deltanet].float(), label=deltanet)


# Names


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.", "model.", ""])
@pytest.mark.parametrize("head", ["lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight"])
def test_every_usual_prefix_is_understood(prefix: str, head: str) -> None:
    config = make_config()
    source = random_source(config)
    renamed = prefixed(source, prefix)
    renamed[head] = renamed.pop("lm_head.weight")
    assert_same(convert_checkpoint(renamed, config), naive(source, config, 1))


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_vision_and_mtp_tensors_are_skipped_and_accounted_for(prefix: str) -> None:
    config = make_config()
    source = prefixed(random_source(config), prefix + "language_model.")
    text = sum(tensor.nbytes for tensor in source.values()), len(source)
    source[prefix + "visual.patch_embed.proj.weight"] = torch.ones(3, 4)
    source[prefix + "visual.blocks.0.attn.qkv.bias"] = torch.ones(6, dtype=torch.bfloat16)
    source["mtp.fc.weight"] = torch.ones(8, dtype=torch.bfloat16)
    converted = convert_checkpoint(source, config)
    report = converted.report
    vision, mtp = report.skipped[Skipped.VISION], report.skipped[Skipped.MTP]
    assert (report.consumed.nbytes, report.consumed.count) == text
    assert (vision.count, vision.nbytes) == (2, 3 * 4 * 4 + 6 * 2)
    assert (mtp.count, mtp.nbytes) == (1, 16)
    assert not [name for name in converted if "visual" in name or "mtp" in name]
    assert "vision 2 tensors" in str(report) and f"converted {len(source) - 3} tensors" in str(report)


MTP_SHAPES = {
    "fc.weight": (16, 32),
    "pre_fc_norm_embedding.weight": (16,),
    "pre_fc_norm_hidden.weight": (16,),
    "norm.weight": (16,),
    "layers.0.input_layernorm.weight": (16,),
    "layers.0.post_attention_layernorm.weight": (16,),
    "layers.0.mlp.gate_proj.weight": (48, 16),
    "layers.0.mlp.up_proj.weight": (48, 16),
    "layers.0.mlp.down_proj.weight": (16, 48),
    "layers.0.self_attn.q_proj.weight": (64, 16),
    "layers.0.self_attn.k_proj.weight": (16, 16),
    "layers.0.self_attn.v_proj.weight": (16, 16),
    "layers.0.self_attn.o_proj.weight": (16, 32),
    "layers.0.self_attn.q_norm.weight": (8,),
    "layers.0.self_attn.k_norm.weight": (8,),
}
"""The 15 tensors of a published head, for SIZES."""


def with_head(config: Qwen35InferenceConfig) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    head = {f"mtp.{name}": torch.randn(shape, generator=generator) for name, shape in MTP_SHAPES.items()}
    return {**random_source(make_config()), **head}


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod."])
def test_the_mtp_head_is_read_when_tokens_are_drafted(prefix: str) -> None:
    config = make_config()
    config.neuron_config.num_speculative_tokens = 2
    source = with_head(config)
    renamed = {prefix + name if name.startswith("mtp") else name: tensor for name, tensor in source.items()}
    converted = convert_checkpoint(renamed, config)
    without = convert_checkpoint(source, make_config())
    assert {*converted} - {*without} == {
        *(f"mtp.{name}" for name in MTP_SHAPES if "q_norm" not in name and "k_norm" not in name),
        *(f"mtp.layers.0.self_attn.{name}" for name in ("q_layernorm.weight", "k_layernorm.weight")),
        *(f"mtp.layers.0.self_attn.{name}" for name in ("gate_proj.weight", "rank_util.rank")),
    }
    for name in ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight"):
        assert torch.equal(converted[f"mtp.{name}"], 1 + source[f"mtp.{name}"])
    assert torch.equal(converted["mtp.fc.weight"], source["mtp.fc.weight"])
    query, gate = source["mtp.layers.0.self_attn.q_proj.weight"].view(4, 2, 8, 16).unbind(1)
    assert torch.equal(converted["mtp.layers.0.self_attn.q_proj.weight"], query.flatten(0, 1))
    assert torch.equal(converted["mtp.layers.0.self_attn.gate_proj.weight"], gate.flatten(0, 1))


def test_a_checkpoint_without_a_head_is_refused_in_a_line_when_tokens_are_to_be_drafted() -> None:
    config = make_config()
    config.neuron_config.num_speculative_tokens = 3
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(random_source(make_config()), config)
    assert caught.value.problems == [
        "num_speculative_tokens=3 needs the tensors mtp.*, which this checkpoint does not have; "
        "set num_speculative_tokens=0"
    ]


def test_a_head_that_lacks_a_tensor_is_refused_by_its_name() -> None:
    config = make_config()
    config.neuron_config.num_speculative_tokens = 3
    source = with_head(config)
    del source["mtp.fc.weight"]
    with pytest.raises(ConversionError, match=r"mtp\.fc\.weight is missing, shape \[16, 32\]"):
        convert_checkpoint(source, config)


@pytest.mark.parametrize(
    "there", [("embed_tokens.weight",), ("lm_head.weight",), ("embed_tokens.weight", "lm_head.weight")]
)
def test_of_a_tied_checkpoint_one_fills_both_but_a_head_of_its_own_is_used(there: tuple[str, ...]) -> None:
    config = make_config(tie_word_embeddings=True)
    tables = {"embed_tokens.weight": torch.full((40, 16), 1.0), "lm_head.weight": torch.full((40, 16), 2.0)}
    source = random_source(config)
    del source["embed_tokens.weight"]
    converted = convert_checkpoint(source | {name: tables[name] for name in there}, config)
    for name in tables:
        assert_close(converted[name], tables[name if name in there else there[0]], label=name)
    assert converted.report.consumed.count == len(source) + len(there)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_the_plan_reads_each_source_once_and_fills_each_target_once_at_27b(tp: int) -> None:
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(tp_degree=tp), **QWEN35_PRESETS["27B"])
    rules = conversion_plan(config)
    sources = [name for rule in rules for name in rule.sources]
    targets = [name for rule in rules for name in rule.targets]
    assert len(set(sources)) == len(sources) and len(set(targets)) == len(targets)
    assert {name: shape for rule in rules for name, shape in rule.sources.items()} == hf_shapes(config)
    assert len(targets) == 4 + 48 * (5 + 7) + 16 * (5 + 8)


@pytest.mark.parametrize("vision_language", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_checkpoint_saved_by_transformers_converts_whole(
    tmp_path: Path, vision_language: bool, tied: bool, tp: int
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.qwen3_5")
    fields = {name: value for name, value in SIZES.items() if name not in ("model_type", "rope_theta")}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    torch.manual_seed(0)
    if vision_language:
        vision = dict(depth=1, hidden_size=8, num_heads=2, intermediate_size=8, out_hidden_size=16, patch_size=2,
                      num_position_embeddings=4)  # fmt: skip
        hf = transformers.Qwen3_5Config(
            text_config={**fields, "tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied
        )
        model = transformers.Qwen3_5ForConditionalGeneration(hf)
    else:
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**fields, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    neuron = Qwen35NeuronConfig(tp_degree=tp, torch_dtype="float32")
    config = Qwen35InferenceConfig.from_pretrained(tmp_path, neuron)
    converted = convert_checkpoint(CheckpointReader(tmp_path), config)
    prefix = "model.language_model." if vision_language else "model."
    source = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    assert_same(converted, naive(source, config, tp))
    assert (converted.report.skipped[Skipped.VISION].count > 0) == vision_language


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_packaged_checkpoint_converts(tp: int) -> None:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, Qwen35NeuronConfig(tp_degree=tp))
    reader = CheckpointReader(MINI_CHECKPOINT)
    source = {name.removeprefix("model.language_model."): reader[name] for name in reader if "visual" not in name}
    assert_same(convert_checkpoint(reader, config), naive(source, config, tp))


# Refusals


def test_a_missing_tensor_is_named_with_its_shape() -> None:
    config = make_config()
    source = random_source(config)
    del source["layers.2.linear_attn.A_log"]
    assert refuse(source, config) == ["layers.2.linear_attn.A_log is missing, shape [8]"]


def test_an_untied_checkpoint_needs_its_lm_head() -> None:
    config = make_config()
    source = random_source(config)
    del source["lm_head.weight"]
    assert refuse(source, config) == ["lm_head.weight is missing, shape [40, 16]"]


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.bias", "extra"])
def test_an_unexpected_tensor_is_named_as_the_checkpoint_calls_it(name: str) -> None:
    config = make_config()
    source = {**random_source(config), name: torch.ones(3, 2)}
    assert refuse(source, config) == [f"{name} is unexpected, shape [3, 2]"]


def test_a_mis_shaped_tensor_is_named_with_both_shapes() -> None:
    config = make_config()
    source = prefixed(random_source(config), "model.")
    source["model.layers.3.self_attn.q_proj.weight"] = torch.ones(32, 16)
    problem = "model.layers.3.self_attn.q_proj.weight has shape [32, 16], expected [64, 16]"
    assert refuse(source, config) == [problem]


def test_a_tied_lm_head_of_another_shape_is_refused() -> None:
    config = make_config(tie_word_embeddings=True)
    source = {**random_source(config), "lm_head.weight": torch.ones(41, 16)}
    assert refuse(source, config) == ["lm_head.weight has shape [41, 16], expected [40, 16]"]


def test_a_tensor_given_under_two_names_is_refused() -> None:
    config = make_config()
    source = random_source(config)
    source["model.norm.weight"] = source["norm.weight"]
    assert refuse(source, config) == ["model.norm.weight and norm.weight are the same tensor, keep one"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused_with_the_way_out(dtype: torch.dtype) -> None:
    config = make_config()
    source = random_source(config)
    source["embed_tokens.weight"] = source["embed_tokens.weight"].to(dtype)
    (problem,) = refuse(source, config)
    assert f"embed_tokens.weight is {dtype}" in problem and "unquantised checkpoint" in problem


def test_all_differences_are_listed_before_any_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    source = random_source(config)
    del source["norm.weight"], source["layers.0.linear_attn.in_proj_z.weight"]
    source |= {"strange": torch.ones(1), "lm_head.weight": torch.ones(2)}
    source["model.embed_tokens.weight"] = source["embed_tokens.weight"].clone()
    save_file(source, tmp_path / "model.safetensors")
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    problems = refuse(CheckpointReader(tmp_path), config)
    assert len(problems) == 5
    for words in ("norm.weight is missing", "in_proj_z.weight is missing", "strange is unexpected", "has shape [2]",
                  "are the same tensor"):  # fmt: skip
        assert any(words in problem for problem in problems), words
