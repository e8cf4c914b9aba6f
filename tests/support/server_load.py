"""A check of the server in pqcad_qat/serving/README.md: many clients ask it at the same time, and nothing is lost.

`tox -e check,server` runs it where only FastAPI and what the runtime needs are installed.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from local_server import free_port
from PIL import Image

from pqcad_qat.serving.text_to_image import TextToImage

CLIENTS, SEEDS = 16, 5
"""Number of clients, and of seeds that they ask for."""


def snippet(page: Path) -> str:
    """The program that the page shows as a server."""
    found = re.search(r"<!-- server -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert len([line for line in found[1].splitlines() if line.strip()]) <= 42
    # a short queue, so that some are told to come again
    assert found[1].count("QUEUE, SECONDS = 2, 32, 60") == 1
    return found[1].replace("QUEUE, SECONDS = 2, 32, 60", "QUEUE, SECONDS = 2, 8, 60")


def ask(url: str, **request: Any) -> tuple[int, bytes]:
    """The status and the content of an answer."""
    asked = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    for _ in range(600):
        try:
            ask(url, prompt="")
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not answer")


def load(url: str, wanted: list[np.ndarray], seconds: float) -> Counter[str]:
    """Let the clients ask for so long, and count the answers by kind."""
    counts, lock, end = Counter[str](), threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            turn += 1
            try:
                status, content = ask(url, prompt="a cat", guidance=1.0, seed=turn % SEEDS)
                kind = "busy" if status == 503 else str(status)
                if status == 200:
                    picture = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
                    kind = "right" if np.array_equal(picture, wanted[turn % SEEDS]) else "another picture"
            except OSError as error:
                kind = f"lost: {error}"
            with lock:
                counts[kind] += 1
            if kind == "busy":
                time.sleep(0.05)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return counts


def main(served: Path, page: Path, seconds: float) -> None:
    folder = served / "stable-diffusion" / "openvino"
    pipeline = TextToImage.from_pretrained(folder, properties={"PERFORMANCE_HINT": "THROUGHPUT"})
    wanted = [pipeline("a cat", guidance=1.0, seed=seed)[0] for seed in range(SEEDS)]
    assert len({picture.tobytes() for picture in wanted}) == SEEDS
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "server.py").write_text(snippet(page), encoding="utf-8")
        url = f"http://127.0.0.1:{(port := free_port())}/images"
        command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--log-level", "warning"]
        server = subprocess.Popen(command, cwd=temporary, env={**os.environ, "FOLDER": str(folder.resolve())})
        try:
            wait_for(url, server)
            assert ask(url, prompt="a cat", steps=0)[0] == 422
            assert ask(url, prompt="a cat", negative="a dog", guidance=1.0)[0] == 422
            counts = load(url, wanted, seconds)
        finally:
            server.terminate()
            server.wait(30)
    print(f"{CLIENTS} clients, {seconds:g} s: {', '.join(f'{kind} {count}' for kind, count in counts.items())}")
    assert counts["right"] > 10 * CLIENTS
    assert set(counts) == {"right", "busy"}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
