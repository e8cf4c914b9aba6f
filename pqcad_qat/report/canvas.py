"""A figure for embedding in a page: matplotlib's SVG with the page's theme colours, tooltips and an alternative text.

Not here: what each figure shows (figures.py).
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure

# Colours of the page's light theme. In the SVG each one becomes var(--name), so that the dark theme can replace it.
COLOURS: Mapping[str, str] = {
    "ink": "#1a2028",
    "muted": "#5b6573",
    "line": "#d8dde4",
    "surface": "#fffffe",
    "accent": "#09766d",
    "blue": "#2b6cb8",
    "amber": "#a86400",
    "rose": "#bb3560",
    "violet": "#6d51bd",
    "grey": "#8e97a3",
    "bits8": "#dfeaf5",
    "bits7": "#c9dcee",
    "bits6": "#a9c9e4",
    "bits5": "#7fafd6",
    "bits4": "#4f8fc4",
    "bits3": "#2a6aa6",
    "bits2": "#123f73",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass
class Canvas:
    """A figure that is being drawn, with the tooltips of its artists."""

    name: str
    figure: Figure
    tips: list[str] = field(default_factory=list)

    def tip(self, artist: Artist, text: str) -> None:
        """Show ``text`` while the pointer is over the artist, which must lie inside its axes."""
        artist.set_in_layout(False)  # the layout would otherwise measure each of hundreds of marks
        artist.set_gid(f"tip{len(self.tips)}")
        self.tips.append(text)

    def svg(self, alt: str) -> str:
        """Return the figure as an <svg> element for embedding in a page; ``alt`` describes what it shows."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _inline(buffer.getvalue(), self, alt)


@contextmanager
def canvas(name: str, width: float, height: float) -> Iterator[Canvas]:
    """Open a Canvas of width x height inches in the style of the pages."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield Canvas(name, Figure(figsize=(width, height), layout="constrained"))


def _inline(text: str, drawn: Canvas, alt: str) -> str:
    # Adapt matplotlib's document for embedding: drop the XML header, the metadata and the size, prefix all ids with the
    # chart's name so that charts on one page do not clash, insert the tooltips as <title> elements, and replace colours
    # by CSS variables.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    text = re.sub(r'\bid="(?!tip)', f'id="{drawn.name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{drawn.name}-", text)
    for index, tip in enumerate(drawn.tips):
        text = text.replace(f'<g id="tip{index}">', f"<g><title>{html.escape(tip)}</title>", 1)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg", f'<svg class="chart" role="img" aria-label="{html.escape(alt)}"', 1).strip()
