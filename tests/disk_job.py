"""What happens on a disk that is full, or read-only: a small one, mounted where only this process sees it.

`unshare --map-root-user --mount python -m tests.disk_job FOLDER STEP` runs the functions below one after another, and
prints the traceback of each, empty if it passed, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import bgd_plugin as bgd
import bgd_plugin.support.steps
from tests.networks import SmallResNet, images, randomized

__all__ = ["SCENARIOS"]

CONFIG = bgd.BGDConfig(
    method="em",
    em_iterations=3,
    distillation=bgd.DistillationConfig(steps=2, batch_size=8),
    finetuning=bgd.FinetuningConfig(steps=3),
    max_divergence=None,
)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Disk:
    """A file system of some pages, in memory; a run is tried with `step` pages more each time."""

    def __init__(self, folder: Path, step: int, pages: int = 64) -> None:
        self.folder, self.step = folder, step
        self._filler = folder / "filler"
        self._mount("-t", "tmpfs", "-o", f"size={pages * _PAGE}", "tmpfs")

    def free_pages(self) -> int:
        """How many there are."""
        return os.statvfs(self.folder).f_bavail

    def leave(self, pages: int) -> None:
        """Fill it, but for so many pages."""
        self._filler.unlink(missing_ok=True)
        self._filler.write_bytes(bytes((self.free_pages() - pages) * _PAGE))
        assert self.free_pages() == pages

    def make_room(self) -> None:
        """Empty again, but for what others wrote."""
        self._filler.unlink(missing_ok=True)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nobody writes to it, not even root."""
        self._mount("-o", "remount,ro")
        yield
        self._mount("-o", "remount,rw")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True)


def _run(checkpoint: Path | None, memory_bytes: int | None = None) -> bgd.results.Quantized:
    torch.manual_seed(0)
    model = randomized(SmallResNet())
    return bgd.quantize(model, images(4), CONFIG, checkpoint=checkpoint, memory_bytes=memory_bytes, progress=False)


def _bytes(result: bgd.results.Quantized) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        bgd.save(result.model, Path(folder) / "net.safetensors")
        return (Path(folder) / "net.safetensors").read_bytes()


def _refused(work: Callable[[], object], *words: str) -> None:
    try:
        work()
    except bgd.BGDError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("there was room")


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())} if folder.exists() else {}


def checkpoint(disk: Disk) -> None:
    """However much room there is, what was kept is whole, and the run goes on from it once there is more."""
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "run"
        expected, wanted = _bytes(_run(whole)), _contents(whole)
    fails = 0
    for pages in range(1, disk.free_pages() - 1, disk.step):
        run = disk.folder / f"run-{pages}"
        disk.leave(pages)
        try:
            assert _bytes(_run(run)) == expected
            break
        except bgd.errors.CheckpointError as error:
            fails += 1
            assert "No space left on device" in str(error), error
        kept = _contents(run)
        assert all(kept[name] == wanted[name] for name in kept if "steps" not in name), list(kept)
        assert kept.keys() <= {*wanted, *(f"layer-{i:04d}.steps.safetensors" for i in range(4))}, list(kept)
        disk.make_room()
        assert _bytes(_run(run)) == expected
        assert _contents(run).keys() == wanted.keys()
        for file in run.iterdir():
            file.unlink()
        run.rmdir()
    assert fails > 4, fails


def saved_file(disk: Disk) -> None:
    """The old file stays, nothing else is left, and it works once there is room."""
    model = _run(None).model
    file = disk.folder / "net.safetensors"
    file.write_bytes(b"old")
    disk.leave(0)
    _refused(lambda: bgd.save(model, file), str(file), "No space left on device", "free space")
    assert _contents(disk.folder).keys() == {"filler", file.name}
    assert file.read_bytes() == b"old"
    disk.make_room()
    bgd.save(model, file)
    assert bgd.load(file, like=SmallResNet())


def read_only(disk: Disk) -> None:
    """What is there stays, a finished run is still read, and an unfinished one goes on once it may write."""
    run, begun, file = disk.folder / "run", disk.folder / "begun", disk.folder / "net.safetensors"
    result = _run(run)
    bgd.save(result.model, file)
    begun.mkdir()
    for name in ("run.json", "layer-0000.safetensors", "finetuning.steps.safetensors"):
        (begun / name).write_bytes((run / name).read_bytes())
    (begun / ".layer-0001.safetensors.tmp").touch()  # as if killed
    (begun / "layer-0000.steps.safetensors").touch()
    before = [_contents(folder) for folder in (run, begun)]
    with disk.read_only():
        _refused(lambda: bgd.save(result.model, file), str(file), "Read-only file system")
        _refused(lambda: _run(disk.folder / "new"), "Read-only file system")
        _refused(lambda: _run(begun), "Read-only file system")
        assert [_contents(folder) for folder in (run, begun)] == before
        assert _bytes(_run(run)) == file.read_bytes()
    (begun / "finetuning.steps.safetensors").unlink()
    assert _bytes(_run(begun)) == file.read_bytes()
    assert _contents(begun).keys() == _contents(run).keys()


def spilled_values(disk: Disk) -> None:
    """Calibration values find no room in the folder for temporary files: nothing of them stays there."""
    bound, expected = 24 * 1024, _bytes(_run(None))
    tempfile.tempdir = str(disk.folder)
    for pages in (0, 1, 9):
        disk.leave(pages)
        _refused(lambda: _run(None, bound), str(disk.folder), "No space left on device", "TMPDIR")
        assert disk.free_pages() == pages
    disk.make_room()
    result = _run(None, bound)
    assert any("in a file" in note and " 0 B in a file" not in note for note in result.report.notes)
    tempfile.tempdir = None
    assert _bytes(result) == expected


SCENARIOS = {job.__name__: job for job in (checkpoint, saved_file, read_only, spilled_values)}


def main(folder: str, step: str) -> None:
    """Run all of them, each on a disk of its own."""
    bgd_plugin.support.steps.SAVE_SECONDS, bgd_plugin.support.steps._SHARE = 0.0, float("inf")
    failures = {}
    for name, scenario in SCENARIOS.items():
        tempfile.tempdir = None
        try:
            scenario(Disk(Path(folder), int(step)))
            failures[name] = ""
        except Exception:
            failures[name] = traceback.format_exc()
    sys.stdout.write(f"{json.dumps(failures)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
