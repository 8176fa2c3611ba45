"""Third-party URDF files, valid and faulty: read as by pinocchio, or refused for a real fault."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, material
from urdf_oracle import PinocchioModel, assert_same, disagreements, link_poses_scipy, random_joints

from jidm.errors import EmbodimentError, MissingExtraError, UrdfError
from jidm.robot.factory import embodiment_from_model
from jidm.robot.kinematics import Kinematics
from jidm.robot.mesh_resolver import package_roots
from jidm.robot.urdf.reader import parse_urdf, read_urdf
from jidm.robot.urdf.writer import write_urdf

# Every refused file, by the end of its path, and its fault.
REFUSED = {
    # a joint names a link that the file does not have
    "drake/Acrobot_unicode.urdf": "joint 'base_weld' has parent 'world', which is no link; add <link name='world'/>",
    "rethink_pneumatic_gripper.urdf": "joint 'left_gripper_base' has parent 'left_hand', which is no link; add",
    # several trees, or joints of one tool only
    "test/links_with_visuals_and_collisions.urdf": "<robot> has 3 root links",
    "urdf_parser_test/collision_filter_group_parsing_test.urdf": "<robot> has 10 root links",
    "joint_parsing_test_missing_screw_thread_pitch.urdf": "<robot> has 2 root links",
    "joint_parsing_test_tag_mismatch_1.urdf": "<drake:joint> is another tool's element",
    # limits left out where the format requires them
    "interface_api_test/arm.urdf": "joint 'J1' is revolute and has no <limit>; give it lower and upper",
    "pr2_description/urdf/pr2_simplified.urdf": "joint 'x' is prismatic and has no <limit>",
    # two files from one source that hold only a transmission
    "val_description/model/robots/test_bench.urdf": "<robot> has no links",
    # a mesh on a web server
    "sdformat/test_sdf_joint_mimic_rack_pinion.urdf": "nothing is loaded from the network",
}

# Valid files that pinocchio's reader refuses: it requires an effort limit that is not -1, and unique materials.
ONLY_HERE = (
    "atlas/urdf/robotiq_tendons.urdf",
    "urdf_parser_test/duplicate_materials.urdf",
    "halodi/eve_r3.urdf",
)


def _files() -> list[Path]:
    root = Path(os.environ.get("JIDM_MATERIAL") or REPOSITORY.parent / "shared" / "material") / "urdf_conformance"
    return sorted(x for x in root.rglob("*") if x.suffix.lower() == ".urdf")


FILES = _files()
IDS = ["/".join(x.parts[-3:]) for x in FILES]


def reason(path: Path) -> str | None:
    return next((why for end, why in REFUSED.items() if path.as_posix().endswith(end)), None)


LOADED = [pytest.param(path, id=name) for path, name in zip(FILES, IDS, strict=True) if reason(path) is None]


def test_the_material_is_complete() -> None:
    material("urdf_conformance")
    assert len(FILES) == 136
    assert all(any(path.as_posix().endswith(end) for path in FILES) for end in (*REFUSED, *ONLY_HERE))


def test_the_docs_page_lists_the_refused_files() -> None:
    """`python benchmarks/urdf_conformance.py --packages --markdown docs/urdf_conformance.md` writes it anew."""
    page = (REPOSITORY / "docs" / "urdf_conformance.md").read_text(encoding="utf-8")
    for kind in ("real", "edge"):
        section = page.split(f"## Refused in `{kind}`")[1].split("## ")[0]
        listed = {line.split("|")[1].strip() for line in section.splitlines() if ".urdf |" in line}
        folder = material("urdf_conformance") / kind
        assert listed == {x.relative_to(folder).as_posix() for x in FILES if x.is_relative_to(folder) and reason(x)}


@pytest.mark.parametrize("path", [pytest.param(x, id=i) for x, i in zip(FILES, IDS, strict=True) if reason(x)])
def test_faulty_files_are_refused_with_file_element_and_remedy(path: Path) -> None:
    with pytest.raises(UrdfError) as refusal:
        read_urdf(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert str(reason(path)) in message
    assert "\n" not in message


@pytest.mark.parametrize("path", LOADED)
def test_joints_limits_and_poses_agree_with_pinocchio(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pinocchio")
    model = read_urdf(path)
    try:
        peer = PinocchioModel(path)
    except Exception:
        assert path.as_posix().endswith(ONLY_HERE)
        return
    found = disagreements(model, peer)
    assert found["joints"] == []
    assert found["limits"] == []
    assert found["meters"] <= 1e-6
    assert found["radians"] <= 1e-6


@pytest.mark.parametrize("path", LOADED)
def test_every_file_moves(path: Path) -> None:
    """Kinematics of what was read, mimics included, against scipy's rotations one joint at a time."""
    model = read_urdf(path)
    try:
        robot = embodiment_from_model(model, name="robot", fingerprint="")
    except EmbodimentError as error:
        assert "no joint moves" in str(error)
        assert not model.movable_joints
        return
    rng = np.random.default_rng(1)
    q = rng.uniform(-1, 1, robot.n)
    full = robot.coupling_matrix @ q + robot.coupling_offset
    poses = Kinematics.from_embodiment(robot).link_poses(torch.from_numpy(q)).numpy()
    values = dict(zip((joint.name for joint in model.movable_joints), full, strict=True))
    expected = link_poses_scipy(model, values)
    np.testing.assert_allclose(poses, [expected[link.name] for link in model.links], rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", LOADED)
def test_writing_and_reading_again_gives_the_model_back(path: Path) -> None:
    model = read_urdf(path)
    assert_same(model, parse_urdf(write_urdf(model), directory=path.parent))


@pytest.mark.parametrize("path", LOADED)
def test_truncated_files_are_refused(path: Path) -> None:
    data = path.read_bytes().rstrip()
    for at in np.random.default_rng(2).integers(0, len(data), 4):
        with pytest.raises(UrdfError, match=r"not well-formed XML|is empty"):
            parse_urdf(data[:at])


def test_mimics_agree_with_pinocchio(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pinocchio")
    material("urdf_conformance")
    compared = 0
    for path in (x for x in FILES if reason(x) is None):
        model = read_urdf(path)
        mimics = [joint for joint in model.movable_joints if joint.mimic]
        try:
            peer = PinocchioModel(path, mimic=True) if mimics else None
        except Exception:
            peer = None
        if peer is None:
            continue
        actuated = tuple(joint.name for joint in model.movable_joints if joint.mimic is None)
        A, b = model.coupling(actuated)
        q = np.random.default_rng(3).uniform(-1, 1, len(actuated))
        values = dict(zip((joint.name for joint in model.movable_joints), A @ q + b, strict=True))
        theirs = peer.link_poses(dict(zip(actuated, q, strict=True)), [link.name for link in model.links])
        ours = link_poses_scipy(model, values)
        for name, pose in theirs.items():
            np.testing.assert_allclose(ours[name], pose, rtol=0, atol=1e-9, err_msg=f"{path}: {name}")
        compared += len(mimics)
    assert compared >= 24


def test_the_oracle_can_fail(tmp_path: Path) -> None:
    pytest.importorskip("pinocchio")
    text = (
        "<robot name='r'><link name='a'/><link name='b'/><joint name='j' type='revolute'><parent link='a'/>"
        "<child link='b'/><axis xyz='0 0 1'/><origin xyz='1 0 0'/><limit lower='-1' upper='1' effort='1' velocity='1'/>"
        "</joint></robot>"
    )
    path = tmp_path / "r.urdf"
    path.write_text(text)
    peer = PinocchioModel(path)
    assert disagreements(parse_urdf(text), peer)["limits"] == []
    assert disagreements(parse_urdf(text.replace("upper='1'", "upper='1.001'")), peer)["limits"]
    assert disagreements(parse_urdf(text.replace("1 0 0", "1.00001 0 0")), peer)["meters"] > 1e-6
    assert disagreements(parse_urdf(text.replace("0 0 1", "0 1e-4 1")), peer)["radians"] > 1e-6


@pytest.mark.parametrize("package", ["pybullet_data", "example_robot_data"])
def test_robots_of_installed_packages_agree_with_pinocchio(package: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Every fortieth of the thousand objects of pybullet_data, every robot of example-robot-data."""
    pytest.importorskip("pinocchio")
    try:
        roots = package_roots(f"{package}:")
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    files = sorted(roots[-1].rglob("*.urdf"))
    loaded = 0
    for path in files[:: 40 if package == "pybullet_data" else 1]:
        try:
            model, peer = read_urdf(path, mesh_roots=roots), PinocchioModel(path)
        except Exception:
            continue
        found = disagreements(model, peer, poses=2, seed=loaded)
        assert (found["joints"], found["limits"]) == ([], []), path
        assert max(found["meters"], found["radians"]) <= 1e-6, path
        loaded += 1
    assert loaded >= (25 if package == "pybullet_data" else 60)


def test_random_joints_stay_inside_limits() -> None:
    model = parse_urdf(
        "<robot name='r'><link name='a'/><link name='b'/><joint name='j' type='prismatic'><parent link='a'/>"
        "<child link='b'/><limit lower='0.1' upper='0.2'/></joint></robot>"
    )
    values = [random_joints(model, np.random.default_rng(k))["j"] for k in range(20)]
    assert 0.1 <= min(values) < max(values) <= 0.2
