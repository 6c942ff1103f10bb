"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from bgd_plugin.errors import CheckpointError

__all__ = ["remove", "remove_leftovers", "write_atomically"]

_SUFFIX = ".tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at every moment, a power cut included, either the old or the new content stands there.

    Where the system can, the new file has no name until it is whole, so that a process that is killed leaves nothing.

    Raises:
        CheckpointError: the disk is full, the folder read-only or not there; what stood at `path` is as it was.
    """
    try:
        _write(path, content)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}; it takes {len(content):,} bytes): make room or give "
            "another place; files that are there are as they were"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote into `folder` left there.

    Raises:
        CheckpointError: the folder is read-only.
    """
    for file in folder.glob(f".*{_SUFFIX}"):
        remove(file)


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        CheckpointError: the folder is read-only.
    """
    if not path.exists():  # some systems refuse to remove even what is not there
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be removed ({error.strerror or error}): let its folder be written to"
        ) from error


def _write(path: Path, content: bytes) -> None:
    unnamed = _unnamed(path.parent)
    if unnamed is None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    else:
        handle, name = unnamed, str(path.with_name(f".{path.name}{_SUFFIX}"))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if unnamed is not None:
                _link(unnamed, Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _unnamed(folder: Path) -> int | None:
    """A handle of a new file in `folder` that has no name; None where the system has no such files."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError:  # what is truly wrong with the folder shows at the next attempt
        return None


def _link(handle: int, name: Path) -> None:
    """Give a file without a name one; whoever was killed right after this line left that name behind."""
    name.unlink(missing_ok=True)
    # a folder's handle, unused with absolute paths, makes Python follow the link in /proc
    folder = os.open("/", os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{handle}", name.absolute(), src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _flush_folder(folder: Path) -> None:
    """Let the new name survive a power cut; some systems cannot, and lose nothing but the newest file then."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
