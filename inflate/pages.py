"""Pages of HTML that show videos and say what they are."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = (
    "body{font-family:sans-serif}video{min-width:12em;image-rendering:pixelated}"
    "th,td{text-align:left;padding:0.2em 0.6em}"
)


def page(title: str, body: str) -> str:
    """A whole page; the title is text, the body markup."""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{body}</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are markup; the first of each row is its heading."""
    above = "".join(f"<th>{cell}</th>" for cell in head)
    lines = [f"<th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}" for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in [above, *lines]) + "\n</table>\n"


def playing(file: str) -> str:
    """What plays a video for ever."""
    return f'<video src="{html.escape(file)}" autoplay loop muted playsinline></video>'
