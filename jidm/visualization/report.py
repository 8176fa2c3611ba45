"""One self-contained HTML page about one judged video: what it shows, what was decoded, and what speaks against it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jidm.atomic_io import atomic_write

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.figure import Figure
    from torch import Tensor

    from jidm.estimation.result import JointMotion

_STRIP_FRAMES = 8  # frames in the strip
_STRIP_HEIGHT = 180  # [px]
_LINE, _LIMIT = "#1f5fbf", "#c03030"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; }}
.reward {{ font-size: 2rem; }} .quiet {{ color: #667; }}
</style></head><body>
<h1>{title}</h1><p><span class="reward">{reward}</span> <span class="quiet">{under}</span></p>
<h2>What speaks against it</h2>{reasons}
<h2>Video, and below what the decoded motion does not explain</h2><img alt="frames and residual heat" src="{strip}">
<p class="quiet">Yellow to red: motion beyond the decoded step. Blue: robot where there should be none, or none where it should be.</p>
<h2>Terms</h2>{table}<img alt="terms over time" src="{terms}">
<h2>Joints and their limits</h2><img alt="joint positions and velocities" src="{joints}">
<p class="quiet">{provenance}</p></body></html>
"""


def write_report(
    path: str | Path,
    *,
    title: str,
    frames: Float[Tensor, "T 3 H W"],
    motion: JointMotion,
    limits: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    reward: float,
    metrics: Mapping[str, float],
    by_step: Mapping[str, Float[Tensor, " S"]],
    unexplained: Float[Tensor, "S h w"],
    misplaced: Float[Tensor, "T h w"],
    reasons: Sequence[str],
) -> None:
    """Write the page; the file appears whole or not at all, and needs nothing beside it.

    Args:
        frames: RGB in [0, 1].
        limits: (n,) lower and upper positions [rad or m] and speeds [rad/s or m/s]; infinite where there are none.
        reward: of the video. metrics: what it is made of, by name.
        by_step: name of a term -> penalty of each step, in [0, 1].
        unexplained: motion that no joint explains [cells]. misplaced: where the robot is not where it should be, in [0, 1].
        reasons: in words.
    """
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{value:.2f}</td></tr>" for name, value in metrics.items())
    reason_items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    page = _PAGE.format(
        title=escape(title),
        reward=f"{reward:.2f}",
        under=f"of 10; {len(frames)} frames, {len(motion.joint_names)} joints",
        reasons=f"<ul>{reason_items}</ul>" if reason_items else "<p>Nothing that good videos do not have.</p>",
        strip=_strip(frames, unexplained, misplaced),
        table=f"<table>{rows}</table>",
        terms=_figure_data_url(_terms(by_step)),
        joints=_figure_data_url(_joints(motion, limits)),
        provenance=escape(
            ", ".join(f"{k}: {v}" for k, v in motion.provenance.items() if isinstance(v, (str, int, float)))
        ),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _strip(frames: Tensor, unexplained: Tensor, misplaced: Tensor) -> str:
    """Frames side by side, the one before the worst step among them, each above its heat."""
    import cv2

    severity = unexplained.flatten(1).sum(1) / 4 + misplaced[1:].flatten(1).sum(1)
    even = np.linspace(1, len(frames) - 1, min(_STRIP_FRAMES, len(frames) - 1)).round().astype(int)
    worst = int(severity.argmax()) + 1
    even[np.abs(even - worst).argmin()] = worst
    columns = []
    for k in even.tolist():
        picture = (frames[k].movedim(0, -1).clamp(0, 1).cpu().numpy() * 255).astype(np.uint8)
        width = max(1, round(picture.shape[1] * _STRIP_HEIGHT / picture.shape[0]))
        picture = np.asarray(cv2.resize(picture, (width, _STRIP_HEIGHT), interpolation=cv2.INTER_AREA))
        gray = np.repeat(picture.mean(-1, keepdims=True), 3, -1) * 0.6
        overlay = _upsample(unexplained[k - 1] / 2, picture) * np.array([255, 190, 0]) + _upsample(
            (unexplained[k - 1] - 2) / 2, picture
        ) * np.array([0, -190, 0])
        overlay = overlay + _upsample(misplaced[k], picture) * np.array([40, 90, 255])
        label = f"frame {k}"
        cv2.putText(picture, label, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(picture, label, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
        columns.append(np.concatenate([picture, np.clip(gray + overlay, 0, 255).astype(np.uint8)]))
    ok, data = cv2.imencode(".jpg", np.concatenate(columns, 1)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert ok
    return _data_url("jpeg", data.tobytes())


def _upsample(values: Tensor, like: NDArray[Any]) -> NDArray[np.float64]:
    """(H, W, 1) in [0, 1]."""
    import cv2

    small = values.clamp(0, 1).float().cpu().numpy()
    return np.asarray(cv2.resize(small, like.shape[1::-1], interpolation=cv2.INTER_LINEAR), np.float64)[..., None]


def _terms(by_step: Mapping[str, Tensor]) -> Figure:
    figure, axis = _axes(1, 1, (11, 3.0))
    for name, values in by_step.items():
        axis[0, 0].plot(np.arange(1, len(values) + 1), values.cpu().numpy(), label=name, linewidth=1.4)
    axis[0, 0].set(xlabel="frame", ylabel="penalty", ylim=(-0.02, 1.02))
    axis[0, 0].legend(ncols=4, fontsize=8, frameon=False)
    return figure


def _joints(motion: JointMotion, limits: tuple[NDArray[np.float64], ...]) -> Figure:
    lower, upper, speed = limits
    n = len(motion.joint_names)
    figure, axes = _axes(n, 2, (11, 0.8 + 1.15 * n))
    time, q, v = (x.cpu().double().numpy() for x in (motion.time, motion.position, motion.velocity))
    for k, name in enumerate(motion.joint_names):
        left, right = axes[k]
        left.plot(time, q[:, k], color=_LINE)
        right.plot(time[1:], v[:, k], color=_LINE)
        for axis, edges in ((left, (lower[k], upper[k])), (right, (-speed[k], speed[k]))):
            for edge in edges:
                if np.isfinite(edge):
                    axis.axhline(edge, color=_LIMIT, linewidth=0.8, linestyle="--")
            axis.tick_params(labelsize=7)
        left.set_ylabel(name, fontsize=8)
    axes[0, 0].set_title("position [rad or m]", fontsize=9)
    axes[0, 1].set_title("velocity [rad/s or m/s]", fontsize=9)
    axes[-1, 0].set_xlabel("time [s]", fontsize=9)
    axes[-1, 1].set_xlabel("time [s]", fontsize=9)
    return figure


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=True, squeeze=False)


def _figure_data_url(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return _data_url("png", data.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
