"""How the page's pictures look: matplotlib to inline SVG that follows the page's light or dark colours.

    looks = Looks(["ptr", "vanilla"])        # an arm has the same colour, marker, line and hatch everywhere
    picture = draw(lambda axes: axes.plot(x, y, color=looks["ptr"].color), "Loss", "loss of ptr over steps")

Text stays text (it can be selected and read aloud). Names come from files: they are drawn as they are, never as TeX.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vla.analysis.plots import OKABE_ITO

INK, PAPER = "#010203", "#fdfefc"
"""Stand for the page's text and background colour until the SVG is written."""
MARKERS, LINES, HATCHES = (
    "osD^vPX*",
    ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))),
    ("", "//", "..", "\\\\", "xx"),
)
WIDTH, TALL = 5.2, 14
"""Inches; a panel is one picture, so that panels stand below each other on a telephone."""
RC = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "page",  # the same picture has the same ids
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "hatch.linewidth": 0.6,
    "hatch.color": PAPER,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Picture:
    """`svg` is safe to put on the page, `title` is plain text; a `tall` one is longer than a screen."""

    title: str
    svg: Markup
    tall: bool


@dataclass(frozen=True)
class Look:
    """How an arm is drawn. Not colour alone: line style, marker and hatch differ too."""

    name: str
    color: str
    marker: str
    linestyle: object
    hatch: str


class Looks(dict[str, Look]):
    """arm → Look, in the order given."""

    def __init__(self, arms: Iterable[str]):
        colors = [INK if color == "#000000" else color for color in OKABE_ITO]
        for i, arm in enumerate(arms):
            marker, line, hatch = MARKERS[i % len(MARKERS)], LINES[i % len(LINES)], HATCHES[i % len(HATCHES)]
            self[arm] = Look(plain(arm), colors[i % len(colors)], marker, line, hatch)


def plain(text: str, most: int = 48) -> str:
    """One printable line of at most `most` characters that an SVG can hold; a legend leaves out "" and "_x"."""
    text = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Cn", "Co") else c for c in str(text))
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "\u200b" + text if text.startswith("_") or not text else text


def draw(paint: Callable[[Axes], None], title: str, text: str, height: float = 3.5) -> Picture:
    """One pair of axes as an inline SVG.

    Args:
        title: above the picture; text: what it shows, for a screen reader. height: inches.
    """
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has more fonts
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    prefix = "p" + hashlib.sha256((title + out.getvalue()).encode()).hexdigest()[:8]
    return Picture(title, Markup(inline(out.getvalue(), prefix, text)), height > TALL)


def inline(svg: str, prefix: str, text: str) -> str:
    """A standalone SVG as an element of an HTML page: no namespaces, links or ids that another picture has."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "id":
                value = f"{prefix}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{prefix}-", 1)
            else:
                value = re.sub(r"url\(#", f"url(#{prefix}-", value)
                value = value.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
            element.set(key, value)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", plain(text, 300))
    return ElementTree.tostring(root, encoding="unicode")
