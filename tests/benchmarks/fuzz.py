"""Hostile files: `load` and `inspect` on inputs that are wrong in every way we know of, with time and memory capped.

Each input is made from a whole file by one to four changes: of bytes, of the safetensors header, of our header inside
it, or of the tensors. An outcome that was not seen before (another error message, numbers and names aside) makes its
input the start of further ones, which leads the search deeper into the checks. A result must be a loaded network or a
`BGDError`; whatever else happens, the input is kept as a finding and the exit code is 1.

    python -m tests.benchmarks.fuzz --inputs 200000
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bgd_plugin as bgd
from bgd_plugin.files.inspection import inspected
from tests.golden.make import NETWORKS

__all__ = ["Fuzzer", "main", "seeds"]

SECONDS_AN_INPUT = 5.0
MEMORY_BYTES = 512 << 20
"""The process may not take more address space than this beyond what it has when it begins."""
MAX_INPUT_BYTES = 1 << 18

_NUMBERS = [0, 1, -1, 2, 3, 7, 8, 9, 255, 256, 257, 2**15, 2**16, 2**16 + 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1]
_NUMBERS += [2**63, 2**64 - 1, 2**64, 10**30, -(2**63)]
_VALUES: list[Any] = [*_NUMBERS, None, True, False, 0.5, float("nan"), float("inf"), "", "x", "\x00", "é", [], {}, [[]]]
_VALUES += [[0], [1, 2], {"": 0}, [2**40, 2**40], [0, 2**62], "conv1", "conv1.codebook", "conv1.codes", "PQConv2d"]
_DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "U16",
    "F4",
    "Z9",
]


@dataclass
class Fuzzer:
    """Makes inputs, and judges what comes of them.

    Attributes:
        outcomes: what came of the inputs, by kind, with the number of times.
        findings: inputs that ended in anything but a network or a `BGDError`, and how.
    """

    folder: Path
    rng: random.Random
    corpus: list[tuple[str, bytes]]
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: list[tuple[bytes, str]] = field(default_factory=list)
    slowest_seconds: float = 0.0

    def step(self) -> None:
        """One input."""
        name, content = self.rng.choice(self.corpus)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3, 4))):
            content = changed(content, self.rng)[:MAX_INPUT_BYTES]
        file = self.folder / "input.safetensors"
        file.write_bytes(content)
        start = time.monotonic()
        for verb, call in (
            ("inspect", lambda: inspected(file)),
            ("load", lambda: bgd.load(file, like=NETWORKS[name]())),
        ):
            outcome = self._outcome(call, content, verb)
            if outcome not in self.outcomes and len(self.corpus) < 2000:
                self.corpus.append((name, content))
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - start)

    def _outcome(self, call: Callable[[], Any], content: bytes, verb: str) -> str:
        signal.setitimer(signal.ITIMER_REAL, SECONDS_AN_INPUT)
        try:
            call()
            return f"{verb}: accepted"
        except bgd.BGDError as error:
            return f"{verb}: {_kind(str(error))}"
        except Exception as error:  # what must not come is what is looked for
            self.findings.append((content, f"{verb}: {type(error).__name__}: {error}"[:300]))
            return f"{verb}: {type(error).__name__}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def seeds() -> list[tuple[str, bytes]]:
    """Whole files of every golden network: name and bytes."""
    folder = Path(__file__).parents[1] / "golden"
    return [(path.name.split("-")[0], path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]


def changed(content: bytes, rng: random.Random) -> bytes:
    """The file with one change."""
    return rng.choice(
        (
            _bytes_changed,
            _header_changed,
            _header_changed,
            _ours_changed,
            _ours_changed,
            _values_changed,
            _inner_changed,
        )
    )(content, rng)


def _split(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
    except (struct.error, ValueError, RecursionError, OverflowError):
        return None
    return (header, content[8 + length :]) if isinstance(header, dict) else None


def _joined(text: str | bytes, data: bytes, length: int | None = None) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def _bytes_changed(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 600) + 1)
    match rng.randrange(6):
        case 0:
            return bytes(data[:place])
        case 1 if data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        case 2:
            data[place:place] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        case 3:
            del data[place : place + rng.choice((1, 2, 8, 64))]
        case 4:
            data[:8] = struct.pack("<Q", rng.choice(_NUMBERS) % 2**64)
        case _:
            data[place : place + 8] = data[: rng.choice((8, 32))]
    return bytes(data)


def _header_changed(content: bytes, rng: random.Random) -> bytes:
    """Offsets, shapes, types, names, names twice, nesting, lengths."""
    parts = _split(content)
    if parts is None:
        return _bytes_changed(content, rng)
    header, data = parts
    names = [n for n in header if n != "__metadata__" and isinstance(header[n], dict)]
    if not names:
        return _bytes_changed(content, rng)
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    match rng.randrange(7):
        case 0:
            entry["data_offsets"] = [rng.choice(_NUMBERS), rng.choice(_NUMBERS)]
        case 1:
            entry["shape"] = [rng.choice(_NUMBERS) for _ in range(rng.choice((0, 1, 2, 4, 64)))]
        case 2:
            entry["dtype"] = rng.choice(_DTYPES)
        case 3:
            header[name], header[other] = header[other], header[name]
        case 4:
            header[rng.choice(("", "__metadata__", f"{name}.x", "x" * 5000, "\udc80"))] = header.pop(name)
        case 5:
            header[name] = _deep_change(entry, rng)
        case _:
            return _joined(_odd_text(header, name, other, rng), data)
    return _joined(json.dumps(header), data)


def _odd_text(header: dict[str, Any], name: str, other: str, rng: random.Random) -> str:
    """A header with a name twice, or nested deeply, or with a tensor of as many values in another shape."""
    text, depth = json.dumps(header), rng.choice((10, 1000, 50_000))
    match rng.randrange(3):
        case 0:
            return text[:-1] + "," + json.dumps({name: header[other]})[1:]
        case 1:
            return "[" * depth + "]" * depth if rng.random() < 0.5 else '{"a":' * depth
    shape = header[name].get("shape")
    if isinstance(shape, list):
        rng.shuffle(shape)
        header[name]["shape"] = rng.choice((shape, [*shape, 1], [1, *shape], [_product(shape)]))
    return json.dumps(header)


def _ours_changed(content: bytes, rng: random.Random) -> bytes:
    """The JSON document inside the header's metadata."""
    parts = _split(content)
    if parts is None or not isinstance(parts[0].get("__metadata__"), dict):
        return _header_changed(content, rng)
    header, data = parts
    metadata = header["__metadata__"]
    try:
        ours = json.loads(metadata.get("bgd_plugin", ""))
    except (ValueError, TypeError, RecursionError):
        return _header_changed(content, rng)
    match rng.randrange(8):
        case 0:
            depth = rng.choice((10, 1000, 50_000))
            metadata["bgd_plugin"] = rng.choice(("[" * depth, "[" * depth + "]" * depth, '{"layers":' * depth))
        case 1:
            metadata["bgd_plugin"] = rng.choice(("", "null", "1", "NaN", "1" * 5000, '"\\ud800"', '{"format":1e999}'))
        case 2 if isinstance(ours, dict):
            ours["aliases"] = {rng.choice(list(header)): rng.choice(_VALUES) for _ in range(2)}
            metadata["bgd_plugin"] = json.dumps(ours)
        case 3 if isinstance(ours, dict) and isinstance(ours.get("layers"), dict) and ours["layers"]:
            name = rng.choice(list(ours["layers"]))
            ours["layers"][rng.choice((name, "x", "", f"{name}.", "fc"))] = ours["layers"].pop(name)
            metadata["bgd_plugin"] = json.dumps(ours)
        case 4 if isinstance(ours, dict):
            ours[rng.choice(("masks", "dtypes", "aliases", "layers", "format"))] = rng.choice(
                (rng.choice(_VALUES), {"conv1": rng.choice(("lines", "2:4", "0:0", "99:99", "positions", "bits", 3))})
            )
            metadata["bgd_plugin"] = json.dumps(ours)
        case _:
            metadata["bgd_plugin"] = json.dumps(_deep_change(ours, rng))
    return _joined(json.dumps(header), data)


def _values_changed(content: bytes, rng: random.Random) -> bytes:
    """The tensors' values: codes out of range, codebooks that are not finite, counts that are negative."""
    parts = _split(content)
    if parts is None or not parts[1]:
        return _bytes_changed(content, rng)
    header, data = parts
    entries = [e for n, e in header.items() if n != "__metadata__" and isinstance(e, dict)]
    offsets = rng.choice(entries).get("data_offsets") if entries else None
    match offsets:
        case [int(start), int(end)] if 0 <= start < end <= len(data):
            fill = rng.choice((b"\xff", b"\x00", b"\x7c\x00", b"\x00\x7c", b"\xff\x7f", b"\x80", rng.randbytes(7)))
            size = rng.choice((end - start, min(2, end - start)))
            values = (fill * (size // len(fill) + 1))[:size]
            return _joined(json.dumps(header), data[:start] + values + data[start + size :])
    return _joined(json.dumps(header), rng.choice((data[:-1], data + b"\x00", data * 2, b"")))


def _inner_changed(content: bytes, rng: random.Random) -> bytes:
    """The header inside a file of format 3, or the tensors behind it."""
    parts = _split(content)
    try:
        (place,) = [e["data_offsets"] for n, e in (parts or ({}, b""))[0].items() if n == "#content"]
        data = parts[1][place[0] : place[1]] if parts else b""
        length = int.from_bytes(data[:4], "little")
        header, rest = zlib.decompress(data[4 : 4 + length]), data[4 + length :]
        inner = json.loads(header)
    except (ValueError, KeyError, TypeError, IndexError, zlib.error, RecursionError):
        return _ours_changed(content, rng)
    match rng.randrange(6):
        case 0:
            rest = _bytes_changed(rest, rng)
        case 1:
            header = rng.choice((header[:-1], b"[" * 50_000, b'{"tensors":' * 1000, header + b" " * 10**7, b"null"))
        case 2 if isinstance(inner, dict):
            entry = rng.choice(("streams", "grids", "tensors", "layers", "format", "file_bytes", "scaled"))
            header = json.dumps({**inner, entry: rng.choice(_VALUES)}).encode()
        case _:
            header = json.dumps(_deep_change(inner, rng)).encode()
    head = zlib.compress(header, rng.choice((0, 9)))
    data = len(head).to_bytes(4, "little") + head + rest
    ours = {"#content": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    return _joined(json.dumps({"__metadata__": {"bgd_plugin": '{"format":3}'}, **ours}), data)


def _deep_change(value: Any, rng: random.Random) -> Any:
    """One place somewhere inside a JSON value, changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _deep_change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        if rng.random() < 0.15:
            return value[:place] + value[place + 1 :]
        return [*value[:place], _deep_change(value[place], rng), *value[place + 1 :]]
    return rng.choice(_VALUES)


def _product(shape: list[Any]) -> int:
    result = 1
    for side in shape:
        result *= side if isinstance(side, int) else 1
    return result


def _kind(message: str) -> str:
    """An error's words without what differs from input to input."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|\d+", "_", message.splitlines()[0] + " ".join(message.splitlines()[1:2]))[
        :160
    ]


def _cap_memory() -> None:
    status = Path("/proc/self/status")
    if status.exists():
        used = int(re.search(r"VmSize:\s+(\d+)", status.read_text())[1]) * 1024  # type: ignore[index]
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))


def _hang(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS_AN_INPUT} s")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 if there is no finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where findings are kept")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        fuzzer = Fuzzer(Path(folder), random.Random(options.seed), seeds())
        for _ in range(200):  # what is imported and cached on first use is no file's doing
            fuzzer.step()
        _cap_memory()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        for done in range(200, options.inputs):
            fuzzer.step()
            if done % 10_000 == 0:
                print(f"{done:,} inputs, {len(fuzzer.outcomes)} outcomes, {len(fuzzer.findings)} findings", flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    accepted = sum(n for outcome, n in fuzzer.outcomes.items() if outcome.endswith("accepted"))
    print(
        f"{options.inputs:,} inputs, each inspected and loaded, in {time.monotonic() - start:.0f} s; "
        f"{len(fuzzer.outcomes)} outcomes, {accepted:,} accepted; slowest {fuzzer.slowest_seconds:.2f} s; "
        f"peak memory grew by {grown:.1f} MiB; {len(fuzzer.findings)} findings"
    )
    for number, (content, how) in enumerate(fuzzer.findings[:100]):
        options.findings.mkdir(exist_ok=True)
        (options.findings / f"{number:03d}.safetensors").write_bytes(content)
        print(f"{number:03d}: {how}")
    return bool(fuzzer.findings)


if __name__ == "__main__":
    sys.exit(main())
