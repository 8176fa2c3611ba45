"""Robots of a single moving link, for tests of rendering."""

from __future__ import annotations

from pathlib import Path

from jidm.robot.embodiment import Embodiment
from jidm.robot.factory import embodiment_from_urdf
from jidm.sim import Appearance, Background, Light

LIT_EVENLY = Appearance(
    light=Light(ambient=1.0, diffuse=0.0, specular=0.0), background=Background(color=(0.0, 0.0, 0.0))
)


def single_link(tmp_path: Path, visual: str, name: str = "single_link") -> Embodiment:
    """A robot with one link that carries the given visuals and slides along y."""
    path = tmp_path / f"{name}.urdf"
    path.write_text(
        f"""<robot name="{name}"><link name="base"/>
        <link name="body">{visual}</link>
        <joint name="slide" type="prismatic"><parent link="base"/><child link="body"/><axis xyz="0 1 0"/>
        <limit lower="-1" upper="1" velocity="1" effort="1"/></joint></robot>"""
    )
    return embodiment_from_urdf(path)


def visual(geometry: str, extra: str = "") -> str:
    return f"<visual>{extra}<geometry>{geometry}</geometry></visual>"
