# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The decoder's tensors: from a checkpoint to the layout that this package's modules are sharded from.

NxD gives rank r the r-th contiguous block of a sharded dimension. A DeltaNet layer concatenates q, k, v (and z) along
that dimension, so their rows are put in rank-major order here: [q_0 | k_0 | v_0 | z_0 | q_1 | k_1 | ...]. Rank r then
owns key heads r*Hk/R onwards and value heads r*H/R onwards, which belong together: value head h reads key head
h // (H/Hk). KV replication, padding of q and o, and vocabulary padding are left to NxDI.

Letters: D hidden, H value heads, Hk key heads, R ranks, N attention heads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

from ..configuration_qwen35 import FULL_ATTENTION, Qwen35InferenceConfig
from ..kernel_selection import MLPKernel, select_mlp_kernel
from .checkpoint import INDEX_FILE, MTP_NAMES, CheckpointReader
from .conversion import (
    BUFFERS,
    ConversionError,
    LazyStateDict,
    Rule,
    RuleSet,
    Skipped,
    convert,
    rank_major,
    unchanged,
    unwrapped,
)

_PREFIXES = ("model.", "")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_MTP = "mtp."


def convert_checkpoint(
    source: Mapping[str, torch.Tensor], config: Qwen35InferenceConfig, progress: bool = False
) -> LazyStateDict:
    """Compare the checkpoint's names, shapes and dtypes with `conversion_plan`, then return the targets unbuilt.

    Args:
        source: HF tensors, with any of the usual name prefixes. Tensors of a `CheckpointReader` are read when needed;
            those of a dict are held until built, so clear the dict to have `materialise` free them one by one.
        config: what the checkpoint must be, with the `tp_degree` to lay it out for.
        progress: show a bar in `materialise`.

    Raises:
        ConversionError: as `RuleSet.match`; or tokens are to be drafted, and the checkpoint has no MTP head.
    """
    names = {_plain(name) for name in source}
    if config.num_speculative_tokens > 0:
        _require_head(source, names, config.num_speculative_tokens)
    found = [name for name in (_EMBEDDING, _HEAD) if name in names]
    # As transformers does: a tied checkpoint may have one for both; if it has both, each is used.
    plan = conversion_plan(config, found if config.tie_word_embeddings and found else None)
    return convert(source, RuleSet(plan, _PREFIXES, _skipped(config.num_hidden_layers)), progress, config.fp8_form)


def _plain(name: str) -> str:
    """A tensor's name without wrappers and prefix."""
    return unwrapped(name).removeprefix(_PREFIXES[0])


def _require_head(source: Mapping[str, torch.Tensor], names: Collection[str], drafted: int) -> None:
    """Check that there is an MTP head at all: fine-tunes often lack it, or keep no more than its names in the index.

    Raises:
        ConversionError: there is none, in one line.
    """
    if any(name.startswith(_MTP) for name in names):
        return
    where = "which this checkpoint does not have"
    if isinstance(source, CheckpointReader):
        listed = {file for name, file in source.listed_only.items() if _plain(name).startswith(_MTP)}
        if listed:
            where = f"which {INDEX_FILE} puts in {', '.join(sorted(listed))} and no file has: download it"
    raise ConversionError(
        [f"num_speculative_tokens={drafted} needs the tensors {_MTP}*, {where}; set num_speculative_tokens=0"]
    )


def _skipped(layers: int) -> dict[str, Skipped]:
    """Patterns of the tensors that the decoder does without; transformers loads checkpoints that have them too."""
    own = "|".join(map(str, range(layers)))
    return {
        r"visual\.": Skipped.VISION,
        MTP_NAMES: Skipped.MTP,
        rf"layers\.(?!({own})\.)\d+\.": Skipped.LAYER,  # some publishers put MTP there
        **BUFFERS,
        r"(v_head|value_head|reward_head|score|classifier|qa_outputs)\.": Skipped.HEAD,
    }


def conversion_plan(config: Qwen35InferenceConfig, vocabulary: Sequence[str] | None = None) -> list[Rule]:
    """How each tensor of this package's modules is built, before any checkpoint is seen.

    Source names are without prefix. Target names are the modules' own, before NxDI's preshard hooks rename some.

    Args:
        config: sizes of the decoder.
        vocabulary: which there are of the embedding and the head; one alone fills both. By default the embedding, and
            the head unless the configuration ties it.
    """
    if vocabulary is None:
        vocabulary = [_EMBEDDING] if config.tie_word_embeddings else [_EMBEDDING, _HEAD]
    rules = [*_vocabulary_rules(config, vocabulary)]
    rules += [_norm_rule("norm.weight", config.hidden_size), _rank_rule(config, "")]
    for i, kind in enumerate(config.layer_types):
        rules += _layer_rules(config, f"layers.{i}.", kind)
    if config.num_speculative_tokens > 0:
        rules += _mtp_rules(config)
    return rules


def _layer_rules(c: Qwen35InferenceConfig, layer: str, kind: str) -> Iterator[Rule]:
    yield _norm_rule(layer + "input_layernorm.weight", c.hidden_size)
    yield _norm_rule(layer + "post_attention_layernorm.weight", c.hidden_size)
    yield from _mlp_rules(c, layer + "mlp.")
    if kind == FULL_ATTENTION:
        yield from _attention_rules(c, layer + "self_attn.")
    else:
        yield from _deltanet_rules(c, layer + "linear_attn.")


def _mtp_rules(c: Qwen35InferenceConfig) -> Iterator[Rule]:
    """The MTP head's own tensors; its embedding and lm_head are the decoder's."""
    yield Rule.of_one(_MTP + "fc.weight", (c.hidden_size, 2 * c.hidden_size), c.neuron_config.torch_dtype)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield _norm_rule(f"{_MTP}{name}.weight", c.hidden_size)
    yield from _layer_rules(c, _MTP + "layers.0.", FULL_ATTENTION)


def _vocabulary_rules(c: Qwen35InferenceConfig, names: Sequence[str]) -> Iterator[Rule]:
    shape, dtype = (c.vocab_size, c.hidden_size), c.neuron_config.torch_dtype
    if len(names) == 1:
        yield Rule({names[0]: shape}, {_EMBEDDING: unchanged, _HEAD: unchanged}, dtype)
    else:
        yield Rule.of_one(_EMBEDDING, shape, dtype)
        yield Rule.of_one(_HEAD, shape, dtype)


def _norm_rule(name: str, size: int, target: str | None = None) -> Rule:
    return Rule.of_one(name, (size,), torch.float32, one_plus, target)


def _rank_rule(c: Qwen35InferenceConfig, prefix: str) -> Rule:
    """The parameter from which a traced module learns its rank: [R] int32, of which each rank gets its own number."""
    ranks = c.neuron_config.tp_degree
    return Rule({}, {prefix + "rank_util.rank": lambda: torch.arange(ranks)}, torch.int32)


def _mlp_rules(c: Qwen35InferenceConfig, prefix: str) -> Iterator[Rule]:
    wide, narrow = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
    transposed = select_mlp_kernel(c) is MLPKernel.NKI
    for name, shape in (("gate_proj", wide), ("up_proj", wide), ("down_proj", narrow)):
        name = f"{prefix}{name}.weight"
        yield Rule({name: shape}, {name: unchanged}, c.matrix_dtype, transposed)


def _attention_rules(c: Qwen35InferenceConfig, prefix: str) -> Iterator[Rule]:
    hidden, dtype = c.hidden_size, c.matrix_dtype
    query_dim, key_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    padded_heads = c.padded_num_attention_heads(c.neuron_config.tp_degree)
    yield Rule(
        {prefix + "q_proj.weight": (2 * query_dim, hidden)},
        {
            prefix + "q_proj.weight": lambda q: query_rows(q, c.head_dim),
            prefix + "gate_proj.weight": lambda q: gate_rows(q, c.head_dim, c.num_key_value_heads, padded_heads),
        },
        dtype,
    )
    yield Rule.of_one(prefix + "k_proj.weight", (key_dim, hidden), dtype)
    yield Rule.of_one(prefix + "v_proj.weight", (key_dim, hidden), dtype)
    yield Rule.of_one(prefix + "o_proj.weight", (hidden, query_dim), dtype)
    yield _norm_rule(prefix + "q_norm.weight", c.head_dim, target=prefix + "q_layernorm.weight")
    yield _norm_rule(prefix + "k_norm.weight", c.head_dim, target=prefix + "k_layernorm.weight")
    yield _rank_rule(c, prefix)


def _deltanet_rules(c: Qwen35InferenceConfig, prefix: str) -> Iterator[Rule]:
    hidden, heads, dtype = c.hidden_size, c.linear_num_value_heads, c.neuron_config.torch_dtype
    ranks = c.neuron_config.tp_degree

    def split_qkv(rows: torch.Tensor) -> list[torch.Tensor]:
        return list(rows.split([c.key_dim, c.key_dim, c.value_dim]))

    yield Rule(
        {prefix + "in_proj_qkv.weight": (c.conv_dim, hidden), prefix + "in_proj_z.weight": (c.value_dim, hidden)},
        {prefix + "in_proj_qkvz.weight": lambda qkv, z: rank_major([*split_qkv(qkv), z], ranks)},
        c.matrix_dtype,
    )
    yield Rule(
        {prefix + "in_proj_b.weight": (heads, hidden), prefix + "in_proj_a.weight": (heads, hidden)},
        {prefix + "in_proj_ba.weight": lambda b, a: rank_major([b, a], ranks)},
        dtype,
    )
    conv = (c.conv_dim, 1, c.linear_conv_kernel_dim)
    yield Rule.of_one(prefix + "conv1d.weight", conv, dtype, lambda w: rank_major(split_qkv(w.squeeze(1)), ranks))
    # The decay is exp(-exp(A_log) * softplus(a + dt_bias)): an error here is exponentiated at every token.
    yield Rule.of_one(prefix + "A_log", (heads,), torch.float32, target=prefix + "A_log.weight")
    yield Rule.of_one(prefix + "dt_bias", (heads,), torch.float32, target=prefix + "dt_bias.weight")
    yield Rule.of_one(prefix + "norm.weight", (c.linear_value_head_dim,), torch.float32)
    yield Rule.of_one(prefix + "out_proj.weight", (hidden, c.value_dim), c.matrix_dtype)


def query_rows(q_proj: torch.Tensor, head_dim: int) -> torch.Tensor:
    """q_proj [N * 2 * head_dim, D], for each head query then gate -> the query rows [N * head_dim, D]."""
    return q_proj.unflatten(0, (-1, 2, head_dim))[:, 0].flatten(0, 1)


def gate_rows(q_proj: torch.Tensor, head_dim: int, kv_heads: int, padded_heads: int) -> torch.Tensor:
    """q_proj [N * 2 * head_dim, D] -> the gate rows [padded_heads * head_dim, D].

    NxDI pads the query heads with zero heads at the end of each KV group, and the gates are padded in the same places.
    What a padded gate holds does not matter: o_proj has zeros for a padded head.
    """
    gate = q_proj.unflatten(0, (-1, 2, head_dim))[:, 1]
    groups = gate.unflatten(0, (kv_heads, -1))
    padding = padded_heads // kv_heads - groups.shape[1]
    return F.pad(groups, (0, 0, 0, 0, 0, padding)).flatten(0, 2).contiguous()


def one_plus(weight: torch.Tensor) -> torch.Tensor:
    """The factor of a norm whose checkpoint weight is its distance from one; float32, as transformers adds them."""
    return 1.0 + weight.float()
