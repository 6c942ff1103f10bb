"""The file of values that found no room in memory: places are used again, and its size is known."""

from __future__ import annotations

import mmap

import torch

from bgd_plugin.calibration.spill import SpillFile

PAGE = mmap.ALLOCATIONGRANULARITY


def _memory(pages: float, value: int = 1) -> torch.UntypedStorage:
    return torch.full((int(pages * PAGE),), value, dtype=torch.uint8).untyped_storage()


def test_the_largest_size_is_what_lay_there_at_once() -> None:
    file = SpillFile()
    assert file.peak_bytes == 0
    for value in range(5):
        extent = file.write(_memory(1.5, value))
        assert bytes(file.read(extent)) == bytes(_memory(1.5, value))
        del extent
    assert file.peak_bytes == 2 * PAGE
    kept = [file.write(_memory(1)) for _ in range(3)]
    assert file.peak_bytes == 3 * PAGE and len(kept) == 3


def test_neighbours_that_are_free_make_one_place() -> None:
    file = SpillFile()
    first, second, third, last = (file.write(_memory(1, value)) for value in range(4))
    starts = [first.start, second.start, third.start]
    for order in ((0, 2, 1), (1, 0, 2)):
        parts: list[object] = [first, second, third]
        del first, second, third
        for place in order:
            parts[place] = None
        large = file.write(_memory(2.5, 9))
        assert large.start == starts[0]
        assert bytes(file.read(large)) == bytes(_memory(2.5, 9))
        assert bytes(file.read(last)) == bytes(_memory(1, 3))
        del large
        first, second, third = (file.write(_memory(1, value)) for value in range(3))
        assert [first.start, second.start, third.start] == starts


def test_the_rest_of_a_larger_place_stays_free() -> None:
    file = SpillFile()
    wide, behind = file.write(_memory(3)), file.write(_memory(1, 7))
    start = wide.start
    del wide
    places = [file.write(_memory(1, value)) for value in range(4)]
    assert [place.start - start for place in places] == [0, PAGE, 2 * PAGE, 4 * PAGE]
    assert bytes(file.read(behind)) == bytes(_memory(1, 7))


def test_a_mapping_writes_to_the_file_and_a_copy_does_not() -> None:
    file = SpillFile()
    extent = file.write(_memory(1))
    file.read(extent)[0] = 5
    assert file.read(extent)[0] == 1
    file.map(extent)[0] = 5
    assert file.read(extent)[0] == 5
