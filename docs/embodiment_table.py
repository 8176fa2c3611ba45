"""Write the README's table of robots from the registry; a test fails when it is out of date.

python docs/embodiment_table.py            rewrites README.md
"""

from __future__ import annotations

from pathlib import Path

from jidm.cli.embodiments import table

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- robots: written by docs/embodiment_table.py -->", "<!-- end of robots -->"


def markdown() -> str:
    """The registry as a Markdown table."""
    lines = ["| name | robot | joints + gripper | files and license |", "|---|---|---|---|"]
    lines += [f"| `{r.name}` | {r.title} | {r.joints} | {r.license} |" for r in table()]
    return "\n".join(lines)


def updated(text: str) -> str:
    """A README with its table replaced by the current one."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
