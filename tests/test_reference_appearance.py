"""The reference appearance: every surface point as it looked in the first frame that showed it."""

from __future__ import annotations

import torch
from rendered import clip

from jidm import AnalyticField
from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.estimation.reference_appearance import ReferenceAppearance
from jidm.video.pyramid import BrightnessPyramid


def test_first_appearances_are_kept_and_points_that_come_into_view_are_added() -> None:
    c = clip("planar_finger_3", frames=8, seed=1)
    field = AnalyticField(c.robot, c.camera, points=4000, occluders=20000)
    poses = [field.at(torch.from_numpy(c.q[t])) for t in (0, 7)]
    bright, dark = (BrightnessPyramid.from_frame(torch.full_like(c.frames[0], level)) for level in (0.8, 0.2))
    first, later = SurfaceAppearance.of(poses[0], bright), SurfaceAppearance.of(poses[1], dark)
    reference = ReferenceAppearance(first, field.points)
    before = reference.appearance_at(poses[1])
    assert set(before.index.tolist()) <= set(first.index.tolist())
    reference.add(later)
    after = reference.appearance_at(poses[1])
    assert len(after) > len(before)
    old = torch.isin(after.index, first.index)
    torch.testing.assert_close(after.brightness[0][old], torch.full_like(after.brightness[0][old], 0.8))
    torch.testing.assert_close(after.brightness[0][~old], torch.full_like(after.brightness[0][~old], 0.2))
    assert after.gradient is None and after.normals is not None
    torch.testing.assert_close(after.normals[~old], later.normals[torch.isin(later.index, after.index[~old])])
