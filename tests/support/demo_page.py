"""A check of the page of `demo` in headless Chromium: a prompt makes a picture, another seed another one.

    python demo_page.py FOLDER SCREENSHOT

`tox -e check,demo` runs it where gradio and what the runtime needs are installed, without PyTorch. With a run's folder,
full precision's picture must stand beside the deployed one: `tox -e demo_beside`. It needs Debian's packages chromium
and chromium-driver.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from browser import chromium
from local_server import free_port
from selenium import webdriver
from selenium.webdriver.common.by import By

PROGRAM = """
import sys
from pathlib import Path
from pqcad_qat.commands.demo import demo
demo(Path(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), tell=print)
"""


def wait(seconds: float, found: Any) -> Any:
    """What `found` gives as soon as it is not false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except Exception:  # the page is still being built, or the server not there
            pass
        time.sleep(0.2)
    raise AssertionError("nothing came")


def pictures(driver: webdriver.Chrome) -> list[str]:
    """Addresses of the pictures that are shown."""
    images = driver.find_elements(By.CSS_SELECTOR, "img")
    return [str(image.get_attribute("src")) for image in images if "/file=" in str(image.get_attribute("src"))]


def check(driver: webdriver.Chrome, url: str, shot: Path, *, beside: bool) -> None:
    """Raise AssertionError if the page does not make pictures, with full precision's beside them if so asked."""
    count = 2 if beside else 1
    driver.get(url)
    button = wait(60, lambda: next(b for b in driver.find_elements(By.TAG_NAME, "button") if b.text == "Make"))
    button.click()
    first = wait(60, lambda: len(pictures(driver)) == count and pictures(driver))
    told = wait(10, lambda: next(p.text for p in driver.find_elements(By.TAG_NAME, "p") if " ms, " in p.text))
    assert told.startswith("deployed, INT8: "), told
    assert ("; full precision: " in told) == beside, told
    driver.save_screenshot(str(shot))
    seed = wait(10, lambda: driver.find_element(By.CSS_SELECTOR, "input[aria-label*='Seed'], input[type=number]"))
    seed.clear()
    seed.send_keys("5")
    button.click()
    wait(60, lambda: len(pictures(driver)) == count and not set(pictures(driver)) & set(first))
    text = driver.find_element(By.TAG_NAME, "body").text
    note = (
        "Both pictures begin from the same noise." if beside else "Full precision is not shown: this is no run's folder"
    )
    assert note in text
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe
    print(f"the page makes pictures: {told}")


def main(folder: Path, shot: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM, str(folder), str(port)], env=dict(os.environ))
    try:
        wait(120, lambda: server.poll() is not None or urllib.request.urlopen(url).status == 200)
        assert server.poll() is None, "the server has ended"
        with chromium() as driver:
            driver.set_window_size(1200, 900)
            check(driver, url, shot, beside=(folder / "policy.yaml").is_file())
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
