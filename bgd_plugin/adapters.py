"""Find and load the adapters that put this library into other frameworks.

An adapter is an entry point. What it needs is what the extra of its name asks for, in the metadata of the
distribution that declares it: so the core knows no framework, and an adapter of anybody's is treated alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from bgd_plugin.errors import BGDError

__all__ = ["Adapter", "Requirement", "adapter_names", "adapters", "load_adapter"]

_GROUP = "bgd_plugin.adapters"


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A distribution that an adapter needs.

    Attributes:
        name: of the distribution.
        wanted: the versions that the adapter knows, such as ">=3.6,<4"; empty if any.
        found: the version that is installed, or None.
        known: whether `found` is one of `wanted`.
    """

    name: str
    wanted: str
    found: str | None
    known: bool

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.name} is not installed"
        return f"{self.name} {self.found}" + ("" if self.known else f" (the adapter knows {self.wanted})")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that is installed, whether or not its framework is.

    Attributes:
        name: what `load_adapter` takes.
        module: what is imported.
        extra: what to install, such as "bgd-plugin[transformers]".
        requirements: what the extra asks for, and what is there.
        problem: why the adapter cannot be loaded, or None.
    """

    name: str
    module: str
    extra: str
    requirements: tuple[Requirement, ...]
    problem: str | None


def adapter_names() -> tuple[str, ...]:
    """Names of the adapters that are installed."""
    return tuple(sorted(_points()))


def adapters() -> tuple[Adapter, ...]:
    """Every adapter that is installed; each is imported to see whether it can be, and registered with its framework."""
    result = []
    for name, point in sorted(_points().items()):
        problem = None
        try:
            load_adapter(name)
        except BGDError as error:
            problem = str(error)
        result.append(
            Adapter(
                name=name,
                module=point.value,
                extra=_extra(point),
                requirements=tuple(_requirements(point)),
                problem=problem,
            )
        )
    return tuple(result)


def load_adapter(name: str) -> Any:
    """Import an adapter and register it with its framework; a second call does nothing more.

    Returns:
        the adapter's module.

    Raises:
        BGDError: no adapter of that name; its framework is missing or in a version that it does not know; or its
            framework cannot be imported.
    """
    points = _points()
    if name not in points:
        existing = ", ".join(sorted(points)) or "none"
        raise BGDError(f"there is no adapter {name!r}; installed adapters: {existing}")
    point = points[name]
    install = f"pip install '{_extra(point)}'"
    requirements = tuple(_requirements(point))
    unknown = [str(requirement) for requirement in requirements if requirement.found and not requirement.known]
    if unknown:
        raise BGDError(f"adapter {name!r} cannot be used: {'; '.join(unknown)}: {install}")
    try:
        module = point.load()
        module.register()
    except Exception as error:  # importing a framework runs its code: anything may come out of it
        # only now, since a framework may come by another distribution than the extra's
        missing = [str(requirement) for requirement in requirements if not requirement.found]
        why = "; ".join([f"{type(error).__name__}: {error}", *missing])
        raise BGDError(f"adapter {name!r} cannot be imported ({why}): {install}") from error
    return module


def _points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=_GROUP)}


def _extra(point: metadata.EntryPoint) -> str:
    distribution = point.dist.name if point.dist else "bgd-plugin"
    return f"{distribution}[{point.name.replace('_', '-')}]"


def _requirements(point: metadata.EntryPoint) -> Iterator[Requirement]:
    """What the extra of an adapter's name asks for."""
    from packaging.requirements import Requirement as Specified  # not needed by `import bgd_plugin`

    extra = point.name.replace("_", "-")
    for text in (point.dist.requires if point.dist else None) or ():
        asked = Specified(text)
        if not asked.marker or "extra" not in str(asked.marker) or not asked.marker.evaluate({"extra": extra}):
            continue
        try:
            found = metadata.version(asked.name)
        except metadata.PackageNotFoundError:
            found = None
        known = found is not None and asked.specifier.contains(found, prereleases=True)
        yield Requirement(name=asked.name, wanted=str(asked.specifier), found=found, known=known)
