"""The parts of a page: tables, figures and animations, as HTML that refers to no other file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; } img.large { width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right; }
th { border-bottom: 1px solid #999; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
p.note { color: #57606a; }
"""


def between(interval: list[float], form: str) -> str:
    low, high = interval
    return f"{low:{form}} to {high:{form}}"


def as_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [("th", header), *(("td", row) for row in rows)]
    return (
        "<table>"
        + "".join("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>" for tag, row in lines)
        + "</table>"
    )


def picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def embedded_gif(path: Path) -> str:
    """The animation, as wide as the page."""
    return f'<img class="large" alt="" src="data:image/gif;base64,{base64.b64encode(path.read_bytes()).decode()}">'
