"""What the documents say is true: their snippets run, their tables and figures are fresh, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])
WITH_SNIPPETS = [
    path for path in DOCUMENTS if "```python" in path.read_text(encoding="utf-8") and "notes" not in path.parts
]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.S | re.M)


def name_of(document: Path) -> str:
    return str(document.relative_to(REPOSITORY))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the snippets expect."""
    pytest.importorskip("pybullet", reason="renders videos: extra sim")
    from jidm import Camera, Embodiment, embodiment_from_urdf, load_embodiment, write_video
    from jidm.sim import Scene, random_motion

    folder = tmp_path_factory.mktemp("workspace")
    (folder / "good").mkdir()

    def film(path: Path, robot: Embodiment, camera: Camera, frames: int) -> None:
        with Scene(robot, supersample=1) as scene:
            images = [
                scene.render(q, camera).rgb for q in random_motion(robot, frames, 1 / 16, seed=0, start=robot.home)
            ]
        write_video(path, iter(images), 16)

    panda = load_embodiment("panda")
    camera = panda.camera().resized(160, 120)
    camera.save(folder / "camera.json")
    film(folder / "robot.mp4", panda, camera, 5)
    (folder / "good" / "0.mp4").write_bytes((folder / "robot.mp4").read_bytes())
    finger = load_embodiment("planar_finger_5")
    film(folder / "finger.mp4", finger, finger.camera().resized(224, 320), 5)

    sys.path.insert(0, str(REPOSITORY / "examples"))
    from importlib import import_module

    (folder / "my_robot.urdf").write_text(import_module("2_my_robot_from_urdf").urdf())
    mine = embodiment_from_urdf(folder / "my_robot.urdf")
    view = {"eye": [0.6, -0.9, 0.7], "target": [0.0, 0.0, 0.3], "fov_y": 45.0}
    film(folder / "my_video.mp4", mine, Camera.from_dict({"width": 320, "height": 240, **view}), 3)
    (folder / "my_finger").symlink_to(REPOSITORY / "checkpoints" / "finger-5")
    scales_of_the_exact_field(folder, panda, camera)
    return folder


def scales_of_the_exact_field(folder: Path, robot: Any, camera: Any) -> None:
    """mine.json, as `jidm fit-scales` writes it for the analytic field."""
    from jidm import JacobianIDM
    from jidm.estimation.analytic_measurement import AnalyticOptions
    from jidm.rewards import ExecutabilityReward

    # Scales depend on the kind of field alone; flow without alignment is quicker.
    quick = AnalyticOptions(refine="none")
    idm = JacobianIDM.from_embodiment(robot, camera=camera, limits="none", options=quick)
    fitted = ExecutabilityReward(idm).fit_scales([str(folder / "robot.mp4")] * 5, q0=robot.home)
    assert fitted.scales is not None
    fitted.scales.save(folder / "mine.json")


@pytest.mark.parametrize("document", WITH_SNIPPETS, ids=name_of)
def test_snippets_run_and_say_the_right_shapes(document: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """The snippets of a page run one after the other; every `expression  # (a, b) ...` has that shape, T being 5."""
    monkeypatch.chdir(workspace)
    generator = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {"videos": torch.rand(2, 5, 3, 48, 48, generator=generator)}
    names["frames"] = np.zeros((5, 128, 128, 3), np.uint8)
    for program in blocks(document, "python"):
        exec(compile(program, name_of(document), "exec"), names)
        for expression, shape in SHAPE.findall(program):
            assert fits(tuple(eval(expression, names).shape), shape, len(names["videos"])), (expression, shape)


SHAPE = re.compile(r"^([\w.]+)(?: = [^#\n]*)? +# \(([^()]*,[^()]*)\)", flags=re.M)


def fits(found: tuple[int, ...], shape: str, videos: int) -> bool:
    """Whether a shape is the written one; letters other than T and N may be any size."""
    values = {"T": 5, "T-1": 4, "N": videos}
    written = [part for part in map(str.strip, shape.split(",")) if part]
    sizes = [values.get(part, int(part) if part.isdigit() else size) for part, size in zip(written, found)]
    return len(written) == len(found) and sizes == list(found)


def test_client_of_the_how_to_is_answered():
    pytest.importorskip("websockets", reason="serves: extra serve")
    names: dict[str, Any] = {"frames": np.zeros((2, 128, 128, 3), np.uint8)}
    exec(blocks(DOCS / "howto" / "serve.md", "python")[0], names)
    command = [sys.executable, "-m", "jidm.cli", "serve", "--checkpoint", "panda-sim", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            port = int(re.findall(r":(\d+),", server.stdout.readline())[0])
            assert names["run"](port).shape[1] == 8
        finally:
            server.terminate()


def test_shapes_are_really_compared():
    assert fits((4, 8), "T-1, 8", 2) and fits((2,), "N,", 2) and fits((5, 7, 9, 3), "T, H, W, 3", 2)
    assert not fits((4, 7), "T-1, 8", 2) and not fits((4,), "T-1, 8", 2) and not fits((3,), "N,", 2)
    assert sum(len(SHAPE.findall(p)) for d in WITH_SNIPPETS for p in blocks(d, "python")) >= 25


def test_quickstart_is_short():
    for document in (REPOSITORY / "README.md", DOCS / "index.md"):
        program = blocks(document, "python")[0]
        assert len([line for line in program.splitlines() if line.strip()]) <= 10
        before = document.read_text(encoding="utf-8").split(program)[0]
        assert len(before.splitlines()) < 60, "the first result comes within two screens"


def test_camera_files_of_the_conventions_load(tmp_path: Path):
    from jidm import Camera

    for text in blocks(DOCS / "conventions.md", "json"):
        (tmp_path / "c.json").write_text(text)
        camera = Camera.load(tmp_path / "c.json")
        assert (camera.width, camera.height) == (json.loads(text)["width"], json.loads(text)["height"])


def test_embodiment_file_of_the_how_to_loads(tmp_path: Path, workspace: Path):
    from jidm import load_embodiment

    folder = tmp_path / "my_robot"
    folder.mkdir()
    text = blocks(DOCS / "howto" / "urdf.md", "toml")[0]
    (folder / "embodiment.toml").write_text(text)
    joints = ["joint_2", "joint_3"]
    urdf = (workspace / "my_robot.urdf").read_text().replace("joint_1", "locked")
    urdf = urdf.replace('name="locked" type="revolute"', 'name="locked" type="fixed"').replace("forearm", "tool")
    for ours, theirs in zip(joints, ("shoulder", "elbow")):
        urdf = urdf.replace(ours, theirs)
    (folder / "robot.urdf").write_text(urdf)
    robot = load_embodiment(folder)
    assert robot.joint_names == ("shoulder", "elbow") and robot.tip_links == ("tool",)


def docs_module(name: str) -> Any:
    from importlib import import_module

    sys.path.insert(0, str(DOCS))
    return import_module(name)


def test_table_of_robots_is_fresh():
    embodiment_table = docs_module("embodiment_table")
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert embodiment_table.updated(text) == text, "out of date: run python docs/embodiment_table.py"
    stale = text.replace("| `panda` |", "| `pnda` |")
    assert embodiment_table.updated(stale) == text


def test_import_graph_is_fresh():
    import_graph = docs_module("import_graph")
    drawn = import_graph.svg()
    assert drawn == import_graph.SVG.read_text(encoding="utf-8"), "out of date: run python docs/import_graph.py"
    assert drawn == import_graph.svg()  # the same again
    for room in import_graph.imports():
        assert f">{room}</text>" in drawn


def test_import_graph_leaves_out_only_what_follows():
    import_graph = docs_module("import_graph")
    graph = {"top": {"middle", "base"}, "middle": {"base"}, "base": set()}
    assert import_graph.reduced(graph) == [("middle", "base"), ("top", "middle")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target
    if "notes" in document.parts:
        return  # of their time
    for path in re.findall(r"`((?:docs|tests|benchmarks|examples|jidm)/[\w./]+\.\w+)`", text):
        assert (REPOSITORY / path).exists(), path


def anchors(document: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if "notes" not in d.parts], ids=name_of)
def test_modules_named_in_text_exist(document: Path):
    from importlib import import_module
    from importlib.util import find_spec

    for dotted in re.findall(r"`(jidm(?:\.\w+)+)", document.read_text(encoding="utf-8")):
        if dotted == "jidm.embodiments" or document.name == "CHANGELOG.md":  # an entry-point group; history
            continue
        module, _, name = dotted.rpartition(".")
        try:
            found = hasattr(import_module(module), name)
        except ImportError:
            found = False
        assert found or find_spec(dotted) is not None, dotted  # not imported: it may need an optional package


def test_benchmark_commands_exist():
    for path in re.findall(r"`python (benchmarks/\w+\.py)", (DOCS / "benchmarks.md").read_text(encoding="utf-8")):
        assert (REPOSITORY / path).exists(), path


def test_every_room_is_on_the_map():
    map_ = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = {
        p.stem for p in (REPOSITORY / "jidm").iterdir() if not p.name.startswith(("_", ".")) and p.suffix in ("", ".py")
    }
    assert {room for room in rooms if f"| `{room}` |" not in map_} == set()
    assert {room for room in re.findall(r"^\| `(\w+)` \|", map_, flags=re.M) if room not in rooms} == set()


def test_every_page_is_in_the_navigation():
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (page for page in DOCS.rglob("*.md") if "notes" not in page.parts):
        assert f": {page.relative_to(DOCS)}\n" in navigation, page


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if "notes" not in d.parts], ids=name_of)
def test_commands_exist_with_their_flags(document: Path, capsys: pytest.CaptureFixture[str]):
    from jidm.cli import VERBS, main

    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for line in (line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()):
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert f"\n{words[1]}:" in makefile, line
        if words[:1] == ["jidm"]:
            assert words[1] in VERBS, line
            inner = words[1:3] if words[1] in ("dataset", "embodiments") and len(words) > 2 else words[1:2]
            assert main([*inner, "--help"]) == 0
            helped = capsys.readouterr().out
            for flag in (word.split("=")[0] for word in words if word.startswith("--")):
                assert flag in helped, f"{line}: no {flag}"


def test_shared_entries_of_docstrings_are_split():
    pytest.importorskip("griffe", reason="builds the site: extra docs")
    split = docs_module("griffe_names").split
    text = "Limits.\n\nArgs:\n    lower, upper: limits\n        [rad].\n    dt: time, of\n        a step: [s]."
    assert split(text) == (
        "Limits.\n\nArgs:\n    lower: limits\n        [rad].\n    upper: limits\n        [rad].\n    dt: time, of\n        a step: [s]."
    )


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if "notes" not in d.parts], ids=name_of)
def test_inputs_of_commands_are_made_or_explained(document: Path):
    """A file or folder that a command reads is written by an earlier command, or named in the page's text or Python."""
    from jidm.checkpoint import bundled_names
    from jidm.robot.registry import embodiment_names

    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    known = {*bundled_names(), *embodiment_names(), "home", "show", "validate"}
    made = set(re.findall(r'"([^"\s]+)"', "\n".join(blocks(document, "python"))))
    for line in (line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()):
        words = line.split("#")[0].split()
        made |= {"jidm_demo"} if words[:2] == ["make", "demo"] else set()
        if words[:1] != ["jidm"]:
            continue
        for path in inputs_of(words[1:]):
            top = path.split("/")[0]
            assert path in known or top in made or re.search(rf"`{re.escape(top)}/?`", prose), f"{line}: {path}"
        defaults = {"decode": "jidm_decode", "evaluate": "jidm_evaluate", "score": "scores.jsonl", "demo": "jidm_demo"}
        made.add(words[words.index("--out") + 1] if "--out" in words else defaults.get(words[1], ""))


def inputs_of(words: list[str]) -> list[str]:
    """Words of a command that name what it reads: those before the first flag, and the values of some flags."""
    rest = words[1:]
    flags = [k for k, word in enumerate(rest) if word.startswith("--")]
    positional = rest[: flags[0] if flags else len(rest)]
    reading = {"--data", "--q0", "--scales", "--camera", "--embodiment", "--checkpoint", "--token-file"}
    values = [rest[k + 1] for k in flags if rest[k] in reading and rest[k + 1 :]]
    return [*positional, *(value for value in values if "." in value or "/" in value or value in ("token",))]


def test_a_missing_input_is_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\njidm babble panda --out data\njidm train --data data --out mine\njidm evaluate mine --data other/x\n```\n"
    )
    with pytest.raises(AssertionError, match="other/x"):
        test_inputs_of_commands_are_made_or_explained(page)
    page.write_text(page.read_text() + "Put `other` there.\n")
    test_inputs_of_commands_are_made_or_explained(page)


def test_the_readme_says_how_weak_the_learned_checkpoints_are():
    """With the figures of the benchmark, beside the examples that use them."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for name in ("finger-5", "panda-sim", "allegro-right-sim"):
        (figure,) = re.findall(rf"\(`{name}`\) \| NVE \| ([\d.]+) \|", table)
        for paragraph in (p for p in text.split("\n\n") if f'"{name}"' in p and "```" not in p):
            assert figure in paragraph, (name, figure)
        assert f'"{name}"' in text
    reward = text[text.index("## A reward for video models") :].split("\n## ")[0]
    (figure,) = re.findall(r"\(`panda-sim`\) \| NVE \| ([\d.]+) \|", table)
    assert figure in reward
