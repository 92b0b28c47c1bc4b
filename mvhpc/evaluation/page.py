"""The pages of ``pages/``; see :mod:`shards.web_page`."""

from pathlib import Path

from shards import web_page

PAGES = Path(__file__).parent / "pages"


def render(page: str, **values: object) -> str:
    """A template of ``pages/`` with its values, which are escaped."""
    return web_page.render(PAGES, page, **values)
