"""What the site does to the pages on their way to HTML; `mkdocs.yml` names this file under `hooks`.

- One API page per room of `jidm/` is made from the tree, so that a new module needs no new page. Dated notes are put
  into the navigation by themselves.
- Equations become MathML, which browsers draw by themselves: no script, no font from the network.
- Links that leave `docs/` lead to the repository, so that the same page works there and on the site.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = "https://github.com/jidm/jidm/blob/main"
NOT_API = {"cli"}  # a command line is documented by `jidm VERB --help`

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.S)
_LOADED = re.compile(
    r"""<(?:script|img|iframe|link rel="(?:stylesheet|preload)")[^>]*?(?:src|href)="(https?://[^"]+)"""
)
_UP = re.compile(r"\]\(((?:\.\./)+)([^)]*)\)")


def rooms() -> list[str]:
    """Folders and files directly below `jidm/` that have an API page, sorted."""
    found = {path.stem for path in (REPOSITORY / "jidm").iterdir() if path.suffix in ("", ".py")}
    return sorted(name for name in found - NOT_API if not name.startswith(("_", ".")))


def api_page(room: str) -> str:
    """Markdown of one room: its own docstring, then every module in it."""
    folder = REPOSITORY / "jidm" / room
    modules = []
    if folder.is_dir():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if path.stem != "__init__" and not any(part.startswith("_") for part in parts):
                modules.append(".".join(parts))
    head = f"::: jidm.{room}\n    options:\n      heading_level: 1\n      members: {'[]' if modules else 'true'}\n"
    return "\n".join([head, *(f"::: {module}\n    options:\n      heading_level: 2\n" for module in modules)])


def notes() -> list[str]:
    """Names of the dated notes, newest first."""
    return sorted((path.name for path in (REPOSITORY / "docs" / "notes").glob("2*.md")), reverse=True)


def on_config(config: Any) -> Any:
    """Put notes and API pages into the navigation."""
    config.nav.append({"Notes": ["notes/index.md", *(f"notes/{name}" for name in notes())]})
    config.nav.append({"API": [{room: f"api/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the API pages."""
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=api_page(room)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave the documents to the repository."""
    depth = page.file.src_uri.count("/")

    def led(match: re.Match[str]) -> str:
        up, rest = match[1].count("../"), match[2]
        return f"]({SOURCE}/{rest})" if up > depth else match[0]

    return _UP.sub(led, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Draw the equations."""

    def drawn(match: re.Match[str]) -> str:
        block = match[2] == "["
        drawing = convert(html.unescape(match[3].strip()), display="block" if block else "inline")
        if "\\" in drawing:  # a command that the converter does not know comes out as it went in
            raise PluginError(f"an equation holds an unknown command: {match[3].strip()}")
        return drawing.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # bars as high as letters

    return _EQUATION.sub(drawn, content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads something from the network.

    Raises:
        PluginError: it does.
    """
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[1]} from the network; ship the file in docs/assets")
    return output
