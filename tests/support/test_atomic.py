"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bgd_plugin.errors import CheckpointError
from bgd_plugin.support.atomic import remove_leftovers, write_atomically


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, which is what a full disk is like for the one who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _as_nobody() -> Iterator[None]:
    """For root, whom a read-only folder does not stop."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture(params=[True, False], ids=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's files that have no name, and without them."""
    if not request.param:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


@pytest.mark.usefixtures("way")
def test_old_content_gives_way_to_new(tmp_path: Path) -> None:
    for content in (b"old", b"new and longer", b""):
        write_atomically(tmp_path / "file", content)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        assert (tmp_path / "file").read_bytes() == content


@pytest.mark.usefixtures("way")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("way")
def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with (
        _largest_file(1000),
        pytest.raises(CheckpointError, match=r"file cannot be written \(File too large; it takes"),
    ):
        write_atomically(tmp_path / "file", bytes(2000))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.usefixtures("way")
def test_a_read_only_folder_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    for folder in (tmp_path, *tmp_path.parents[:1]):
        folder.chmod(0o555)
    try:
        with (
            _as_nobody(),
            pytest.raises(CheckpointError, match=r"cannot be written \(Permission denied; it takes 3 bytes"),
        ):
            write_atomically(tmp_path / "file", b"new")
    finally:
        for folder in (tmp_path, *tmp_path.parents[:1]):
            folder.chmod(0o755)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "file", b"new")


@pytest.mark.parametrize("step", ["write", "fsync", "link", "chmod", "replace"])
def test_whatever_step_fails_nothing_is_left(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(os, "fdopen", fail)
        else:
            patch.setattr(os, step, fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            write_atomically(tmp_path / "file", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.usefixtures("way")
def test_a_leftover_under_the_same_name_never_becomes_the_file(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"left over")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".hidden", "file.tmp", "layer-0001.safetensors"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
