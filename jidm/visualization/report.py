"""A self-contained HTML page about one scored video: frames, decoded motion, reward and reasons."""

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
from jidm.visualization.image import resize, to_image, to_uint8
from jidm.visualization.plot import PositionAndVelocityLimits, draw_motion, new_figure

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.figure import Figure
    from torch import Tensor

    from jidm.estimation.result import JointMotion

_STRIP_FRAMES = 8  # frames in the strip
_STRIP_HEIGHT = 180  # [px]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; }}
.reward {{ font-size: 2rem; }} .quiet {{ color: #667; }}
</style></head><body>
<h1>{title}</h1><p><span class="reward">{reward}</span> <span class="quiet">{under}</span></p>
<h2>Reasons</h2>{reasons}
<h2>Video, and motion that the decoded steps do not explain</h2><img alt="frames and residual heat" src="{strip}">
<p class="quiet">Yellow to red: motion beyond the decoded step. Blue: foreground beside the robot, or background on it.</p>
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
    limits: PositionAndVelocityLimits,
    reward: float,
    metrics: Mapping[str, float],
    by_step: Mapping[str, Float[Tensor, " S"]],
    unexplained: Float[Tensor, "S h w"],
    misplaced: Float[Tensor, "T h w"],
    reasons: Sequence[str],
) -> None:
    """Write the page; the file appears whole or not at all, and refers to no other file.

    Args:
        path: HTML file.
        title: of the page.
        frames: RGB in [0, 1].
        motion: the decoded motion.
        limits: position and velocity limits.
        reward: of the video.
        metrics: further numbers by name.
        by_step: term -> penalty of each step, in [0, 1].
        unexplained: image motion that no joint explains [cells].
        misplaced: cells that are spurious or missing, in [0, 1].
        reasons: as text.
    """
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{value:.2f}</td></tr>" for name, value in metrics.items())
    reason_items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    page = _PAGE.format(
        title=escape(title),
        reward=f"{reward:.2f}",
        under=f"of 10; {len(frames)} frames, {len(motion.joint_names)} joints",
        reasons=f"<ul>{reason_items}</ul>" if reason_items else "<p>None.</p>",
        strip=_strip(frames, unexplained, misplaced),
        table=f"<table>{rows}</table>",
        terms=_figure_data_url(_terms(by_step)),
        joints=_figure_data_url(draw_motion(motion, limits=limits)),
        provenance=escape(
            ", ".join(f"{k}: {v}" for k, v in motion.provenance.items() if isinstance(v, (str, int, float)))
        ),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _strip(frames: Tensor, unexplained: Tensor, misplaced: Tensor) -> str:
    """Frames side by side, the worst one included, each above a heat map of its residuals."""
    import cv2

    severity = unexplained.flatten(1).sum(1) / 4 + misplaced[1:].flatten(1).sum(1)
    chosen = np.linspace(1, len(frames) - 1, min(_STRIP_FRAMES, len(frames) - 1)).round().astype(int)
    worst = int(severity.argmax()) + 1
    chosen[np.abs(chosen - worst).argmin()] = worst
    columns = []
    for k in chosen.tolist():
        image = to_image(frames[k])
        image = resize(image, round(image.shape[1] * _STRIP_HEIGHT / image.shape[0]), _STRIP_HEIGHT)
        gray = np.repeat(image.mean(-1, keepdims=True), 3, -1) * 0.6
        heat = _upsample(unexplained[k - 1] / 2, image) * np.array([255, 190, 0])  # yellow up to 2 cells, then red
        heat += _upsample((unexplained[k - 1] - 2) / 2, image) * np.array([0, -190, 0])
        heat += _upsample(misplaced[k], image) * np.array([40, 90, 255])
        for color, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):  # white on a black outline
            cv2.putText(image, f"frame {k}", (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, color, thickness, cv2.LINE_AA)
        columns.append(np.concatenate([image, to_uint8(gray + heat)]))
    ok, data = cv2.imencode(".jpg", np.concatenate(columns, 1)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert ok
    return _data_url("jpeg", data.tobytes())


def _upsample(values: Tensor, like: NDArray[Any]) -> NDArray[np.float64]:
    """(H, W, 1) in [0, 1]."""
    import cv2

    small = values.clamp(0, 1).float().cpu().numpy()
    return np.asarray(cv2.resize(small, like.shape[1::-1], interpolation=cv2.INTER_LINEAR), np.float64)[..., None]


def _terms(by_step: Mapping[str, Tensor]) -> Figure:
    figure = new_figure(11, 3.0)
    axis = figure.subplots()
    for name, values in by_step.items():
        axis.plot(np.arange(1, len(values) + 1), values.cpu().numpy(), label=name, linewidth=1.4)
    axis.set(xlabel="frame", ylabel="penalty", ylim=(-0.02, 1.02))
    axis.legend(ncols=4, fontsize=8, frameon=False)
    return figure


def _figure_data_url(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return _data_url("png", data.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
