"""What every test stands on: checked annotations, few threads, and the folder of third-party material."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

# Must come before anything of jidm is imported.
from jaxtyping import install_import_hook

install_import_hook("jidm", "annotations.checked")

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


def material(name: str) -> Path:
    """A folder of third-party files that the repository does not hold; skips the test where it is absent.

    Looked for in the folder named by the environment variable JIDM_MATERIAL, else in `../shared/material` beside the
    repository.
    """
    root = Path(os.environ.get("JIDM_MATERIAL") or REPOSITORY.parent / "shared" / "material")
    path = root / name
    if not path.exists():
        pytest.skip(f"third-party material '{name}' is not in {root}; set JIDM_MATERIAL to the folder that holds it")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped with a reason where no CUDA device works."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
