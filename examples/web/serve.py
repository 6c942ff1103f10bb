"""Serves the page on this machine, and compares what a browser answers with what torch answered.

python examples/web/serve.py FOLDER [--port 8000]     open http://localhost:8000
python examples/web/serve.py FOLDER --check            a headless Chromium opens it; prints what agrees
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

__all__ = ["check", "chromium", "served"]


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder under their MIME types; `POST /answers` takes what a page found."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def __init__(self, *arguments: Any, answers: Queue[Any], **keywords: Any) -> None:
        self._answers = answers
        super().__init__(*arguments, **keywords)

    def end_headers(self) -> None:
        # with these two, a browser lets the runtime use threads
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answers.put(json.loads(self.rfile.read(length)))
        self.send_response(204)
        self.end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with suppress(ConnectionError):  # the page was closed
            super().copyfile(source, outputfile)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[tuple[str, Queue[Any]]]:
    """Serve a folder on localhost alone; gives the address, and a queue of what pages posted."""
    answers: Queue[Any] = Queue()
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder), answers=answers))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}", answers
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chromium() -> str | None:
    """The path of a Chromium or Chrome, None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def check(folder: Path, timeout: float = 180.0) -> dict[str, Any]:
    """Open the page in a headless Chromium, let it answer all photos, and compare.

    Returns:
        `photos`, `equal` (same class as torch's), `largest_difference` of a probability, `first_answer_ms` since the
        page was asked for, `after_load_ms` since its load event, and `transferred_bytes` of the network.
    """
    browser = chromium()
    if browser is None:
        raise SystemExit("no Chromium is installed: on Debian, apt-get install chromium")
    with served(folder) as (address, answers), tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [*command, f"{address}/index.html?check"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            found = answers.get(timeout=timeout)
        except Empty:
            raise SystemExit(f"the page gave no answers within {timeout:.0f} s") from None
        finally:
            process.terminate()
            process.wait()
    wanted = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["photos"]
    pairs = list(zip(found["photos"], wanted, strict=True))
    return {
        "photos": len(pairs),
        "equal": sum(one["answer"] == other["answer"] for one, other in pairs),
        "largest_difference": max(abs(one["probability"] - other["probability"]) for one, other in pairs),
        "first_answer_ms": found["firstAnswerMs"],
        "after_load_ms": found["afterLoadMs"],
        "transferred_bytes": found["transferredBytes"],
    }


def main() -> None:
    """Serve until Ctrl-C, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        print(json.dumps(check(options.folder), indent=1))
        return
    with served(options.folder, options.port) as (address, _):
        print(f"{address}   (Ctrl-C ends)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
