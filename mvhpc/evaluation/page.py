"""HTML pages that load nothing: styles and pictures are a part of the file, and there are no scripts."""

import base64
import io
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PAGES = Path(__file__).parent / "pages"
MIME = {"svg": "image/svg+xml", "png": "image/png"}


def render(page: str, **values: object) -> str:
    """A template of ``pages/`` with its values, which are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    css = (PAGES / "page.css").read_text()
    return environment.get_template(page).render(css=css, **values)


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
