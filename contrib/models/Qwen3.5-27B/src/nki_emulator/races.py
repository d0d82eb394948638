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
    """Per core and piece of one storage, the last meeting after which it was accessed; -1 if never."""

    piece_bytes: int
    written: list[np.ndarray]
    read: list[np.ndarray]
    found: set[tuple[int, bool, bool]] = field(default_factory=set)


class RaceDetector:
    """Remembers which core accessed which bytes of shared HBM since the cores last met."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
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
        mine = history.written if writing else history.read
        mine[core][where] = meeting
        for other in range(self.programs):
            if other == core:
                continue
            for theirs, other_writes in ((history.written, True), (history.read, False)):
                if not (writing or other_writes) or not bool((theirs[other][where] == meeting).any()):
                    continue
                kind = (core, writing, other_writes)
                if kind not in history.found:
                    history.found.add(kind)
                    return Conflict(other, other_writes)
        return None

    def _history(self, storage: Storage) -> _History:
        if id(storage) not in self._histories:
            total, piece = storage.raw.size, storage.granule
            while total // piece > _MAX_ENTRIES:
                piece *= 2
            count = -(-total // piece)
            written, read = ([np.full(count, -1, dtype=np.int32) for _ in range(self.programs)] for _ in range(2))
            self._histories[id(storage)] = (storage, _History(piece, written, read))
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
