# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint tensors in the layout that this package's modules are sharded from.

NxD gives rank r the r-th contiguous block of a sharded dimension. A DeltaNet layer concatenates q, k, v (and z) along
that dimension, so their rows are put in rank-major order here: [q_0 | k_0 | v_0 | z_0 | q_1 | k_1 | ...]. Rank r then
owns key heads r*Hk/R onwards and value heads r*H/R onwards, which belong together: value head h reads key head
h // (H/Hk). KV replication, padding of q and o, and vocabulary padding are left to NxDI.

Letters: D hidden, H value heads, Hk key heads, R ranks, N attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..configuration_qwen35 import FULL_ATTENTION, Qwen35InferenceConfig
from .checkpoint import CheckpointReader, TensorSpec

Build = Callable[..., torch.Tensor]
Shape = tuple[int, ...]

# In the order of trial: a name is cut at the first that it starts with. NxDI strips one leading "model." by itself.
_PREFIXES = ("model.language_model.", "language_model.", "model.", "")
_READABLE = (torch.bfloat16, torch.float16, torch.float32)


class ConversionError(ValueError):
    """A checkpoint whose tensors are not those of the configuration; lists every difference."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(
            "the checkpoint does not fit its configuration:\n"
            + "\n".join(f"  - {line}" for line in problems)
            + "\n  check that config.json and the weights are of the same checkpoint"
        )


@dataclass
class Tally:
    count: int = 0
    nbytes: int = 0

    def add(self, spec: TensorSpec) -> None:
        self.count += 1
        self.nbytes += spec.nbytes

    def __str__(self) -> str:
        return f"{self.count} tensors ({self.nbytes / 1e9:.3f} GB)"


@dataclass
class ConversionReport:
    """Where every source tensor went."""

    consumed: Tally = field(default_factory=Tally)
    vision: Tally = field(default_factory=Tally)
    mtp: Tally = field(default_factory=Tally)
    tied: Tally = field(default_factory=Tally)

    def __str__(self) -> str:
        skipped = f"skipped: vision {self.vision}, MTP {self.mtp}, lm_head tied to the embedding {self.tied}"
        return f"converted {self.consumed}; {skipped}"


@dataclass(frozen=True)
class Rule:
    """Some source tensors, with the shapes they must have, and the targets built from exactly these."""

    sources: dict[str, Shape]
    targets: dict[str, Build]  # each takes the source tensors in the order of `sources`
    dtype: torch.dtype


class LazyStateDict(MutableMapping[str, torch.Tensor]):
    """A state dict whose tensors are built when they are first asked for, and kept from then on.

    NxD asks for each several times over: it compares their storages, then their dtypes, then cuts a block a rank. A
    copy shares what is built already and builds the rest for itself: to hold a few tensors at a time, work on copies.
    """

    def __init__(
        self,
        items: Mapping[str, torch.Tensor | Callable[[], torch.Tensor]],
        report: ConversionReport | None = None,
        progress: bool = False,
    ) -> None:
        self._items = dict(items)
        self.report = report or ConversionReport()
        self.progress = progress

    def __getitem__(self, name: str) -> torch.Tensor:
        item = self._items[name]
        if not isinstance(item, torch.Tensor):
            item = self._items[name] = item()
        return item

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._items[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items  # Mapping's own would build the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def copy(self) -> LazyStateDict:
        """Another dict of the same tensors; those not built yet are built by each for itself."""
        return LazyStateDict(self._items, self.report, self.progress)

    def materialise(self, progress: bool | None = None) -> dict[str, torch.Tensor]:
        """Build every tensor into a plain dict and leave this one empty, letting go of each source on the way."""
        names = list(self._items)
        if self.progress if progress is None else progress:
            from tqdm import tqdm

            names = tqdm(names, desc="converting", unit="tensor")
        return {name: self.pop(name) for name in names}


def rank_major(blocks: Sequence[torch.Tensor], ranks: int) -> torch.Tensor:
    """Blocks of [n_i, ...], each of whole ranks, as [sum n_i, ...] with all of rank 0 first, then all of rank 1, ..."""
    shares = [block.reshape(ranks, -1, *block.shape[1:]) for block in blocks]
    return torch.cat(shares, dim=1).flatten(0, 1)


def query_rows(q_proj: torch.Tensor, head_dim: int) -> torch.Tensor:
    """q_proj [N * 2 * head_dim, D], for each head query then gate -> the query rows [N * head_dim, D]."""
    return q_proj.unflatten(0, (-1, 2, head_dim))[:, 0].flatten(0, 1)


def gate_rows(q_proj: torch.Tensor, head_dim: int, kv_heads: int, padded_heads: int) -> torch.Tensor:
    """q_proj [N * 2 * head_dim, D] -> the gate rows [padded_heads * head_dim, D].

    Padding goes to the end of each KV group, where NxDI puts the zero query heads. A zero gate is a factor of one half
    on the output of a padded head, which o_proj then multiplies by zero.
    """
    gate = q_proj.unflatten(0, (-1, 2, head_dim))[:, 1]
    groups = gate.unflatten(0, (kv_heads, -1))
    padding = padded_heads // kv_heads - groups.shape[1]
    return F.pad(groups, (0, 0, 0, 0, 0, padding)).flatten(0, 2).contiguous()


def one_plus(weight: torch.Tensor) -> torch.Tensor:
    """The factor of a norm whose checkpoint weight is its distance from one; float32, as transformers adds them."""
    return 1.0 + weight.float()


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def conversion_plan(config: Qwen35InferenceConfig) -> list[Rule]:
    """How each tensor of this package's modules is built, from the configuration alone.

    Source names are without prefix, target names are those before NxDI's preshard hooks. Every source is in one rule.
    """
    c, ranks, dtype = config, config.neuron_config.tp_degree, config.neuron_config.torch_dtype
    hidden, wide, value_heads = c.hidden_size, c.intermediate_size, c.linear_num_value_heads
    padded_heads = c.padded_num_attention_heads(ranks)
    rules: list[Rule] = []

    def add(sources: dict[str, Shape], targets: dict[str, Build], dtype: torch.dtype = dtype) -> None:
        rules.append(Rule(sources, targets, dtype))

    def keep(name: str, *shape: int) -> None:
        add({name: shape}, {name: _same})

    def add_norm(name: str, size: int, target: str) -> None:
        add({name: (size,)}, {target: one_plus}, torch.float32)

    def add_ranks(target: str) -> None:
        add({}, {target: lambda: torch.arange(ranks)}, torch.int32)

    def split_qkv(rows: torch.Tensor) -> list[torch.Tensor]:
        return list(rows.split([c.key_dim, c.key_dim, c.value_dim]))

    if c.tie_word_embeddings:
        add({"embed_tokens.weight": (c.vocab_size, hidden)}, {"embed_tokens.weight": _same, "lm_head.weight": _same})
    else:
        keep("embed_tokens.weight", c.vocab_size, hidden)
        keep("lm_head.weight", c.vocab_size, hidden)
    add_norm("norm.weight", hidden, "norm.weight")
    add_ranks("rank_util.rank")
    for i, kind in enumerate(c.layer_types):
        layer = f"layers.{i}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            add_norm(layer + name, hidden, layer + name)
        keep(layer + "mlp.gate_proj.weight", wide, hidden)
        keep(layer + "mlp.up_proj.weight", wide, hidden)
        keep(layer + "mlp.down_proj.weight", hidden, wide)
        if kind == FULL_ATTENTION:
            attn = layer + "self_attn."
            add(
                {attn + "q_proj.weight": (2 * c.num_attention_heads * c.head_dim, hidden)},
                {
                    attn + "q_proj.weight": lambda q: query_rows(q, c.head_dim),
                    attn + "gate_proj.weight": lambda q: gate_rows(q, c.head_dim, c.num_key_value_heads, padded_heads),
                },
            )
            keep(attn + "k_proj.weight", c.num_key_value_heads * c.head_dim, hidden)
            keep(attn + "v_proj.weight", c.num_key_value_heads * c.head_dim, hidden)
            keep(attn + "o_proj.weight", hidden, c.num_attention_heads * c.head_dim)
            add_norm(attn + "q_norm.weight", c.head_dim, attn + "q_layernorm.weight")
            add_norm(attn + "k_norm.weight", c.head_dim, attn + "k_layernorm.weight")
            add_ranks(attn + "rank_util.rank")
        else:
            attn = layer + "linear_attn."
            add(
                {attn + "in_proj_qkv.weight": (c.conv_dim, hidden), attn + "in_proj_z.weight": (c.value_dim, hidden)},
                {attn + "in_proj_qkvz.weight": lambda qkv, z: rank_major([*split_qkv(qkv), z], ranks)},
            )
            add(
                {attn + "in_proj_b.weight": (value_heads, hidden), attn + "in_proj_a.weight": (value_heads, hidden)},
                {attn + "in_proj_ba.weight": lambda b, a: rank_major([b, a], ranks)},
            )
            add(
                {attn + "conv1d.weight": (c.conv_dim, 1, c.linear_conv_kernel_dim)},
                {attn + "conv1d.weight": lambda w: rank_major(split_qkv(w.squeeze(1)), ranks)},
            )
            # The decay is exp(-exp(A_log) * softplus(a + dt_bias)): an error here is exponentiated at every token.
            add({attn + "A_log": (value_heads,)}, {attn + "A_log.weight": _same}, torch.float32)
            add({attn + "dt_bias": (value_heads,)}, {attn + "dt_bias.weight": _same}, torch.float32)
            add({attn + "norm.weight": (c.linear_value_head_dim,)}, {attn + "norm.weight": _same}, torch.float32)
            keep(attn + "out_proj.weight", hidden, c.value_dim)
    return rules


def convert_checkpoint(
    source: Mapping[str, torch.Tensor], config: Qwen35InferenceConfig, progress: bool = False
) -> LazyStateDict:
    """Compare the checkpoint's names, shapes and dtypes with the plan, then return the targets unbuilt.

    Args:
        source: HF tensors, with any of the usual name prefixes. Tensors of a `CheckpointReader` are read when needed;
            those of a dict are held until built, so clear the dict to have `materialise` free them one by one.
        config: what the checkpoint must be, with the `tp_degree` to lay it out for.
        progress: show a bar in `materialise`.

    Raises:
        ConversionError: tensors that are missing, unexpected, mis-shaped, quantised or there twice. All are listed.
    """
    rules = conversion_plan(config)
    expected: dict[str, Shape] = {}
    for rule in rules:
        assert expected.keys().isdisjoint(rule.sources), f"two rules read {rule.sources.keys()}"
        expected |= rule.sources
    given, report, problems = _identify(source, config, expected)
    problems += [f"{name} is missing, shape {list(shape)}" for name, shape in expected.items() if name not in given]
    if problems:
        raise ConversionError(problems)

    items: dict[str, torch.Tensor | Callable[[], torch.Tensor]] = {}
    for rule in rules:
        loads = [_loader(source, given[name]) for name in rule.sources]
        for target, build in rule.targets.items():
            assert target not in items, f"two rules fill {target}"
            items[target] = _thunk(build, loads, rule.dtype)
    return LazyStateDict(items, report, progress)


def _identify(
    source: Mapping[str, torch.Tensor], config: Qwen35InferenceConfig, expected: Mapping[str, Shape]
) -> tuple[dict[str, str], ConversionReport, list[str]]:
    """(plan's name -> source's name, account of all source tensors, problems)."""
    given: dict[str, str] = {}
    report, problems = ConversionReport(), []
    for name in source:
        spec = _spec(source, name)
        plain = next(name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix))
        if plain.startswith(("visual.", "mtp.")):
            (report.vision if plain.startswith("visual.") else report.mtp).add(spec)
            continue
        tied = plain == "lm_head.weight" and config.tie_word_embeddings
        shape = expected.get("embed_tokens.weight" if tied else plain)
        if shape is None:
            problems.append(f"{name} is unexpected, shape {list(spec.shape)}")
        elif plain in given:
            problems.append(f"{name} and {given[plain]} are the same tensor, keep one")
        elif spec.shape != shape:
            problems.append(f"{name} has shape {list(spec.shape)}, expected {list(shape)}")
        elif spec.dtype not in _READABLE:
            problems.append(f"{name} is {spec.dtype}, not bfloat16, float16 or float32; use the unquantised checkpoint")
        elif not tied:
            report.consumed.add(spec)
        else:
            report.tied.add(spec)
        given.setdefault(plain, name)
    return given, report, problems


def _spec(source: Mapping[str, torch.Tensor], name: str) -> TensorSpec:
    if isinstance(source, CheckpointReader):
        return source.spec(name)
    return TensorSpec(tuple(source[name].shape), source[name].dtype)


def _loader(source: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    if isinstance(source, CheckpointReader):
        return lambda: source[name]
    tensor = source[name]  # held by itself, so that the source dict may be cleared
    return lambda: tensor


def _thunk(build: Build, loads: Sequence[Callable[[], torch.Tensor]], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: build(*(load() for load in loads)).to(dtype)
