"""HTML pages that load nothing: styles, pictures and scripts are a part of the file."""

import base64
import io
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLE = Path(__file__).parent / "pages" / "page.css"  # of all pages
MIME = {"svg": "image/svg+xml", "png": "image/png"}


def render(folder: Path, page: str, **values: object) -> str:
    """A template with its values, which are escaped; ``css`` is the style of all pages.

    Args:
        folder: of the template, and of what it includes.
        page: file name of the template.
        values: by their names in the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(page).render(css=STYLE.read_text(), **values)


def inline(figure: Figure, kind: str) -> str:
    """A figure as a ``data:`` URL; ``kind`` is ``svg`` or ``png``."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "mvhpc"}):  # the same page has the same bytes
        figure.savefig(buffer, format=kind, dpi=110, facecolor=figure.get_facecolor(), metadata=metadata)
    return _url(buffer.getvalue(), kind)


def inline_file(path: Path) -> str:
    """A picture file, PNG or SVG, as a ``data:`` URL."""
    return _url(path.read_bytes(), path.suffix[1:])


def _url(content: bytes, kind: str) -> str:
    return f"data:{MIME[kind]};base64,{base64.b64encode(content).decode()}"
