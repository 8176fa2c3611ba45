"""`jidm report`: one page about one video: its decoded motion, its reward and the reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jidm.cli.model_args import ModelArgs


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML page about how executable the motion in a video is."""

    video: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")]
    """Video file."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder. --q0 may also be a JSON file of file name -> numbers."""

    scales: Path | None = None
    """Scales of the reward, written by `jidm fit-scales`; those of the checkpoint if not given."""

    fps: float | None = None
    """Frame rate [1/s], if the file states none or a wrong one."""

    out: Path = Path("report.html")
    """The page."""

    def run(self) -> int:
        from jidm.cli.checks import check_exists, check_out_file, check_positive
        from jidm.cli.inputs import read_poses, video_size

        check_positive(fps=self.fps)
        check_out_file(self.out)
        if self.scales is not None:
            check_exists(self.scales, file=True)
        self.model.check(check_q0=read_poses(self.model.q0) is None)
        check_exists(self.video)
        from jidm.video.io import read_video
        from jidm.visualization.report import write_report

        config = self.model.reward_config(self.scales, lambda: video_size(self.video, self.fps), self.fps)
        reward = config.build()
        score, analysis = reward.explain(self.video, q0=config.initial_pose(str(self.video)), fps=self.fps)
        assert score.motion is not None and score.by_step is not None
        lower, upper, velocity = (x.double().numpy() for x in (analysis.lower, analysis.upper, analysis.velocity))
        write_report(
            self.out, title=self.video.name, frames=read_video(self.video).frames, motion=score.motion,
            limits=(lower, upper, velocity),
            reward=float(score.reward), metrics={"EVA's reward": score.eva, **(score.penalties or {})}, by_step=score.by_step,
            unexplained=analysis.residuals.unexplained_map, misplaced=analysis.residuals.misplaced_map, reasons=score.reasons,
        )  # fmt: skip
        print(f"{self.video}: {float(score.reward):.2f} of 10; written to {self.out}")
        for reason in score.reasons:
            print(f"  {reason}")
        return 0
