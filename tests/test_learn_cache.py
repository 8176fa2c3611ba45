"""Laws of the cache of tables: whole folders only, and no more room than allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jidm.errors import InputError
from jidm.training.data.cache import cached_folder


def _name(k: int) -> str:
    return f"set-128x128-{k:016x}"


def _filled(size: int):
    def make(folder: Path) -> None:
        (folder / "table.npy").write_bytes(bytes(size))

    return make


def _unused(folder: Path, hours: float) -> None:
    then = folder.stat().st_mtime - 3600 * hours
    os.utime(folder, (then, then))


@pytest.fixture(autouse=True)
def _limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JIDM_CACHE_GB", "3e-6")  # 3,000 bytes


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        folder = cached_folder(tmp_path / _name(1), lambda new: made.append(new))
    assert len(made) == 1 and folder.is_dir() and not list(tmp_path.glob(".*"))


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(new: Path) -> None:
        (new / "half.npy").write_bytes(b"1")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached_folder(tmp_path / _name(1), fail)
    assert not list(tmp_path.iterdir())


def test_longest_unused_folders_go_until_the_rest_fits(tmp_path: Path) -> None:
    for k, hours in enumerate([5, 9, 7, 3]):
        _unused(cached_folder(tmp_path / _name(k), _filled(700)), hours)
    cached_folder(tmp_path / _name(9), _filled(1400))
    assert {x.name for x in tmp_path.iterdir()} == {_name(k) for k in (0, 3, 9)}


def test_use_counts_as_such_and_what_was_used_lately_stays(tmp_path: Path) -> None:
    for k in range(4):
        _unused(cached_folder(tmp_path / _name(k), _filled(700)), 5 + k)
    cached_folder(tmp_path / _name(3), _filled(0))
    cached_folder(tmp_path / _name(9), _filled(5000))
    assert {x.name for x in tmp_path.iterdir()} == {_name(3), _name(9)}


def test_other_peoples_folders_stay(tmp_path: Path) -> None:
    for name in ("holiday", "set-128x128"):
        (tmp_path / name).mkdir()
        _filled(9000)(tmp_path / name)
        _unused(tmp_path / name, 100)
    cached_folder(tmp_path / _name(1), _filled(700))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("text", ["lots", "-1", "nan"])
def test_a_limit_that_is_no_number_is_told_before_any_work(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JIDM_CACHE_GB", text)
    with pytest.raises(InputError, match="JIDM_CACHE_GB"):
        cached_folder(tmp_path / _name(1), lambda new: pytest.fail("made something"))
