"""What a planned layer and a plan say of their bytes, and how they print."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bgd_plugin.errors import ConfigError
from bgd_plugin.planning.types import CurvePoint, Plan, PlannedLayer, SkippedLayer


def _layer(**fields: Any) -> PlannedLayer:
    names: dict[str, Any] = {"name": "body.fc", "target": "body.fc", "kind": "linear", "family": "linear"}
    shape: dict[str, Any] = {"weight_shape": (30, 8), "block_size": 4, "codebook_size": 16, "calls": ()}
    return PlannedLayer(**(names | shape | fields))


@pytest.mark.parametrize(("codewords", "bits"), [(2, 1), (3, 2), (16, 4), (17, 5), (256, 8), (257, 9), (4096, 12)])
def test_a_code_has_the_bits_of_its_codebook(codewords: int, bits: int) -> None:
    assert _layer(codebook_size=codewords).code_bits == bits


@pytest.mark.parametrize(("codewords", "code_bytes"), [(255, 1), (256, 1), (257, 4)])
def test_codes_in_memory_take_a_byte_up_to_256_codewords(codewords: int, code_bytes: int) -> None:
    layer = _layer(codebook_size=codewords)
    assert layer.memory_bytes == code_bytes * 30 * 2 + 4 * codewords * 4
    masked = _layer(codebook_size=codewords, mask_form="bits", mask_bytes=30)
    assert masked.memory_bytes == layer.memory_bytes + 30 * 8


def test_bytes_in_the_file_are_codes_codebook_and_mask() -> None:
    odd = _layer(weight_shape=(31, 8), codebook_size=8)  # 186 bits of codes
    assert odd.compressed_bytes == 24 + 2 * 8 * 4
    assert dataclasses.replace(odd, codebook_storage="int8").compressed_bytes == 24 + 8 * 4 + 4
    assert dataclasses.replace(odd, mask_form="bits", mask_bytes=31).compressed_bytes == 24 + 2 * 8 * 4 + 31
    assert dataclasses.replace(odd, codes="entropy", size_bytes=77).compressed_bytes == 77
    assert odd.bits_per_weight == pytest.approx(8 * 88 / (31 * 8))
    assert (odd.weights, odd.rows, odd.blocks_per_row) == (248, 31, 2)
    assert (odd.size_bytes, odd.mask_bytes, odd.codes, odd.codebook_storage) == (0, 0, "blocks", "float16")


def test_zeros_are_kept_where_a_mask_is_planned() -> None:
    weight = torch.tensor([[0.0, 1.0], [-2.0, 0.0]], requires_grad=True)
    assert _layer().kept(weight) is None
    kept = _layer(mask_form="bits").kept(weight)
    assert kept is not None and kept.tolist() == [[False, True], [True, False]] and not kept.requires_grad


def _plan(**fields: Any) -> Plan:
    parts: dict[str, Any] = {
        "layers": (_layer(note="why"), _layer(name="tail", codes="entropy", block_size=1, size_bytes=99)),
        "skipped": (SkippedLayer(name="stem", reason="first_layer=None"),),
        "original_bytes": 4096,
        "compressed_bytes": 1024,
        "paper_bytes": 2048,
        "notes": ("a note",),
        "memory_bytes": 3072,
    }
    return Plan(**(parts | fields))


def test_a_plan_prints_layers_reasons_notes_and_totals() -> None:
    text = str(_plan())
    rows = [line.split() for line in text.splitlines()]
    assert ["body.fc", "linear", "30×8", "4", "16", "5.27", "0.15", "KiB", "why"] in rows
    assert ["tail", "linear", "30×8", "1", "entropy", "3.30", "0.10", "KiB"] in rows
    assert ["stem", "first_layer=None"] in rows and "a note" in text.splitlines()
    assert text.splitlines()[-1] == (
        "2 layers quantized, 1 left float: 4.00 KiB → 1.00 KiB (4.0×), in memory 3.00 KiB; "
        "by the paper's accounting 2.00 KiB"
    )
    bare = str(_plan(skipped=(), memory_bytes=None))
    assert "left float  " not in bare and "4.00 KiB → 1.00 KiB (4.0×); by the paper's" in bare
    assert "expected divergence" not in bare


def test_a_plan_prints_its_curve() -> None:
    curve = (CurvePoint(file_bytes=1024, expected_divergence=0.25), CurvePoint(file_bytes=2048, expected_divergence=0))
    rows = [line.split() for line in str(_plan(curve=curve)).splitlines()]
    assert ["1.00", "KiB", "4.0×", "0.25"] in rows and ["2.00", "KiB", "2.0×", "0"] in rows


def test_the_chart_marks_the_chosen_file(tmp_path: Path) -> None:
    curve = (CurvePoint(file_bytes=1024, expected_divergence=0.25), CurvePoint(file_bytes=4096, expected_divergence=0))
    charts = []
    for chosen in (0.125, None):
        _plan(curve=curve, expected_divergence=chosen).to_svg(tmp_path / "curve.svg")
        charts.append((tmp_path / "curve.svg").read_text(encoding="utf-8"))
    assert "1.00 KiB, 0.12" in charts[0] and "1.00 KiB, 0.12" not in charts[1]
    with pytest.raises(ConfigError, match="the plan has no curve: give plan"):
        _plan().to_svg(tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
