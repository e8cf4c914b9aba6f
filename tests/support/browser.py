"""A check of the pages that `browser_pages` has written, in headless Chromium: at three widths, light and dark.

    python browser.py FOLDER

It needs selenium, and Debian's packages chromium and chromium-driver; `tox -e check,browser` runs it. Not here: what
the pages say (tests/report).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

WIDTHS = (390, 768, 1440)
SCHEMES = ("light", "dark")
CONTRAST = 4.5
"""Least contrast of text with what is behind it (WCAG 2.1, level AA)."""

CUT = """
return [...document.querySelectorAll("body *")].filter(element => {
  const style = getComputedStyle(element), scrolls = ["auto", "scroll"].includes(style.overflowX);
  if (element.closest("svg") || element.closest("details:not([open])") || scrolls) return false;
  const within = element.closest(".scroll, .chartbox, pre, nav ul");
  const box = element.getBoundingClientRect();
  const out = !within && box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
  return out || (style.overflowX === "hidden" && element.scrollWidth > element.clientWidth + 1);
}).map(element => `${element.tagName} ${element.className} ${element.textContent.slice(0, 60)}`);
"""
"""Elements that stick out of the window or are cut, and cannot be scrolled to."""

FAINT = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = colour => {
  const [r, g, b] = colour.map(value => value / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = rgb(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour.slice(0, 3);
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
};
return [...document.querySelectorAll("body *:not(svg *)")].filter(element =>
  [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()) && element.offsetWidth
).map(element => {
  const [a, b] = [rgb(getComputedStyle(element).color), behind(element)].map(c => light(c.slice(0, 3)));
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), `${element.tagName}.${element.className}`];
}).filter(([contrast]) => contrast < arguments[0]).map(([contrast, name]) => `${name} ${contrast.toFixed(2)}`);
"""
"""Texts that are hard to read on what is behind them."""

UNTOLD = """
return [...document.querySelectorAll("img, svg")].filter(element =>
  !(element.getAttribute("alt") || element.getAttribute("aria-label") || element.getAttribute("aria-hidden"))
).map(element => element.outerHTML.slice(0, 80));
"""
"""Pictures without a text for those who do not see them."""

HIDDEN = """
return [...document.querySelectorAll("table")].filter(table => table.offsetWidth).map(table => {
  const scroll = table.closest(".scroll"), cells = table.tBodies[0].rows[0].cells;
  const first = [...cells].find(cell => cell.tagName === "TD"), box = first && first.getBoundingClientRect();
  return box && scroll && box.right > scroll.getBoundingClientRect().right + 1 ? table.textContent.slice(0, 80) : null;
}).filter(Boolean);
"""
"""Tables whose first figure is only seen after scrolling."""


@contextmanager
def chromium() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium")
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-dev-shm-usage",
            "disable-quic",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            f"user-data-dir={profile}",
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options, Service(which("chromedriver")))
        try:
            yield browser
        finally:
            browser.quit()


def faults(browser: Any, page: Path) -> Iterator[str]:
    """What is wrong with a page."""
    for scheme in SCHEMES:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        for width in WIDTHS:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            where = f"{page} at {width}, {scheme}"
            yield from (f"{where}: console: {entry['message']}" for entry in browser.get_log("browser"))
            whole = browser.execute_script("return document.documentElement.scrollWidth")
            if whole > width:
                yield f"{where}: {whole} pixels wide"
            yield from (f"{where}: cut: {element}" for element in browser.execute_script(CUT))
            yield from (f"{where}: faint: {element}" for element in browser.execute_script(FAINT, CONTRAST))
            yield from (f"{where}: no text for {picture}" for picture in browser.execute_script(UNTOLD))
            yield from (f"{where}: column hidden: {table}" for table in browser.execute_script(HIDDEN))
    yield from (f"{page}: {fault}" for fault in unsorted(browser))


def unsorted(browser: Any) -> Iterator[str]:
    """What is wrong with the sorting of a page's tables."""
    for table in browser.find_elements(By.CSS_SELECTOR, "table.sortable"):
        buttons = table.find_elements(By.CSS_SELECTOR, "thead button")
        if not buttons:
            yield "a table of the class sortable has no buttons"
        for column, button in enumerate(buttons):
            before = sorted(column_of(table, column))
            for sign in (1, -1):
                button.click()
                now = column_of(table, column)
                numbers = [float(text.replace(",", "").split()[0].split("/")[0]) for text in now if text[:1].isdigit()]
                texts = now if not numbers else []
                if sorted(now) != before:
                    yield f"sorting column {column} changes what is in it"
                if numbers != sorted(numbers, reverse=sign < 0) or (texts and texts != sorted(texts)[::sign]):
                    yield f"column {column} is not sorted: {now}"
                if numbers and any(not text[:1].isdigit() for text in now[: len(numbers)]):
                    yield f"column {column}: what is unknown does not come last: {now}"
            if button.find_element(By.XPATH, "..").get_attribute("aria-sort") != "descending":
                yield f"column {column} does not say how it is sorted"


def column_of(table: Any, column: int) -> list[str]:
    rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [row.find_elements(By.CSS_SELECTOR, "th, td")[column].text for row in rows]


def main(folder: Path) -> None:
    pages = [folder / "study" / "study.html", next(folder.glob("study/*/report.html"))]
    pages += [next(folder.glob(f"{name}/*.html")) for name in ("benchmark", "sensitivity")]
    with chromium() as browser:
        found = [fault for page in pages for fault in faults(browser, page)]
    print("\n".join(found) or f"{len(pages)} pages: nothing to complain about")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
