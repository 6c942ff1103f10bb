"""Does the network that went in come back? Published architectures at a setting that loses next to nothing.

Run `python -m tests.benchmarks.fidelity`; `--only GLOB` takes some. Each network has random weights and small inputs.
Every layer is quantized with blocks of one weight and codebooks of up to 4,096 codewords in half precision; the rest
stays in single precision. Checked: the class, the names in the state dict, the outputs' types, their values (within 1 %
of the float network's), and that another process loads the file to the same outputs, bit for bit. Networks above 60 M
parameters are left out. Results are kept in a file: a second call goes on with those that are missing there.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bgd_plugin as bgd
from bgd_plugin.nn import PQModule
from tests.benchmarks.fidelity_networks import Case, batches_of, cases, initialized

__all__ = ["Reader", "config", "main", "run"]

_LARGE = 60_000_000
_BOUND = 0.01
_FINE = bgd.LayerConfig(block_size=1, codebook_size=4096)


def config(method: Any = "em") -> bgd.BGDConfig:
    """The setting that loses next to nothing."""
    return bgd.BGDConfig(
        method=method,
        conv=_FINE,
        pointwise_conv=_FINE,
        depthwise_conv=_FINE,
        linear=_FINE,
        embedding=_FINE,
        first_layer=_FINE,
        em_iterations=2,
        rounds=1,
        codebook_storage="float16",
        weight_storage="float32",
        float_storage="float32",
    )


class Reader:
    """Another process, which loads files and says what the networks in them answer."""

    def __init__(self, *, timm: bool = True) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.fidelity", "--serve", *([] if timm else ["--no-timm"])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def same(self, name: str, folder: Path) -> bool | str:
        """Whether the file `net` in a folder answers as `answers` says; an error's text if it cannot be loaded."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([name, str(folder)]), file=self._process.stdin, flush=True)
        found: bool | str = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        with self._process:  # closes its pipes, and waits for its end
            pass


def serve(*, timm: bool) -> None:
    """What the other process does."""
    known = {case.name: case for case in cases(timm=timm)}
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        name, folder = json.loads(line)
        try:
            case = known[name]
            loaded = bgd.load(Path(folder) / "net", like=initialized(case.build, seed=1))
            wanted = torch.load(Path(folder) / "answers")
            found = _tensors(_answer(loaded, case.inputs(loaded)))
            same: bool | str = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
        except Exception as error:  # told to the other process
            same = f"{type(error).__name__}: {error}"
        print(json.dumps(same), file=answers, flush=True)
        gc.collect()


def run(case: Case, settings: bgd.BGDConfig, reader: Reader) -> dict[str, Any]:
    """One network's row."""
    start = time.process_time()
    model = initialized(case.build, seed=0)
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"name": case.name, "parameters": parameters}
    if parameters > _LARGE:
        return row | {"left out": f"above {_LARGE // 1_000_000} M parameters"}
    batch = case.inputs(model)
    data = batches_of(batch)
    try:
        result = bgd.quantize(model, data, settings, progress=False)
        row |= _compared(case, model, result.model, batch)
        quantized = {path for path, part in result.model.named_modules() if isinstance(part, PQModule)}
        lost = [n for n in _names(model, quantized) if n not in result.model.state_dict()]
        row |= {
            "layers": len(result.report.layers),
            "share": sum(layer.weights for layer in result.report.layers) / parameters,
            "class": type(result.model) is type(model),
            "names": lost or True,
            "way": next((note for note in result.report.notes if "running the network itself" in note), "graph"),
            "float": {s.name: s.reason for s in result.report.skipped},
        }
        with tempfile.TemporaryDirectory() as folder:
            bgd.save(result.model, Path(folder) / "net")
            torch.save(_tensors(_answer(result.model, batch)), Path(folder) / "answers")
            row["again"] = reader.same(case.name, Path(folder))
    except bgd.BGDError as error:
        row["refused"] = str(error)
    except Exception:  # a failure is what this looks for
        row["failed"] = traceback.format_exc()
    return row | {"seconds": time.process_time() - start}


def _names(model: nn.Module, quantized: set[str]) -> list[str]:
    """Names in the state dict that have no reason to change: those outside of the quantized layers."""
    return [n for n in model.state_dict() if not any(n == path or n.startswith(f"{path}.") for path in quantized)]


@torch.no_grad()
def _answer(model: nn.Module, batch: Any) -> Any:
    torch.manual_seed(0)
    return model(**batch) if isinstance(batch, dict) else model(*(batch if isinstance(batch, tuple) else (batch,)))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _compared(case: Case, model: nn.Module, student: nn.Module, batch: Any) -> dict[str, Any]:
    """Whether the outputs have the same types, and the largest difference of one of them from the float network's."""
    outputs = [_answer(net, batch) for net in (model, student)]
    specs = [(type(output), pytree.tree_structure(output)) for output in outputs]
    if case.compared:
        inner = torch.stack(list(batch[0]))
        outputs = [_answer(net.get_submodule(case.compared), inner) for net in (model, student)]
    pairs = list(zip(*map(_tensors, outputs), strict=True))
    off = [_off(exact, found) for exact, found in pairs if exact.is_floating_point()]
    return {"types": specs[0][0] is specs[1][0] and (bool(case.compared) or specs[0] == specs[1]), "off": max(off)}


def _off(exact: Tensor, found: Tensor) -> float:
    if exact.shape != found.shape or exact.dtype != found.dtype:
        return float("inf")
    norm = float(exact.double().norm())
    return float((exact.double() - found.double()).norm()) / norm if norm else float(found.double().norm())


def is_right(row: dict[str, Any]) -> bool:
    """Whether a network came back as it should."""
    return row.get("off", 1.0) < _BOUND and all(row.get(k) is True for k in ("types", "class", "names", "again"))


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['name']:58} {row['parameters'] / 1e6:7.2f} M"
    for key in ("left out", "refused", "failed"):
        if key in row:
            return f"{head}  {key.upper()}: {row[key].strip().splitlines()[-1]}"
    verdict = "ok" if is_right(row) else "WRONG"
    wrong = {k: row[k] for k in ("types", "class", "names", "again") if row[k] is not True}
    way = "graph" if row["way"] == "graph" else "runs"
    text = f"{head}  {verdict:5} {row['off']:.2%} off, {row['layers']} layers, {row['share']:.0%}, {way}"
    return f"{text}, {row['seconds']:.0f} CPU-s" + (f" {wrong}" if wrong else "")


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="a glob on names such as timm:*")
    parser.add_argument("--method", default="em", choices=("em", "full"))
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "bgd-fidelity.json")
    parser.add_argument("--again", action="store_true", help="run those anew that were not right")
    parser.add_argument("--no-timm", dest="timm", action="store_false", help="where timm is not installed")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.serve:
        serve(timm=options.timm)
        return
    rows = json.loads(options.results.read_text()) if options.results.is_file() else {}
    reader = Reader(timm=options.timm)
    for case in cases(timm=options.timm):
        key = f"{case.name} {options.method}"
        is_done = key in rows and not (options.again and not is_right(rows[key]) and "left out" not in rows[key])
        if is_done or not fnmatch.fnmatchcase(case.name, options.only):
            continue
        rows[key] = run(case, config(options.method), reader)
        options.results.write_text(json.dumps(rows, indent=1))
        print(line(rows[key]), flush=True)
        gc.collect()
    reader.close()
    chosen = [row for key, row in rows.items() if key.endswith(options.method)]
    tried = [row for row in chosen if "left out" not in row]
    wrong = [row["name"] for row in tried if not is_right(row)]
    print(
        f"{len(tried) - len(wrong)} of {len(tried)} came back right, {len(chosen) - len(tried)} left out; not: {wrong}"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
