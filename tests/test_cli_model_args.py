"""The command line options that define a decoder: one meaning for all verbs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from urdf_text import joint, robot

from jidm.cli.model_args import ModelArgs
from jidm.errors import EmbodimentError, InputError
from jidm.fields.analytic import AnalyticField
from jidm.fields.free import LearnedField
from jidm.robot.registry import load_embodiment

NAME = "planar_finger_2"
EXACT = {"embodiment": NAME, "camera": next(iter(load_embodiment(NAME).cameras))}


def size() -> tuple[int, int]:
    camera = load_embodiment(NAME).camera(EXACT["camera"])
    return camera.width // 2, camera.height // 2


def test_an_exact_field_in_the_resized_camera() -> None:
    idm = ModelArgs(**EXACT, q0=("home",)).build_idm(size, q0_required=True)
    assert isinstance(idm.field, AnalyticField) and (idm.field.camera.width, idm.field.camera.height) == size()
    assert idm.limits == "all" and ModelArgs(**EXACT, limits="position").build_idm().limits == "position"


def test_a_reward_gets_the_same_decoder_without_velocity_limits() -> None:
    model = ModelArgs(**EXACT, flow="dis", device="cpu")
    config = model.reward_config(None, size, 16.0)
    idm, direct = config.build_idm(), model.build_idm(size)
    assert idm.limits == "none" and config.fps == 16.0
    assert isinstance(idm.field, AnalyticField) and isinstance(direct.field, AnalyticField)
    assert idm.field.camera.to_dict() == direct.field.camera.to_dict()
    assert type(idm.flow) is type(direct.flow)


def test_links_and_mesh_roots_reach_the_field_and_the_reward(tmp_path: Path) -> None:
    (tmp_path / "meshes").mkdir()
    (tmp_path / "robot").mkdir()
    trimesh.creation.box(extents=(0.1, 0.1, 0.3)).export(tmp_path / "meshes" / "m.stl")
    shape = "<visual><geometry><mesh filename='package://two/meshes/m.stl'/></geometry></visual>"
    text = robot(*(f"<link name='{x}'>{shape}</link>" for x in "abc"), joint("j", "a", "b"), joint("k", "a", "c"))
    (tmp_path / "robot" / "two.urdf").write_text(text)
    args = ModelArgs(
        embodiment=str(tmp_path / "robot" / "two.urdf"), camera="front", mesh_roots=(tmp_path,), links=("a", "c*")
    )
    for idm in (args.build_idm(), args.reward_config(None, size, None).build_idm()):
        assert isinstance(idm.field, AnalyticField)
        assert set(idm.field.surface.link.tolist()) == set(idm.field.edges.link.tolist())
        names = {idm.field.embodiment.model.links[k].name for k in idm.field.surface.link.tolist()}
        assert names == {"a", "c"}
    with pytest.raises(EmbodimentError, match=r"m\.stl' was not found"):
        replace(args, mesh_roots=()).build_idm()


def test_a_checkpoint_alone_and_with_its_camera() -> None:
    assert isinstance(ModelArgs(checkpoint="finger-5").build_idm().field, LearnedField)
    with_camera = ModelArgs(checkpoint="finger-5", camera="trained").build_idm()
    assert isinstance(with_camera.field, AnalyticField)


def test_initial_poses_of_a_reward_in_every_form(tmp_path: Path) -> None:
    robot = load_embodiment(NAME)
    first, second = robot.joint_names
    by_file = {"a.mp4": [0.1, -0.2], "b.mp4": [0.3, 0.4]}
    for name, content in (
        ("one.json", [0.1, -0.2]),
        ("named.json", {second: -0.2, first: 0.1}),
        ("many.json", by_file),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    np.save(tmp_path / "one.npy", [0.1, -0.2])
    for given in (("0.1", "-0.2"), *((str(tmp_path / name),) for name in ("one.json", "named.json", "one.npy"))):
        assert ModelArgs(**EXACT, q0=given).reward_config(None, size, None).q0 == [0.1, -0.2]
    many = ModelArgs(**EXACT, q0=(str(tmp_path / "many.json"),)).reward_config(None, size, None)
    assert many.q0 == by_file and many.initial_pose("folder/b.mp4") == [0.3, 0.4]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "--embodiment is missing"),
        ({"embodiment": NAME}, "--camera is missing"),
        (EXACT, "--q0 is missing"),
        ({**EXACT, "q0": ("9", "9")}, "outside"),
        ({"checkpoint": "finger-5", "camera": "front"}, "--camera needs --embodiment"),
        ({"checkpoint": "finger-5", "links": ("link1",)}, "--links needs --camera"),
        ({**EXACT, "links": ("lnk1",)}, "has no link 'lnk1': did you mean 'link1'"),
        ({"checkpoint": "finger-5", "mesh_roots": (Path(),)}, "--mesh-roots needs --embodiment"),
        ({**EXACT, "mesh_roots": (Path(),)}, "is for the meshes of a URDF file"),
    ],
)
def test_wrong_options_fail_before_the_video_is_opened(given: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModelArgs(**given).build_idm(lambda: pytest.fail("opened"), q0_required=True)  # type: ignore[arg-type]


def test_poses_need_a_robot() -> None:
    with pytest.raises(InputError, match="--q0 needs --embodiment"):
        ModelArgs(checkpoint="finger-5", q0=("0", "0")).initial_pose(None)
