"""The command line: imports, errors, and output files."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import urdf_text

from jidm import cli
from jidm.camera.model import Camera
from jidm.cli import doctor, inputs
from jidm.cli.decode import Decode
from jidm.errors import CameraError, InputError, JidmError, JidmWarning, install_command
from jidm.robot.embodiment import Embodiment
from jidm.robot.registry import embodiment_names, load_embodiment

REPOSITORY = Path(__file__).resolve().parents[1]


def jidm(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jidm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, **options)


@pytest.fixture(scope="module")
def finger() -> Embodiment:
    return load_embodiment("planar_finger_2")


# ---- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", [["--help"], ["decode", "--help"], ["--version"], ["embodiments"], ["embodiments", "show", "panda"]]
)
def test_answers_without_torch(line: list[str]):
    program = (
        f"import sys; from jidm.cli import main; code = main({line!r}); assert code == 0; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip().endswith("False"), done.stderr


def test_every_verb_is_listed_and_light():
    done = jidm("--help")
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert verb in done.stdout
        assert jidm(verb, "--help").returncode == 0


def test_help_is_not_broken_inside_a_sentence():
    """Tyro joins the lines of a field's docstring only if they begin with a letter; indented ones do not."""
    from docstring_parser import parse_from_object

    from jidm.cli.model_args import ModelArgs
    from jidm.training.config import TrainConfig

    verbs = [
        getattr(import_module(module), name) for module, name in (where.split(":") for where in cli.VERBS.values())
    ]
    for described in (*verbs, ModelArgs, TrainConfig):
        for field in parse_from_object(described).params:
            lines = (field.description or "").splitlines()[1:]
            assert all(line[:1].isalpha() for line in lines), f"{described.__name__}.{field.arg_name}"


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("embodiments show pnda", 1, "did you mean 'panda'?"),
        ("embodiments shw", 2, "shw"),
        ("decode", 1, "VIDEO"),
        ("decode v.mp4 --out {tmp}", 1, "--embodiment is missing"),
        ("decode v.mp4 --embodiment panda --q0 home --out {tmp}", 1, "--camera is missing"),
        ("decode v.mp4 --embodiment panda --camera front --out {tmp}", 1, "--q0 is missing"),
        ("decode v.mp4 --checkpoint nowhere --out {tmp}", 1, "nowhere"),
        ("decode v.mp4 --checkpoint nowhere --camera front --out {tmp}", 1, "--camera needs --embodiment"),
        ("decode v.mp4 --embodiment panda --camra c.json", 2, "--camra"),
        ("decode v.mp4 --embodiment pnda --camera front --q0 home", 1, "did you mean 'panda'?"),
        ("decode v.mp4 --embodiment panda --camera frnt --q0 home", 1, "did you mean 'front'?"),
        ("decode v.mp4 --embodiment panda --camera c.json --q0 home", 1, "cannot read camera file c.json"),
        ("decode v.mp4 --embodiment panda --camera front --q0 1 2", 1, "--q0 has 2 values, 'panda' has 8 joints"),
        ("decode v.mp4 --embodiment panda --camera front --q0 hme", 1, "must be 8 numbers, 'home'"),
        ("decode v.mp4 --embodiment panda --camera front --q0 q.npy", 1, "cannot read q.npy"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --out {tmp}", 1, "v.mp4: no such file"),
        ("decode {tmp}/text.mp4 --embodiment panda --camera front --q0 home --out {tmp}", 1, "text.mp4"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --out {tmp}/text.mp4", 1, "is a file"),
        ("decode v.mp4 --embodiment {tmp}/text.urdf --camera front --q0 home", 1, "text.urdf"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --fps 0", 1, "--fps 0 must be a positive number"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --fps nan", 1, "--fps nan"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --max-size -1", 1, "--max-size -1"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --rotate 45", 2, "45"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --undistort 0.1", 1, "k1 k2 p1 p2"),
        ("decode v.mp4 --checkpoint finger-5 --undistort 0 0 0 0", 1, "--undistort needs --camera"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --device cuda", 1, "runs on the CPU"),
        ("decode v.mp4 --checkpoint finger-5 --device gpu", 1, "--device 'gpu' is unknown"),
        ("decode v.mp4 --embodiment panda --camera front --q0 home --out {tmp}/text.mp4/deep", 1, "is a file"),
        ("decode {tmp}/*.avi --embodiment panda --camera front --q0 home", 1, "no file fits this pattern"),
        ("decode {tmp}/empty --embodiment panda --camera front --q0 home", 1, "neither videos nor images"),
        ("decode v.mp4 v.mp4 --embodiment panda --camera front --q0 home", 1, "is given twice"),
        ("decode {tmp}/text.mp4 --embodiment panda --camera {tmp} --q0 home", 1, "Is a directory"),
        ("decode v.mp4 --embodiment panda --camera front --q0 {tmp}/empty", 1, "--q0"),
        ("report v.mp4 --embodiment panda --camera front --q0 home --out {tmp}", 1, "is a folder; give a file"),
        ("report v.mp4 --embodiment panda --camera front --q0 home --fps -1", 1, "--fps -1"),
        ("report v.mp4 --embodiment panda --camera front --q0 home --scales {tmp}", 1, "is a folder; give a file"),
        ("report v.mp4 --embodiment panda --camera front --q0 home", 1, "v.mp4: no such file"),
        ("score", 1, "name at least one video"),
        ("score v.mp4 --checkpoint panda-sim --out {tmp}/no/scores.jsonl", 1, "does not exist; make it first"),
        ("score v.mp4 --checkpoint panda-sim --fps 0", 1, "--fps 0"),
        ("fit-scales v.mp4 --checkpoint panda-sim --out {tmp}", 1, "is a folder; give a file"),
        ("rank", 1, "name at least one file"),
        ("rank {tmp}/text.mp4 --best -2", 1, "--best -2"),
        ("serve --embodiment panda --camera front --port 70000", 1, "--port 70000"),
        ("serve --embodiment panda --camera front --chunk 0", 1, "--chunk 0"),
        ("serve --embodiment panda --camera front --control-rate -5", 1, "--control-rate -5"),
        ("serve --embodiment panda --camera front --token-file {tmp}", 1, "cannot read the token"),
        ("evaluate finger-5 --data {tmp}/nothing", 1, "no such file or folder"),
        ("evaluate finger-5 --data {tmp} --frames 1", 1, "--frames 1"),
        ("evaluate finger-5 --data {tmp} --out {tmp}/text.mp4", 1, "is a file"),
        ("evaluate fingr-5 --data {tmp}", 1, "did you mean 'finger-5'?"),
        ("babble planar_finger_2 --out {tmp}/text.mp4", 1, "is a file"),
        ("babble planar_finger_2 --out {tmp}/new --seed -1", 1, "--seed -1"),
        ("train --data {tmp} --embodiment panda --out {tmp}/text.mp4", 1, "is a file"),
        ("train --data {tmp}/nowhere --embodiment panda --out {tmp}/new", 1, "no such file or folder"),
        ("demo --fps 0", 1, "--fps 0"),
        ("demo --seed -1", 1, "--seed -1"),
        ("demo --camera frnt", 1, "did you mean 'front'?"),
        ("demo --frames 1", 1, "--frames 1"),
        ("demo --frames many", 2, "many"),
        ("nonsense", 2, "nonsense"),
    ],
)
def test_failure_is_one_line(line: str, code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "text.urdf").write_text("this is no robot")
    (tmp_path / "empty").mkdir()
    assert cli.main(line.format(tmp=tmp_path).split()) == code
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("jidm: ") and words in error and "a bug" not in error, error


def test_wrong_arguments_are_refused_without_torch():
    """So an error in the arguments is there at once: torch takes seconds to load."""
    lines = [
        "decode v.mp4 --embodiment pnda",
        "decode v.mp4 --embodiment panda --camera front --q0 1 2",
        "decode v.mp4 --embodiment panda --camera front --q0 home",
        "decode v.mp4 --embodiment panda --camera frnt --q0 home",
        "decode v.mp4 --checkpoint nowhere",
        "serve --embodiment panda --camera front --port 70000",
        "score v.mp4 --checkpoint panda-sim --fps 0",
        "report v.mp4 --embodiment panda --camera front --q0 home",
        "evaluate finger-5 --data nowhere",
        "demo --frames 1",
    ]
    program = (
        "import sys; from jidm.cli import main\n"
        f"for line in {lines!r}: assert main(line.split()) == 1; assert 'torch' not in sys.modules, line"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(lines)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_flags_that_switch_off_say_what_they_switch_off(verb: str):
    """A field that is true by default is shown as --no-...; its help must read as that of the flag."""
    import ast

    module = cli.VERBS[verb].split(":")[0]
    modules = [import_module(module)] + ([import_module("jidm.training.config")] if verb == "train" else [])
    for body in (
        x.body
        for m in modules
        for x in ast.walk(ast.parse(Path(m.__file__).read_text()))
        if isinstance(x, ast.ClassDef)
    ):
        for field, text in pairwise(body):
            on = (
                isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant) and field.value.value is True
            )
            if on and isinstance(text, ast.Expr):
                assert re.match(r"(Write|Measure|Do|Use|Draw|Show) no", ast.literal_eval(text.value)), ast.unparse(
                    field
                )


@dataclass(frozen=True)
class Failing:
    """A verb that fails in the requested way."""

    how: str = "fault"

    def run(self) -> None:
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "disk":
            raise OSError(28, "No space left on device", "plot.png")
        if self.how == "sleep":
            print("asleep", flush=True)
            time.sleep(60)
        raise JidmError("a\nlong\nstory") if self.how == "own" else ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("interrupt", 130, "jidm: interrupted"),
        ("disk", 1, "jidm: plot.png: No space left on device"),
        ("own", 1, "jidm: a long story"),
        ("fault", 1, "jidm: unexpected ZeroDivisionError: division by zero (a bug in jidm; --traceback shows where)"),
    ],
)
def test_any_exception_is_one_line(
    how: str, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(cli.VERBS, "fail", f"{__name__}:Failing")
    assert cli.main(["fail", "--how", how]) == code
    assert capsys.readouterr().err == text + "\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli.VERBS, "fail", f"{__name__}:Failing")
    for line in (["fail", "--traceback"], ["--traceback", "fail"]):
        with pytest.raises(ZeroDivisionError):
            cli.main(line)


def test_ctrl_c_ends_at_once_and_in_one_line():
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import jidm.cli as c; c.VERBS['fail'] = 'test_cli:Failing'\n"
        "sys.exit(c.main(['fail', '--how', 'sleep']))"
    )
    # Tests started in the background ignore Ctrl-C.
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=50)
    assert (process.returncode, error) == (130, "jidm: interrupted\n")


def test_a_closed_output_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "jidm.cli", "embodiments"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    os.close(writing)
    assert done.returncode == 141
    assert not re.search("Error|Traceback|Exception", done.stderr)  # a progress bar of a slow machine is none


# ---- inputs -----------------------------------------------------------------------------------------------------------


def test_initial_pose_in_every_form(finger: Embodiment, tmp_path: Path):
    first, second = finger.joint_names
    np.save(tmp_path / "q.npy", [0.1, -0.2])
    np.save(tmp_path / "trajectory.npy", [[0.1, -0.2], [0.3, 0.4]])
    (tmp_path / "list.json").write_text("[0.1, -0.2]")
    (tmp_path / "named.json").write_text(json.dumps({second: -0.2, first: 0.1}))
    for given in (
        ("0.1", "-0.2"), ("0.1,-0.2",), ("0.1, -0.2",), *((str(tmp_path / name),) for name in os.listdir(tmp_path)),
    ):  # fmt: skip
        np.testing.assert_array_equal(inputs.read_q0(given, finger), [0.1, -0.2])
    np.testing.assert_array_equal(inputs.read_q0(("home",), finger), finger.home)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("q.json", "{", "not a .json file"),
        ("q.json", '{"hinge": 1}', "has no joint 'hinge'"),
        ("q.json", "{}", "lacks"),
        ("q.json", '["a", "b"]', "must hold 2 numbers"),
        ("q.json", "[1, 2, 3]", "has 3 values"),
        ("q.json", "[NaN, 0]", "nan, outside"),
        ("q.json", "[90, 0]", "angles are in radians"),
        ("q.npy", "x", "not a .npy file"),
    ],
)
def test_wrong_initial_pose_is_refused(name: str, content: str, words: str, finger: Embodiment, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(JidmError) as refused:
        inputs.read_q0((str(tmp_path / name),), finger)
    assert words in str(refused.value)


def test_pickles_are_never_opened(finger: Embodiment, tmp_path: Path):
    np.save(tmp_path / "q.npy", np.array([object(), object()]), allow_pickle=True)
    with pytest.raises(InputError, match="plain numbers"):
        inputs.read_q0((str(tmp_path / "q.npy"),), finger)


def test_camera_by_name_and_by_file(finger: Embodiment, tmp_path: Path):
    name = next(iter(finger.cameras))
    camera = finger.camera(name)
    camera.save(tmp_path / "c.json")
    for given in (name, str(tmp_path / "c.json")):
        assert finger.camera(given).to_dict() == camera.to_dict()


def test_camera_is_resized_only_to_the_same_aspect_ratio():
    camera = Camera.look_at((1, 1, 1), (0, 0, 0), width=320, height=240)
    assert inputs.resize_camera(camera, 320, 240) is camera
    assert (half := inputs.resize_camera(camera, 160, 120)).width == 160 and half.height == 120
    with pytest.raises(CameraError, match=r"320x240, the video is 320x180"):
        inputs.resize_camera(camera, 320, 180)


# ---- embodiments and doctor -------------------------------------------------------------------------------------------


def test_table_lists_every_robot(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["embodiments"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(embodiment_names())


def test_show_prints_the_whole_descriptor(capsys: pytest.CaptureFixture[str]):
    robot = load_embodiment("panda")
    assert cli.main(["embodiments", "show", "panda"]) == 0
    text = capsys.readouterr().out
    for word in (
        *robot.joint_names,
        *robot.tip_links,
        robot.content_hash,
        robot.license,
        "panda_finger_joint2 = 1 * panda",
    ):
        assert word in text
    assert cli.main(["embodiments", "show", "panda", "--json"]) == 0
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert data["joint_names"] == list(robot.joint_names)
    np.testing.assert_array_equal(data["upper"], robot.upper)


def test_show_takes_a_urdf_file_and_names_its_missing_meshes(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder, meshes = tmp_path / "robot", tmp_path / "data" / "arm-2.1" / "meshes"
    meshes.mkdir(parents=True)
    folder.mkdir()
    (meshes / "a.stl").write_text("solid")
    (meshes.parent / "package.xml").write_text("<package><name>arm</name></package>")
    shape = "<visual><geometry><mesh filename='package://arm/meshes/a.stl'/></geometry></visual>"
    (folder / "arm.urdf").write_text(
        urdf_text.robot(
            f"<link name='a'>{shape}</link>", urdf_text.links("b"), urdf_text.joint("j", "a", "b"), name="arm"
        )
    )
    line = ["embodiments", "show", str(folder / "arm.urdf")]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    assert "MISSING MESH" in text and str(folder / "meshes" / "a.stl") in text and "--mesh-roots" in text
    assert cli.main([*line, "--mesh-roots", str(tmp_path / "data")]) == 0
    assert "MISSING" not in capsys.readouterr().out
    assert cli.main([*line, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["link_names"] == ["a", "b"] and "package://arm/meshes/a.stl" in data["missing_meshes"][0]


def test_a_warning_is_one_line_without_its_place_in_the_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def warn(self: object) -> int:
        for _ in range(2):
            warnings.warn("a mesh\nis missing", JidmWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("jidm.cli.embodiments.Embodiments.run", warn)
    assert cli.main(["embodiments"]) == 0
    assert capsys.readouterr().err == "jidm: warning: a mesh is missing\n"


def test_doctor_distinguishes_ok_broken_and_crashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import jidm.cli.probes as p, os\n"
        "p.fine = lambda: 'fine'\n"
        "def raises(): raise RuntimeError('nms does not exist')\n"
        "def nothing(): raise LookupError('no such device')\n"
        "p.raises, p.nothing, p.crashes = raises, nothing, os.abort\n"
        "import time; p.hangs = lambda: time.sleep(60)\n"
        "p.process = lambda: (print('a package says hello'), str(os.getpid()))[1]\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    probes = [doctor.Probe(name, name, "numpy") for name in ("fine", "raises", "nothing", "crashes", "hangs")]
    absent = doctor.Probe("fine", "absent", "no-such-package")
    found = {f.label: f for f in doctor.run_probes((*probes[:4], absent))}
    assert [found[k].status for k in ("fine", "raises", "nothing", "crashes")] == ["ok", "broken", "none", "broken"]
    assert "absent" not in found
    assert "nms does not exist" in found["raises"].detail and "signal 6" in found["crashes"].detail
    # One process answers all (loading torch takes the time), and another one what follows a crash or a hang.
    who = doctor.Probe("process", "process", "numpy")
    answers = doctor.run_probes((who, who, probes[3], who, probes[4], who), limit=5.0)
    first, second, crashed, third, hung, fourth = (answer.detail for answer in answers)
    assert first == second and len({first, third, fourth}) == 3
    assert "signal 6" in crashed and "no answer after 5 s" in hung


def test_doctor_names_what_to_install():
    found = doctor.missing(
        {"core": {"torch": None, "numpy": "2"}, "serve": {"msgpack": None}, "pytorch3d": {"pytorch3d": None}}
    )
    assert [(f.label, f.status) for f in found] == [
        ("torch", "broken"),
        ("msgpack", "missing"),
        ("pytorch3d", "missing"),
    ]
    assert found[1].detail == install_command("serve") and "build it from source" in found[2].detail


def test_doctor_knows_the_declared_dependencies():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    import re

    def names(lines: list[str]) -> set[str]:
        return {re.match(r"[\w-]+", line)[0] for line in lines}

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(doctor.CORE) == names(project["dependencies"]) - {"tomli"}
    optional = project["optional-dependencies"].items()
    extras = {name: names(lines) for name, lines in optional if name not in ("dev", "docs")}
    assert {name: set(packages) for name, packages in doctor.EXTRAS.items()} == extras


# ---- decode and demo, end to end --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pybullet", reason="the demo renders with PyBullet: extra sim")
    out = tmp_path_factory.mktemp("demo")
    assert cli.main(["demo", "--embodiment", "planar_finger_2", "--frames", "5", "--out", str(out), "--traceback"]) == 0
    return out


def test_demo_writes_numbers_and_plots(demo: Path):
    from jidm.estimation.result import JointMotion
    from jidm.video.io import read_video

    names = {
        "input.mp4",
        "overlay.mp4",
        "plot.png",
        "errors.csv",
        "motion.npz",
        "motion.csv",
        "truth.npy",
        "summary.json",
    }
    assert {path.name for path in demo.iterdir()} == names
    motion, truth = JointMotion.load(demo / "motion.npz"), np.load(demo / "truth.npy")
    assert motion.position.shape == truth.shape == (5, 2)
    assert len(read_video(demo / "overlay.mp4")) == 4
    summary = json.loads((demo / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["frames"] == 5 and summary["embodiment"] == "planar_finger_2"
    with (demo / "errors.csv").open() as file:
        rows = {row["joint"]: row for row in csv.DictReader(file)}
    # The error table is recomputed from the files, in another way than the program does: from differences of the filtered
    # positions, which agree with the steps to about 1e-6 rad.
    error = np.diff(motion.position.double().numpy() - truth, axis=0)
    for k, joint in enumerate(motion.joint_names):
        expected = np.abs(error[:, k]).sum() / np.abs(np.diff(truth[:, k])).sum()
        assert float(rows[joint]["nve"]) == pytest.approx(expected, rel=1e-2, abs=1e-5)
        assert expected < 0.3


def test_decode_of_the_same_file_gives_the_same_motion(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from jidm.estimation.result import JointMotion

    camera = tmp_path / "camera.json"
    load_embodiment("planar_finger_2").camera().save(camera)
    line = f"decode {demo}/input.mp4 --embodiment planar_finger_2 --camera {camera} --q0 {demo}/truth.npy --out {tmp_path}/d"
    assert cli.main(line.split()) == 0
    assert "frames in" in capsys.readouterr().out
    out = tmp_path / "d"
    assert {p.name for p in out.iterdir()} == {"motion.npz", "motion.csv", "plot.png", "overlay.mp4", "summary.json"}
    again, first = JointMotion.load(out / "motion.npz"), JointMotion.load(demo / "motion.npz")
    np.testing.assert_allclose(again.position, first.position, atol=1e-6)


# ---- many videos, sizes, stale results ----------------------------------------------------------------------------------


FINGER = "--embodiment planar_finger_2 --camera front"


@pytest.fixture(scope="module")
def clips(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two good videos and a damaged one, between them in the order of names."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a", "c"):
        (folder / f"{name}.mp4").write_bytes((demo / "input.mp4").read_bytes())
    (folder / "b.mp4").write_bytes((demo / "input.mp4").read_bytes()[:1000])
    return folder


def test_many_videos_get_a_folder_each_and_one_failure_ends_none(
    demo: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from jidm.estimation.result import JointMotion

    line = f"decode {clips} {FINGER} --q0 {demo}/truth.npy --no-overlay --out {tmp_path}/out"
    assert cli.main(line.split()) == 1
    said = capsys.readouterr()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"a", "c", "videos.json"}
    first = JointMotion.load(demo / "motion.npz")
    for name in ("a", "c"):
        np.testing.assert_allclose(JointMotion.load(out / name / "motion.npz").position, first.position, atol=1e-6)
    lines = said.out.splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"{clips}/a.mp4: 5 frames") and lines[2].startswith("2 of 3 videos")
    (failed,) = [x for x in said.err.splitlines() if "failed" in x]
    assert f"{clips}/b.mp4: failed: " in failed and "a bug" not in failed
    problems = {x["folder"]: x["problem"] for x in json.loads((out / "videos.json").read_text())["videos"]}
    assert problems["a"] is problems["c"] is None and "b.mp4" in problems["b"]

    # The same again for one video, by pattern: allowed, and the others stay. Other settings are refused.
    again = f"decode {clips}/[c].mp4 {FINGER} --q0 {demo}/truth.npy --no-overlay --out {out}"
    assert cli.main(again.split()) == 0
    assert len(json.loads((out / "videos.json").read_text())["videos"]) == 3
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main([*again.split(), "--smooth"]) == 1
    assert "made with other settings (smooth)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_each_video_has_its_initial_pose(demo: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    truth = np.load(demo / "truth.npy")
    (tmp_path / "q0.json").write_text(json.dumps({"a.mp4": truth[0].tolist(), "b.mp4": [9.0, 9.0]}))
    line = f"decode {clips}/a.mp4 {clips}/c.mp4 {FINGER} --q0 {tmp_path}/q0.json --no-overlay --out {tmp_path}/out"
    assert cli.main(line.split()) == 1
    assert "q0.json has no initial pose for c.mp4" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "videos.json"}


def test_names_of_results_are_unique(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert inputs.result_names([one / "a.mp4", one / "b.mp4"]) == ["a", "b"]
    assert inputs.result_names([one / "a.mp4", one / "a.avi"]) == ["a.mp4", "a.avi"]
    assert inputs.result_names([one / "a.mp4", two / "a.mp4"]) == ["one_a.mp4", "two_a.mp4"]
    with pytest.raises(InputError, match="same names"):
        inputs.result_names([one / "x" / "a.mp4", two / "x" / "a.mp4"])


def test_a_folder_of_images_is_one_video(tmp_path: Path):
    for folder, names in {
        "images": ["0.png", "1.png"],
        "videos": ["b.mp4", "a.mkv"],
        "both": ["0.png", "a.mp4"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    images, videos = tmp_path / "images", tmp_path / "videos"
    assert inputs.expand_videos([images]) == ([images], False)
    assert inputs.expand_videos([videos]) == ([videos / "a.mkv", videos / "b.mp4"], True)
    assert inputs.expand_videos([videos / "a.mkv"]) == ([videos / "a.mkv"], False)
    assert inputs.expand_videos([images, videos / "*.mp4"]) == ([images, videos / "b.mp4"], True)
    with pytest.raises(InputError, match="holds videos and images"):
        inputs.expand_videos([tmp_path / "both"])


def test_large_frames_are_reduced_and_the_result_says_so(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from jidm.video.io import open_video, read_video
    from jidm.video.preparation import MAX_SIZE

    assert Decode.max_size == MAX_SIZE
    size = open_video(demo / "input.mp4")
    half = max(size.width, size.height) // 2
    line = f"decode {demo}/input.mp4 {FINGER} --q0 {demo}/truth.npy --max-size {half} --out {tmp_path}/out"
    assert cli.main(line.split()) == 0
    smaller = f"{size.width // 2}x{size.height // 2}"
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("jidm: ")]
    assert f"{size.width}x{size.height} frames are decoded at {smaller}; --max-size 0" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "x".join(map(str, summary["frame_size"])) == smaller and summary["camera"]["width"] == size.width // 2
    assert summary["provenance"]["video_size"] == [size.width, size.height]
    assert len(read_video(tmp_path / "out" / "overlay.mp4")) == 4


def test_a_video_on_its_side_is_turned(demo: Path, tmp_path: Path):
    from jidm.estimation.result import JointMotion
    from jidm.video.io import read_video, write_video

    frames = read_video(demo / "input.mp4").frames
    write_video(tmp_path / "side.mkv", frames.rot90(1, (-2, -1)), 16, crf=0)
    line = f"decode {tmp_path}/side.mkv {FINGER} --q0 {demo}/truth.npy --rotate 90 --no-overlay --out {tmp_path}/out"
    assert cli.main(line.split()) == 0
    motion, upright = JointMotion.load(tmp_path / "out" / "motion.npz"), JointMotion.load(demo / "motion.npz")
    np.testing.assert_allclose(motion.position, upright.position, atol=0.01)
    assert motion.provenance["rotated"] == 90
    unturned = [x for x in line.split() if x not in ("--rotate", "90")]
    assert cli.main(unturned) == 1  # the camera has another shape


def test_lens_distortion_is_removed_with_the_camera_of_the_video(demo: Path, tmp_path: Path):
    """Whether undistortion is right is in test_video_preparation.py; here, that the decoder gets it at the video's size."""
    import torch

    from jidm.cli.model_args import ModelArgs
    from jidm.video.io import open_video
    from jidm.video.preparation import undistorted

    video, coefficients = demo / "input.mp4", (0.4, -0.1, 0.0, 0.01)
    plain = open_video(video)
    camera = load_embodiment("planar_finger_2").camera().resized(plain.width, plain.height)
    camera.resized(2 * plain.width, 2 * plain.height).save(tmp_path / "twice.json")
    model = ModelArgs(embodiment="planar_finger_2", camera=str(tmp_path / "twice.json"), q0=("home",))
    decode = Decode((video,), model=model, undistort=coefficients)
    source, idm = decode._prepare(video, model.build_idm())
    assert (idm.field.camera.width, idm.field.camera.height) == (plain.width, plain.height)
    assert torch.allclose(idm.field.camera.K, camera.K)
    expected = next(undistorted(plain, camera.K, coefficients).pixels())[1]
    found = next(source.pixels())[1]
    assert torch.equal(found, expected) and not torch.equal(found, next(plain.pixels())[1])


def test_a_new_result_takes_the_place_of_the_old_one_whole(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    line = f"decode {demo}/input.mp4 {FINGER} --q0 {demo}/truth.npy --out {out}".split()
    out.mkdir()
    for name in ("motion.npz", "overlay.mp4", "notes.txt"):
        (out / name).write_text("old")
    assert cli.main([*line, "--no-overlay"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "motion.npz",
        "motion.csv",
        "plot.png",
        "summary.json",
        "notes.txt",
    }
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before["notes.txt"] == b"old" and before["motion.npz"] != b"old"

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jidm.visualization.plot_motion", fail)
    assert cli.main(line) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_devices_are_named_or_refused():
    import torch

    from jidm.idm.device import find_device

    assert find_device("cpu") == torch.device("cpu")
    for name, words in {"gpu": "unknown", "meta": "not supported", "cuda:99": "device 'cuda:99'"}.items():
        with pytest.raises(InputError, match=words):
            find_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"sees no CUDA device.*use cpu"):
            find_device("cuda")
