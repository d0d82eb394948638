# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""From checkpoint tensors to module tensors: the rules, one matcher of names for all of them, and the lazy result.

A `Rule` says which source tensors there must be and what is built of them. A `RuleSet` holds the rules of one part of a
checkpoint (the decoder in `text_rules`, the vision encoder in `vision_rules`) and knows which names belong to it.
`convert` compares names, shapes and dtypes with a rule set before it reads any tensor.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile

import torch

from ..error_text import first_three, one_line
from ..fp8_form import FP8, Fp8Form
from ..nki_kernels.library_mlp import SCALE_ROWS
from .checkpoint import INDEX_FILE, CheckpointReader, TensorSpec
from .foreign import QUANTISED, foreign_form, maker_beside
from .fp8 import (
    NO_SCALES,
    ROUNDED_AGAIN,
    ScaledMatrix,
    Scales,
    build_weight,
    contradiction,
    find_scales,
    quantise_per_channel,
    scale_per_channel,
)

logger = logging.getLogger(__name__)

Build = Callable[..., torch.Tensor]
Load = Callable[[], torch.Tensor | ScaledMatrix]
Shape = tuple[int, ...]

_READABLE = (torch.bfloat16, torch.float16, torch.float32)
_WRAPPERS = {
    "_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model"
}  # fmt: skip
"""Parts of names that torch.compile, data-parallel training, FSDP, activation checkpointing and PEFT add."""

_MODELS = {"model", "language_model"}


class ConversionError(ValueError):
    """A checkpoint whose tensors are not those of the configuration; of each kind of difference, the first three."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [*map(one_line, problems)]
        super().__init__(
            "the checkpoint does not fit its configuration:\n"
            + "\n".join(f"  - {line}" for line in self.problems)
            + "\n  check that config.json and the weights are of the same checkpoint"
        )


@dataclass
class Tally:
    """How many tensors, of how many bytes, and the names of all."""

    names: list[str] = field(default_factory=list)
    nbytes: int = 0

    @property
    def count(self) -> int:
        return len(self.names)

    def add(self, name: str, spec: TensorSpec) -> None:
        self.names.append(name)
        self.nbytes += spec.nbytes

    def __str__(self) -> str:
        return f"{self.count} tensors ({self.nbytes / 1e9:.3f} GB)"


class Skipped(Enum):
    """Why a source tensor is not read."""

    VISION = "vision"
    MTP = "MTP"
    LAYER = "layers beyond num_hidden_layers"
    BUFFER = "saved buffers"
    HEAD = "heads of other tasks"


BUFFERS = {
    r"(.+\.)?rotary(_pos)?_emb\..+": Skipped.BUFFER,
    r"(.+\.)?((original_)?inv_freq|(cos|sin)_cached|masked_bias|position_ids|_extra_state)": Skipped.BUFFER,
}
"""Names of tensors that follow from the configuration, or that training kept for itself; for `RuleSet.skipped`."""


@dataclass
class ConversionReport:
    """How many source tensors, of how many bytes, went where."""

    consumed: Tally = field(default_factory=Tally)
    skipped: dict[Skipped, Tally] = field(default_factory=lambda: {reason: Tally() for reason in Skipped})
    listed_only: list[str] = field(default_factory=list)
    """Names that the checkpoint's index has and its files have not, and that nothing is built from."""

    def __str__(self) -> str:
        skipped = [f"{reason.value} {tally}" for reason, tally in self.skipped.items() if tally.count]
        skipped += [f"in {INDEX_FILE} only {len(self.listed_only)} tensors"] if self.listed_only else []
        return f"converted {self.consumed}; skipped: {', '.join(skipped) or 'none'}"

    def unusual(self) -> list[str]:
        """A line for each kind of skipped tensor that published checkpoints have not."""
        kinds = {reason.value: tally.names for reason, tally in self.skipped.items()}
        del kinds[Skipped.VISION.value], kinds[Skipped.MTP.value]
        kinds[f"tensors that {INDEX_FILE} lists and no file has"] = self.listed_only
        return [f"skipped {kind}: {first_three(names)}" for kind, names in kinds.items() if names]


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """The `Build` of a target that has the values of its source."""
    return tensor


@dataclass(frozen=True)
class Rule:
    """Some source tensors, with the shapes they must have, and the targets built from exactly these."""

    sources: dict[str, Shape]
    targets: dict[str, Build]  # each takes the source tensors in the order of `sources`
    dtype: torch.dtype
    """Of the targets. Where it is fp8, each target X.weight has a second, X.scale [rows, 1] float32, and builds must
    move whole rows or add rows of zeros."""
    transposed: bool = False
    """Whether targets are the transposes of what is built; X.scale is then [`SCALE_ROWS`, rows], of equal rows, as
    nki-library's kernels take it."""

    @classmethod
    def of_one(
        cls, name: str, shape: Shape, dtype: torch.dtype, build: Build | None = None, target: str | None = None
    ) -> Rule:
        """One source for one target, which by default has the source's name and values."""
        return cls({name: shape}, {target or name: build or unchanged}, dtype)


@dataclass(frozen=True)
class RuleSet:
    """The rules of one part of a checkpoint, and which of the checkpoint's names are of that part.

    Args:
        rules: their sources have names without prefix. No source is in two rules, no target is filled by two.
        prefixes: what the checkpoint may put before a source's name, after `unwrapped`, tried in this order. The first
            that fits is cut off. A tensor that starts with none of them is of another part and is ignored. The last is
            shown before the name of a missing tensor.
        skipped: patterns of names, after the prefix, of tensors that are only counted: pattern of the start -> why.
    """

    rules: Sequence[Rule]
    prefixes: tuple[str, ...]
    skipped: Mapping[str, Skipped] = field(default_factory=dict)

    def plain_name(self, name: str) -> str | None:
        """`name` without wrappers and prefix, or None where it is of another part of the checkpoint."""
        bare = unwrapped(name)
        return next((bare.removeprefix(prefix) for prefix in self.prefixes if bare.startswith(prefix)), None)

    def match(
        self, source: Mapping[str, torch.Tensor], scales: Scales = NO_SCALES
    ) -> tuple[dict[str, str], ConversionReport]:
        """Find the checkpoint's tensor for every source of the rules, without reading any.

        Args:
            source: HF tensors.
            scales: which of them scale which.

        Returns:
            names: name in the rules -> name in the checkpoint.
            report: the account of all tensors of the checkpoint that are not ignored.

        Raises:
            ConversionError: tensors that are missing, unexpected, mis-shaped, wrongly scaled, quantised or there twice.
                A checkpoint in a form that is not read at all has one line; else every kind is listed, with its first
                three tensors.
        """
        expected: dict[str, Shape] = {}
        for rule in self.rules:
            assert expected.keys().isdisjoint(rule.sources), f"two rules read {rule.sources.keys()}"
            expected |= rule.sources
        names: dict[str, str] = {}
        report = ConversionReport()
        kinds = ("unexpected", "scaled wrongly", "there twice", "of another shape", "of such a dtype", "missing")
        problems: dict[str, list[str]] = {kind: [] for kind in kinds}
        unexpected: list[str] = []
        for name in source:
            plain = self.plain_name(name)
            if plain is None:
                continue
            spec, shape = _spec(source, name), expected.get(plain)
            if shape is None:
                reason = next((reason for start, reason in self.skipped.items() if re.match(start, plain)), None)
                if reason is not None:
                    report.skipped[reason].add(name, spec)
                elif name in scales.beside:
                    report.consumed.add(name, spec)  # read with its weight
                elif name in scales.problems:
                    problems["scaled wrongly"].append(scales.problems[name])
                else:
                    unexpected.append(name)
                    problems["unexpected"].append(f"{name} is unexpected, shape {list(spec.shape)}")
                continue
            if name in scales.problems:
                problems["scaled wrongly"].append(scales.problems[name])
            elif plain in names:
                problems["there twice"].append(f"{name} and {names[plain]} are the same tensor, keep one")
            elif spec.shape != shape:
                problems["of another shape"].append(f"{name} has shape {list(spec.shape)}, expected {list(shape)}")
            elif spec.dtype not in _READABLE and name not in scales.of:
                problems["of such a dtype"].append(
                    f"{name} is {spec.dtype}, not bfloat16, float16 or float32; use the unquantised checkpoint"
                )
            else:
                report.consumed.add(name, spec)
            names.setdefault(plain, name)
        reader = source if isinstance(source, CheckpointReader) else None
        listed = {self.plain_name(name): name for name in reader.listed_only} if reader else {}
        missing = [name for name in expected if name not in names]
        for name in missing:
            line = f"{self.prefixes[-1]}{name} is missing, shape {list(expected[name])}"
            if reader and name in listed:
                file = reader.listed_only[listed[name]]
                line += f": {INDEX_FILE} puts it in {file}, which lacks it; download both again"
            problems["missing"].append(line)
        report.listed_only = [name for plain, name in listed.items() if plain is not None and plain not in expected]
        if any(problems.values()):
            directory = reader.directory if reader else None
            whole = foreign_form(unexpected, directory) or _unknown_prefix(missing, {*unexpected})
            lines = [whole] if whole else [line for kind in problems.items() for line in _summed_up(*kind)]
            if not whole and (maker := maker_beside(directory)):
                lines.append(f"a file beside the weights says that they are quantised with {maker}; {QUANTISED}")
            raise ConversionError(lines)
        return names, report


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers around the model add to it, and with at most one "model." in front."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    models = len(list(takewhile(_MODELS.__contains__, parts)))
    return ".".join(["model"] * (models > 0) + parts[models:])


def _summed_up(kind: str, lines: list[str]) -> list[str]:
    """The first three lines, and how many more there are."""
    more = len(lines) - 3
    rest = f"{more} more tensor{' is' if more == 1 else 's are'} {kind}"
    return lines[:3] + [rest] * (more > 0)


def _unknown_prefix(missing: Collection[str], names: Collection[str]) -> str | None:
    """The problem of a checkpoint that puts a prefix nobody knows before the names of all missing tensors."""
    for sample in missing:
        for name in names:
            prefix = name.removesuffix(sample)
            if name.endswith("." + sample) and all(prefix + other in names for other in missing):
                return f"the names of {len(missing)} tensors start with {prefix!r} ({name}); save them without it"
        return None
    return None


class LazyStateDict(MutableMapping[str, torch.Tensor]):
    """A state dict whose tensors are built when they are first asked for, and kept from then on.

    Keeping them matters because NxD asks for each tensor several times: to compare storages, to compare dtypes, and to
    cut a block for every rank. A copy shares the tensors built so far and builds the others for itself, so that a
    caller who wants few tensors in memory at a time works on a copy and drops it.
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
        """Another dict of the same tensors; each of the two builds those that are not built yet for itself."""
        return LazyStateDict(self._items, self.report, self.progress)

    def materialise(self, progress: bool | None = None) -> dict[str, torch.Tensor]:
        """Build every tensor into a plain dict, and empty this one, so that each source is freed once it is used.

        Args:
            progress: show a bar; by default what the dict was made with.
        """
        names = list(self._items)
        if self.progress if progress is None else progress:
            from tqdm import tqdm

            names = tqdm(names, desc="converting", unit="tensor")
        return {name: self.pop(name) for name in names}


def convert(
    source: Mapping[str, torch.Tensor], rule_set: RuleSet, progress: bool = False, form: Fp8Form | None = None
) -> LazyStateDict:
    """Match the checkpoint with the rules, then return the targets unbuilt.

    Args:
        source: HF tensors. Those of a `CheckpointReader` are read when a target of theirs is built. Those of a dict are
            held until then, so clear the dict to have `materialise` free them one by one.
        rule_set: the part of the checkpoint to convert.
        progress: show a bar in `materialise`.
        form: how fp8 weights of the checkpoint are scaled, as its config.json says; None where it says nothing.

    Raises:
        ConversionError: as `RuleSet.match`; or config.json says that weights are in fp8, and none is.
    """
    scales = find_scales({name: _spec(source, name) for name in source}, form)
    names, report = rule_set.match(source, scales)
    if form is not None and not scales.of:
        raise ConversionError(
            ["quantization_config in config.json says that weights are in fp8, and none is; take both anew"]
        )
    logger.info("%s", report)
    for line in report.unusual():
        logger.warning("%s", line)
    if listed := scales.contradictions():
        logger.warning("%s", contradiction(listed))
    if form is not None and form.block is not None and any(rule.dtype == FP8 for rule in rule_set.rules):
        logger.warning("%s", ROUNDED_AGAIN)
    items: dict[str, torch.Tensor | Callable[[], torch.Tensor]] = {}
    for rule in rule_set.rules:
        loads = [_loader(source, names[name], scales) for name in rule.sources]
        for target, build in rule.targets.items():
            assert target not in items, f"two rules fill {target}"
            if rule.dtype == FP8:
                items |= _fp8_builders(target, build, loads, rule.transposed)
            else:
                items[target] = _builder(_then_transposed(build) if rule.transposed else build, loads, rule.dtype)
    return LazyStateDict(items, report, progress)


def rank_major(blocks: Sequence[torch.Tensor], ranks: int) -> torch.Tensor:
    """Put the rows of several blocks in the order in which NxD shards them, so that each rank gets a share of each.

    NxD gives rank r the r-th contiguous part of a sharded dimension.

    Args:
        blocks: [n_i, ...] each, n_i a multiple of `ranks`.
        ranks: how many there are.

    Returns:
        [sum n_i, ...]: the first share of every block, then the second share of every block, and so on.
    """
    shares = [block.reshape(ranks, -1, *block.shape[1:]) for block in blocks]
    return torch.cat(shares, dim=1).flatten(0, 1)


def _spec(source: Mapping[str, torch.Tensor], name: str) -> TensorSpec:
    if isinstance(source, CheckpointReader):
        return source.spec(name)
    return TensorSpec(tuple(source[name].shape), source[name].dtype)


def _loader(source: Mapping[str, torch.Tensor], name: str, scales: Scales) -> Load:
    load = _plain_loader(source, name)
    if name not in scales.of:
        return load
    load_scale = _plain_loader(source, scales.of[name])
    return lambda: scales.matrix(name, load(), load_scale())


def _plain_loader(source: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    if isinstance(source, CheckpointReader):
        return lambda: source[name]
    tensor = source[name]  # held by itself, so that the source dict may be cleared
    return lambda: tensor


def _builder(build: Build, loads: Sequence[Load], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def built() -> torch.Tensor:
        sources = (load() for load in loads)
        return build(*(s.dequantised(dtype) if isinstance(s, ScaledMatrix) else s for s in sources)).to(dtype)

    return built


def _then_transposed(build: Build) -> Build:
    return lambda *sources: build(*sources).T.contiguous()


def _fp8_builders(
    target: str, build: Build, loads: Sequence[Load], transposed: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """The weight of a target in fp8, and its scales: the rows of both are moved alike."""

    def weight() -> torch.Tensor:
        rows = build_weight(build, [quantise_per_channel(target, load()) for load in loads])
        return rows.T.contiguous() if transposed else rows

    def scale() -> torch.Tensor:
        rows = build(*(scale_per_channel(target, load()) for load in loads))
        return rows.T.repeat(SCALE_ROWS, 1) if transposed else rows

    return {target: weight, target.removesuffix("weight") + "scale": scale}
