"""What the viewer draws, from which files it reads it, and what it refuses; the page itself is in test_viewer_page.py."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from lerobot_files import make_episode, make_v2
from viewer_runs import FPS, FRAMES, HEIGHT, ROBOT, STD, WIDTH, decode_folder, finger_run, motion_of_finger

from jidm.cli import main
from jidm.datasets import open_dataset
from jidm.errors import InputError, MissingExtraError, VideoError
from jidm.estimation.result import JointMotion
from jidm.fields.free import LearnedField
from jidm.idm import JacobianIDM
from jidm.video.io import open_video, write_video
from jidm.video.letterbox import Letterbox
from jidm.visualization.viewer import joint_charts, pictures
from jidm.visualization.viewer.joint_charts import JointChart, joint_bars
from jidm.visualization.viewer.live import LiveFeed
from jidm.visualization.viewer.load import MOTION_FILE, decode_run, load_decode, load_episode
from jidm.visualization.viewer.pictures import PICTURES, FramePictures, compare
from jidm.visualization.viewer.server import check_port, require_viser
from jidm.visualization.viewer.viewed_run import MAX_SIDE, ViewedRun, recorded_motion, reduced


@pytest.fixture(scope="module")
def run() -> ViewedRun:
    return finger_run()


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_flow_of_the_decoded_step_leaves_no_residual_and_of_another_step_does(run: ViewedRun):
    analysis = FramePictures(run).analyze(3)
    assert analysis.flow is not None and analysis.residual is not None
    speed = float(analysis.flow.norm(dim=0).max())
    assert speed > 1 and float(analysis.residual.max()) < 0.02 * speed
    wrong = replace(run, motion=replace(run.motion, delta_q=torch.zeros_like(run.motion.delta_q)))
    still = FramePictures(wrong).analyze(3)
    assert still.residual is not None
    torch.testing.assert_close(still.residual, analysis.flow.norm(dim=0))


def test_the_field_picture_shows_what_the_chosen_joint_moves(run: ViewedRun):
    """The last joint moves less of the finger than the first: its picture has less color."""

    def colored(joint: int) -> int:
        image, caption = FramePictures(run).draw(2, joint, "Jacobian field", 2 * WIDTH)
        assert run.joint_names[joint] in caption and "px/rad" in caption
        return int((np.ptp(image.astype(int), axis=-1) > 60).sum())

    assert colored(0) > 1.3 * colored(1) > 0


def test_pixels_are_those_of_the_video_not_of_the_reduced_frames(run: ViewedRun):
    small = FramePictures(run).draw(2, 0, "Jacobian field", WIDTH)[1]
    large = FramePictures(replace(run, width=4 * WIDTH, height=4 * HEIGHT)).draw(2, 0, "Jacobian field", WIDTH)[1]
    first, second = (float(text.split(" to ")[1].split()[0]) for text in (small, large))
    assert second == pytest.approx(4 * first, rel=0.05)


def test_the_video_picture_is_the_frame_and_tells_that_it_is_not_valid(run: ViewedRun):
    image, caption = FramePictures(run).draw(2, 0, "video", WIDTH)
    np.testing.assert_array_equal(image, run.frames[2].permute(1, 2, 0).numpy())
    assert "not valid" not in caption
    assert "not valid" in FramePictures(run).draw(3, 0, "video", WIDTH)[1]  # step 2 leads to frame 3


def test_what_is_not_known_is_said_and_not_drawn(run: ViewedRun):
    bare = FramePictures(replace(run, field=None, camera=None))
    assert "no field" in bare.draw(2, 0, "Jacobian field", WIDTH)[1]
    assert "no field" in bare.draw(2, 0, "residual", WIDTH)[1]
    assert "no next frame" in FramePictures(run).draw(FRAMES - 1, 0, "optical flow", WIDTH)[1]
    assert "not measured" in FramePictures(replace(run, flow=None)).draw(0, 0, "optical flow", WIDTH)[1]


def test_sheets(run: ViewedRun):
    drawn = FramePictures(run)
    four, one = drawn.sheet(2, 0), drawn.sheet(2, 0, ("video",))
    assert four.shape[1] > 2 * pictures.TILE_WIDTH and one.shape[1] > pictures.TILE_WIDTH
    pair = compare({"A": drawn, "B": FramePictures(replace(run, motion=run.motion[:3]))}, 5, 1, PICTURES)
    assert pair.shape[0] > 4 * pictures.TILE_WIDTH * HEIGHT / WIDTH


def test_bands_of_a_letterboxed_grid_are_removed():
    """A grid that holds the coordinates of the letterboxed image, cut to the image, holds those of the image."""
    box = Letterbox(60, 160, 128, 128)
    v, u = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    inner = pictures._without_bands(torch.stack([u, v]), box)
    assert tuple(inner.shape) == (2, box.inner_height, box.inner_width)
    assert inner[0, 0, 0] == box.left and inner[1, 0, 0] == box.top
    assert inner[0, 0, -1] == 127 - box.left


def test_a_learned_field_is_drawn_by_its_own_matching():
    idm = JacobianIDM.from_pretrained("finger-5")
    assert isinstance(idm.field, LearnedField) and idm.flow is None
    n = len(idm.joint_names)
    motion = recorded_motion(idm.joint_names, ("revolute",) * n, np.arange(3) / FPS, np.zeros((3, n)))
    frames = [torch.randint(0, 255, (3, 60, 100), dtype=torch.uint8) for _ in range(3)]
    drawn = FramePictures(decode_run(frames, 100, 60, motion, idm, "finger"))
    analysis = drawn.analyze(0)
    assert analysis.flow is not None and tuple(analysis.flow.shape) == (2, 60, 100)
    assert analysis.jacobian is not None and analysis.jacobian.shape[1] == n
    height, width = analysis.jacobian.shape[-2:]
    assert width / height == pytest.approx(100 / 60, rel=0.1)
    # In the pixels in which `dense` gives the same field.
    again = pictures._evaluate_field(drawn.run, drawn.run.frame(0), torch.zeros(n))
    assert again.jacobian is not None
    ratio = (analysis.jacobian.norm() / width**2) / (again.jacobian.norm() / again.jacobian.shape[-1] ** 2)
    assert float(ratio) == pytest.approx(1, rel=0.05)


def test_frames_are_reduced_to_what_fits_into_memory():
    assert tuple(reduced(torch.zeros(3, 1080, 1920, dtype=torch.uint8)).shape) == (3, 360, MAX_SIDE)
    small = torch.randint(0, 255, (3, 20, 30), dtype=torch.uint8)
    assert reduced(small) is small


# ---- joints ---------------------------------------------------------------------------------------------------------


def _style(element: ET.Element) -> dict[str, str]:
    return dict(part.split(":", 1) for part in element.attrib["style"].split(";"))


def test_bars_place_position_and_band_within_the_limits(run: ViewedRun):
    rows = ET.fromstring(joint_bars([run], 5, 1))
    bands, marks = rows.findall(".//div[@class='band']"), rows.findall(".//div[@class='position']")
    assert len(bands) == len(marks) == 2
    assert run.robot is not None
    for k in range(2):
        span = run.robot.upper[k] - run.robot.lower[k]
        position = 100 * (float(run.motion.position[5, k]) - run.robot.lower[k]) / span
        assert float(_style(marks[k])["left"].rstrip("%")) == pytest.approx(position, abs=0.01)
        assert float(_style(bands[k])["width"].rstrip("%")) == pytest.approx(100 * 4 * STD[k] / span, abs=0.02)
    # Step 4 leads to frame 5.
    assert _style(bands[1])["background"] == joint_charts._UNOBSERVABLE != _style(bands[0])["background"]


def test_a_joint_outside_its_limits_is_red(run: ViewedRun):
    assert run.robot is not None
    beyond = run.motion.position.clone()
    beyond[2, 0] = run.robot.upper[0] + 0.1
    rows = ET.fromstring(joint_bars([replace(run, motion=replace(run.motion, position=beyond))], 2, 0))
    colors = [_style(x)["background"] for x in rows.findall(".//div[@class='position']")]
    assert colors[0] == joint_charts._OUTSIDE != colors[1]


def test_names_are_text_not_markup(run: ViewedRun):
    names = ("<b>a", "<img src=x>")
    motion = replace(run.motion, joint_names=names)
    rows = ET.fromstring(joint_bars([replace(run, motion=motion, robot=None)], 0, 0))
    assert rows[0].text == "<b>a" and not rows.findall(".//img")


def test_recorded_positions_have_no_band(run: ViewedRun):
    assert "band" not in joint_bars([replace(run, decoded=False)], 0, 0)


def test_the_cursor_of_the_chart_follows_the_time(run: ViewedRun):
    chart = JointChart({"decoded": run}, run.joint_names[0])

    def cursor(t: int) -> float:
        return float(np.nonzero((chart.draw(t) == (200, 40, 90)).all(-1))[1].mean())

    columns = [cursor(t) for t in range(FRAMES)]
    np.testing.assert_allclose(np.diff(columns), np.diff(columns).mean(), atol=1.1)
    assert columns[-1] - columns[0] > 0.6 * chart.draw(0).shape[1]


def test_recorded_motion_adds_up():
    q = np.random.default_rng(0).normal(size=(5, 3))
    motion = recorded_motion(("a", "b", "c"), ("revolute",) * 3, np.arange(5) / 4.0, q)
    np.testing.assert_allclose(q[0] + motion.delta_q.numpy().cumsum(0), q[1:])
    np.testing.assert_allclose(motion.velocity.numpy(), 4 * np.diff(q, axis=0))
    with pytest.raises(InputError, match="not numbers"):
        recorded_motion(("a",), ("revolute",), np.arange(2.0), np.array([[0.0], [np.nan]]))
    with pytest.raises(InputError, match="do not increase"):
        recorded_motion(("a",), ("revolute",), np.zeros(2), np.zeros((2, 1)))


# ---- live -----------------------------------------------------------------------------------------------------------


def test_a_live_feed_shows_what_the_decoder_says(run: ViewedRun):
    assert run.robot is not None and run.camera is not None
    idm = JacobianIDM.from_embodiment(run.robot, camera=run.camera, points=500)
    feed = LiveFeed(idm, "live")
    assert feed.run_since(None) is None and len(feed.waiting()) == 1
    stream = idm.stream(run.frame(0), q0=run.motion.position[0])
    feed.observe(run.frame(0), 0.0, stream, None)
    assert feed.run_since(None) is None  # no step yet
    for t in (1, 2):
        feed.observe(run.frame(t), t / FPS, stream, stream.push(run.frame(t), t / FPS))
    version, live = feed.run_since(None)
    expected = idm.decode(
        torch.stack([run.frame(t) for t in range(3)]), q0=run.motion.position[0], fps=FPS, layout="TCHW"
    )
    torch.testing.assert_close(live.motion.position, expected.position)
    assert torch.equal(live.frames[2], run.frames[2])
    assert feed.run_since(version) is None
    other = idm.stream(run.frame(3), q0=run.motion.position[3])
    feed.observe(run.frame(3), 0.0, other, None)
    feed.observe(run.frame(3), 0.1, stream, stream.push(run.frame(3), 0.3))  # of the video before
    assert feed.run_since(version) is None
    feed.observe(run.frame(4), 0.1, other, other.push(run.frame(4), 0.1))
    assert len(feed.run_since(version)[1]) == 2


def test_a_live_feed_forgets_the_older_half(run: ViewedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jidm.visualization.viewer.live._MAX_FRAMES", 4)
    assert run.robot is not None and run.camera is not None
    idm = JacobianIDM.from_embodiment(run.robot, camera=run.camera, points=500)
    feed, stream = LiveFeed(idm, "live"), idm.stream(run.frame(0), q0=run.motion.position[0])
    feed.observe(run.frame(0), 0.0, stream, None)
    for t in range(1, 5):
        feed.observe(run.frame(t), t / FPS, stream, stream.push(run.frame(t), t / FPS))
    _, live = feed.run_since(None)
    whole = idm.decode(torch.stack([run.frame(t) for t in range(5)]), q0=run.motion.position[0], fps=FPS, layout="TCHW")
    assert len(live) == 3 and torch.equal(live.frames[0], run.frames[2])
    torch.testing.assert_close(live.motion.position, whole.position[2:])


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_decode_folder_is_shown_as_it_was_decoded(tmp_path: Path):
    folder = decode_folder(tmp_path / "out")
    run = load_decode(folder)
    torch.testing.assert_close(run.motion.position, motion_of_finger().position)
    assert run.robot is not None and run.robot.name == ROBOT and run.field is not None and run.truth is None
    assert len(run) == FRAMES and (run.width, run.height) == (WIDTH, HEIGHT)
    np.save(folder / "truth.npy", run.motion.position.numpy())
    assert load_decode(folder).truth is not None
    np.save(folder / "truth.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"truth.npy: is \(2, 2\)"):
        load_decode(folder)


def test_a_moved_video_is_found_beside_the_folder_or_named(tmp_path: Path):
    folder = decode_folder(tmp_path / "out")
    moved = tmp_path / "elsewhere.mp4"
    (tmp_path / "finger.mp4").rename(moved)
    with pytest.raises(VideoError, match="--video"):
        load_decode(folder)
    assert len(load_decode(folder, video=moved)) == FRAMES
    moved.rename(folder / "finger.mp4")
    assert len(load_decode(folder)) == FRAMES


def test_a_robot_of_a_file_is_named_in_the_summary(tmp_path: Path):
    from jidm.cli.model_args import ModelArgs

    urdf = tmp_path / "mine.urdf"
    urdf.write_text("<robot/>")
    assert ModelArgs(embodiment=str(urdf)).embodiment_file == str(urdf)
    assert ModelArgs(embodiment=ROBOT).embodiment_file is None and ModelArgs().embodiment_file is None
    folder = decode_folder(tmp_path / "out")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "embodiment_file": str(tmp_path / "gone.urdf")}))
    with pytest.raises(InputError, match="--embodiment"):
        load_decode(folder)
    assert load_decode(folder, embodiment=ROBOT).robot is not None


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda folder: (folder / "motion.npz").unlink(), "lacks motion.npz; 'jidm decode VIDEO --out"),
        (lambda folder: (folder / "motion.npz").write_bytes(b"x"), "is not a joint motion"),
        (lambda folder: (folder / "summary.json").write_text("{"), "is not a summary"),
        (lambda folder: (folder / "summary.json").write_text("{}"), "is not a summary"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path, break_it, complaint: str, capsys):
    folder = decode_folder(tmp_path / "out")
    break_it(folder)
    pytest.importorskip("viser")
    assert main(["view", str(folder), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_wrong_command_lines(tmp_path: Path, capsys):
    pytest.importorskip("viser")
    for arguments, complaint in (
        ([], "name one run, or 2"),
        ([str(tmp_path / "none")], "no such file or folder"),
        ([str(tmp_path)], "no decode folder"),
        (["a", "b", "c"], "got 3"),
    ):
        assert main(["view", *arguments, "--port", "0"]) == 1
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
    scores = tmp_path / "scores.jsonl"
    scores.write_text('{"video": "a.mp4", "reward": 3.0}\n')
    assert main(["view", str(scores), "--video", "b.mp4", "--port", "0"]) == 1
    assert "has no score of b.mp4" in capsys.readouterr().err


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="in use; choose another"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1"):
        check_port("192.0.2.1", 8080)
    with pytest.raises(InputError, match="cannot listen"):
        check_port("127.0.0.1", 99999)


def test_missing_viser_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(MissingExtraError, match=r"\[view\]"):
        require_viser()


def test_an_episode_is_shown_as_recorded_and_asked_for(tmp_path: Path, capsys):
    episodes = {0: make_episode(0, 5), 2: make_episode(2, 6)}
    make_v2(tmp_path / "data", episodes)
    run = load_episode(open_dataset(tmp_path / "data"), 2)
    np.testing.assert_allclose(run.motion.position.numpy(), episodes[2].state, atol=1e-6)
    assert len(run) == 6 and not run.decoded and run.robot is None and run.field is None
    assert FramePictures(run).analyze(1).flow is not None
    pytest.importorskip("viser")
    assert main(["view", str(tmp_path / "data"), "--port", "0"]) == 1
    assert "give --episode, one of 0, 2" in capsys.readouterr().err


@pytest.mark.parametrize("degrees", [90, 180])
def test_a_video_is_shown_as_it_was_turned_for_decoding(tmp_path: Path, degrees: int):
    folder = decode_folder(tmp_path / "out")
    upright = load_decode(folder)
    stream = open_video(tmp_path / "finger.mp4")
    lying = [torch.rot90(x, degrees // 90, (-2, -1)).permute(1, 2, 0).numpy() for _, x in stream.pixels()]
    write_video(tmp_path / "lying.mp4", lying, FPS)
    motion = JointMotion.load(folder / MOTION_FILE)
    replace(motion, provenance={**motion.provenance, "rotated": degrees}).save(folder / MOTION_FILE)
    shown = load_decode(folder, video=tmp_path / "lying.mp4")
    assert (shown.width, shown.height) == (upright.width, upright.height)
    assert (shown.frames[3].double() - upright.frames[3].double()).abs().mean() < 4
