"""URDF text put together from pieces, and the check that a refusal is one line that names the file."""

from __future__ import annotations

import pytest

from jidm.errors import UrdfError
from jidm.robot.urdf.reader import parse_urdf

LIMIT = "<limit lower='-1' upper='1' velocity='2' effort='3'/>"


def robot(*elements: str, name: str = "r") -> str:
    return f"<robot name='{name}'>{''.join(elements)}</robot>"


def links(names: str) -> str:
    return "".join(f"<link name='{name}'/>" for name in names)


def joint(name: str, parent: str, child: str, content: str = LIMIT, kind: str = "revolute") -> str:
    return f"<joint name='{name}' type='{kind}'><parent link='{parent}'/><child link='{child}'/>{content}</joint>"


def one_joint(content: str = LIMIT, kind: str = "revolute") -> str:
    return robot(links("ab"), joint("j", "a", "b", content, kind))


def one_visual(content: str, tag: str = "visual") -> str:
    return robot(f"<link name='a'><{tag}>{content}</{tag}></link>")


def parse_error(text: str | bytes, where: str = "arm.urdf") -> str:
    """The one line by which the text is refused."""
    with pytest.raises(UrdfError) as error:
        parse_urdf(text, where=where)
    message = str(error.value)
    assert message.startswith(f"{where}: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message


def mimic_joint(of: str, multiplier: float = 1, offset: float = 0) -> str:
    return f"{LIMIT}<mimic joint='{of}' multiplier='{multiplier}' offset='{offset}'/>"


def chain(count: int, content: str = "<origin xyz='0.01 0 0' rpy='0.3 0 0.02'/><axis xyz='0 0 1'/>" + LIMIT) -> str:
    body = "".join(f"<link name='l{k}'/>" for k in range(count))
    return robot(body, *(joint(f"j{k}", f"l{k - 1}", f"l{k}", content) for k in range(1, count)))
