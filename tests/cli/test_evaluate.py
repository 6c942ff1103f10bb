"""The command `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import bgd_plugin as bgd
from bgd_plugin.cli.app import app
from tests.cli.common import NET, RUNNER, SMALL, net


def test_evaluate_counts_what_the_networks_answer(file: Path, flat: Path) -> None:
    done = RUNNER.invoke(app, ["evaluate", NET, str(file), "--images", str(flat), *SMALL, "--float", "--json"])
    values = json.loads(done.stdout)
    assert values["images"] == 6
    for which in ("float", "compressed"):
        given = values[which]["answers"]
        assert [answer["label"] for answer in given] == [0, 1, 2, 0, 1, 2]
        assert values[which]["top1"] == sum(a["classes"][0] == a["label"] for a in given) / 6
        assert values[which]["top5"] == 1.0
    text = RUNNER.invoke(app, ["evaluate", NET, str(file), "--images", str(flat), *SMALL]).stdout
    assert "compressed" in text
    assert "float" not in text


def test_evaluate_answers_as_the_loaded_network(file: Path, flat: Path) -> None:
    from bgd_plugin.cli.images import Preprocessing, opened

    values = json.loads(
        RUNNER.invoke(app, ["evaluate", NET, str(file), "--images", str(flat), *SMALL, "--json"]).stdout
    )
    inputs = torch.stack([Preprocessing(size=8, resize=8)(opened(path)) for path in sorted(flat.iterdir())])
    with torch.no_grad():
        expected = bgd.load(file, like=net().eval())(inputs).argmax(1).tolist()
    assert [answer["classes"][0] for answer in values["compressed"]["answers"]] == expected
