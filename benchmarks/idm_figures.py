"""Figures of models over seeds: medians, rows of the result, ratios to the baselines, and tables for readers."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from results import row, rows

from jidm.cli.text import columns
from jidm.evaluation.tables import MODEL_COLUMNS, corruption_table

OURS = "jacobian_field"
ANALYTIC = "analytic"  # nothing learned: the exact field of the robot as each episode's own camera saw it
ANALYTIC_PREDICTED_START = "analytic_predicted_start"  # the same from the first pose that the network predicts
METHODS = {OURS: "learned"}
"""Label of a model -> method of the result, where they differ."""
COMMON = {"position_share": "position_share", "coverage_68": "coverage_68", "coverage_95": "coverage_95"}
SIMULATED = COMMON | {
    "nve": "nve",
    "nve_smoothed": "nve_smoothed",
    "nve_pairs": "nve_pairs",
    "nve_median": "nve_median_episode",
    "action_mse": "action_mse",
    "correlation": "correlation_mean",
    "tip_error": "tip_error_mm",
    "field_error": "field_error_mean",
    "flow_error": "flow_epe_px",
    "valid_share": "valid_share",
}
RECORDED = COMMON | {
    "correlation": "correlation_mean",
    "nve_moving": "nve_moving",
    "correlation_smoothed": "correlation_mean_smoothed",
    "nve_moving_smoothed": "nve_moving_smoothed",
}
"""Metric -> its name in the scores, for motor babbling in simulation and for a recording of a real robot."""
CASES = {"background": "background replaced", "occlusion": "20 % hidden", "jpeg": "JPEG 30"}
"""Corruption -> case of the result, where they differ."""
TABLE_COLUMNS = (*MODEL_COLUMNS, ("nve_moving", "NVE MOVING", ".3f"))


# ---- over seeds -----------------------------------------------------------------------------------------------------


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median over seeds of every figure, with lowest and highest; per joint likewise."""
    medians = {key: over_seeds([r["scores"].get(key) for r in results]) for key in results[0]["scores"]}
    if "training_steps" in results[0]:
        medians["training_steps"] = over_seeds([r["training_steps"] for r in results])
    return medians


def over_seeds(values: list[Any]) -> Any:
    if all(isinstance(v, dict) for v in values):
        keys = [key for key in values[0] if all(key in v for v in values)]
        return {key: over_seeds([v[key] for v in values]) for key in keys}
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(values) or not numbers:
        return values[0]
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def median_corruptions(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """corruption -> model -> median figures over seeds."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for label, found in results.items():
        for corruption in found[0]["corruptions"]:
            medians = over_seeds([r["corruptions"].get(corruption, {}) for r in found])
            out.setdefault(corruption, {})[label] = {
                k: v["median"] if isinstance(v, dict) and "median" in v else v for k, v in medians.items()
            }
    return out


def median_of(document: dict[str, Any], model: str, key: str) -> float | None:
    value = document["models"].get(model, {}).get(key)
    return value["median"] if isinstance(value, dict) and "median" in value else None


# ---- rows of the result ---------------------------------------------------------------------------------------------


def figures(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each figure: of every model, over the baselines', and on corrupted videos; medians over seeds."""
    robot = document["embodiment"] or Path(document["recording"]).name
    shown = (RECORDED if document["recording"] else SIMULATED) | {"training_steps": "training_steps"}
    made = []
    for label, found in document["models"].items():
        method = method_of(label)
        for metric, key in shown.items():
            value = found.get(key)
            if isinstance(value, dict) and "median" in value:
                spread = (value["low"], value["high"]) if value["low"] != value["high"] else None
                made.append(row(robot, method, metric, value["median"], spread=spread))
        if label.startswith(OURS) or label in (ANALYTIC, ANALYTIC_PREDICTED_START):
            made += rows(robot, method, against_baselines(document, label))
    for corruption, models in document.get("corruptions", {}).items():
        for label, found in models.items():
            measured = {key: found.get(key) for key in ("nve", "nve_rise", "coverage_95")}
            made += rows(robot, method_of(label), measured, case=CASES.get(corruption, corruption))
    return made


def method_of(label: str) -> str:
    """Name of a model in the results."""
    return label.replace(OURS, METHODS[OURS])


def against_baselines(document: dict[str, Any], ours: str) -> dict[str, float | None]:
    """Ratios to the baselines' figures, and for a recording how much better the correlation is."""
    rivals = [x for x in document["models"] if x not in (ANALYTIC, ANALYTIC_PREDICTED_START) and not x.startswith(OURS)]

    def ratio(key: str, rival: str) -> float | None:
        a, b = median_of(document, ours, key), median_of(document, rival, key)
        return None if a is None or not b else a / b

    def over_best(key: str) -> float | None:
        ratios = [x for x in (ratio(key, rival) for rival in rivals) if x is not None]
        return max(ratios) if ratios else None

    def above_best(key: str) -> float | None:
        mine, theirs = median_of(document, ours, key), [median_of(document, rival, key) for rival in rivals]
        best = max((x for x in theirs if x is not None), default=None)
        return None if mine is None or best is None else mine - best

    if document["recording"]:
        return {
            "correlation_above_best_baseline": above_best("correlation_mean"),
            "nve_over_best_baseline": over_best("nve_moving"),
            "correlation_smoothed_above_best_baseline": above_best("correlation_mean_smoothed"),
            "nve_smoothed_over_best_baseline": over_best("nve_moving_smoothed"),
        }
    found = {f"action_mse_over_{x}": ratio("action_mse", x) for x in ("direct", "direct_on_flow") if x in rivals}
    if ours.startswith(OURS) and ours != OURS:  # trained on less: comparing it with direct on all data says enough
        return {key: value for key, value in found.items() if key == "action_mse_over_direct"}
    return found | {
        "action_mse_over_best_baseline": over_best("action_mse"),
        "nve_over_best_baseline": over_best("nve"),
        "nve_smoothed_over_best_baseline": over_best("nve_smoothed"),
    }


# ---- for readers ----------------------------------------------------------------------------------------------------


def report(document: dict[str, Any]) -> str:
    """Tables: models, joints, corruptions."""

    def cell(value: Any, form: str) -> str:
        if not isinstance(value, dict):
            return "-"
        text = format(value["median"], form)
        return (
            text
            if value["low"] == value["high"]
            else f"{text} ({format(value['low'], form)}-{format(value['high'], form)})"
        )

    models: list[tuple[str, ...]] = [("MODEL", *(heading.format(tolerance=0.05) for _, heading, _ in TABLE_COLUMNS))]
    models += [
        (label, *(cell(m.get(key), form) for key, _, form in TABLE_COLUMNS)) for label, m in document["models"].items()
    ]
    parts = [document["embodiment"] or document["recording"], columns(models)]
    joints: list[tuple[str, ...]] = [("JOINT", *(f"{k} NVE / CORR" for k in document["models"]))]
    for name in document["models"][OURS]["nve_per_joint"] if OURS in document["models"] else ():
        found = [(m["nve_per_joint"].get(name), m["correlation"].get(name)) for m in document["models"].values()]
        joints.append((name, *(f"{cell(a, '.2f')} / {cell(b, '.2f')}" for a, b in found)))
    parts.append(columns(joints))
    if "corruptions" in document:
        parts.append(columns(corruption_table(document["corruptions"])))
    return "\n\n".join(parts)
