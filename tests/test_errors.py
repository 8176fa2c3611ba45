"""Errors name the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from jidm.errors import MissingExtraError, install_command

REPOSITORY = Path(__file__).resolve().parents[1]


def test_a_checkout_is_extended_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wheel says is in test_wheel.py."""
    monkeypatch.chdir(REPOSITORY)
    assert install_command("sim") == "pip install -e '.[sim]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("sim") == f"pip install -e '{REPOSITORY}[sim]'"


def test_a_package_of_no_extra_is_installed_by_its_name() -> None:
    assert (
        str(MissingExtraError("to_pandas", "pandas", None))
        == "to_pandas needs the package 'pandas': pip install pandas"
    )
