# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Accesses of two cores to the same bytes of HBM that nothing orders.

Programs run one after the other here and side by side on a device. What two of them do between the same two meetings
(``core_barrier`` or ``sendrecv``) is concurrent; where one writes bytes that the other reads or writes, the result
depends on the device's timing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .memory import NkiTensor, Storage

#: Entries of one tensor's tracker; larger tensors are tracked in larger pieces.
_MAX_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Conflict:
    """The other side of a race.

    Attributes:
        core: which core.
        writing: whether it writes.
    """

    core: int
    writing: bool


@dataclass
class _History:
    """What was accessed of one storage.

    Attributes:
        piece_bytes: bytes of one entry.
        last: by (core, writing), for each piece the last meeting after which it was accessed; -1 if never.
        found: kinds of conflict that were reported: core, whether it writes, whether the other one does.
    """

    piece_bytes: int
    last: dict[tuple[int, bool], np.ndarray] = field(default_factory=dict)
    found: set[tuple[int, bool, bool]] = field(default_factory=set)


class RaceDetector:
    """Remembers which core accessed which bytes of shared HBM since the cores last met."""

    def __init__(self) -> None:
        # Storages are kept alive by the launch, so that their identity is unique.
        self._histories: dict[int, tuple[Storage, _History]] = {}

    def access(self, tensor: NkiTensor, core: int, meeting: int, *, writing: bool) -> Conflict | None:
        """Record an access; a conflict with another core, the first time that this tensor shows one of its kind.

        Args:
            tensor: what is accessed.
            core: program that accesses it.
            meeting: how often the program has met the others.
            writing: whether it writes.
        """
        history = self._history(tensor.storage)
        where = _pieces(tensor, history.piece_bytes)
        if (core, writing) not in history.last:
            pieces = -(-tensor.storage.raw.size // history.piece_bytes)
            history.last[core, writing] = np.full(pieces, -1, dtype=np.int32)
        history.last[core, writing][where] = meeting
        for (other, other_writes), last in history.last.items():
            kind = (core, writing, other_writes)
            if other == core or not (writing or other_writes) or kind in history.found:
                continue
            if bool((last[where] == meeting).any()):
                history.found.add(kind)
                return Conflict(other, other_writes)
        return None

    def _history(self, storage: Storage) -> _History:
        if id(storage) not in self._histories:
            piece = storage.granule
            while storage.raw.size // piece > _MAX_ENTRIES:
                piece *= 2
            self._histories[id(storage)] = (storage, _History(piece))
        return self._histories[id(storage)][1]


def _pieces(tensor: NkiTensor, piece: int) -> slice | np.ndarray:
    """Pieces of the storage that ``tensor`` touches."""
    starts, length = tensor.byte_runs()
    if starts.size == 1:
        return slice(int(starts[0]) // piece, -(-(int(starts[0]) + length) // piece))
    first = starts // piece
    count = int((-(-(starts + length) // piece) - first).max()) if starts.size else 0
    reached = first[:, None] + np.arange(count)
    return reached[reached * piece < starts[:, None] + length]
