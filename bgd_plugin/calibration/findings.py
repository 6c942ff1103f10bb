"""What runs of the compressed and of the float network find, batch by batch, in the store of the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bgd_plugin.calibration.partial import PartialRun
from bgd_plugin.calibration.store import BatchStore, Shelf

__all__ = ["Findings"]

_KINDS = ("calls", "skips", "products")


class Findings:
    """Inputs of layers and norms, and what else a `PartialRun` finds, on either side.

    Args:
        store: of the batches.
        prefix: of the entries in the content of a batch.
        sides: "student" and "reference"; where one network is both, "reference".
    """

    def __init__(self, store: BatchStore, prefix: str, sides: Sequence[str]) -> None:
        self._store, self._prefix, self._sides = store, prefix, sides
        self._calls: dict[str, int] = {}
        self._products: dict[str, int] = {}
        self._skips: dict[str, int] = {}

    def put(self, content: dict[str, Any], runs: Mapping[str, PartialRun], names: Sequence[str]) -> bool:
        """Keep what runs on one batch have found, and drop what they found of layers that are not asked for any more.

        Args:
            content: of the batch.
            runs: by side; a side without a run keeps what an earlier one found.
            names: the layers, or the norm, that are asked for now; on both sides they have been found.

        Returns:
            whether a run has executed other operators than the recorded one. The student's inputs then stand for the
            float network's, as where these have other shapes.
        """
        for side, run in runs.items():
            content[self._entry(side)] = {kind: getattr(run, kind) for kind in _KINDS} | {"strayed": run.strayed}
        mine, theirs = (content[self._entry(side)] for side in ("student", "reference"))
        if "reference" not in runs:
            ahead = set(list(theirs["calls"])[list(theirs["calls"]).index(names[0]) :])
            theirs |= {kind: {name: v for name, v in theirs[kind].items() if name in ahead} for kind in _KINDS}
        has_strayed = bool(mine["strayed"] or theirs["strayed"])
        for name in names:
            inputs = [side["calls"][name] for side in (mine, theirs)]
            if has_strayed or [x.shape for x, _ in inputs[0]] != [x.shape for x, _ in inputs[1]]:
                theirs["calls"][name] = inputs[0]
                theirs["products"].pop(name, None)
            skips = [side["skips"].get(name) for side in (mine, theirs)]
            fits = skips[0] is not None and skips[1] is not None and skips[0].shape == skips[1].shape
            self._calls[name] = self._calls.get(name, 0) + len(inputs[0])
            self._skips[name] = self._skips.get(name, 0) + fits
            self._products[name] = self._products.get(name, 0) + (name in theirs["products"])
        return has_strayed

    def clear(self, names: Sequence[str]) -> None:
        """Begin anew with some layers, or a norm: no batch has been run.

        Args:
            names: of these.
        """
        for name in names:
            self._calls[name] = self._skips[name] = self._products[name] = 0

    def calls(self, side: str, name: str) -> Sequence[list[Any]]:
        """The inputs of a layer or norm, of any shape, and their geometries.

        Args:
            side: "student" or "reference".
            name: of the layer or norm.

        Returns:
            for each batch, a list of pairs.
        """
        return self._shelf(side, "calls", name)

    def count(self, name: str) -> int:
        """How many inputs of a layer or norm have been found in the compressed network, in all batches.

        Args:
            name: of the layer or norm.
        """
        return self._calls.get(name, 0)

    def skips(self, name: str) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """What a layer's outputs are added to in the compressed and in the float network.

        Args:
            name: the layer's.

        Returns:
            for each batch, a tensor of the output's shape, on either side; None if there is none in some batch.
        """
        if self._skips.get(name) != len(self._store):
            return None
        return self._shelf("student", "skips", name), self._shelf("reference", "skips", name)

    def products(self, name: str) -> Callable[[int], Tensor] | None:
        """The float network's inputs of a layer times its weight, `[positions, rows]`, of the batch at an index.

        Args:
            name: the layer's.

        Returns:
            a function of the index; None if they are not known of all batches.
        """
        has_all = self._products.get(name) == len(self._store)
        return self._shelf("reference", "products", name).__getitem__ if has_all else None

    def _shelf(self, side: str, kind: str, name: str) -> Sequence[Any]:
        return _Found(self._store, self._entry(side), kind, name)

    def _entry(self, side: str) -> str:
        return f"{self._prefix}{side if side in self._sides else 'reference'} found"


class _Found(Shelf):
    """What was found of one layer or norm, batch by batch; reading an element opens its batch."""

    def __init__(self, store: BatchStore, entry: str, kind: str, name: str) -> None:
        super().__init__(store, entry)
        self._kind, self._of = kind, name

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index)[self._kind][self._of]
