"""Videos gone wrong: what changes, where and from when on, and that the truth that goes with them is true."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jidm.errors import InputError
from jidm.robot.registry import load_embodiment
from jidm.sim.appearance import Appearance, Background
from jidm.sim.camera_placement import fit_camera_to_robot
from jidm.sim.failures import FAILURE_KINDS, RenderedEpisode, corrupt
from jidm.sim.failures.motions import MOTION_FAILURES
from jidm.sim.failures.pictures import IMAGE_FAILURES
from jidm.sim.motion import smooth_motion
from jidm.sim.scene import Scene

T, FPS = 12, 16.0
BEGUN = {"stretched", "melted", "missing", "doubled", "jump", "teleport"}


@pytest.fixture(scope="module")
def take():
    robot = load_embodiment("panda")
    camera = fit_camera_to_robot(robot, robot.camera("front"), 96, 96, crop_fraction=0.15)
    with Scene(
        robot, appearance=Appearance(background=Background("picture")), supersample=2, mesh_tolerance=0.01, exact=False
    ) as world:
        yield RenderedEpisode.render(world, camera, smooth_motion(robot, T, 1 / FPS, seed=3), FPS)


def changed(take: RenderedEpisode, video: np.ndarray) -> np.ndarray:
    """(T,) mean difference from the clean video."""
    return np.abs(video.astype(float) - take.rendering.rgb).mean((1, 2, 3))


@pytest.mark.parametrize("kind", FAILURE_KINDS)
def test_the_same_arguments_make_the_same_video(take: RenderedEpisode, kind: str):
    one, again, other = corrupt(take, kind, 0.7, 5), corrupt(take, kind, 0.7, 5), corrupt(take, kind, 0.7, 6)
    assert (one.video == again.video).all() and one.label == again.label and (one.q == again.q).all()
    assert one.video.shape == take.rendering.rgb.shape and one.video.dtype == np.uint8
    assert json.loads(json.dumps(one.label)) == one.label
    assert one.label["kind"] == kind and one.label["strength"] == 0.7 and one.label["seed"] == 5
    if kind not in ("frozen", "late"):  # these draw nothing
        assert (one.video != other.video).any()


def test_a_world_may_change_after_it_was_filmed(take: RenderedEpisode):
    before = corrupt(take, "penetration", 0.7, 5).video
    look, seed = take.scene.appearance, take.scene.seed
    try:
        take.scene.appearance, take.scene.seed = Appearance.textured("patches"), seed + 1
        assert (corrupt(take, "penetration", 0.7, 5).video == before).all()
        assert (
            take.scene.seed == seed + 1
            and take.scene.appearance.background.kind == "patches"
            and not take.scene.objects
        )
    finally:
        take.scene.appearance, take.scene.seed = look, seed


@pytest.mark.parametrize("kind", FAILURE_KINDS)
def test_stronger_is_more(take: RenderedEpisode, kind: str):
    weak, strong = (
        np.mean([changed(take, corrupt(take, kind, s, k).video).mean() for k in range(3)]) for s in (0.2, 1)
    )
    assert 0 < weak < strong


@pytest.mark.parametrize("kind", sorted(BEGUN))
def test_nothing_happens_before_it_begins(take: RenderedEpisode, kind: str):
    found = corrupt(take, kind, 1.0, 2)
    difference, begins = changed(take, found.video), found.label["begins"]
    assert 0 < begins < T and not difference[:begins].any() and difference[begins:].all()


@pytest.mark.parametrize("kind", sorted(IMAGE_FAILURES))
def test_pictures_go_wrong_where_they_are_said_to(take: RenderedEpisode, kind: str):
    found = corrupt(take, kind, 1.0, 4)
    assert (found.q == take.q).all()
    robot, last = take.rendering.on_robot[-1], found.video[-1].astype(float)
    wrong = np.abs(last - take.rendering.rgb[-1]).max(-1) > 12
    if kind == "drift":
        assert wrong[~robot].mean() > 0.05 and wrong[robot].mean() < 0.05
    elif kind == "flicker":
        assert wrong.mean() > 0.2
    else:
        limb = take.limb_mask(take.robot.model.link_index(found.label["link"]))[-1]
        assert wrong[robot & ~limb].mean() < 0.3 < 10 * wrong.mean()
    if kind == "missing":
        gone = np.abs(last - take.background[-1]).max(-1)[limb]
        assert gone.mean() < 1  # nothing of it is left


@pytest.mark.parametrize("kind", sorted(MOTION_FAILURES))
def test_motions_go_wrong_inside_the_limits_and_are_filmed(take: RenderedEpisode, kind: str):
    found = corrupt(take, kind, 1.0, 4)
    assert (found.q >= take.robot.lower).all() and (found.q <= take.robot.upper).all() and (found.q != take.q).any()
    assert (found.video == take.rerender(found.q)).all()
    steps, begins = np.abs(np.diff(found.q, axis=0)).max(-1), found.label["begins"]
    if kind == "jump":
        assert steps.argmax() == begins - 1 and np.count_nonzero(found.q[-1] != take.q[-1]) == 1
        assert take.robot.joint_names[np.abs(np.diff(found.q, axis=0))[begins - 1].argmax()] == found.label["joint"]
    if kind == "frozen":
        assert begins == 0 and not steps.any() and (found.video == found.video[:1]).all()
    if kind == "late":
        assert (found.q[found.label["frames"] :] == take.q[: T - found.label["frames"]]).all()
    if kind == "wrong_goal":
        assert (found.q[0] == take.q[0]).all() and steps.max() < 0.5


def test_what_is_behind_is_what_the_camera_sees_without_the_robot(take: RenderedEpisode):
    alone = take.scene
    look = alone.appearance.background.image(96, 96, seed=alone.seed)
    once = ~take.rendering.on_robot.all(0)
    inside = np.s_[2:-2, 2:-2]
    difference = np.abs(take.background[0] / 255 - look).max(-1)
    assert np.median(difference[once][...]) < 0.01 and (difference[inside][once[inside]] < 0.05).mean() > 0.97


def test_a_thing_in_the_way_is_met_by_the_tip(take: RenderedEpisode):
    found = corrupt(take, "penetration", 1.0, 1)
    tip = take.robot.model.link_index(take.robot.tip_links[0])
    distance = [np.abs(take.scene.link_poses(q)[tip, :3, 3] - found.label["position"]).max() for q in take.q]
    assert min(distance) < found.label["side_m"] / 2 and (found.q == take.q).all() and not take.scene.objects


@pytest.mark.parametrize(
    ("kind", "strength", "says"), [("melt", 0.5, "melted"), ("jump", 0.0, "strength"), ("jump", 1.5, "strength")]
)
def test_bad_input_is_named(take: RenderedEpisode, kind: str, strength: float, says: str):
    with pytest.raises(InputError, match=says):
        corrupt(take, kind, strength, 0)
