"""Options become settings, and mistakes in them are errors that name the option."""

from __future__ import annotations

from pathlib import Path

import bgd_plugin as bgd
from bgd_plugin.cli.options import Regime, settings_from, with_budget, with_distillation, with_finetuning
from tests.cli.common import NET, SMALL, fails, image


def test_mistakes_in_options(tmp_path: Path, flat: Path, file: Path) -> None:
    quantize = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a")]
    (tmp_path / "bad.json").write_text("{")
    fails(["plan", NET, "--override", "conv"], "GLOB=block,codebook")
    fails(["plan", NET, "--override", "nothing*=float"], "matches no layer")
    fails(["plan", NET, "--config", str(tmp_path / "bad.json")], "bad.json")
    fails(["plan", NET, "--config", str(tmp_path / "bad.json"), "--regime", "paper-small"], "only one of them")
    fails([*quantize, "--mean", "1,2"], "three numbers")
    fails([*quantize, "--size", "300"], "size=300")
    fails([*quantize, "--device", "toaster"], "--device")
    fails([*quantize, "--report", str(tmp_path / "no" / "a.html")], "does not exist: create it first")
    fails(["inspect", str(tmp_path / "bad.json")], "not a whole safetensors file")
    fails(["inspect", str(tmp_path / "none")], "file not found")
    assert not (tmp_path / "a").exists()


def test_mistakes_in_folders(tmp_path: Path, flat: Path, file: Path) -> None:
    evaluate = ["evaluate", NET, str(file), *SMALL, "--images"]
    (tmp_path / "empty").mkdir()
    image(tmp_path / "unlabelled" / "cat.png", 0)
    image(tmp_path / "beyond" / "7.png", 0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_text("no image")
    image(tmp_path / "mixed" / "1.png", 0)
    image(tmp_path / "mixed" / "ant" / "1.png", 0)
    fails([*evaluate, str(tmp_path / "none")], "folder not found")
    fails([*evaluate, str(tmp_path / "empty")], "no images found")
    fails([*evaluate, str(tmp_path / "unlabelled")], "'cat.png' has no label")
    fails([*evaluate, str(tmp_path / "beyond")], "label 7", "3 classes")
    fails([*evaluate, str(tmp_path / "broken")], "cannot be read as an image")
    fails([*evaluate, str(tmp_path / "mixed")], "one or the other")


def test_options_become_settings(tmp_path: Path) -> None:
    paper = settings_from(Regime.paper_small, None, ["fc=float", "layer4.*=18"], 1024, 8)
    assert paper.linear == bgd.LayerConfig(block_size=4, codebook_size=1024)
    assert paper.pointwise_conv == bgd.LayerConfig(block_size=8)
    assert paper.overrides == (("fc", None), ("layer4.*", bgd.LayerConfig(block_size=18)))
    trellis = settings_from(Regime.default, None, ["fc=trellis"], None, None)
    assert trellis.overrides == (("fc", bgd.LayerConfig(codes="trellis")),)
    (tmp_path / "b.json").write_text(trellis.to_json())
    assert settings_from(Regime.default, tmp_path / "b.json", None, None, None) == trellis
    assert with_distillation(paper, 7, True).distillation == bgd.DistillationConfig(steps=7)
    assert with_distillation(paper, 7, False).distillation is None
    assert with_finetuning(paper, None, True, 10).finetuning == bgd.FinetuningConfig(steps=90, trained="codebooks")
    assert with_finetuning(paper, 2, True, 10).finetuning == bgd.FinetuningConfig(steps=20, trained="codebooks")
    assert with_finetuning(paper, 2, False, 10).finetuning is None
    mixed = with_finetuning(bgd.BGDConfig(max_divergence=None), 2, True, 10, mixing=True).finetuning
    assert mixed == bgd.FinetuningConfig(steps=20, mixing=True)
    assert with_finetuning(bgd.BGDConfig(max_divergence=None), None, True, 10).finetuning is None
    (tmp_path / "a.json").write_text(paper.to_json())
    assert settings_from(Regime.default, tmp_path / "a.json", None, None, None) == paper


def test_sizes_with_units() -> None:
    sizes = {"5MB": 5_000_000, "5 mib": 5 * 2**20, "1.5kB": 1500, "700": 700, "2KiB": 2048, "1GB": 10**9, "9B": 9}
    for text, size in sizes.items():
        assert with_budget(bgd.BGDConfig(max_divergence=None), text, None).target_bytes == size
    assert with_budget(bgd.BGDConfig(target_bytes=9), None, 7.5) == bgd.BGDConfig(target_ratio=7.5)
    for text in ("5 elephants", "MB", "-3MB", "1e6"):
        fails(["plan", NET, "--target-size", text], f"--target-size '{text}': give a number and a unit")
    fails(["plan", NET, "--target-size", "1MB", "--target-ratio", "3"], "give only one of them")
    fails(["plan", NET, "--target-size", "1kB"], "the least possible size is")
