"""The annotation check of the test run is switched on, and it refuses what it should."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from jidm.camera.model import Camera

TESTS = Path(__file__).parent


def test_wrong_shape_is_refused():
    camera = Camera.look_at((1, 1, 1), (0, 0, 0))
    with pytest.raises(Exception, match="project_camera"):
        camera.project_camera(torch.zeros(5, 4))
    assert camera.project_camera(torch.ones(5, 3)).shape == (5, 2)


def test_names_for_type_checkers_only_are_left_out_and_the_rest_is_checked(tmp_path: Path):
    (tmp_path / "room.py").write_text(
        textwrap.dedent("""
        from __future__ import annotations
        from typing import TYPE_CHECKING
        from jaxtyping import Float
        from torch import Tensor
        if TYPE_CHECKING:
            from nowhere import Ghost

        def f(ghost: Ghost | None, x: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
            return x.sum(-1)
        """)
    )
    program = f"""
import sys; sys.path[:0] = [{str(TESTS)!r}, {str(tmp_path)!r}]
from jaxtyping import install_import_hook
install_import_hook("room", "annotations.checked")
import room, torch
room.f(object(), torch.zeros(2, 3))
try:
    room.f(object(), torch.zeros(2, 4))
except Exception:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr
