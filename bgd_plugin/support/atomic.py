"""Atomic file writes: a file is complete or absent."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from bgd_plugin.errors import CheckpointError

__all__ = ["remove", "remove_leftovers", "write_atomically"]

_SUFFIX = ".tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: at every moment, even in a power cut, `path` holds either the old or the new content.

    Where the system supports it, the new file has no name until it is complete, so a killed process leaves nothing.

    Raises:
        CheckpointError: the disk is full, or the folder is read-only or missing; the old file is unchanged.
    """
    try:
        _write(path, content)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}; it takes {len(content):,} bytes): free space or "
            "choose another folder; existing files are unchanged"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a process killed while writing left in `folder`.

    Raises:
        CheckpointError: the folder is read-only.
    """
    for file in folder.glob(f".*{_SUFFIX}"):
        remove(file)


def remove(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        CheckpointError: the folder is read-only.
    """
    if not path.exists():  # on some systems even removing a missing file fails
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be removed ({error.strerror or error}): make its folder writable"
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
    """A handle to a new unnamed file in `folder`; None if the system does not support unnamed files."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError:  # a real problem with the folder is reported by the fallback
        return None


def _link(handle: int, name: Path) -> None:
    """Give an unnamed file a name; a process killed right after this leaves that name behind."""
    name.unlink(missing_ok=True)
    # the folder's handle is unused with absolute paths, but makes Python follow the link in /proc
    folder = os.open("/", os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{handle}", name.absolute(), src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _flush_folder(folder: Path) -> None:
    """Flush the folder so that the new name survives a power cut; without support, only the newest file is at risk."""
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
