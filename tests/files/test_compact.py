"""Format 3: the same network from fewer bytes, written only where it saves some, and counted to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.encoding.significant import round_to_bits
from bgd_plugin.errors import CheckpointError
from bgd_plugin.files.compact import compacted, expanded
from bgd_plugin.files.container import joined, parted
from bgd_plugin.files.format import Stored, file_bytes, file_size, stored
from bgd_plugin.files.inspection import inspected, inspection_text
from bgd_plugin.nn import PQConv2d, PQLinear
from tests.encoding.walks import random_walk
from tests.networks import same_outputs


class Net(nn.Module):
    """A layer whose codes walk through the trellis, one whose codes are uneven, and one whose codes are not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        walk = torch.from_numpy(random_walk(rows=24, columns=36, size=22, offset=1))
        codebook = torch.randint(-127, 128, (22, 1), generator=generator) / 128
        self.second = PQConv2d(codebook, walk, nn.Conv2d(4, 24, 3))
        uneven = torch.randint(0, 16, (40, 6), generator=generator)
        uneven[torch.rand(40, 6, generator=generator) < 0.8] = 3
        self.third = PQLinear(torch.randn(16, 4, generator=generator).half().float(), uneven, nn.Linear(24, 40))
        even = torch.randint(0, 256, (32, 40), generator=generator)
        self.fourth = PQLinear(torch.randn(256, 1, generator=generator), even, nn.Linear(40, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)))
        result: torch.Tensor = self.fourth(self.third(x.mean((2, 3))))
        return result


class Float(Net):
    """The same with float layers."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 24, 3)
        self.third = nn.Linear(24, 40)
        self.fourth = nn.Linear(40, 32)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for norm in (net.norm.weight, net.norm.bias):
            norm.copy_(torch.tensor([0.25, -1.5, 0.75, 2.0]))
    return net


def test_a_network_comes_back_from_format_3(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "net"
    assert bgd.save(net, path) == path.stat().st_size == file_size(stored(net))
    loaded = bgd.load(path, like=Float().eval())
    assert same_outputs(net, loaded, [torch.randn(2, 3, 9, 9)])
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())
    bgd.save(loaded, tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_each_tensor_has_its_own_form(net: Net) -> None:
    compact = compacted(stored(net))
    assert compact is not None
    assert [name for name in compact.header["streams"] if not name.startswith("#")] == ["second.codes", "third.codes"]
    assert compact.tensors["fourth.codes"].numel() == 32 * 40  # codes of equal frequency stay packed
    assert ["norm.weight", [4], True] in compact.header["grids"]["#grid4v"]
    assert compact.tensors["first.weight"].dtype == torch.float32


def test_a_network_without_worthwhile_streams_is_written_in_format_2() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (30, 30))
    net = nn.Sequential(nn.Linear(8, 30), PQLinear(torch.randn(16, 1), codes, nn.Linear(30, 30)))
    assert compacted(stored(net)) is None
    content = file_bytes(stored(net))
    tensors = safetensors.deserialize(content)
    assert "1.codes" in dict(tensors)


def test_an_older_version_is_told_to_upgrade(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bgd.save(net, tmp_path / "net")
    monkeypatch.setattr("bgd_plugin.files.save.FORMAT_VERSION", 2)
    with pytest.raises(CheckpointError, match="written in format 3, but this version reads up to 2: upgrade"):
        bgd.load(tmp_path / "net", like=Float())


def test_expanding_gives_back_the_content(net: Net) -> None:
    content = stored(net)
    compact = compacted(content)
    assert compact is not None
    again = expanded(compact)
    assert set(again.tensors) == set(content.tensors)
    for name, value in content.tensors.items():
        assert again.tensors[name].dtype == value.dtype
        assert torch.equal(again.tensors[name], value), name
    assert again.header | {"format": 2} == content.header | {"format": 2, "file_bytes": again.header["file_bytes"]}


def test_lengths_are_known_without_coding(net: Net) -> None:
    exact, about = compacted(stored(net)), compacted(stored(net), exact=False)
    assert exact is not None
    assert about is not None
    assert exact.header == about.header
    for name, value in exact.tensors.items():
        assert value.numel() <= about.tensors[name].numel() <= value.numel() + 8, name


def test_inspection_counts_the_bytes_of_the_file(net: Net, tmp_path: Path) -> None:
    size = bgd.save(net, tmp_path / "net")
    found = inspected(tmp_path / "net")
    assert found["format"] == 3
    assert sum(found["parts_bytes"].values()) == found["file_bytes"] == size
    assert all(part >= 0 for part in found["parts_bytes"].values())
    second = next(layer for layer in found["layers"] if layer["name"] == "second")
    compact = compacted(stored(net))
    assert compact is not None
    assert second["codes_bytes"] == compact.tensors["second.codes"].numel()
    assert second["bits_per_weight"] < 5  # packed: more than 5
    assert "format 3" in inspection_text(found)


def _edited(net: Net, edit: Any) -> Stored:
    compact = compacted(stored(net))
    assert compact is not None
    tensors, header = parted(joined(compact.tensors, compact.header))
    edit(tensors, header)
    return Stored(tensors=tensors, header=header)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t, h: h.update(streams=["second.codes", "nowhere"]),
        lambda t, h: h.update(streams=["second.codes", "second.codes"]),
        lambda t, h: h.update(streams=[3]),
        lambda t, h: h.update(grids=3),
        lambda t, h: h["layers"].pop("second"),
        lambda t, h: h.update(layers=3),
        lambda t, h: h["layers"]["second"].__setitem__(2, 21),
        lambda t, h: h["layers"]["second"].__setitem__(3, [24, 4, 3, 2**40]),
        lambda t, h: t.update({"second.codes": t["second.codes"][:-1]}),
        lambda t, h: t.update({"#steps": t["#steps"][:-1]}),
        lambda t, h: t.update({"#steps": t["#steps"].float()}),
        lambda t, h: t.pop("#grid4v"),
        lambda t, h: t.update({"#grid4v": t["#grid4v"][:-1]}),
        lambda t, h: h["grids"]["#grid4v"].append(["norm.running_mean", [3], True]),
        lambda t, h: t.update({"norm.bias": torch.zeros(4)}),
        lambda t, h: h["grids"].update({"#grid9": []}),
    ],
)
def test_damage_is_refused(net: Net, edit: Any) -> None:
    with pytest.raises(ValueError):
        expanded(_edited(net, edit))


def test_a_stream_of_next_to_nothing_stands_for_few_codes() -> None:
    """However even the codes: what a file makes of memory is in proportion to its length."""
    codes = torch.zeros(1000, 1000, dtype=torch.int64)
    net = nn.Sequential(PQLinear(torch.randn(4, 1), codes, nn.Linear(1000, 1000)))
    assert compacted(stored(net)) is None
    assert file_size(stored(net)) > 1000 * 1000 / 64


def test_uneven_codes_of_blocks_alone_stay_in_format_2() -> None:
    """The plan has promised their length before there were codes."""
    codes = torch.randint(0, 16, (80, 60), generator=torch.Generator().manual_seed(0))
    codes[:, 1:] = codes[:, 1:].where(codes[:, 1:] % 5 == 0, 3)
    codes[0, 0], codes[1, 0] = 0, 1  # no row of a trellis begins with either
    net = nn.Sequential(PQLinear(torch.randn(16, 1), codes, nn.Linear(60, 80)))
    assert compacted(stored(net)) is None


@pytest.fixture
def halves() -> Net:
    """A network with numbers in half precision: one bias of full precision, and statistics of few bits."""
    torch.manual_seed(0)
    net = Net().eval()
    for module in (net.third, net.fourth):
        bias: Any = module.bias
        bias.data = (2 + torch.rand(len(bias))).half().float()
    net.norm = nn.BatchNorm2d(4000)
    for value in (net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var):
        value.data = round_to_bits(2 + 8 * torch.rand(4000), 7)
    return net


def test_numbers_in_half_precision_take_their_high_bytes_as_a_stream(halves: Net) -> None:
    content = stored(halves)
    compact = compacted(content)
    assert compact is not None
    assert [name for name, _ in compact.header["halves"]["#half4.running_var"]] == ["norm.running_var"]
    bits = 8 * (compact.tensors["#half4.running_var"].numel() + compact.tensors["#half4.running_var/low"].numel())
    assert 4 + 2.5 < bits / 4000 < 4 + 4.5  # four bits as they are, and one of ten high bytes, with their table
    assert "#half8.bias" not in compact.header["halves"]  # too few to be worth a table
    assert compact.tensors["third.bias"].dtype == torch.float16
    again = expanded(compact)
    for name, value in content.tensors.items():
        assert again.tensors[name].dtype == value.dtype
        assert torch.equal(again.tensors[name], value), name
    assert sum(again.header["file_bytes"][name] for name in ("norm.weight", "norm.bias")) < 4 * 4000 * 0.6


@pytest.mark.parametrize(
    "edit",
    [
        lambda t, h: h.update(halves=3),
        lambda t, h: h.update(halves={"#half4.weight": 3}),
        lambda t, h: h["halves"].update({"#half9.weight": []}),
        lambda t, h: h["halves"].update({"#half3.weight": []}),
        lambda t, h: h["halves"]["#half4.weight"][0].__setitem__(1, [4001]),
        lambda t, h: h["halves"]["#half4.weight"][0].__setitem__(0, "norm.bias"),
        lambda t, h: t.pop("#half4.weight/low"),
        lambda t, h: t.update({"#half4.weight/low": t["#half4.weight/low"][:-1]}),
        lambda t, h: t.update({"#half4.weight": t["#half4.weight"][:-1]}),
        lambda t, h: t.update({"norm.bias": torch.zeros(4)}),
        lambda t, h: h["streams"].remove("#half4.weight"),
    ],
)
def test_damage_to_numbers_in_half_precision_is_refused(halves: Net, edit: Any) -> None:
    with pytest.raises(ValueError):
        expanded(_edited(halves, edit))
