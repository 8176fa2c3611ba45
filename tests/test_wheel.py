"""The wheel is self-contained: built, installed into a fresh environment, and every embodiment loads from it.

Dependencies are not installed twice: the fresh environment sees the running one's packages behind its own, and the
test makes sure that jidm itself comes from the wheel.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from commands import call

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED = {path.parent.name for path in (REPOSITORY / "embodiments").glob("*/embodiment.toml")}
TRAINED = {path.parent.name for path in (REPOSITORY / "checkpoints").glob("*/config.json")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="builds the package: extra dev")
    out = tmp_path_factory.mktemp("sdist")
    call(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=REPOSITORY)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the unpacked source distribution, so that this is tested as well."""
    source, out = sdist.parent / "source", sdist.parent / "wheel"
    with tarfile.open(sdist) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(source, filter="data")
        else:
            archive.extractall(source)
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=next(source.iterdir()))
    return next(out.glob("*.whl"))


def test_wheel_contains_the_package_data_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jidm"}
    assert "jidm/py.typed" in names
    assert {n.split("/")[2] for n in names if n.startswith("jidm/_embodiments/")} == BUNDLED
    weights = {f"jidm/_checkpoints/{name}/model.safetensors" for name in TRAINED}
    assert weights and weights == {n for n in names if n.endswith(".safetensors")}
    sources = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "jidm").rglob("*.py")}
    assert sources <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    for extra in ("robots", "sim", "train", "control", "raft", "serve", "ray", "pytorch3d", "docs", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_sdist_contains_the_tests_and_the_robots(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"embodiments/{name}/embodiment.toml" for name in BUNDLED} <= names
    assert {f"checkpoints/{name}/config.json" for name in TRAINED} <= names
    assert {"tests/test_wheel.py", "Makefile", "constraints.txt", "LICENSE", "README.md"} <= names


def test_every_embodiment_loads_from_the_wheel(wheel: Path, tmp_path: Path):
    home = tmp_path / "fresh"
    call(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    # A path file only appends: what is installed in the fresh environment comes first, and the .pth files of the
    # running one, an editable jidm among them, are not read.
    (site / "running.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    program = """
import json, jidm, jidm.robot.registry
robots = {}
for name in jidm.embodiment_names():
    try:
        robots[name] = jidm.load_embodiment(name).n
    except jidm.MissingExtraError as error:
        robots[name] = str(error)
hint = str(jidm.MissingExtraError("rendering", "pybullet", "sim"))
print(json.dumps([jidm.__file__, str(jidm.bundled.bundled_folder("embodiments")), robots, hint]))
"""
    file, folder, robots, hint = json.loads(call(python, "-c", program, cwd=tmp_path))
    assert Path(file).is_relative_to(home) and Path(folder).is_relative_to(home)
    assert set(robots) == BUNDLED
    failed = {name: n for name, n in robots.items() if not isinstance(n, int)}
    assert not failed, failed
    assert hint == "rendering needs the package 'pybullet': pip install 'jidm[sim]'"
    assert "panda" in call(home / "bin" / "jidm", "embodiments", cwd=tmp_path)
