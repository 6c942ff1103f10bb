"""The container of format 3: there and back, and bytes that are not one."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
import torch

from bgd_plugin.errors import CheckpointError
from bgd_plugin.files.container import content_length, joined, parted

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([True, False]),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "number": torch.tensor(7, dtype=torch.int64),
    "halves": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}
HEADER = {"format": 3, "layers": {"x": ["PQLinear", 1, 4, [2, 3]]}}


def _made(header: Any, data: bytes = b"") -> torch.Tensor:
    head = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    return torch.tensor(list(len(head).to_bytes(4, "little") + head + data), dtype=torch.uint8)


def test_tensors_and_header_come_back() -> None:
    tensors, header = parted(joined(TENSORS, HEADER))
    assert header == HEADER
    assert list(tensors) == sorted(TENSORS)
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_the_bytes_are_those_of_the_description() -> None:
    content = bytes(joined(TENSORS, HEADER).tolist())
    length = int.from_bytes(content[:4], "little")
    header = json.loads(zlib.decompress(content[4 : 4 + length]))
    assert header["tensors"][1] == ["b.weight", "float32", [2, 3]]
    parts = [bytes(TENSORS[name].reshape(-1).view(torch.uint8).tolist()) for name in sorted(TENSORS)]
    assert content[4 + length :] == b"".join(parts)


def test_the_length_is_known_without_values() -> None:
    empty = {name: value.to("meta") for name, value in TENSORS.items()}
    assert content_length(empty, HEADER) == joined(TENSORS, HEADER).numel()


def test_a_header_that_deflates_too_well_is_not_deflated() -> None:
    header = {"format": 3, "layers": {}, "x": "x" * 100_000}
    assert joined({}, header).numel() > 100_000
    assert parted(joined({}, header)) == ({}, header)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(0, dtype=torch.uint8), "header is damaged"),
        (torch.zeros(9, dtype=torch.int32), "not bytes"),
        (torch.full((40,), 255, dtype=torch.uint8), "header is damaged"),
        (_made(b"{" * 30), "header is damaged"),
        (_made(b"[" * 3000), "header is damaged"),
        (_made([1]), "header is damaged"),
        (_made({}), "lists no tensors"),
        (_made({"tensors": [["x", "float32"]]}), "does not consist"),
        (_made({"tensors": [["x", "float31", [1]]]}), "does not consist"),
        (_made({"tensors": [["x", "uint8", [-1]]]}), "does not consist"),
        (_made({"tensors": [["x", "uint8", [True]]]}, b"1"), "does not consist"),
        (_made({"tensors": [["x", "uint8", [2**40, 2**40]]]}), "no place"),
        (_made({"tensors": [["x", "uint8", [1]], ["x", "uint8", [1]]]}, b"12"), "no place"),
        (_made({"tensors": [["x", "uint8", [1]]]}, b"12"), "belong to no tensor"),
        (_made(b" " * 10**7 + b'{"tensors":[]}'), "header is damaged"),
    ],
)
def test_other_bytes_are_refused(content: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parted(content)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no such type")
def test_a_type_that_files_do_not_have_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="float8_e8m0fnu, which files cannot hold"):
        joined({"x": torch.zeros(2).to(torch.float8_e8m0fnu)}, {})
