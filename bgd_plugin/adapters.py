"""Find and load the adapters that make this library available in other frameworks.

An adapter is an entry point. Its requirements are those of the extra with its name, in the metadata of the
distribution that declares it. So the core knows no framework, and third-party adapters are treated alike.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from bgd_plugin.errors import BGDError

__all__ = ["Adapter", "Requirement", "adapters", "load_adapter", "notify_hosts"]

_GROUP = "bgd_plugin.adapters"
_HOSTS = "bgd_plugin.hosts"

_logger = logging.getLogger(__name__)
_waiting: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A distribution that an adapter needs.

    Attributes:
        name: the distribution's name.
        wanted: the supported versions, such as ">=3.6,<4"; empty for any.
        found: the installed version, or None.
        known: whether `found` is supported.
    """

    name: str
    wanted: str
    found: str | None
    known: bool

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.name} is not installed"
        return f"{self.name} {self.found}" + ("" if self.known else f" (the adapter supports {self.wanted})")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An installed adapter, whether or not its framework is installed.

    Attributes:
        name: the name for `load_adapter`.
        module: the module that is imported.
        extra: what to install, such as "bgd-plugin[transformers]".
        requirements: the distributions that the extra requires.
        problem: why the adapter cannot be loaded, or None.
    """

    name: str
    module: str
    extra: str
    requirements: tuple[Requirement, ...]
    problem: str | None


def adapters(*, imported: bool = False) -> tuple[Adapter, ...]:
    """All installed adapters, and what is wrong with them.

    Args:
        imported: import each adapter, and thereby its framework, to find out whether it can be loaded; without it, the
            versions of what is installed are compared, which takes no time.
    """
    result = []
    for name, point in sorted(_points().items()):
        requirements = tuple(_requirements(point))
        # a framework may be provided by another distribution than the extra's: then only importing it tells
        is_certain = all(requirement.known for requirement in requirements) and _is_there(point.module)
        problem = None if is_certain and not imported else _problem(name)
        adapter = Adapter(
            name=name, module=point.value, extra=_extra(point), requirements=requirements, problem=problem
        )
        result.append(adapter)
    return tuple(result)


def _problem(name: str) -> str | None:
    """Why an adapter cannot be loaded."""
    try:
        load_adapter(name)
    except BGDError as error:
        return str(error)
    return None


def _is_there(module: str) -> bool:
    """Whether there is such a module; only the packages that it is in are imported."""
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def load_adapter(name: str) -> Any:
    """Import an adapter and register it with its framework; a second call has no further effect.

    Args:
        name: an installed adapter, such as "neural_compressor"; `bgd-plugin adapters` lists them.

    Returns:
        the adapter's module.

    Raises:
        BGDError: there is no such adapter; or its framework is missing, has an unsupported version, or cannot be
            imported.
    """
    points = _points()
    if name not in points:
        existing = ", ".join(sorted(points)) or "none"
        raise BGDError(f"no adapter {name!r}: give one of the installed adapters: {existing}")
    point = points[name]
    install = f"pip install '{_extra(point)}'"
    requirements = tuple(_requirements(point))
    unknown = [str(requirement) for requirement in requirements if requirement.found and not requirement.known]
    if unknown:
        raise BGDError(f"adapter {name!r} cannot be used: {'; '.join(unknown)}: {install}")
    try:
        module = point.load()
        module.register()
    except Exception as error:  # importing a framework runs its code, which may raise anything
        # checked only now, since a framework may be provided by another distribution than the extra's
        missing = [str(requirement) for requirement in requirements if not requirement.found]
        why = "; ".join([f"{type(error).__name__}: {error}", *missing])
        raise BGDError(f"adapter {name!r} cannot be imported ({why}): {install}") from error
    return module


def notify_hosts() -> None:
    """Tell frameworks that are imported that there are quantized layers in this process.

    A host is an entry point named after a module of a framework: once that is imported, what the entry point names is
    called. So a framework's own saving can know of quantized layers, whichever entrance they came through.
    """
    for name, point in _hosts().items():
        if name in _waiting and name in sys.modules:
            _waiting.discard(name)
            try:
                point.load()()
            except Exception as error:  # importing a framework's part runs its code: anything may come out of it
                _logger.warning("%s: its models may save quantized layers that they cannot load (%s)", name, error)


@functools.cache
def _hosts() -> dict[str, metadata.EntryPoint]:
    points = {point.name: point for point in metadata.entry_points(group=_HOSTS)}
    _waiting.update(points)
    return points


def _points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=_GROUP)}


def _extra(point: metadata.EntryPoint) -> str:
    distribution = point.dist.name if point.dist else "bgd-plugin"
    return f"{distribution}[{point.name.replace('_', '-')}]"


def _requirements(point: metadata.EntryPoint) -> Iterator[Requirement]:
    """The requirements of the extra with the adapter's name."""
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
