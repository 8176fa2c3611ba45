"""Evaluation: known errors give known metrics, failures are reported, exact fields and flows are exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from written_poses import InMemoryDataset, PixelPoseModel

from jidm.baselines.idm import BaselineIDM
from jidm.camera.model import Camera
from jidm.cli import main
from jidm.errors import DatasetError, InputError
from jidm.estimation.result import JointMotion
from jidm.evaluation import metrics
from jidm.evaluation.config import EvalConfig
from jidm.evaluation.evaluate import evaluate
from jidm.evaluation.field_metrics import FieldPrediction, predict_field
from jidm.evaluation.ground_truth import GroundTruthView, letterbox_camera, make_surface_field
from jidm.evaluation.held_out import HeldOut
from jidm.evaluation.summary import compare_models, summarize
from jidm.evaluation.tables import _CORRUPTION_COLUMNS, MEANINGS, MODEL_COLUMNS, legend, summary_table
from jidm.fields.analytic import AnalyticField
from jidm.idm import JacobianIDM
from jidm.model_registry import model_class
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import load_embodiment
from jidm.training.data.batch import JointStats
from jidm.video.letterbox import Letterbox

NAMES = ("joint_1", "joint_2")


def smooth(frames: int, seed: int, n: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(frames)[:, None] / 16
    return 0.6 * np.sin(2 * np.pi * rng.uniform(0.2, 0.5, n) * t + rng.uniform(-3, 3, n))


@pytest.fixture(scope="module")
def recording() -> InMemoryDataset:
    return InMemoryDataset({k: smooth(60, k) for k in (0, 1, 4, 16)}, NAMES)


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_a_perfect_model_gets_perfect_metrics(recording: InMemoryDataset):
    summary = summarize(evaluate(PixelPoseModel(NAMES), HeldOut(recording), name="perfect"))
    assert summary["episodes"] == 4 and summary["failed"] == [] and summary["steps"] == 4 * 59
    assert summary["nve"] < 1e-3 and summary["nve_pairs"] < 1e-3 and summary["position_share"] == 1.0
    assert summary["correlation_mean"] == pytest.approx(1.0, abs=1e-6)
    assert summary["coverage_68"] == summary["coverage_95"] == 1.0
    assert json.dumps(summary, allow_nan=False)


def test_an_error_of_a_tenth_is_an_nve_of_a_tenth(recording: InMemoryDataset):
    summary = summarize(evaluate(PixelPoseModel(NAMES, scale=0.9), HeldOut(recording), name="tenth"))
    truth = np.concatenate([np.diff(q, axis=0) for q in recording.q.values()])
    assert summary["nve"] == pytest.approx(0.1, abs=1e-4)
    assert list(summary["nve_per_joint"].values()) == pytest.approx([0.1, 0.1], abs=1e-4)
    assert summary["nve_interval"] == pytest.approx([0.1, 0.1], abs=1e-4)
    assert summary["action_mse"] == pytest.approx(0.01 * (truth**2).mean(), rel=1e-3)
    within = np.mean([np.abs(0.1 * (q[1:49] - q[0])) <= 0.05 for q in recording.q.values()])
    assert summary["position_share"] == pytest.approx(within, abs=0.01) and within < 1
    inside = (np.abs(0.1 * truth) <= 0.01 * 0.99446).mean()
    assert summary["coverage_68"] == pytest.approx(inside, abs=1e-6)


def test_invalid_steps_count_in_the_nve(recording: InMemoryDataset):
    summary = summarize(evaluate(PixelPoseModel(NAMES, invalid=3), HeldOut(recording), name="gap"))
    steps = [np.abs(np.diff(q, axis=0)) for q in recording.q.values()]
    assert summary["valid_share"] == pytest.approx(58 / 59)
    assert summary["nve"] == pytest.approx(sum(s[3].sum() for s in steps) / sum(s.sum() for s in steps), abs=1e-4)


def test_only_the_chosen_joints_count(recording: InMemoryDataset):
    class OneWrong(PixelPoseModel):
        def predict_steps(self, *args):
            return super().predict_steps(*args) * torch.tensor([1.0, 0.0])

    whole = summarize(evaluate(OneWrong(NAMES), HeldOut(recording)))
    first = summarize(evaluate(OneWrong(NAMES), HeldOut(recording, EvalConfig(joints=("joint_1",)))))
    assert whole["nve"] > 0.3 and first["nve"] < 1e-3
    assert whole["action_mse"] > 1e-5 and first["action_mse"] < 1e-9 and first["action_mse_pairs"] < 1e-9
    assert list(first["nve_per_joint"]) == ["joint_1"] == first["joints"]
    with pytest.raises(InputError, match="did you mean 'joint_1'"):
        HeldOut(recording, EvalConfig(joints=("joint1",))).joint_mask(NAMES)


def test_joints_at_rest_have_no_correlation():
    q = {k: np.concatenate([smooth(30, k, 1), np.full((30, 1), 0.3)], axis=1) for k in range(2)}
    summary = summarize(evaluate(PixelPoseModel(NAMES), HeldOut(InMemoryDataset(q, NAMES))))
    assert list(summary["correlation"]) == ["joint_1"] == summary["moving_joints"]
    assert summary["nve_per_joint"]["joint_2"] is None


def test_ratios_are_over_the_episodes_that_all_models_decoded(recording: InMemoryDataset):
    class Fails(PixelPoseModel):
        def decode(self, video, **how):
            if len(self.seen) == 1:
                self.seen.append(0)
                raise RuntimeError("lens\ncap")
            self.seen.append(0)
            return super().decode(video, **how)

    other = Fails(NAMES, scale=0.8)
    other.seen = []
    both = {
        "ours": evaluate(PixelPoseModel(NAMES, scale=0.9), HeldOut(recording), name="ours"),
        "other": evaluate(other, HeldOut(recording), name="other"),
    }
    assert both["other"].failed == {1: "RuntimeError: lens cap"} and len(both["other"].episodes) == 3
    assert compare_models(both, "ours")["other"]["action_mse_ratio"] == pytest.approx(0.25, rel=1e-3)
    rows = summary_table([summarize(e) for e in both.values()])
    assert rows[0][0] == "MODEL" and rows[1][-1] == "4/4" and rows[2][-1] == "3/4"
    assert len({len(row) for row in rows}) == 1


def test_a_model_that_fails_everywhere_is_reported(recording: InMemoryDataset):
    class Broken(PixelPoseModel):
        def decode(self, video, **how):
            raise ValueError("no")

    summary = summarize(evaluate(Broken(NAMES), HeldOut(recording), name="broken"))
    assert summary["episodes"] == 0 and len(summary["failed"]) == 4
    assert summary_table([summary])[1][-1] == "0/4"


# ---- held-out episodes ----------------------------------------------------------------------------------------------


def test_an_uncertainty_that_was_not_estimated_is_not_scored(recording: InMemoryDataset):
    class Regression(PixelPoseModel):
        def decode(self, video, **how):
            return replace(super().decode(video, **how), provenance={"not_measured": ["covariance"]})

    summary = summarize(evaluate(Regression(NAMES), HeldOut(recording)))
    assert summary["coverage_68"] is summary["coverage_95"] is summary["position_coverage_95"] is None
    assert summary["nve"] < 1e-3


def test_stride_makes_longer_steps_at_a_lower_rate(recording: InMemoryDataset):
    held_out = HeldOut(recording, EvalConfig(stride=3, frames=11, episodes=(4,)))
    clip = held_out.clip(4, NAMES)
    assert clip.fps == pytest.approx(16 / 3) and clip.frame == tuple(range(0, 33, 3))
    assert torch.equal(clip.q, torch.from_numpy(recording.q[4][0:33:3]))
    result = evaluate(PixelPoseModel(NAMES), held_out).episodes[0]
    assert torch.allclose(result.motion.delta_q, result.delta_q, atol=1e-5)
    assert result.motion.time[1] == pytest.approx(3 / 16)


def test_the_frame_before_is_the_one_before(recording: InMemoryDataset):
    class Backwards(PixelPoseModel):
        def predict_steps(self, first, second, before=None):
            return super().predict_steps(before if before is not None else first, second)

    episode = evaluate(Backwards(NAMES), HeldOut(recording, EvalConfig(episodes=(1,)))).episodes[0]
    q = torch.from_numpy(recording.q[1])
    expected = torch.cat([q[1:2] - q[:1], q[2:] - q[:-2]])  # at an episode's start the frame replaces the one before
    assert torch.allclose(episode.pair_steps, expected, atol=1e-5)


def test_joints_are_found_by_name_in_any_order(recording: InMemoryDataset):
    clip = HeldOut(recording).clip(0, NAMES[::-1])
    assert np.array_equal(clip.q.numpy(), recording.q[0][:, ::-1])
    with pytest.raises(DatasetError, match="no joint 'elbow'"):
        HeldOut(recording).clip(0, ("elbow",))


def test_wrong_choices_are_refused_by_name(recording: InMemoryDataset):
    with pytest.raises(DatasetError, match=r"no episodes \[7\]; it has 4 episodes"):
        HeldOut(recording, EvalConfig(episodes=(0, 7)))
    with pytest.raises(DatasetError, match=r"has no camera 'fronl'.*did you mean 'front'"):
        HeldOut(recording, EvalConfig(image_key="fronl"))
    with pytest.raises(InputError, match="stride"):
        EvalConfig(stride=0)
    foreign = replace(recording, recipe={"embodiment": "planar_finger_2", "embodiment_hash": "f" * 64})
    with pytest.raises(DatasetError, match="content hash ffffffffffff"):
        HeldOut(foreign)


def test_the_initial_pose_is_given_or_not(recording: InMemoryDataset):
    given = []

    class Listener(PixelPoseModel):
        def decode(self, video: torch.Tensor, *, q0: torch.Tensor | None, fps: float) -> JointMotion:
            given.append(q0 is not None)
            return super().decode(video, q0=torch.zeros(len(NAMES)).double() if q0 is None else q0, fps=fps)

    for start in (True, False):
        evaluate(Listener(NAMES), HeldOut(recording, EvalConfig(given_initial_pose=start, episodes=(0,))), name="it")
    assert given == [True, False]


def test_the_model_gets_the_corrupted_frames(recording: InMemoryDataset):
    frozen = evaluate(
        PixelPoseModel(NAMES), HeldOut(recording), corruption=lambda video, clip: video[:1].expand_as(video)
    )
    assert summarize(frozen)["nve"] == pytest.approx(1.0)


# ---- ground truth ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finger() -> Embodiment:
    return load_embodiment("planar_finger_2")


@pytest.fixture(scope="module")
def camera(finger: Embodiment) -> Camera:
    return finger.camera().resized(64, 64)


@pytest.fixture(scope="module")
def seen(finger: Embodiment, camera: Camera) -> InMemoryDataset:
    """A recording with depth, links and camera, computed from the surface points of an analytic field."""
    q = {0: smooth(6, 0)}
    field = AnalyticField(finger, camera.resized(16, 16), points=20000, occluders=20000)
    depth, links = np.zeros((6, 16, 16), np.float32), np.full((6, 16, 16), -1, np.int16)
    for t in range(6):
        pose = field.at(torch.from_numpy(q[0][t]))
        surface = pose.surface()
        p = field.kinematics.transform_points(
            field.kinematics.link_poses(pose.q), pose.surface_points.link, pose.surface_points.p_link
        )
        z = field.camera.transform(p)[:, 2]
        for k in torch.argsort(z, descending=True).tolist():
            u, v = surface.points[k].round().long().tolist()
            if surface.visible[k] and 0 <= u < 16 and 0 <= v < 16:
                depth[t, v, u], links[t, v, u] = z[k], pose.surface_points.link[k]
    row = torch.cat([camera.K[[0, 1, 0, 1], [0, 1, 2, 2]], camera.T_camera_base[:3].reshape(-1)]).numpy()
    extras = {
        "observation.depth.front": {0: depth},
        "observation.links.front": {0: links},
        "observation.camera.front": {0: np.tile(row, (6, 1))},
    }
    recipe = {"embodiment": finger.name, "embodiment_hash": finger.content_hash}
    return InMemoryDataset(q, finger.joint_names, size=(64, 64), recipe=recipe, extras=extras)


def test_recorded_camera_is_read_back(seen: InMemoryDataset, camera: Camera):
    view = HeldOut(seen).clip(0, seen.joint_names).ground_truth
    assert view is not None and len(view.cameras) == 1
    assert torch.allclose(view.camera(3).K, camera.K) and torch.allclose(
        view.camera(3).T_camera_base, camera.T_camera_base
    )


def test_objects_in_front_of_the_robot_are_not_the_robot(seen: InMemoryDataset):
    view = HeldOut(seen).clip(0, seen.joint_names).ground_truth
    q = torch.from_numpy(seen.q[0][2])
    v, u = (view.links[2] >= 0).nonzero()[5].tolist()
    assert view.jacobian(2, q, 16, 16)[1][v, u] == 1
    view.links[2, v, u] = -1
    assert view.jacobian(2, q, 16, 16)[1][v, u] == 0 and view.flow(2, q, q + 0.1, 16, 16)[1][v, u] == 0


def test_a_letterboxed_camera_projects_to_the_letterboxed_image(camera: Camera):
    letterbox = Letterbox(64, 64, 40, 72)
    p = torch.tensor([[0.05, 0.02, 0.0], [-0.03, 0.1, 0.05]], dtype=torch.float64)
    uv, other = camera.project(p)[0], letterbox_camera(camera, letterbox).project(p)[0]
    scale, offset = torch.tensor([letterbox.scale_u, letterbox.scale_v]), torch.tensor([letterbox.left, letterbox.top])
    assert torch.allclose(other, (uv + 0.5) * scale - 0.5 + offset)


def test_exact_flow_is_the_exact_field_times_a_small_step(seen: InMemoryDataset):
    view = HeldOut(seen).clip(0, seen.joint_names).ground_truth
    q = torch.from_numpy(seen.q[0][2])
    step = torch.tensor([1e-3, -2e-3], dtype=torch.float64)
    flow, where = view.flow(2, q, q + step, 16, 16)
    jacobian, mask = view.jacobian(2, q, 16, 16)
    both = where * mask
    assert both.sum() > 8
    assert float(metrics.endpoint_error(flow, torch.einsum("cnhw,n->chw", jacobian, step), both)) < 0.02 * float(
        metrics.endpoint_error(flow, 0 * flow, both)
    )


def test_exact_flow_is_in_pixels_of_the_full_image(seen: InMemoryDataset, finger: Embodiment, camera: Camera):
    view = HeldOut(seen).clip(0, seen.joint_names).ground_truth
    q, q_next = (torch.from_numpy(seen.q[0][t]) for t in (0, 5))
    flow, where = view.flow(0, q, q_next, 16, 16)
    points = AnalyticField(finger, camera, points=4000).at(q)
    moved = points.surface(q_next - q).points - points.surface().points
    largest = moved[points.visible].norm(dim=-1).max()
    assert float((flow.norm(dim=0) * where).max()) == pytest.approx(float(largest), rel=0.1)


def test_a_letterboxed_view_stays_exact(seen: InMemoryDataset):
    clip = HeldOut(seen).clip(0, seen.joint_names)
    other = clip.letterbox(64, 96)  # the same image with black columns left and right
    assert other.video.shape[-2:] == (64, 96) and torch.equal(other.video[..., 16:80], clip.video)
    q = torch.from_numpy(seen.q[0][2])
    jacobian, mask = clip.ground_truth.jacobian(2, q, 16, 16)
    wide, wide_mask = other.ground_truth.jacobian(2, q, 16, 24)
    assert torch.equal(wide_mask[:, 4:20], mask) and torch.allclose(wide[..., 4:20], jacobian)
    assert not bool(wide_mask[:, :4].any()) and not bool(wide_mask[:, 20:].any())
    half = clip.letterbox(32, 32).ground_truth.jacobian(2, q, 8, 8)[0]
    assert float(half.abs().max()) == pytest.approx(float(jacobian.abs().max()) / 2, rel=0.15)
    flow, where = clip.ground_truth.flow(2, q, q + 0.1, 16, 16)
    flow_wide, where_wide = other.ground_truth.flow(2, q, q + 0.1, 16, 24)
    assert torch.allclose(flow_wide[..., 4:20], flow, atol=2e-2) and torch.equal(where_wide[:, 4:20], where)


def test_an_exact_model_has_no_field_error_and_no_flow_error(seen: InMemoryDataset, finger: Embodiment):
    class Exact(PixelPoseModel):
        """Predicts exact field and flow at the pose that it is given, which is the decoded one."""

        wrong = 1.0

        def predict_field(self, first, second, q):
            view = HeldOut(seen).clip(0, seen.joint_names).ground_truth
            t = int((torch.from_numpy(seen.q[0]) - q[0]).abs().sum(1).argmin())
            jacobian, mask = view.jacobian(t, q[0], 16, 16)
            flow, _ = view.flow(t, torch.from_numpy(seen.q[0][t]), torch.from_numpy(seen.q[0][t + 1]), 16, 16)
            return FieldPrediction(self.wrong * jacobian[None], mask[None], flow[None], None, torch.zeros(1, 2))

    exact = Exact(seen.joint_names)
    summary = summarize(evaluate(exact, HeldOut(seen, EvalConfig(field_samples=3))))
    assert summary["field_error_mean"] < 1e-3 and summary["flow_epe_px"] < 2e-3 and summary["mask_iou"] == 1.0
    assert summary["flow_length_px"] > 0.1 and summary["tip_error_mm"] < 0.01
    exact.wrong = 0.7
    summary = summarize(evaluate(exact, HeldOut(seen, EvalConfig(field_samples=3))))
    assert list(summary["field_error"].values()) == pytest.approx([0.3, 0.3], abs=1e-3)


def test_the_analytic_model_is_evaluated_like_the_others(seen: InMemoryDataset, finger: Embodiment, camera: Camera):
    evaluation = evaluate(JacobianIDM.from_embodiment(finger, camera=camera), HeldOut(seen, EvalConfig(frames=4)))
    summary = summarize(evaluation)
    assert not evaluation.failed and summary["episodes"] == len(seen.episode_indices)
    assert (summary["nve"] is not None and "nve_pairs" not in summary) or summary["nve_pairs"] is None


def test_a_surface_is_sampled_once_for_all_cameras(finger: Embodiment, camera: Camera):
    surface = make_surface_field(finger)
    q = torch.zeros(2, dtype=torch.float64)
    one = GroundTruthView(surface, (camera,), None, None)
    wide = replace(camera, K=camera.K * torch.tensor([[0.5, 1, 1], [1, 0.5, 1], [1, 1, 1]]))
    other = GroundTruthView(surface, (wide,), None, None)
    assert float(other.robot_mask(0, q).sum() / one.robot_mask(0, q).sum()) == pytest.approx(0.25, rel=0.3)
    assert one.flow(0, q, q, 16, 16) is None


def test_tip_error_of_a_model_without_motion(seen: InMemoryDataset, finger: Embodiment):
    summary = summarize(evaluate(PixelPoseModel(seen.joint_names, scale=0.0), HeldOut(seen)))
    kinematics = Kinematics.from_embodiment(finger)
    tip = finger.model.link_index(finger.tip_links[0])
    p = kinematics.link_poses(torch.from_numpy(seen.q[0]))[:, tip, :3, 3]
    assert summary["tip_error_mm"] == pytest.approx(1000 * float((p[1:] - p[0]).norm(dim=-1).mean()))


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, seen: InMemoryDataset) -> dict[str, PixelPoseModel]:
    """Stand-ins behind the command line: one recording, and models by name."""
    import jidm.checkpoint
    import jidm.datasets
    import jidm.model_registry

    models = {"good": PixelPoseModel(seen.joint_names, scale=0.9), "poor": PixelPoseModel(seen.joint_names, scale=0.5)}
    data = {"good": {"data_hash": "another"}, "poor": {"data_hash": seen.content_hash, "train_episodes": [0, 5]}}
    read = {name: SimpleNamespace(name=name, training={"data": data[name]}) for name in models}
    monkeypatch.setattr("jidm.cli.checks.check_checkpoint", lambda name: None)
    monkeypatch.setattr("jidm.cli.checks.check_exists", lambda path: None)
    monkeypatch.setattr(jidm.datasets, "open_dataset", lambda path: seen)
    monkeypatch.setattr(jidm.checkpoint, "load_checkpoint", read.__getitem__)
    monkeypatch.setattr(jidm.model_registry, "load_idm", lambda checkpoint: models[checkpoint.name])
    return models


def test_command_line_prints_writes_and_draws(shelf, tmp_path: Path, capsys: pytest.CaptureFixture):
    code = main(["evaluate", "good", "poor", "--data", "d", "--out", str(tmp_path / "out"), "--corruptions"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [m["name"] for m in document["models"]] == ["good", "poor"]
    assert document["models"][0]["nve"] == pytest.approx(0.1, abs=1e-3)
    assert document["comparison"]["good"]["poor"]["action_mse_ratio"] == pytest.approx(0.04, rel=0.01)
    assert set(document["corruptions"]) == {"background", "blur", "jpeg", "occlusion"}
    assert (tmp_path / "out" / "curves_000000.png").exists()
    assert printed.err == "jidm: poor was trained on 1 episode (0) of these; choose others\n"
    for word in ("NVE", "good", "poor", "OTHER", "0.040", "background"):
        assert word in printed.out


def test_command_line_fails_when_a_model_decodes_nothing(shelf, tmp_path: Path, capsys: pytest.CaptureFixture):
    def broken(video, **how):
        raise ValueError("no light")

    shelf["poor"].decode = broken
    assert main(["evaluate", "good", "poor", "--data", "d", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "poor: episode 0 failed: ValueError: no light" in printed.err and "0/1" in printed.out
    assert main(["evaluate", "good", "--data", "d", "--episodes", "3", "--out", str(tmp_path / "out")]) == 1
    assert "there is no episode 3" in capsys.readouterr().err


# ---- fields of real models ------------------------------------------------------------------------------------------


def untrained(kind: str) -> object:
    stats = JointStats(*((x, x) for x in (0.1, 0.5, 0.03, -1.0, 1.0)))
    torch.manual_seed(0)
    return model_class(kind).from_data(NAMES, ("revolute", "revolute"), 32, 32, stats, size="tiny").eval()


def frames() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).unbind(0)


def test_the_prediction_of_a_learned_field_is_at_the_given_pose():
    idm = JacobianIDM(None, untrained("jacobian_field"), None)
    first, second = frames()
    q = torch.tensor([[0.1, 0.2], [0.0, -0.3], [0.4, 0.0]])
    seen = predict_field(idm, first, second, q.double())
    with torch.no_grad():
        jacobian, mask = idm.field.jacobian(idm.field.encode(first), q)
    assert torch.allclose(seen.jacobian, jacobian) and torch.allclose(seen.mask, mask.sigmoid())
    assert seen.flow.shape == (3, 2, 16, 16) and seen.residual.shape == seen.weight.shape == (3, 16, 16)
    assert bool((seen.weight >= 0).all()) and 0.1 < float(seen.weight.max()) < 1
    alone = predict_field(idm, first[1:2], second[1:2], q[1:2])
    assert torch.allclose(alone.delta_q, seen.delta_q[1:2], atol=1e-5)


def test_the_prediction_of_vera_has_the_decoded_step():
    idm = BaselineIDM(untrained("vera"))
    first, second = frames()
    seen = predict_field(idm, first, second, torch.zeros(3, 2))
    assert seen.mask is None and torch.allclose(seen.delta_q, idm.predict_steps(first, second), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(seen.jacobian, idm.model.jacobian(first))


def test_a_model_without_a_field_has_no_field_prediction():
    assert predict_field(BaselineIDM(untrained("direct")), *frames(), torch.zeros(3, 2)) is None


def test_every_column_of_a_table_is_explained():
    headings = {heading for _, heading, _ in (*MODEL_COLUMNS, *_CORRUPTION_COLUMNS)} | {
        "MSE RATIO",
        "PAIRS",
        "EPISODES",
    }
    assert {MEANINGS.get(heading) or MEANINGS.get(heading.split()[0]) for heading in headings} <= set(MEANINGS.values())
    table = [("MODEL", "NVE", "WITHIN 0.05", "TIP [mm]"), ("a", "0.10", "90.0%", "-"), ("b", "-", "80.0%", "-")]
    assert [heading for heading, _ in legend(table)] == ["NVE", "WITHIN 0.05"]  # not of a column without numbers
