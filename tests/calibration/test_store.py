"""What a batch holds comes back from the file as it was, within the bound, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import BatchStore
from bgd_plugin.calibration import store as store_module
from bgd_plugin.calibration.spill import SpillFile
from bgd_plugin.calibration.store import Shelf
from tests.networks import FunctionalNet, SmallResNet, TwiceNet, images, randomized, vectors

KIB = 1024


def _filled(bound: int | None, batches: int = 4) -> BatchStore:
    store = BatchStore(bound)
    for batch in range(batches):
        store.append({"x": torch.full((256,), float(batch))})  # 1 KiB each
    return store


@pytest.mark.parametrize("bound", [None, 1, 4 * KIB, 100 * KIB])
def test_every_batch_keeps_its_content(bound: int | None) -> None:
    store = _filled(bound)
    for _ in range(2):
        for batch in range(4):
            assert torch.equal(store.open(batch)["x"], torch.full((256,), float(batch)))
            store.open(batch)["x"] += 10
        for batch in range(4):
            store.open(batch)["x"] -= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_views_stay_views_and_two_names_of_one_tensor_stay_two_names(dtype: torch.dtype) -> None:
    store = BatchStore(1)
    whole = torch.arange(12).to(dtype)
    content = {
        "whole": whole,
        "again": whole,
        "nested": [{"rows": whole.view(3, 4).T}],
        "text": "x",
        "empty": whole[:0],
    }
    store.append(content | {"nothing": torch.empty(0), "part": whole[5:7]})
    store.append({})
    found = store.open(0)
    assert store.spilled_bytes
    assert found["whole"] is found["again"]
    assert found["text"] == "x" and found["empty"].shape == found["nothing"].shape == (0,)
    found["whole"].fill_(1)
    store.open(1)
    found = store.open(0)
    assert torch.equal(found["nested"][0]["rows"], torch.ones(4, 3, dtype=dtype))
    assert found["nested"][0]["rows"].stride() == (1, 4)
    assert torch.equal(found["part"], torch.ones(2, dtype=dtype))


def test_closed_batches_take_at_most_half_of_the_bound() -> None:
    store = _filled(4 * KIB)
    store.open(3)
    assert store.spilled_bytes >= 2 * KIB
    assert store.peak_bytes == 3 * KIB  # two that are closed, and the one that is open


def test_batches_come_back_when_there_is_room() -> None:
    store = _filled(4 * KIB)
    for batch in range(4):
        store.open(batch)["x"] = torch.zeros(8)
    before = store.spilled_bytes
    for _ in range(3):
        for batch in range(4):
            store.open(batch)["y"] = torch.full((8,), float(batch))
    assert store.spilled_bytes == before  # nothing more was written
    assert all(torch.equal(store.open(batch)["y"], torch.full((8,), float(batch))) for batch in range(4))


def test_a_network_s_own_tensors_are_neither_counted_nor_moved() -> None:
    layer = nn.Linear(100, 100)
    store = BatchStore(1)
    owner = nn.Identity()
    store.claim(owner, [layer])
    store.append({"weight": layer.weight, "view": layer.weight.detach().T})
    store.append({})
    assert store.spilled_bytes == 0
    assert store.open(0)["view"].data_ptr() == layer.weight.data_ptr()


def test_places_in_the_file_are_used_again_but_not_while_somebody_reads_them() -> None:
    file = SpillFile()
    memory = torch.arange(3000, dtype=torch.int32).untyped_storage()
    first, second = file.write(memory), file.write(memory)
    mapped = file.map(first)
    place = first.start
    del first
    gc.collect()
    assert file.write(memory).start != place  # freed at once: it never had a second reference
    del mapped
    gc.collect()
    assert file.write(memory).start == place
    assert bytes(file.read(second)) == bytes(memory)
    assert file.peak_bytes <= 4 * 4 * 4096


def test_a_file_that_cannot_grow_is_an_error_that_says_what_to_do() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = BatchStore(1)
    store.append({"x": torch.zeros(300_000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(bgd.errors.CalibrationError, match=r"cannot be written to .*File too large.*TMPDIR"):
            store.append({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


NETWORKS: dict[str, tuple[Any, list[Tensor]]] = {
    "resnet": (SmallResNet, images(4)),
    "functional": (FunctionalNet, images(4, size=12)),
    "twice": (TwiceNet, vectors(4)),
}


@pytest.mark.parametrize("bound", [1, 8_000])
@pytest.mark.parametrize("method", ["full", "em"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_bound_changes_no_byte_of_the_result(
    network: str, method: Any, bound: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kind, data = NETWORKS[network]
    torch.manual_seed(0)
    model = randomized(kind())
    config = bgd.BGDConfig(
        method=method, distillation=bgd.DistillationConfig(steps=2, batch_size=8), max_divergence=None
    )
    free = bgd.quantize(model, data, config, progress=False)
    bounded = bgd.quantize(model, iter(data), config, memory_bytes=bound, progress=False)
    for name, value in free.model.state_dict().items():
        assert torch.equal(value, bounded.model.state_dict()[name]), name
    note = next(note for note in bounded.report.notes if note.startswith("calibration values: "))
    assert "0.00 KiB in a file" not in note
    assert bound > 1 or "give smaller batches" in note
    assert not list(tmp_path.glob("bgd-plugin*"))


def test_only_where_the_bound_was_not_kept_smaller_batches_are_advised() -> None:
    for bound, is_advised in ((1, True), (160 * KIB, False)):
        report = bgd.quantize(
            SmallResNet().eval(), images(), bgd.BGDConfig(max_divergence=None), memory_bytes=bound, progress=False
        ).report
        (note,) = [note for note in report.notes if note.startswith("calibration values: ")]
        assert ("give smaller batches" in note) == is_advised


def test_a_bound_must_be_positive() -> None:
    with pytest.raises(bgd.errors.ConfigError, match="memory_bytes=0: give a positive number"):
        bgd.quantize(SmallResNet(), images(), bgd.BGDConfig(max_divergence=None), memory_bytes=0)


_PEAK = """
import torch
from torch import nn
import bgd_plugin as bgd
from tests.benchmarks.memory import Images, forget_peak, resident_mib

torch.set_num_threads(1)
torch.manual_seed(0)
block = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
CONFIG = bgd.BGDConfig(rounds=0, max_divergence=None)
def run(count, bound):
    bgd.quantize(model.eval(), Images(count, 2, 64), CONFIG, memory_bytes=bound, progress=False)
run(8, bound=1)  # what the process takes once and for all
for bound in (20 * 2**20, None):
    forget_peak()
    before = resident_mib("VmRSS")
    run(48, bound)
    print(resident_mib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read where Linux keeps it")
def test_the_measured_peak_stays_within_the_bound() -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, env=environment)
    assert not run.returncode, run.stderr
    bounded, unbounded = map(float, run.stdout.split())
    assert bounded < 20
    assert unbounded > 27  # 48 images of 16 channels at 64 px: 12 MiB for each value


def test_nothing_is_left_after_the_process_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, torch; from bgd_plugin.calibration import BatchStore; store = BatchStore(1); "
        "store.append({'x': torch.zeros(9)}); store.append({}); print(store.spilled_bytes, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert run.returncode == -signal.SIGKILL
    assert int(run.stdout) > 0
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def _subprocess_paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield


def test_room_of_batches_that_are_removed_is_free_again() -> None:
    store = _filled(8 * KIB)  # room for four closed batches
    store.remove([0, 1, 2])
    assert len(store) == 1 and torch.equal(store.open(0)["x"], torch.full((256,), 3.0))
    for batch in range(3):
        store.append({"x": torch.full((256,), float(batch))})
    store.open(0)
    assert store.spilled_bytes == 0
    assert store.peak_bytes <= 5 * KIB


def test_a_batch_on_file_gives_no_room_when_it_is_removed() -> None:
    store = _filled(4 * KIB)
    store.open(0)
    spilled = store.spilled_bytes
    assert spilled
    store.remove([3])
    for batch in range(4):
        store.append({"x": torch.full((256,), float(batch))})
    assert store.spilled_bytes > spilled
    assert store.peak_bytes <= 3 * KIB


def test_what_an_owner_that_is_gone_has_kept_makes_room() -> None:
    store, owner = BatchStore(8 * KIB), nn.Identity()
    prefix = store.claim(owner, [])
    assert store.claim(nn.Identity(), []) != prefix
    for batch in range(3):
        store.append({f"{prefix}x": torch.full((256,), float(batch)), "y": torch.zeros(1)})
    del owner
    gc.collect()
    store.open(0)
    assert [list(store.open(batch)) for batch in range(3)] == [["y"]] * 3
    for _ in range(3):
        store.append({"x": torch.zeros(256)})
    store.open(0)
    assert store.spilled_bytes == 0


PAGE = 4096


def _pages(bound: int, batches: int) -> BatchStore:
    """Batches of a page each, the last one open."""
    store = BatchStore(bound)
    for batch in range(batches):
        store.append({"x": torch.full((PAGE // 4,), float(batch))})
    return store


@pytest.mark.parametrize(("count", "spilled"), [(5, 0), (6, 1), (7, 2)])
def test_batches_beyond_the_room_are_on_file_and_those_within_are_not(count: int, spilled: int) -> None:
    """Four closed batches fit into half of the room for eight, a fifth does not."""
    store = _pages(8 * PAGE, count)
    assert store.spilled_bytes == spilled * PAGE
    assert store.peak_bytes == min(count - 1, 5) * PAGE


def test_a_batch_that_is_opened_makes_room_for_another() -> None:
    store = _pages(4 * PAGE, 2)
    for index in (0, 1, 0, 1, 0):
        store.open(index)
    assert store.spilled_bytes == 0 and store.peak_bytes == 2 * PAGE
    store.append({"x": torch.zeros(PAGE // 4)})
    store.open(0)
    assert store.spilled_bytes == PAGE and store.peak_bytes == 3 * PAGE


def test_a_batch_that_is_mapped_is_written_once() -> None:
    """Nothing of it is copied while it is open, and it goes back to its place in the file."""
    store = _pages(1, 2)
    assert store.spilled_bytes == PAGE
    for number in range(3):
        store.open(0)["x"].fill_(float(number))
        store.open(1)
    assert store.spilled_bytes == 2 * PAGE
    assert torch.equal(store.open(0)["x"], torch.full((PAGE // 4,), 2.0))


def test_prefixes_of_walks_are_unique_and_their_networks_are_exempt_until_they_end() -> None:
    store, layer = BatchStore(1), nn.BatchNorm1d(4)
    owners = [nn.Identity(), nn.Identity()]
    names = [store.claim(owner, [layer]) for owner in owners]
    assert len(set(names)) == 2
    store.append({names[0] + "x": torch.ones(2), names[1] + "x": torch.ones(3), "mean": layer.running_mean})
    del owners[0]
    gc.collect()
    assert set(store.open(0)) == {names[1] + "x", "mean"}
    store.append({})
    assert store.spilled_bytes == PAGE
    assert store.open(0)["mean"].data_ptr() == layer.running_mean.data_ptr()  # type: ignore[union-attr]


def test_tensors_that_are_more_than_memory_stay() -> None:
    store = BatchStore(1)
    learnt, sparse, own = torch.ones(3, requires_grad=True), torch.eye(3).to_sparse(), nn.Parameter(torch.ones(2))
    store.append({"learnt": learnt, "sparse": sparse, "own": own, "text": [1, "x"], "plain": torch.ones(5)})
    store.append({})
    assert store.spilled_bytes == PAGE
    found = store.open(0)
    assert found["learnt"] is learnt and found["sparse"] is sparse and found["own"] is own and found["text"] == [1, "x"]


def test_a_shelf_is_one_entry_of_each_batch() -> None:
    store = _filled(1, 3)
    shelf = Shelf(store, "x")
    assert len(shelf) == 3 and [float(x[0]) for x in shelf] == [0.0, 1.0, 2.0] and float(shelf[1][0]) == 1.0


def test_memory_is_given_back_after_what_was_written_and_not_what_was_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(store_module, "give_back_memory", lambda: given.append(1))
    store = BatchStore(1000)
    store._trimmed_bytes = 12_000
    for _ in range(3):
        store.append({"x": torch.zeros(2000)})
    for number in (0, 1, 2, 0, 1, 2, 0, 1):
        store.open(number)
    assert len(given) == 1  # of 24,000 bytes
    store.open(0)["y"] = torch.zeros(5000)
    store.open(1)
    assert len(given) == 2
