"""Metrics of an evaluation as JSON values, for tables and files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jidm.evaluation import metrics
from jidm.evaluation.evaluate import Evaluation

_WIDENED_QUANTILE = 0.95
_SMOOTHED_KEYS = (
    "nve", "nve_per_joint", "action_mse", "nve_moving", "correlation", "correlation_mean", "position_share",
    "tip_error_mm", "coverage_68", "coverage_95",
)  # fmt: skip


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """All metrics of one model as JSON values; None where one does not exist (no field, no robot, no motion).

    `nve` and `action_mse` are of steps decoded as a video from the known initial pose, including steps that are not
    valid; `nve_pairs` and `action_mse_pairs` are of every pair of frames by itself, without a given pose; `*_smoothed`
    are of the motion smoothed over the whole video, see `DecodedEpisode.smoothed`.
    """
    counts = evaluation.joint_mask.tolist()
    out: dict[str, Any] = {
        "name": evaluation.name,
        "episodes": len(evaluation.episodes),
        "failed": [{"episode": k, "problem": why} for k, why in evaluation.failed.items()],
        "joints": [name for name, use in zip(evaluation.joint_names, counts, strict=True) if use],
        **evaluation.data,
    }
    if not evaluation.episodes:
        return out
    values = (
        _step_metrics(evaluation)
        | _position_metrics(evaluation)
        | _uncertainty_metrics(evaluation)
        | _field_metrics(evaluation)
    )
    smoothed = evaluation.smoothed
    smoothed_values = _step_metrics(smoothed) | _position_metrics(smoothed) | _uncertainty_metrics(smoothed)
    values |= {f"{key}_smoothed": smoothed_values[key] for key in _SMOOTHED_KEYS}
    return out | {key: _as_json(value) for key, value in values.items()}


def _step_metrics(evaluation: Evaluation) -> dict[str, Any]:
    joint_mask, names, episodes = evaluation.joint_mask, evaluation.joint_names, evaluation.episodes
    truth, error = step_errors(evaluation)
    velocity = torch.cat([e.delta_q / e.motion.time.diff()[:, None] for e in episodes])
    moving = metrics.moving_joints(velocity, evaluation.config.moving_speed) & joint_mask
    absolute_error = torch.stack([(e.motion.delta_q.double() - e.delta_q)[:, joint_mask].abs().sum() for e in episodes])
    absolute_motion = torch.stack([e.delta_q[:, joint_mask].abs().sum() for e in episodes])
    values = {
        "steps": len(truth),
        "mean_step": truth[:, joint_mask].abs().mean(),
        "moving_speed": evaluation.config.moving_speed,
        "moving_joints": [n for n, m in zip(names, moving.tolist(), strict=True) if m],
        "nve_interval": [_number(x) for x in metrics.ratio_interval(absolute_error, absolute_motion)],
        "nve_median_episode": (absolute_error / absolute_motion).nanmedian(),
    }
    for kind, errors in (("", error), ("_pairs", pair_errors(evaluation))):
        if errors is None:
            continue
        correlation = metrics.correlation(errors + truth, truth)
        values |= {
            f"nve{kind}": metrics.nve(errors[:, joint_mask], truth[:, joint_mask]),
            f"nve{kind}_per_joint": _by_name(names, metrics.nve_per_joint(errors, truth), joint_mask),
            f"action_mse{kind}": metrics.action_mse(errors[:, joint_mask]),
            f"nve{kind}_moving": metrics.nve(errors[:, moving], truth[:, moving]),
            f"correlation{kind}": _by_name(names, correlation, moving),
            f"correlation{kind}_mean": correlation[moving].nanmean(),
        }
    return values


def _position_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Over the first `clip_frames` frames of each episode, without the first frame, whose pose is given."""
    joint_mask, config = evaluation.joint_mask, evaluation.config
    clips = []
    for e in evaluation.episodes:
        integrated = metrics.integrate_steps(e.motion.position[0], e.motion.delta_q)
        clips.append(tuple(x[1 : config.clip_frames].double() for x in (e.motion.position, integrated, e.q)))
    position, integrated, q = (torch.cat(x) for x in zip(*clips, strict=True))
    error_at_end = [(p[-1] - x[-1]).abs()[joint_mask].mean() for p, _, x in clips]
    position_joints, integrated_joints, q_joints = (x[:, joint_mask] for x in (position, integrated, q))
    return {
        "clip_frames": config.clip_frames,
        "tolerance": config.tolerance,
        "position_share": metrics.fraction_within(position_joints, q_joints, config.tolerance),
        "position_share_steps_added": metrics.fraction_within(integrated_joints, q_joints, config.tolerance),
        "position_error_mean": (position_joints - q_joints).abs().mean(),
        "position_error_end": torch.stack(error_at_end).mean(),
        "tip_error_mm": _tip_error_mm(evaluation, position, q),
    }


def _tip_error_mm(evaluation: Evaluation, position: Tensor, q: Tensor) -> float | None:
    robot = evaluation.embodiment
    if robot is None or tuple(robot.joint_names) != evaluation.joint_names:
        return None
    from jidm.robot.kinematics import Kinematics

    tips = [robot.model.link_index(name) for name in robot.tip_links]
    error = metrics.tip_error(Kinematics.from_embodiment(robot), tips, position, q)
    return float(error.mean() * 1000)


def _uncertainty_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Calibration of the claimed uncertainty against the truth, flags, and speed."""
    _, error = step_errors(evaluation)
    joint_mask, flags = evaluation.joint_mask, step_flags(evaluation)
    counts = (flags["valid"][:, None] & joint_mask).expand_as(error)
    counts = counts & flags["claimed"]
    values: dict[str, Any] = {
        f"coverage_{round(level * 100)}": metrics.coverage(error, flags["std"], level, counts) for level in (0.68, 0.95)
    }
    motions = [e.motion for e in evaluation.episodes]
    q_error = torch.cat([(e.motion.position.double() - e.q)[1:] for e in evaluation.episodes])
    q_std = torch.cat([m.position_std.double()[1:] for m in motions])
    rates = [e.motion.frames / e.seconds for e in evaluation.episodes if e.seconds > 0]
    return values | {
        "position_coverage_95": metrics.coverage(q_error, q_std, 0.95, counts),
        "valid_share": flags["valid"].double().mean(),
        "observable_share": flags["observable"][:, joint_mask].double().mean(),
        "std_median": flags["std"][:, joint_mask].median(),
        "residual_px": torch.cat([m.residual for m in motions]).double().mean(),
        "frames_per_second": statistics.median(rates) if rates else None,
        "decoded_frames": sum(m.frames for m in motions),
        "threads": torch.get_num_threads(),
    }


def _field_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Errors of field and flow, where the recording has the exact ones and the model has its own."""
    values: dict[str, Any] = {"field_error_mean": None, "flow_epe_px": None}
    samples = [sample for e in evaluation.episodes for sample in e.field_samples]
    exact_samples = [
        (x.prediction, x.jacobian, x.mask) for x in samples if x.jacobian is not None and x.mask is not None
    ]
    if exact_samples:
        predictions, exact, mask = (list(x) for x in zip(*exact_samples, strict=True))
        on_robot = torch.stack(mask)
        jacobian = torch.cat([x.jacobian.double() for x in predictions])
        per_joint = metrics.field_error(jacobian, torch.stack(exact), on_robot)
        values |= {
            "field_error": _by_name(evaluation.joint_names, per_joint, evaluation.joint_mask),
            "field_error_mean": per_joint[evaluation.joint_mask].nanmean(),
        }
        if all(x.mask is not None for x in predictions):
            a, b = torch.cat([x.mask for x in predictions]) > 0.5, on_robot > 0.5
            values["mask_iou"] = (a & b).sum() / (a | b).sum().clamp(min=1)
    exact_flows = [
        (x.prediction.flow, x.flow, x.flow_mask)
        for x in samples
        if x.flow is not None and x.prediction.flow is not None
    ]
    if exact_flows:
        measured, truth, on_robot = (
            torch.stack([y.double().squeeze(0) for y in x]) for x in zip(*exact_flows, strict=True)
        )
        values["flow_epe_px"] = metrics.endpoint_error(measured, truth, on_robot)
        values["flow_length_px"] = metrics.endpoint_error(torch.zeros_like(truth), truth, on_robot)
    return values


# ---- comparisons ----------------------------------------------------------------------------------------------------


def step_errors(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """True steps, and errors of the decoded ones, (S, n) over all decoded episodes [rad or m]."""
    truth = torch.cat([e.delta_q for e in evaluation.episodes])
    return truth, torch.cat([e.motion.delta_q.double() for e in evaluation.episodes]) - truth


def pair_errors(evaluation: Evaluation) -> Tensor | None:
    """Errors of the steps of single pairs (S, n) [rad or m]; None for a model that has none."""
    errors = [e.pair_steps - e.delta_q for e in evaluation.episodes if e.pair_steps is not None]
    return torch.cat(errors) if errors and len(errors) == len(evaluation.episodes) else None


def step_flags(evaluation: Evaluation) -> dict[str, Tensor]:
    """Of all decoded steps: `valid` (S,), `observable` (S, n), standard deviation `std` (S, n) [rad or m], and
    `claimed` (S, 1), whether that was estimated at all: a regression only returns the variance of its training data."""
    motions = [e.motion for e in evaluation.episodes]
    return {
        "valid": torch.cat([m.valid for m in motions]).bool(),
        "observable": torch.cat([m.observable for m in motions]).bool(),
        "claimed": torch.cat(
            [
                m.valid.new_full((m.frames - 1, 1), "covariance" not in m.provenance.get("not_measured", ()))
                for m in motions
            ]
        ),
        "std": torch.cat([m.covariance.diagonal(dim1=-2, dim2=-1) for m in motions]).double().clamp(min=0).sqrt(),
    }


def compare_models(evaluations: Mapping[str, Evaluation], reference: str) -> dict[str, dict[str, float | None]]:
    """Action MSE of one model divided by that of each other, on the episodes that all of them decoded: below 1 is
    better.

    Args:
        evaluations: by name.
        reference: name of the one model.

    Returns:
        other -> {"action_mse_ratio", "action_mse_pairs_ratio", "action_mse_smoothed_ratio"}.
    """
    common = set.intersection(*({e.index for e in x.episodes} for x in evaluations.values()))
    errors = {name: _common_errors(x, common) for name, x in evaluations.items()}
    return {
        name: {f"{key}_ratio": _mse_ratio(errors[reference][key], error) for key, error in other.items()}
        for name, other in errors.items()
        if name != reference
    }


def _mse_ratio(error: Tensor | None, other: Tensor | None) -> float | None:
    return None if error is None or other is None else _number(metrics.mse_ratio(error, other))


def _common_errors(evaluation: Evaluation, common: set[int]) -> dict[str, Tensor | None]:
    """Errors of the joints that count, decoded in the three ways of `compare_models`, on the common episodes."""
    kept = replace(evaluation, episodes=tuple(e for e in evaluation.episodes if e.index in common))
    if not kept.episodes:
        return {"action_mse": None, "action_mse_pairs": None, "action_mse_smoothed": None}
    pairs = pair_errors(kept)
    return {
        "action_mse": step_errors(kept)[1][:, kept.joint_mask],
        "action_mse_pairs": None if pairs is None else pairs[:, kept.joint_mask],
        "action_mse_smoothed": step_errors(kept.smoothed)[1][:, kept.joint_mask],
    }


def compare_corrupted(clean: Evaluation, corrupted: Evaluation) -> dict[str, Any]:
    """How much worse a model gets under a corruption, and whether its claimed uncertainty shows it.

    Args:
        clean: on the images as recorded.
        corrupted: under the corruption, of the same or of other episodes.

    Returns:
        JSON values. `nve` and `nve_rise`, its ratio to the clean one; `invalid_share`; `unobservable_share` of the
        joints that count; `widened_share`: steps whose claimed standard deviation (rms over these joints) is above the
        95th percentile of the clean steps'; `nve_trusted` of steps that are valid and not widened, and its ratio to the
        same of the clean steps; `coverage_95`: share of errors inside the claimed 95 % intervals.
    """
    out: dict[str, Any] = {"episodes": len(corrupted.episodes), "failed": dict(corrupted.failed)}
    if not clean.episodes or not corrupted.episodes:
        return out
    limit = _rms_std(clean).quantile(_WIDENED_QUANTILE)
    before, after = (_corruption_metrics(x, limit) for x in (clean, corrupted))
    return out | {
        **after,
        "nve_clean": before["nve"],
        "nve_rise": _ratio(after["nve"], before["nve"]),
        "nve_trusted_rise": _ratio(after["nve_trusted"], before["nve_trusted"]),
    }


def _corruption_metrics(evaluation: Evaluation, limit: Tensor) -> dict[str, float | None]:
    truth, error = step_errors(evaluation)
    flags, joint_mask = step_flags(evaluation), evaluation.joint_mask
    widened = _rms_std(evaluation) > limit
    trusted = flags["valid"] & ~widened
    counts = (flags["valid"][:, None] & joint_mask).expand_as(error) & flags["claimed"]
    values = {
        "nve": metrics.nve(error[:, joint_mask], truth[:, joint_mask]),
        "nve_trusted": metrics.nve(error[trusted][:, joint_mask], truth[trusted][:, joint_mask]),
        "invalid_share": 1 - flags["valid"].double().mean(),
        "unobservable_share": 1 - flags["observable"][:, joint_mask].double().mean(),
        "widened_share": widened.double().mean() if bool(flags["claimed"].any()) else torch.tensor(torch.nan),
        "coverage_95": metrics.coverage(error, flags["std"], 0.95, counts),
    }
    return {key: _number(x) for key, x in values.items()}


def _rms_std(evaluation: Evaluation) -> Tensor:
    return step_flags(evaluation)["std"][:, evaluation.joint_mask].square().mean(-1).sqrt()


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _by_name(names: Sequence[str], values: Tensor, where: Tensor) -> dict[str, float | None]:
    return {n: _number(v) for n, v, w in zip(names, values, where.tolist(), strict=True) if w}


def _as_json(value: Any) -> Any:
    return _number(value) if isinstance(value, Tensor) else value


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
