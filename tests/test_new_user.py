"""The path of a new user: the wheel from an index into a fresh environment, then README's first snippet, decode, view and report
of a video of their own. No simulator is installed there, and nothing of this repository is on the path.

It takes some minutes, most of them for installing torch.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from commands import call, clean_environment, run

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
_UNREACHABLE = "No matching distribution|Could not find a version|ConnectionError|NewConnectionError|Name or service"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel and the extras `robots` and `view`."""
    pytest.importorskip("hatchling", reason="builds the package: extra dev")
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=REPOSITORY)
    home = out / "fresh"
    call(sys.executable, "-m", "venv", home, cwd=out)
    (wheel,) = out.glob("*.whl")
    pins = REPOSITORY / "constraints.txt"
    try:
        call(home / "bin" / "python", "-m", "pip", "install", "-q", "-c", pins, f"{wheel}[robots,view]", cwd=out)
    except AssertionError as error:
        if re.search(_UNREACHABLE, str(error)):
            pytest.skip("no package index with the dependencies is reachable")
        raise
    return home / "bin"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with robot.mp4, a Panda from its home pose, and camera.json."""
    pytest.importorskip("pybullet", reason="renders the user's video: extra sim")
    from jidm import load_embodiment, write_video
    from jidm.sim import Scene, random_motion

    folder = tmp_path_factory.mktemp("theirs")
    panda = load_embodiment("panda")
    camera = panda.camera().resized(320, 240)
    camera.save(folder / "camera.json")
    truth = random_motion(panda, 8, 1 / 16, seed=0, start=panda.home)
    with Scene(panda) as scene:
        write_video(folder / "robot.mp4", iter([scene.render(q, camera).rgb for q in truth]), 16)
    (folder / "truth.json").write_text(json.dumps(truth.tolist()))
    return folder


def test_from_install_to_report(programs: Path, theirs: Path) -> None:
    assert "jidm" in call(programs / "jidm", "--version", cwd=theirs)
    where = call(programs / "python", "-c", "import jidm; print(jidm.__file__)", cwd=theirs)
    assert Path(where.strip()).is_relative_to(programs.parent)
    call(programs / "python", "-c", "import importlib.util as u; assert u.find_spec('pybullet') is None", cwd=theirs)

    (snippet, *_) = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.S | re.M
    )
    print_position = "\nprint(motion.position[-1].tolist())"
    decoded = json.loads(call(programs / "python", "-c", snippet + print_position, cwd=theirs).splitlines()[-1])
    truth = json.loads((theirs / "truth.json").read_text())
    # The first joints of the arm; the wrist's roll is hardly seen.
    moved = max(abs(a - b) for a, b in zip(truth[-1][:4], truth[0][:4]))
    off = max(abs(a - b) for a, b in zip(truth[-1][:4], decoded[:4]))
    assert off < 0.5 * moved, (off, moved)

    model = ["--embodiment", "panda", "--camera", "camera.json", "--q0", "home"]
    said = call(programs / "jidm", "decode", "robot.mp4", *model, cwd=theirs)
    assert "8 frames" in said
    results = {path.name for path in (theirs / "jidm_decode").iterdir()}
    assert results == {"motion.npz", "motion.csv", "plot.png", "summary.json", "overlay.mp4"}

    with subprocess.Popen(
        [programs / "jidm", "view", "jidm_decode", "--port", "0"], stdout=subprocess.PIPE, text=True, cwd=theirs,
        env=clean_environment(),
    ) as viewer:  # fmt: skip
        try:
            assert viewer.stdout is not None
            address = re.search(r"http://\S+", viewer.stdout.readline())
            assert address is not None
            with urllib.request.urlopen(address[0], timeout=30) as page:
                assert page.status == 200 and b"<html" in page.read().lower()
        finally:
            viewer.send_signal(signal.SIGINT)
        viewer.communicate(timeout=60)

    said = call(programs / "jidm", "report", "robot.mp4", "--checkpoint", "panda-sim", cwd=theirs)
    assert "of 10; written to report.html" in said
    assert (theirs / "report.html").read_text(encoding="utf-8").count("data:image/") == 3

    done = run(programs / "jidm", "demo", cwd=theirs)
    assert done.returncode == 1 and "pip install 'jidm[sim]'" in done.stderr
