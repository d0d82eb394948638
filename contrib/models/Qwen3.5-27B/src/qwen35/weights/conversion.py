# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""From checkpoint tensors to module tensors: the rules, one matcher of names for all of them, and the lazy result.

A `Rule` says which source tensors there must be and what is built of them. A `RuleSet` holds the rules of one part of a
checkpoint (the decoder in `text_rules`, the vision encoder in `vision_rules`) and knows which names belong to it.
`convert` compares names, shapes and dtypes with a rule set before it reads any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from .checkpoint import CheckpointReader, TensorSpec

Build = Callable[..., torch.Tensor]
Shape = tuple[int, ...]

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


class Skipped(Enum):
    """Why a source tensor is not read."""

    VISION = "vision"
    MTP = "MTP"
    TIED = "lm_head tied to the embedding"


@dataclass
class ConversionReport:
    """How many source tensors, of how many bytes, went where."""

    consumed: Tally = field(default_factory=Tally)
    skipped: dict[Skipped, Tally] = field(default_factory=lambda: {reason: Tally() for reason in Skipped})

    def __str__(self) -> str:
        skipped = ", ".join(f"{reason.value} {tally}" for reason, tally in self.skipped.items())
        return f"converted {self.consumed}; skipped: {skipped}"


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """The `Build` of a target that has the values of its source."""
    return tensor


@dataclass(frozen=True)
class Rule:
    """Some source tensors, with the shapes they must have, and the targets built from exactly these."""

    sources: dict[str, Shape]
    targets: dict[str, Build]  # each takes the source tensors in the order of `sources`
    dtype: torch.dtype  # of the targets

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
        prefixes: what the checkpoint may put before a source's name, tried in this order. The first that fits is cut
            off. A tensor that starts with none of them is of another part and is ignored. The last is shown before
            the name of a missing tensor.
        skipped: starts of names, after the prefix, of tensors that other rule sets read; these are only counted.
        tied: tensors that need not be there because they repeat a source: name -> the source's name. One that is there
            must have the source's shape, and is not read.
    """

    rules: Sequence[Rule]
    prefixes: tuple[str, ...]
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def plain_name(self, name: str) -> str | None:
        """`name` without its prefix, or None where it is of another part of the checkpoint."""
        return next((name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)), None)

    def match(self, source: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], ConversionReport]:
        """Find the checkpoint's tensor for every source of the rules, without reading any.

        Returns:
            names: name in the rules -> name in the checkpoint.
            report: the account of all tensors of the checkpoint that are not ignored.

        Raises:
            ConversionError: tensors that are missing, unexpected, mis-shaped, quantised or there twice. All are listed.
        """
        expected: dict[str, Shape] = {}
        for rule in self.rules:
            assert expected.keys().isdisjoint(rule.sources), f"two rules read {rule.sources.keys()}"
            expected |= rule.sources
        names: dict[str, str] = {}
        report, problems = ConversionReport(), []
        for name in source:
            plain = self.plain_name(name)
            if plain is None:
                continue
            spec = _spec(source, name)
            reason = next((reason for start, reason in self.skipped.items() if plain.startswith(start)), None)
            if reason is not None:
                report.skipped[reason].add(spec)
                continue
            shape = expected.get(self.tied.get(plain, plain))
            if shape is None:
                problems.append(f"{name} is unexpected, shape {list(spec.shape)}")
            elif plain in names:
                problems.append(f"{name} and {names[plain]} are the same tensor, keep one")
            elif spec.shape != shape:
                problems.append(f"{name} has shape {list(spec.shape)}, expected {list(shape)}")
            elif spec.dtype not in _READABLE:
                problems.append(
                    f"{name} is {spec.dtype}, not bfloat16, float16 or float32; use the unquantised checkpoint"
                )
            else:
                (report.skipped[Skipped.TIED] if plain in self.tied else report.consumed).add(spec)
            names.setdefault(plain, name)
        problems += [
            f"{self.prefixes[-1]}{name} is missing, shape {list(shape)}"
            for name, shape in expected.items()
            if name not in names
        ]
        if problems:
            raise ConversionError(problems)
        return names, report


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


def convert(source: Mapping[str, torch.Tensor], rule_set: RuleSet, progress: bool = False) -> LazyStateDict:
    """Match the checkpoint with the rules, then return the targets unbuilt.

    Args:
        source: HF tensors. Those of a `CheckpointReader` are read when a target of theirs is built. Those of a dict are
            held until then, so clear the dict to have `materialise` free them one by one.
        rule_set: the part of the checkpoint to convert.
        progress: show a bar in `materialise`.

    Raises:
        ConversionError: as `RuleSet.match`.
    """
    names, report = rule_set.match(source)
    items: dict[str, torch.Tensor | Callable[[], torch.Tensor]] = {}
    for rule in rule_set.rules:
        loads = [_loader(source, names[name]) for name in rule.sources]
        for target, build in rule.targets.items():
            assert target not in items, f"two rules fill {target}"
            items[target] = _builder(build, loads, rule.dtype)
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


def _loader(source: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    if isinstance(source, CheckpointReader):
        return lambda: source[name]
    tensor = source[name]  # held by itself, so that the source dict may be cleared
    return lambda: tensor


def _builder(
    build: Build, loads: Sequence[Callable[[], torch.Tensor]], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    return lambda: build(*(load() for load in loads)).to(dtype)
