"""Files from strangers: they load or are refused, run nothing, and cost no more than they hold."""

from __future__ import annotations

import json
import random
import re
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bgd_plugin as bgd
from bgd_plugin.files.container import joined, parted
from bgd_plugin.files.format import FORMAT_VERSION
from bgd_plugin.files.inspection import inspected, inspection_text
from tests.benchmarks.fuzz import Fuzzer, seeds
from tests.golden.make import FOLDER, NETWORKS

GOLDEN = sorted(FOLDER.glob("*.safetensors"))
ROOT = Path(bgd.__file__).parents[1]


def test_every_format_that_was_written_has_its_golden_files() -> None:
    found = {(file.stem.split("-")[0], int(file.stem.rpartition("-")[2])) for file in GOLDEN}
    assert found == {(name, number) for name in NETWORKS for number in range(1, FORMAT_VERSION + 1)}


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_golden_files_load_and_give_the_outputs_of_their_day(file: Path) -> None:
    values = safetensors.torch.load_file(FOLDER / f"{file.stem}.outputs")
    network = bgd.load(file, like=NETWORKS[file.name.split("-")[0]]())
    with torch.no_grad():
        torch.testing.assert_close(network(values["input"]), values["output"], rtol=1e-4, atol=1e-5)
    assert inspection_text(inspected(file))


def test_mutated_files_load_or_are_refused(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path, random.Random(3), seeds())
    for _ in range(1500):
        fuzzer.step()
    assert [how for _, how in fuzzer.findings] == []
    # the search gets into the checks, and some changes do no harm
    assert len(fuzzer.outcomes) > 50
    assert fuzzer.outcomes["load: accepted"] > 0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def _with_ours(content: bytes, ours: str) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["bgd_plugin"] = ours
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _loads_or_is_refused(file: Path) -> None:
    for call in (inspected, lambda file: bgd.load(file, like=NETWORKS["resnet"]())):
        try:
            call(file)
        except bgd.BGDError as error:
            assert str(file) in str(error)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["format", "layers", "frozen", "scaled", "numbers", "aliases", "dtypes", "masks"]), value=_JSON
)
def test_any_json_in_our_header_loads_or_is_refused(key: str, value: object, tmp_path: Path) -> None:
    content = next(file for file in GOLDEN if file.name.startswith("resnet")).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    ours = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["bgd_plugin"])
    file = tmp_path / "file.safetensors"
    file.write_bytes(_with_ours(content, json.dumps(ours | {key: value})))
    _loads_or_is_refused(file)


@pytest.mark.parametrize(
    "entry", [["PQConv2d", float("inf"), 8, [16, 8, 3, 3]], ["PQConv2d", 9, 8, [10**400]], [0, 0, 0, 0], [[]] * 4, {}]
)
def test_entries_that_once_ended_in_other_errors(entry: object, tmp_path: Path) -> None:
    content = next(file for file in GOLDEN if file.name.startswith("resnet")).read_bytes()
    file = tmp_path / "file.safetensors"
    file.write_bytes(_with_ours(content, json.dumps({"format": 1, "layers": {"conv1": entry}})))
    with pytest.raises(bgd.errors.CheckpointError):
        inspected(file)
    with pytest.raises(bgd.errors.CheckpointError):
        bgd.load(file, like=NETWORKS["resnet"]())


@pytest.mark.parametrize("file", [file for file in GOLDEN if not file.stem.endswith("-3")], ids=lambda file: file.stem)
def test_a_header_without_layers_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    ours = json.loads(safetensors.safe_open(str(file), framework="pt").metadata()["bgd_plugin"])
    del ours["layers"]
    path = tmp_path / "net.safetensors"
    path.write_bytes(_with_ours(content, json.dumps(ours)))
    with pytest.raises(bgd.errors.CheckpointError):
        bgd.load(path, like=NETWORKS[file.name.split("-")[0]]())


@pytest.mark.parametrize("file", [file for file in GOLDEN if file.stem.endswith("-3")], ids=lambda file: file.stem)
def test_an_inner_header_without_layers_is_refused(file: Path, tmp_path: Path) -> None:
    tensors, header = parted(safetensors.torch.load_file(file)["#content"])
    del header["layers"]
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file({"#content": joined(tensors, header)}, path, {"bgd_plugin": '{"format": 3}'})
    with pytest.raises(bgd.errors.CheckpointError):
        bgd.load(path, like=NETWORKS[file.name.split("-")[0]]())


def test_nothing_that_runs_code_from_a_file_is_used() -> None:
    """Float weights for the command line may come from `torch.save`; they are read with torch's restricted reader."""
    suspicious = re.compile(
        r"\bpickle\.loads?\b|(?<!safetensors\.)\btorch\.load\(|\beval\(|\bexec\(|\bmarshal\b|\bshelve\b"
        r"|\bdill\b|\byaml\.load\("
    )
    found = [
        (path.name, line.strip())
        for folder in (ROOT / "bgd_plugin", ROOT / "adapters")
        for path in sorted(folder.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if suspicious.search(line) and ".eval()" not in line and "def eval(" not in line
    ]
    assert all("weights_only=True" in line for _, line in found), found
