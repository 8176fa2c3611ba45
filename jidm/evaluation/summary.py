"""Figures of an evaluation: everything a table or a JSON file says, computed from what the models said."""

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

_SMOOTHED_KEYS = (
    "nve", "nve_per_joint", "action_mse", "nve_moving", "correlation", "correlation_mean", "position_share",
    "tip_error_mm", "coverage_68", "coverage_95",
)  # fmt: skip


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """All figures of one model as JSON values; None where a figure does not exist (no field, no robot, no motion).

    `nve` and `action_mse` are of steps decoded as a video from the known first pose, steps that were not valid included
    as they stand; `nve_pairs` and `action_mse_pairs` are of every pair of frames by itself, without any pose given;
    `*_smoothed` are of the decoded steps after `jidm.estimation.smoother.smoothed`.
    """
    judged = evaluation.joint_mask.tolist()
    out: dict[str, Any] = {
        "name": evaluation.name,
        "episodes": len(evaluation.episodes),
        "failed": [{"episode": k, "problem": why} for k, why in evaluation.failed.items()],
        "joints": [name for name, counts in zip(evaluation.joint_names, judged, strict=True) if counts],
        **evaluation.data,
    }
    if not evaluation.episodes:
        return out
    figures = (
        _step_metrics(evaluation)
        | _position_metrics(evaluation)
        | _uncertainty_metrics(evaluation)
        | _field_metrics(evaluation)
    )
    smoothed = evaluation.smoothed
    smoothed_figures = _step_metrics(smoothed) | _position_metrics(smoothed) | _uncertainty_metrics(smoothed)
    figures |= {f"{key}_smoothed": smoothed_figures[key] for key in _SMOOTHED_KEYS}
    return out | {key: _as_json(value) for key, value in figures.items()}


def _step_metrics(evaluation: Evaluation) -> dict[str, Any]:
    joint_mask, names, episodes = evaluation.joint_mask, evaluation.joint_names, evaluation.episodes
    truth, error = step_errors(evaluation)
    velocity = torch.cat([e.delta_q / e.motion.time.diff()[:, None] for e in episodes])
    moving = metrics.moving_joints(velocity, evaluation.config.moving_speed) & joint_mask
    wrong = torch.stack([(e.motion.delta_q.double() - e.delta_q)[:, joint_mask].abs().sum() for e in episodes])
    moved = torch.stack([e.delta_q[:, joint_mask].abs().sum() for e in episodes])
    correlation = metrics.correlation(error + truth, truth)
    figures = {
        "steps": len(truth),
        "nve": metrics.nve(error[:, joint_mask], truth[:, joint_mask]),
        "nve_interval": [_number(x) for x in metrics.ratio_interval(wrong, moved)],
        "nve_median_episode": (wrong / moved).nanmedian(),
        "nve_per_joint": _by_name(names, metrics.nve_per_joint(error, truth), joint_mask),
        "action_mse": metrics.action_mse(error[:, joint_mask]),
        "mean_step": truth[:, joint_mask].abs().mean(),
        "moving_speed": evaluation.config.moving_speed,
        "moving_joints": [n for n, m in zip(names, moving.tolist(), strict=True) if m],
        "nve_moving": metrics.nve(error[:, moving], truth[:, moving]),
        "correlation": _by_name(names, correlation, moving),
        "correlation_mean": correlation[moving].nanmean(),
    }
    pairs = pair_errors(evaluation)
    if pairs is not None:
        correlation = metrics.correlation(pairs + truth, truth)
        figures |= {
            "nve_pairs": metrics.nve(pairs[:, joint_mask], truth[:, joint_mask]),
            "nve_pairs_per_joint": _by_name(names, metrics.nve_per_joint(pairs, truth), joint_mask),
            "action_mse_pairs": metrics.action_mse(pairs[:, joint_mask]),
            "nve_pairs_moving": metrics.nve(pairs[:, moving], truth[:, moving]),
            "correlation_pairs": _by_name(names, correlation, moving),
            "correlation_pairs_mean": correlation[moving].nanmean(),
        }
    return figures


def _position_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Over the first `clip` frames of each episode, the first frame, which is given, left out."""
    joint_mask, config = evaluation.joint_mask, evaluation.config
    rows = []
    T = config.clip_frames
    for e in evaluation.episodes:
        added = metrics.integrate_steps(e.motion.position[0], e.motion.delta_q)
        rows.append(tuple(x[1:T].double() for x in (e.motion.position, added, e.q)))
    position, added, q = (torch.cat(x) for x in zip(*rows, strict=True))
    away = (position - q).abs()[:, joint_mask]
    figures = {
        "clip_frames": config.clip_frames,
        "tolerance": config.tolerance,
        "position_share": metrics.fraction_within(position[:, joint_mask], q[:, joint_mask], config.tolerance),
        "position_share_steps_added": metrics.fraction_within(added[:, joint_mask], q[:, joint_mask], config.tolerance),
        "position_error_mean": away.mean(),
        "position_error_end": torch.stack([(p[-1] - x[-1]).abs()[joint_mask].mean() for p, _, x in rows]).mean(),
        "tip_error_mm": _tip_millimetres(evaluation, position, q),
    }
    return figures


def _tip_millimetres(evaluation: Evaluation, position: Tensor, q: Tensor) -> float | None:
    robot = evaluation.embodiment
    if robot is None or tuple(robot.joint_names) != evaluation.joint_names:
        return None
    from jidm.robot.kinematics import Kinematics

    tips = [robot.model.link_index(name) for name in robot.tip_links]
    error = metrics.tip_error(Kinematics.from_embodiment(robot), tips, position, q)
    return float(error.mean() * 1000)


def _uncertainty_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """What the decoding says of itself, held against the truth."""
    _, error = step_errors(evaluation)
    joint_mask, flags = evaluation.joint_mask, step_flags(evaluation)
    counts = (flags["valid"][:, None] & joint_mask).expand_as(error)
    counts = counts & flags["claimed"]
    figures: dict[str, Any] = {
        f"coverage_{round(level * 100)}": metrics.coverage(error, flags["std"], level, counts) for level in (0.68, 0.95)
    }
    motions = [e.motion for e in evaluation.episodes]
    q_error = torch.cat([(e.motion.position.double() - e.q)[1:] for e in evaluation.episodes])
    q_std = torch.cat([m.position_std.double()[1:] for m in motions])
    rates = [e.motion.frames / e.seconds for e in evaluation.episodes if e.seconds > 0]
    return figures | {
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
    """Against the exact field and flow, where the recording knows them and the model has its own."""
    figures: dict[str, Any] = {"field_error_mean": None, "flow_epe_px": None}
    samples = [look for e in evaluation.episodes for look in e.field_samples]
    known = [(x.prediction, x.jacobian, x.mask) for x in samples if x.jacobian is not None and x.mask is not None]
    if known:
        seen, exact, mask = (list(x) for x in zip(*known, strict=True))
        on_robot = torch.stack(mask)
        made = torch.cat([x.jacobian.double() for x in seen])
        per_joint = metrics.field_error(made, torch.stack(exact), on_robot)
        figures |= {
            "field_error": _by_name(evaluation.joint_names, per_joint, evaluation.joint_mask),
            "field_error_mean": per_joint[evaluation.joint_mask].nanmean(),
        }
        if all(x.mask is not None for x in seen):
            a, b = torch.cat([x.mask for x in seen]) > 0.5, on_robot > 0.5
            figures["mask_iou"] = (a & b).sum() / (a | b).sum().clamp(min=1)
    moved = [
        (x.prediction.flow, x.flow, x.flow_mask)
        for x in samples
        if x.flow is not None and x.prediction.flow is not None
    ]
    if moved:
        measured, truth, on_robot = (torch.stack([y.double().squeeze(0) for y in x]) for x in zip(*moved, strict=True))
        figures["flow_epe_px"] = metrics.endpoint_error(measured, truth, on_robot)
        figures["flow_length_px"] = metrics.endpoint_error(torch.zeros_like(truth), truth, on_robot)
    return figures


# ---- what figures are made of ---------------------------------------------------------------------------------------


def step_errors(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """True steps and errors of the decoded ones (S, n) over all finished episodes [rad or m]."""
    truth = torch.cat([e.delta_q for e in evaluation.episodes])
    return truth, torch.cat([e.motion.delta_q.double() for e in evaluation.episodes]) - truth


def pair_errors(evaluation: Evaluation) -> Tensor | None:
    """Errors of the steps of single pairs (S, n) [rad or m]; None where the model has no such way."""
    errors = [e.pair_steps - e.delta_q for e in evaluation.episodes if e.pair_steps is not None]
    return torch.cat(errors) if errors and len(errors) == len(evaluation.episodes) else None


def step_flags(evaluation: Evaluation) -> dict[str, Tensor]:
    """Of all decoded steps: valid (S,), observable (S, n), standard deviation `std` (S, n), and `claimed` (S, 1), whether
    that was measured at all: a regression hands out the spread of its training data, which is no claim."""
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


def compare_models(evaluations: Mapping[str, Evaluation], ours: str) -> dict[str, dict[str, float | None]]:
    """Action MSE of one model over each other's, on the episodes that all of them decoded: below 1 is better.

    Returns:
        rival -> {"action_mse_ratio", "action_mse_pairs_ratio", "action_mse_smoothed_ratio"}.
    """
    common = set.intersection(*({e.index for e in x.episodes} for x in evaluations.values()))
    errors = {name: _common_errors(x, common) for name, x in evaluations.items()}
    out: dict[str, dict[str, float | None]] = {}
    for rival, other in errors.items():
        if rival != ours:
            out[rival] = {
                f"{key}_ratio": None
                if errors[ours][key] is None or other[key] is None
                else _number(metrics.mse_ratio(errors[ours][key], other[key]))
                for key in errors[ours]
            }
    return out


def _common_errors(evaluation: Evaluation, common: set[int]) -> dict[str, Any]:
    kept = replace(evaluation, episodes=tuple(e for e in evaluation.episodes if e.index in common))
    if not kept.episodes:
        return {"action_mse": None, "action_mse_pairs": None, "action_mse_smoothed": None}
    pairs = pair_errors(kept)
    return {
        "action_mse": step_errors(kept)[1][:, kept.joint_mask],
        "action_mse_pairs": None if pairs is None else pairs[:, kept.joint_mask],
        "action_mse_smoothed": step_errors(kept.smoothed)[1][:, kept.joint_mask],
    }


def _by_name(names: Sequence[str], values: Tensor, where: Tensor) -> dict[str, float | None]:
    return {n: _number(v) for n, v, w in zip(names, values, where.tolist(), strict=True) if w}


def _as_json(value: Any) -> Any:
    return _number(value) if isinstance(value, Tensor) else value


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


# ---- for readers ----------------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("nve", "NVE", ".3f"),
    ("nve_pairs", "NVE PAIRS", ".3f"),
    ("nve_smoothed", "SMOOTHED", ".3f"),
    ("action_mse", "ACTION MSE", ".2e"),
    ("position_share", "WITHIN {tolerance}", ".1%"),
    ("tip_error_mm", "TIP [mm]", ".1f"),
    ("correlation_mean", "CORR", ".3f"),
    ("flow_epe_px", "FLOW [px]", ".2f"),
    ("field_error_mean", "FIELD", ".2f"),
    ("coverage_68", "IN 68%", ".0%"),
    ("coverage_95", "IN 95%", ".0%"),
    ("valid_share", "VALID", ".0%"),
    ("frames_per_second", "FRAMES/S", ".1f"),
)


def summary_table(
    summaries: Sequence[Mapping[str, Any]], *, extra_columns: Sequence[tuple[str, str, str]] = ()
) -> list[tuple[str, ...]]:
    """Rows of text: a header, then one line per model; "-" where a figure does not exist.

    Args:
        summaries: what `scores` gave, one per model.
        extra_columns: further columns, (key, heading, format).
    """
    tolerance = next((f["tolerance"] for f in summaries if f.get("tolerance")), 0.05)
    columns = [*_COLUMNS, *extra_columns]
    rows = [("MODEL", *(heading.format(tolerance=tolerance) for _, heading, _ in columns), "EPISODES")]
    for f in summaries:
        cells = ["-" if f.get(key) is None else format(f[key], form) for key, _, form in columns]
        count = f"{f['episodes']}/{f['episodes'] + len(f['failed'])}"
        rows.append((str(f["name"]), *cells, count))
    return rows


def comparison_table(document: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of text: action MSE of one model over each rival's. `document`: model -> what `compared` gave."""
    rows: list[tuple[str, ...]] = [("MODEL", "RIVAL", "MSE RATIO", "PAIRS", "SMOOTHED")]
    for ours, rivals in document.items():
        for rival, ratios in rivals.items():
            cells = [ratios[f"action_mse{kind}_ratio"] for kind in ("", "_pairs", "_smoothed")]
            rows.append((ours, rival, *("-" if x is None else f"{x:.3f}" for x in cells)))
    return rows


def corruption_table(document: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of text: how the error rises. `document`: condition -> model -> what `jidm.evaluation.corruptions.compare` gave."""
    columns = (
        ("nve_clean", "NVE CLEAN", ".3f"),
        ("nve", "NVE", ".3f"),
        ("nve_rise", "RISE", ".2f"),
        ("nve_trusted_rise", "RISE TRUSTED", ".2f"),
        ("invalid_share", "INVALID", ".0%"),
        ("unobservable_share", "UNOBSERVABLE", ".0%"),
        ("widened_share", "WIDENED", ".0%"),
        ("coverage_95", "IN 95%", ".0%"),
    )
    rows = [("CONDITION", "MODEL", *(heading for _, heading, _ in columns))]
    for corruption, models in document.items():
        for model, values in models.items():
            cells = ("-" if values.get(key) is None else format(values[key], form) for key, _, form in columns)
            rows.append((corruption, model, *cells))
    return rows
