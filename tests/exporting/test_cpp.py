"""The C++ example: compiled against onnxruntime, it answers as torch does."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy
import pytest
import torch

import bgd_plugin as bgd
from tests.networks import SmallResNet, em, images, randomized

SOURCE = Path(__file__).parents[2] / "examples" / "cpp" / "run.cpp"
_PACKAGE = "com.github.asus4.onnxruntime@0.4.9"
"""An npm package that holds onnxruntime's headers beside its library for Linux."""


@pytest.fixture
def onnxruntime_folder(tmp_path: Path) -> Path:
    """A folder with `include` and `lib`: that of the environment variable ONNXRUNTIME, or out of the npm package."""
    if given := os.environ.get("ONNXRUNTIME"):
        return Path(given)
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, and ONNXRUNTIME names no folder of onnxruntime")
    packed = subprocess.run(
        [npm, "pack", "--ignore-scripts", _PACKAGE], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    folder = tmp_path / "onnxruntime"
    (folder / "include").mkdir(parents=True)
    (folder / "lib").mkdir()
    with tarfile.open(tmp_path / packed.stdout.split()[-1]) as archive:
        for member in archive:
            is_header = member.name.endswith(".h") and "simulator" in member.name
            if is_header or member.name.endswith("Linux/x64/libonnxruntime.so"):
                content = archive.extractfile(member)
                assert content is not None
                (folder / ("include" if is_header else "lib") / Path(member.name).name).write_bytes(content.read())
    (folder / "lib" / "libonnxruntime.so.1").symlink_to("libonnxruntime.so")  # the name that programs ask for
    return folder


@pytest.mark.slow
def test_the_example_answers_as_torch(onnxruntime_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program, library = tmp_path / "run", onnxruntime_folder / "lib"
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        str(SOURCE),
        f"-I{onnxruntime_folder / 'include'}",
    ]
    subprocess.run([*command, f"-L{library}", "-lonnxruntime", f"-Wl,-rpath,{library}", "-o", str(program)], check=True)
    batch = images()[0]
    network = bgd.quantize(randomized(SmallResNet()), images(), em(), progress=False).model
    bgd.export(network, tmp_path / "net.onnx", batch[:2], dynamic=True)
    batch[0].numpy().tofile(tmp_path / "input.bin")
    for option in ([], ["--small"]):
        done = subprocess.run(
            [str(program), str(tmp_path / "net.onnx"), str(tmp_path / "input.bin"), *option],
            check=True,
            capture_output=True,
        )
        found = torch.from_numpy(numpy.frombuffer(done.stdout, numpy.float32).copy())
        assert torch.allclose(found, network(batch[:1])[0], atol=1e-5)
    refused = subprocess.run([str(program), "missing.onnx", str(tmp_path / "input.bin")], capture_output=True)
    assert refused.returncode == 1
    assert b"missing.onnx" in refused.stderr
