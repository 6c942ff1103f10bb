"""Where frameworks are missing, or of an unknown version: the core works, adapters and tests say why they do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import bgd_plugin as bgd
from bgd_plugin import BGDError
from tests.adapters.test_frameworks import ADAPTERS, EXTRAS

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = {point.name for point in metadata.entry_points(group="bgd_plugin.adapters")}
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason="this entry point is not installed here"))
    for name in ADAPTERS
]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")])}
    environment.pop("BGD_FRAMEWORKS", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_where_no_framework_is_installed_the_core_works_and_adapters_say_what_to_install() -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        "from tests.hidden_frameworks import FRAMEWORKS\n"
        "import bgd_plugin as bgd\n"
        "from tests.networks import PlainNet, vectors\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        bgd.load_adapter(name)\n"
        "    except bgd.BGDError as error:\n"
        "        print(error)\n"
        "for module in pkgutil.walk_packages(bgd.__path__, 'bgd_plugin.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "assert bgd.quantize(PlainNet(), vectors(), progress=False).report.ratio > 1\n"
        "assert not set(FRAMEWORKS) & {name.split('.')[0] for name in sys.modules}\n"
    )
    done = _run("-c", code, *sorted(INSTALLED & set(ADAPTERS)))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, line in zip(sorted(INSTALLED & set(ADAPTERS)), lines, strict=True):
        extra = re.escape(name.replace("_", "-"))
        assert re.search(rf"adapter '{name}' cannot be imported \(.*No module.*pip install '.*\[{extra}\]'", line)


@pytest.mark.parametrize("name", NAMES)
def test_a_framework_of_an_unknown_version_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    asked = {requirement.name for requirement in EXTRAS[name.replace("_", "-")]}
    monkeypatch.setattr(metadata, "version", lambda package: "99.0" if package in asked else version(package))
    with pytest.raises(BGDError, match=rf"adapter '{name}' cannot be used: .* 99\.0 \(the adapter supports "):
        bgd.load_adapter(name)


def test_tests_of_adapters_are_skipped_with_the_reason() -> None:
    files = ["test_torchao.py", "test_modelopt.py", "test_transformers.py", "test_minilm.py", "neural_compressor"]
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "tests.hidden_frameworks"]
    done = _run("-m", "pytest", *options, *(f"tests/adapters/{file}" for file in files))
    assert done.returncode == 5, done.stdout  # nothing was run
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(reasons) >= 9
    assert all("is not installed" in line for line in reasons)
