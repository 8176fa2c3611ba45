"""Programs in processes of their own, without this repository on their path."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def clean_environment() -> dict[str, str]:
    """The environment without what would let a program find this repository or its virtual environment."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A finished command, whatever its exit status."""
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=clean_environment())


def call(*command: str | Path, cwd: Path) -> str:
    """What the command prints; it must succeed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout
