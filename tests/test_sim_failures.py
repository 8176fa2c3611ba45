"""Corrupted videos: what changes, where and from which frame on, and that their labels and joint positions are true."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jidm.errors import InputError
from jidm.robot.registry import load_embodiment
from jidm.sim.appearance import Appearance, Background
from jidm.sim.camera_placement import fit_camera_to_robot
from jidm.sim.failures import FAILURE_KINDS, RenderedEpisode, corrupt
from jidm.sim.failures.images import IMAGE_FAILURES
from jidm.sim.failures.motions import MOTION_FAILURES
from jidm.sim.motion import random_motion
from jidm.sim.scene import Scene

T, FPS = 12, 16.0
WITH_START = {"stretched", "melted", "missing", "doubled", "jump", "teleport"}


@pytest.fixture(scope="module")
def episode():
    robot = load_embodiment("panda")
    camera = fit_camera_to_robot(robot, robot.camera("front"), 96, 96, crop_fraction=0.15)
    with Scene(
        robot, appearance=Appearance(background=Background("picture")), supersample=2, mesh_tolerance=0.01, exact=False
    ) as scene:
        yield RenderedEpisode.render(scene, camera, random_motion(robot, T, 1 / FPS, seed=3), FPS)


def changed(episode: RenderedEpisode, video: np.ndarray) -> np.ndarray:
    """(T,) mean difference from the clean video."""
    return np.abs(video.astype(float) - episode.rendering.rgb).mean((1, 2, 3))


@pytest.mark.parametrize("kind", FAILURE_KINDS)
def test_same_arguments_same_video(episode: RenderedEpisode, kind: str):
    one, again, other = corrupt(episode, kind, 0.7, 5), corrupt(episode, kind, 0.7, 5), corrupt(episode, kind, 0.7, 6)
    assert (one.video == again.video).all() and one.label == again.label and (one.q == again.q).all()
    assert one.video.shape == episode.rendering.rgb.shape and one.video.dtype == np.uint8
    assert json.loads(json.dumps(one.label)) == one.label
    assert one.label["kind"] == kind and one.label["strength"] == 0.7 and one.label["seed"] == 5
    if kind not in ("frozen", "late"):  # these draw nothing
        assert (one.video != other.video).any()


def test_a_scene_may_change_after_rendering(episode: RenderedEpisode):
    before = corrupt(episode, "penetration", 0.7, 5).video
    appearance, seed = episode.scene.appearance, episode.scene.seed
    try:
        episode.scene.appearance, episode.scene.seed = Appearance.textured("patches"), seed + 1
        assert (corrupt(episode, "penetration", 0.7, 5).video == before).all()
        assert (
            episode.scene.seed == seed + 1
            and episode.scene.appearance.background.kind == "patches"
            and not episode.scene.objects
        )
    finally:
        episode.scene.appearance, episode.scene.seed = appearance, seed


@pytest.mark.parametrize("kind", FAILURE_KINDS)
def test_a_greater_strength_changes_more(episode: RenderedEpisode, kind: str):
    weak, strong = (
        np.mean([changed(episode, corrupt(episode, kind, s, k).video).mean() for k in range(3)]) for s in (0.2, 1)
    )
    assert 0 < weak < strong


@pytest.mark.parametrize("kind", sorted(WITH_START))
def test_nothing_changes_before_the_start_frame(episode: RenderedEpisode, kind: str):
    found = corrupt(episode, kind, 1.0, 2)
    difference, start = changed(episode, found.video), found.label["start_frame"]
    assert 0 < start < T and not difference[:start].any() and difference[start:].all()


@pytest.mark.parametrize("kind", sorted(IMAGE_FAILURES))
def test_image_failures_change_the_labeled_limb(episode: RenderedEpisode, kind: str):
    found = corrupt(episode, kind, 1.0, 4)
    assert (found.q == episode.q).all()
    robot, last = episode.rendering.on_robot[-1], found.video[-1].astype(float)
    wrong = np.abs(last - episode.rendering.rgb[-1]).max(-1) > 12
    if kind == "drift":
        assert wrong[~robot].mean() > 0.05 and wrong[robot].mean() < 0.05
    elif kind == "flicker":
        assert wrong.mean() > 0.2
    else:
        limb = episode.layers.limb_mask(episode.robot.model.link_index(found.label["link"]))[-1]
        assert wrong[robot & ~limb].mean() < 0.3 < 10 * wrong.mean()
    if kind == "missing":
        gone = np.abs(last - episode.layers.background[-1]).max(-1)[limb]
        assert gone.mean() < 1  # the limb is gone


@pytest.mark.parametrize("kind", sorted(MOTION_FAILURES))
def test_motion_failures_keep_position_limits_and_are_rendered(episode: RenderedEpisode, kind: str):
    found = corrupt(episode, kind, 1.0, 4)
    assert (
        (found.q >= episode.robot.lower).all()
        and (found.q <= episode.robot.upper).all()
        and (found.q != episode.q).any()
    )
    assert (found.video == episode.rerender(found.q)).all()
    steps, start = np.abs(np.diff(found.q, axis=0)).max(-1), found.label["start_frame"]
    if kind == "jump":
        assert steps.argmax() == start - 1 and np.count_nonzero(found.q[-1] != episode.q[-1]) == 1
        assert episode.robot.joint_names[np.abs(np.diff(found.q, axis=0))[start - 1].argmax()] == found.label["joint"]
    if kind == "frozen":
        assert start == 0 and not steps.any() and (found.video == found.video[:1]).all()
    if kind == "late":
        assert (found.q[found.label["delay_frames"] :] == episode.q[: T - found.label["delay_frames"]]).all()
    if kind == "wrong_goal":
        assert (found.q[0] == episode.q[0]).all() and steps.max() < 0.5


def test_the_background_layer_is_the_true_background(episode: RenderedEpisode):
    scene = episode.scene
    truth = scene.appearance.background.image(96, 96, seed=scene.seed)
    uncovered = ~episode.rendering.on_robot.all(0)
    inside = np.s_[2:-2, 2:-2]
    difference = np.abs(episode.layers.background[0] / 255 - truth).max(-1)
    assert np.median(difference[uncovered]) < 0.01 and (difference[inside][uncovered[inside]] < 0.05).mean() > 0.97


def test_the_tip_penetrates_the_obstacle(episode: RenderedEpisode):
    found = corrupt(episode, "penetration", 1.0, 1)
    tip = episode.robot.model.link_index(episode.robot.tip_links[0])
    distance = [np.abs(episode.scene.link_poses(q)[tip, :3, 3] - found.label["position"]).max() for q in episode.q]
    assert min(distance) < found.label["side_m"] / 2 and (found.q == episode.q).all() and not episode.scene.objects


@pytest.mark.parametrize(
    ("kind", "strength", "says"), [("melt", 0.5, "melted"), ("jump", 0.0, "strength"), ("jump", 1.5, "strength")]
)
def test_invalid_input_is_rejected(episode: RenderedEpisode, kind: str, strength: float, says: str):
    with pytest.raises(InputError, match=says):
        corrupt(episode, kind, strength, 0)
