"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jidm.atomic_io import atomic_write, replaced_files
from jidm.errors import InputError

PATTERNS = ("result.*", "plot_*.png")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("result.npz", "plot_a.png", "notes.txt"):
        (out / name).write_text("old")
    return out


def test_a_result_is_replaced_and_other_files_stay(folder: Path) -> None:
    with replaced_files(folder, PATTERNS) as new:
        (new / "result.csv").write_text("new")
        assert (folder / "result.npz").read_text() == "old"  # until the block is left
    assert contents(folder) == {"result.csv": "new", "notes.txt": "old"}


def test_a_failure_leaves_the_earlier_result(folder: Path, tmp_path: Path) -> None:
    for out, before in ((folder, contents(folder)), (tmp_path / "new", None)):
        with pytest.raises(ZeroDivisionError), replaced_files(out, PATTERNS) as new:
            (new / "result.csv").write_text("new")
            raise ZeroDivisionError
        assert (contents(out) if out.exists() else None) == before


def test_no_moment_shows_files_of_two_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at after each single change of a file."""
    seen: list[set[str]] = []
    for method in ("unlink", "rename"):
        original = getattr(Path, method)

        def watched(self: Path, *arguments: object, original=original, **options: object) -> object:
            answer = original(self, *arguments, **options)
            seen.append({path.read_text() for path in folder.iterdir() if path.is_file() and path.name != "notes.txt"})
            return answer

        monkeypatch.setattr(Path, method, watched)
    with replaced_files(folder, PATTERNS) as new:
        for name in ("result.csv", "plot_b.png"):
            (new / name).write_text("new")
    assert len(seen) >= 4 and all(len(kinds) <= 1 for kinds in seen)


def test_a_file_is_no_folder_and_a_folder_no_file(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file; give a folder"), replaced_files(folder / "notes.txt", PATTERNS):
        pass
    with pytest.raises(InputError, match="it is a folder; give a file"), atomic_write(folder):
        pass
    assert sorted(os.listdir(folder)) == ["notes.txt", "plot_a.png", "result.npz"]
