"""What a run showed of a network's residual streams, and which of them can be rotated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Heads", "NormReads", "Part", "Stream", "Structure"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A parameter, or some rows of it, that gives values.

    Attributes:
        name: the parameter's.
        role: "rows" for a matrix `[out, ...]`, "columns" for a matrix `[in, out]`, "table" for an embedding `[n, out]`,
            "plain" for numbers `[..., out]` that are added as they are.
        start, stop: the outputs that are meant, of "rows".
        bias: name of the parameter that is added to the product; empty for none.
    """

    name: str
    role: str
    start: int = 0
    stop: int = 0
    bias: str = ""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Where the values of attention's heads stand among a layer's outputs.

    Attributes:
        part: the layer.
        width: outputs of a head.
        first: the first output of the first head.
        step: from the first output of a head to that of the next one.
        count: of heads.
    """

    part: Part
    width: int
    first: int
    step: int
    count: int


@dataclass(kw_only=True)
class NormReads:
    """What a norm reads, and who reads its output.

    Attributes:
        parts: of the sums that it normalizes.
        readers: matrices that its output is multiplied by.
        others: what else reads it, in words.
        is_mixed: it also normalizes other values.
    """

    parts: set[Part] = field(default_factory=set)
    readers: list[Part] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    is_mixed: bool = False


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One residual stream.

    Attributes:
        parts: all that is added into it.
        norms: paths of the norms that read it.
        direct: matrices that read it without a norm.
        obstacle: why it cannot be rotated, in words; empty if nothing shows.
    """

    parts: frozenset[Part]
    norms: tuple[str, ...]
    direct: tuple[Part, ...]
    obstacle: str


class Structure:
    """Collects what a run shows.

    Attributes:
        norms: by path.
        direct: what reads a sum without a norm: the sum's parts, and the matrix.
        heads: the values of attention, and the matrix that reads what attention makes of them.
    """

    def __init__(self) -> None:
        self.norms: dict[str, NormReads] = {}
        self.direct: list[tuple[frozenset[Part], Part]] = []
        self.heads: list[tuple[Heads, Part]] = []
        self._above: dict[Part, Part] = {}
        self._obstacles: dict[Part, str] = {}

    def joined(self, parts: Iterable[Part]) -> None:
        """Note that parts are added to each other."""
        roots = list(dict.fromkeys(self._root(part) for part in parts))
        for root in roots[1:]:
            self._above[root] = roots[0]

    def spoil(self, parts: Iterable[Part], reason: str) -> None:
        """Note why a sum of parts cannot be rotated.

        Args:
            parts: of the sum.
            reason: in words; the first one is kept.
        """
        for part in parts:
            self._obstacles.setdefault(part, reason)

    def norm_read(self, path: str, parts: frozenset[Part] | None) -> None:
        """Note that a norm ran.

        Args:
            path: of the norm.
            parts: of the sum that it ran on; None: it ran on something else.
        """
        reads = self.norms.setdefault(path, NormReads())
        if parts is None:
            reads.is_mixed = True
        else:
            self.joined((*reads.parts, *parts))
            reads.parts |= parts

    def streams(self) -> list[Stream]:
        """The sums that norms read, in the order of their first norm."""
        members: dict[Part, set[Part]] = {}
        for part in {*self._above, *self._above.values(), *(p for r in self.norms.values() for p in r.parts)}:
            members.setdefault(self._root(part), set()).add(part)
        norms: dict[Part, list[str]] = {}
        for path, reads in self.norms.items():
            if reads.parts:
                norms.setdefault(self._root(next(iter(reads.parts))), []).append(path)
        return [self._stream(root, frozenset(members[root]), tuple(paths)) for root, paths in norms.items()]

    def _stream(self, root: Part, parts: frozenset[Part], norms: tuple[str, ...]) -> Stream:
        obstacle = next((self._obstacles[part] for part in parts if part in self._obstacles), "")
        mixed = [path for path in norms if self.norms[path].is_mixed]
        if mixed and not obstacle:
            obstacle = f"{mixed[0]} also normalizes something else"
        direct = tuple(reader for read, reader in self.direct if self._root(next(iter(read))) == root)
        return Stream(parts=parts, norms=norms, direct=direct, obstacle=obstacle)

    def _root(self, part: Part) -> Part:
        while part in self._above:
            part = self._above[part]
        return part
