"""The pieces of a network that is not a graph: modules whose kept output can replace another run.

A piece contains layers or norms, runs at most once per batch, does not modify its arguments, and returns tensors.
Pieces are nested: a model, its encoder, an encoder layer, its attention, a projection.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.recording import Recording
from bgd_plugin.calibration.returned import Returned
from bgd_plugin.calibration.trees import leaves, mapped

__all__ = ["Kept", "Pieces", "freed", "kept", "revived"]


@dataclass(frozen=True)
class _Gone:
    """A tensor on which nothing later depends; a later run gets zeros in its place."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


Kept = dict[str, Any]
"""Outputs of pieces by path; in a later run, copies of them replace the computation."""


class Pieces:
    """What the recordings of all batches have in common.

    Attributes:
        order: layers and norms as they first run.
        last: for each piece, the index in `order` of the last layer or norm in it.
        contents: for each piece, the names of the layers and norms in it.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._recordings = recordings
        self.order: list[str] = []
        for recording in recordings:
            self.order = _merged(self.order, list(dict.fromkeys(recording.order)))
        place = {name: index for index, name in enumerate(self.order)}
        contents: dict[str, set[str]] = {}
        for recording in recordings:
            for path, found in recording.contents.items():
                contents.setdefault(path, set()).update(found)
        unfit = set().union(*(r.unfit | {p for p, n in r.calls.items() if n > 1} for r in recordings))
        self.last = {
            path: max(place[name] for name in found) for path, found in contents.items() if path and path not in unfit
        }
        self.contents = {path: contents[path] for path in self.last}
        self._inside: dict[str, set[str]] = {}
        self._readers = [self._resolved(recording) for recording in recordings]

    def finished(self, place: int) -> set[str]:
        """Pieces whose layers and norms all come before the index `place` in `order`."""
        return {path for path, last in self.last.items() if last < place}

    def parent(self, batch: int, path: str) -> str:
        """The piece inside which the piece at `path` runs, in the batch at this index; "" for none."""
        parents = self._recordings[batch].parents
        path = parents.get(path, "")
        while path and path not in self.last:
            path = parents.get(path, "")
        return path

    def readers(self, batch: int, path: str) -> Collection[str]:
        """The readers of the piece at `path`, in the batch at this index: pieces, layers, norms, `ANSWER`."""
        return self._readers[batch].get(path, ())

    def together(self, name: str) -> list[str]:
        """The layer of this name, and those right after it that have the same input in every batch."""
        place = self.order.index(name)
        group = [name]
        for other in self.order[place + 1 :]:
            if not all(_shares(recording, other, group) for recording in self._recordings):
                break
            group.append(other)
        return group

    def stretch(self, place: int, most_bytes: float) -> tuple[list[list[str]], str]:
        """What a run can find in one go from a place in `order` on: the rest of a piece.

        Args:
            place: index in `order`.
            most_bytes: that the inputs in all batches may take.

        Returns:
            groups of layers that have the same input, and norms, one by one; and the path of the largest piece that
            contains the place and whose inputs take no more than that, or "" for the group at the place alone.
        """
        taken = itertools.accumulate(sum(r.sizes[name] for r in self._recordings) for name in self.order[place:])
        most = place + sum(size <= most_bytes for size in taken)
        around = [p for p, found in self.contents.items() if self.order[place] in found and self.last[p] < most]
        through = max(around, key=lambda path: (self.last[path], len(self.contents[path])), default="")
        end = self.last[through] + 1 if through else place + 1
        groups: list[list[str]] = []
        while place < end:
            groups.append(self.together(self.order[place]))
            place += len(groups[-1])
        return groups, through

    def returning(self, batch: int, name: str) -> tuple[str, Returned] | None:
        """The largest piece that returns a layer's output, as the batch at this index shows, and its form of it.

        Args:
            batch: its index.
            name: of the layer, the last one in the piece.
        """
        recording, place = self._recordings[batch], self.order.index(name)
        found = [
            path
            for path, returned in recording.returned.items()
            if returned.layer == name and self.last.get(path) == place and name in recording.contents.get(path, ())
        ]
        largest = max(found, key=lambda path: len(self.contents[path]), default=None)
        return None if largest is None else (largest, recording.returned[largest])

    def inside(self, path: str) -> set[str]:
        """Pieces that have no other layers and norms than the piece at `path`, which is not one of them."""
        if path not in self._inside:
            around = self.contents.get(path, set())
            self._inside[path] = {p for p, found in self.contents.items() if p != path and found <= around}
        return self._inside[path]

    def blocks(self, layers: Collection[str], most: int) -> list[str]:
        """The largest pieces with one to `most` of these layers, in the order in which they run.

        Args:
            layers: names of layers.
            most: maximum number of layers in a piece.

        Returns:
            paths of pieces.
        """
        counts = {path: len(found & set(layers)) for path, found in self.contents.items()}
        fitting = {path for path, count in counts.items() if 0 < count <= most}
        batches = range(len(self._recordings))
        largest = [p for p in fitting if not any(self.parent(b, p) in fitting for b in batches)]
        return sorted(largest, key=lambda path: (self.first(path), path))

    def first(self, path: str) -> int:
        """The index in `order` of the first layer or norm in the piece at `path`."""
        return min(self.order.index(name) for name in self.contents[path])

    def _resolved(self, recording: Recording) -> dict[str, set[str]]:
        """The readers of each piece; a reader that is not a piece is replaced by its own readers."""
        result: dict[str, set[str]] = {}
        for path in self.last:
            found: set[str] = set()
            waiting, seen = list(recording.readers.get(path, ())), {path}
            while waiting:
                reader = waiting.pop()
                if reader in recording.calls and reader not in self.last and reader not in seen:
                    waiting += recording.readers.get(reader, ())
                elif reader not in seen:
                    found.add(reader)
                seen.add(reader)
            result[path] = found
        return result


def _shares(recording: Recording, name: str, group: Sequence[str]) -> bool:
    """Whether a layer's only input is that of the group, or none of them runs."""
    counts = [recording.counts[other] for other in (*group, name)]
    return not any(counts) or (counts == [1] * len(counts) and recording.shares.get(name) in group)


def kept(output: Any) -> Any:
    """A copy of a piece's output, which later code cannot write to."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), output)


def _gone(output: Any) -> Any:
    """A kept output without its values."""
    return pytree.tree_map_only(Tensor, lambda t: _Gone(t.shape, t.dtype, t.device), output)


def revived(output: Any, blanks: dict[Any, Tensor]) -> Any:
    """A copy of a kept output, for a run that may write to it.

    Args:
        output: the kept output.
        blanks: zeros that replace values on which nothing depends, one tensor per shape, dtype and device; extended.
    """

    def alive(leaf: Any) -> Any:
        if not isinstance(leaf, _Gone):
            return leaf.clone() if isinstance(leaf, Tensor) else leaf
        if leaf not in blanks:
            blanks[leaf] = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        return blanks[leaf]

    return mapped(alive, output)


def _has_values(output: Any) -> bool:
    """Whether a kept output still has its values."""
    return not any(isinstance(leaf, _Gone) for leaf in leaves(output))


def _merged(known: list[str], seen: list[str]) -> list[str]:
    """Merge two orders: a new name comes right after the one that it followed."""
    result = list(known)
    place = 0
    for name in seen:
        if name in result:
            place = result.index(name) + 1
        else:
            result.insert(place, name)
            place += 1
    return result


def _needed(pieces: Pieces, batch: int, path: str, *, done: Collection[str], stored: Collection[str]) -> bool:
    """Whether a later layer, norm or piece reads a piece's output."""
    return not all(reader in done or reader in stored for reader in pieces.readers(batch, path))


def freed(pieces: Pieces, batch: int, kept_outputs: Kept, *, done: Collection[str], stored: Collection[str]) -> Kept:
    """The kept outputs that are still needed: none inside a piece that is kept itself, and no values without a reader.

    Args:
        pieces: of the network.
        batch: index of the batch.
        kept_outputs: the outputs kept so far.
        done: layers and norms that will not run again.
        stored: pieces whose output is kept.
    """
    result: Kept = {}
    for path, output in kept_outputs.items():
        if pieces.parent(batch, path) in stored:
            continue
        is_needed = _needed(pieces, batch, path, done=done, stored=stored)
        result[path] = output if is_needed or not _has_values(output) else _gone(output)
    return result
