"""Figures of Matplotlib as SVG that follows the page's colours, light or dark."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

# Colours that stand for variables of the page's style sheet.
INK, FAINT, LINE, ACCENT = "#010101", "#010102", "#010103", "#010104"
_HEAT = (0.20, 0.50, 0.80)
_VARIABLES = {INK: "ink", FAINT: "faint", LINE: "line", ACCENT: "accent"}
NUM_COLOURS = 12
# From the thirteenth on, subjects share colours with others, but not markers.
_MARKERS = "osD^vPX"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        name: Its name, which no other figure of the page has.
        title: What it shows, in a few words.
        caption: How it is read, in a sentence.
        svg: The SVG element.
        subject: The subject that it is of alone, by its place in the report.
    """

    name: str
    title: str
    caption: str
    svg: Markup
    subject: int | None = None


def colour(index: int) -> str:
    """Returns the colour of a subject, by its place in the report."""
    return f"#0102{index % NUM_COLOURS:02x}"


def marker(index: int) -> str:
    """Returns the marker of a subject, by its place in the report."""
    return _MARKERS[(index + index // NUM_COLOURS) % len(_MARKERS)]


@contextlib.contextmanager
def new_figure(width: float, height: float, **subplots: Any) -> Iterator[Any]:
    """Yields a figure of Matplotlib and its axes, in the page's style.

    Args:
        width: Its width, in points.
        height: Its height, in points.
        **subplots: What `subplots` takes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "inertia_jax",
        "font.size": 11,
        "text.color": INK,
        "text.parse_math": False,  # names may have any sign in them
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": FAINT,
        "ytick.labelcolor": FAINT,
        "lines.linewidth": 1.7,
        "lines.markersize": 5,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(width / 72, height / 72), **subplots)
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def tag(artist: Any, index: int) -> None:
    """Marks what is drawn of a subject, which the page's script shows and hides."""
    artist.set_gid(f"subject-{index}")


def heat(axes: Any, shares: Any, *, extent: Any = None) -> None:
    """Draws shares in [0, 1] as squares, from the page's ground to a strong colour."""
    import numpy as np

    shares = np.asarray(shares)
    # A tone between those of the light and the dark page: pixels have no variables.
    pixels = np.broadcast_to(np.array([*_HEAT, 0.0]), (*shares.shape, 4)).copy()
    pixels[..., 3] = 0.85 * shares
    axes.imshow(pixels, interpolation="none", aspect="auto", extent=extent)
    axes.grid(False)


def to_svg(figure: Any, name: str, title: str) -> Markup:
    """Returns a figure as an SVG element.

    Args:
        figure: The figure.
        name: A name that no other figure of the page has.
        title: What it shows, in words.
    """
    stream = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for element in ("metadata", "style"):  # the page has a style sheet of its own
        text = re.sub(rf"<{element}.*?</{element}>\s*", "", text, flags=re.DOTALL)
    # Without a size of its own, it has that of the page.
    box = re.search(r'viewBox="[^"]*"', text)
    opened = f'<svg {box[0] if box else ""} id="{name}" role="img" class="figure"'
    opened = f"{opened} aria-label={_quoted(title)}>"
    text = re.sub(r"<svg[^>]*>", lambda _: opened, text, count=1)
    # Ids are those of one page.
    text = re.sub(
        r' id="subject-(\d+)"', r' class="of-subject" data-subject="\1"', text
    )
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    ids = re.findall(r' id="([^"]+)"', text)
    for found in {*ids} - {name}:
        text = text.replace(f' id="{found}"', f' id="{name}-{found}"')
        text = text.replace(f'"#{found}"', f'"#{name}-{found}"')
        text = text.replace(f"url(#{found})", f"url(#{name}-{found})")
    for value, variable in _VARIABLES.items():
        text = text.replace(value, f"var(--{variable})")
    text = re.sub(
        r"#0102([0-9a-f]{2})", lambda m: f"var(--subject-{int(m[1], 16)})", text
    )
    # Numbers to a hundredth of a point.
    text = re.sub(r"(\d+\.\d{2})\d+", r"\1", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    return Markup(text)


def _quoted(text: str) -> str:
    return f'"{Markup.escape(text)}"'
