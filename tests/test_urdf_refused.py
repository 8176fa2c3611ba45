"""The URDF reader, element by element: faults are refused by one line that names file, element and remedy."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from urdf_text import LIMIT, chain, joint, links, mimic_joint, one_joint, one_visual, parse_error, robot

from jidm.errors import UrdfError
from jidm.robot.urdf import xml
from jidm.robot.urdf.reader import parse_urdf, read_urdf
from jidm.robot.urdf.xml import MAX_BYTES

ENTITIES = "<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;'>"
XML = {
    "a DTD": ("<!DOCTYPE robot>" + one_joint(), "DTD or entities.*remove the DOCTYPE"),
    "a DTD elsewhere": ("<!DOCTYPE robot SYSTEM 'http://example.com/x.dtd'>" + one_joint(), "DTD or entities"),
    "entities": (f"<!DOCTYPE robot [{ENTITIES}]><robot name='&b;'/>", "DTD or entities"),
    "a file as entity": (
        "<!DOCTYPE r [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><robot name='&x;'/>",
        "DTD or entities",
    ),
    "an unknown entity": ("<robot name='&x;'/>", "not well-formed XML in line 1.*undefined entity"),
    "nothing": ("", "the file is empty; was it written completely"),
    "blanks": (" \n\t ", "the file is empty"),
    "a byte order mark": (b"\xef\xbb\xbf", "not well-formed XML"),
    "no XML": ("solid mesh", "not well-formed XML in line 1"),
    "binary": (bytes(range(256)), "not well-formed XML"),
    "cut off": (one_joint()[:-9], "not well-formed XML.*cut off"),
    "cut in a tag": (one_joint()[:40], "not well-formed XML.*cut off"),
    "two documents": (one_joint() * 2, "not well-formed XML.*junk after document element"),
    "the wrong encoding": (b"<robot name='\xff'/>", "not well-formed XML"),
    "an unknown encoding": (b"<?xml version='1.0' encoding='klingon'?><robot/>", "not well-formed XML.*encoding"),
    "a multi-byte encoding": (b"<?xml version='1.0' encoding='shift_jis'?><robot/>", "not well-formed XML"),
    "half a character": ("<robot name='\ud800'/>", "not well-formed XML"),
    "the same attribute twice": ("<robot name='a' name='b'/>", "not well-formed XML.*duplicate attribute"),
    "an SDF": ("<sdf version='1.6'/>", "outermost element is <sdf>; a URDF's is <robot>"),
    "a xacro include": (robot("<xacro:include filename='x'/>", links("a")), "holds <xacro:include>.*run xacro"),
    "a xacro macro": (robot("<xacro:macro name='x'/>", links("a")), "holds <xacro:macro>.*run xacro"),
    "deep nesting": ("<robot>" + "<x>" * 200 + "</x>" * 200 + "</robot>", "more than 100 levels of XML"),
}


@pytest.mark.parametrize("case", XML)
def test_broken_or_unsafe_xml(case: str) -> None:
    text, pattern = XML[case]
    assert re.search(pattern, parse_error(text))


STRUCTURE = {
    "no links": (robot(), "<robot> has no links; add at least one"),
    "a nameless link": (robot(links("a"), "<link/>"), "<link> number 2 has no name"),
    "a nameless joint": (robot(links("a"), "<joint type='fixed'/>"), "<joint> number 1 has no name"),
    "an empty name": (robot("<link name=''/>"), "<link> number 1 has no name"),
    "two roots": (robot(links("ab")), r"<robot> has 2 root links \(a, b\); join them"),
    "many roots": (robot(links("abcdefg")), r"7 root links \(a, b, c, d, e, \.\.\.\)"),
    "a cycle": (robot(links("ab"), joint("j", "a", "b"), joint("k", "b", "a")), "no root link.*form a cycle; remove"),
    "a cycle beside a tree": (
        robot(links("abcd"), joint("j", "a", "b"), joint("k", "c", "d"), joint("m", "d", "c")),
        "link 'c' is part of a cycle that the root does not reach; remove one joint",
    ),
    "a link on itself": (
        robot(links("ab"), joint("j", "a", "a")),
        "joint 'j' joins link 'a' to itself: a cycle; remove",
    ),
    "a link twice": (robot(links("aba"), joint("j", "a", "b")), "link 'a' occurs twice; give each its own name"),
    "a joint twice": (
        robot(links("abc"), joint("j", "a", "b"), joint("j", "b", "c")),
        "joint 'j' occurs twice; give each its own name",
    ),
    "no such parent": (
        robot(links("ab"), joint("j", "aa", "b")),
        "joint 'j' has parent 'aa', which is no link; add <link name='aa'/> or correct.*did you mean 'a'",
    ),
    "no such child": (robot(links("ab"), joint("j", "a", "bb")), "joint 'j' has child 'bb', which is no link"),
    "two parents": (
        robot(links("abc"), joint("j", "a", "b"), joint("k", "a", "c"), joint("m", "c", "b")),
        "link 'b' hangs on two joints, 'j' and 'm'; a URDF is a tree, remove one",
    ),
    "parallel joints": (robot(links("ab"), joint("j", "a", "b"), joint("k", "a", "b")), "link 'b' hangs on two joints"),
    "no parent": (
        robot(links("ab"), "<joint name='j' type='fixed'><child link='b'/></joint>"),
        "must name one parent link",
    ),
    "no child": (
        robot(links("ab"), "<joint name='j' type='fixed'><parent link='b'/></joint>"),
        "must name one child link",
    ),
    "a nameless child": (
        one_joint().replace("<child link='b'/>", "<child/>"),
        "must name one child link, as <child link=",
    ),
    "two children": (one_joint("<child link='a'/>" + LIMIT), "joint 'j' must name one child link"),
    "an unknown type": (one_joint(kind="revolut"), "joint 'j' has unknown type 'revolut'; did you mean 'revolute'"),
    "no type": (one_joint().replace(" type='revolute'", ""), "joint 'j' has unknown type ''; known: continuous, fixed"),
    "another tool's joint": (
        robot(links("ab"), "<drake:joint name='j' type='ball'><parent link='a'/><child link='b'/></drake:joint>"),
        "2 root links.*<drake:joint> is another tool's element and not read",
    ),
    "two limits": (one_joint(LIMIT * 2), "joint 'j' holds 2 <limit> elements where one is meant; keep one"),
    "two axes": (one_joint("<axis xyz='0 0 1'/><axis xyz='0 1 0'/>" + LIMIT), "joint 'j' holds 2 <axis>"),
    "two origins": (one_joint("<origin/><origin/>" + LIMIT), "joint 'j' holds 2 <origin>"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_structures_that_are_no_tree_of_links(case: str) -> None:
    text, pattern = STRUCTURE[case]
    assert re.search(pattern, parse_error(text))


VALUES = {
    "a zero axis": (one_joint("<axis xyz='0 0 0'/>" + LIMIT), "joint 'j' has a zero axis; give its direction"),
    "almost zero": (one_joint("<axis xyz='0 1e-12 0'/>" + LIMIT), "joint 'j' has a zero axis"),
    "a planar zero axis": (one_joint("<axis xyz='0 0 0'/>", "planar"), "joint 'j' has a zero axis"),
    "a misspelt axis": (
        one_joint("<axis xzy='0 0 1'/>" + LIMIT),
        "joint 'j' <axis> has no xyz; add xyz= with 3 numbers",
    ),
    "a short axis": (one_joint("<axis xyz='0 1'/>" + LIMIT), "<axis> xyz='0 1' must hold 3 numbers"),
    "bounds crossed": (one_joint("<limit lower='2' upper='-1'/>"), "joint 'j' has lower 2 > upper -1; swap them"),
    "above the default": (one_joint("<limit lower='1'/>"), "joint 'j' has lower 1 > upper 0"),
    "no limit": (
        one_joint(""),
        "joint 'j' is revolute and has no <limit>; give it lower and upper .rad., or make it conti",
    ),
    "no slide limit": (
        one_joint("", "prismatic"),
        r"joint 'j' is prismatic and has no <limit>; give it lower and upper \[m\]",
    ),
    "no bounds": (one_joint("<limit effort='1' velocity='1'/>"), "joint 'j' has a <limit> without lower and upper"),
    "a negative speed": (
        one_joint("<limit upper='1' velocity='-2'/>"),
        r"joint 'j' has a limit of -2 for its velocity, which no joint can keep; write the joint's own limit \[rad/s\], or leave",
    ),
    "a negative force": (
        one_joint("<limit upper='1' effort='-0.5'/>", "prismatic"),
        r"joint 'j' has a limit of -0.5 for its effort.*own limit \[N\], or leave effort out where it is unknown",
    ),
    "a mimic of none": (one_joint(LIMIT + "<mimic multiplier='2'/>"), "joint 'j' <mimic> names no joint"),
    "a missing mimic": (one_joint(mimic_joint("k")), "joint 'j' mimics 'k', which does not exist; known: j"),
    "a mimic of itself": (one_joint(mimic_joint("j")), "joint 'j' mimics itself; one joint must be free"),
    "mimics in a cycle": (
        robot(
            links("abcd"),
            joint("x", "a", "b", mimic_joint("y")),
            joint("y", "b", "c", mimic_joint("z")),
            joint("z", "c", "d", mimic_joint("y")),
        ),
        "joint 'z' mimics in a cycle: y -> z -> y; one joint must be free",
    ),
    "a comma": (one_joint("<limit lower='-0,5' upper='1'/>"), "<limit> lower='-0,5' is not a finite number; write one"),
    "no number": (one_joint("<limit lower='' upper='1'/>"), "<limit> lower='' must hold 1 number; correct it"),
    "two numbers": (one_joint("<limit lower='0 1' upper='1'/>"), "lower='0 1' must hold 1 number"),
    "underscores": (one_joint("<limit lower='0' upper='1_0'/>"), "upper='1_0' is not a finite number"),
    "hexadecimal": (one_joint("<limit lower='0' upper='0x10'/>"), "upper='0x10' is not a finite number"),
    "other digits": (one_joint("<limit lower='0' upper='١'/>"), "upper='١' is not a finite number"),
    "xacro": (
        one_joint("<origin xyz='${x} 0 0'/>" + LIMIT),
        r"xyz='\$\{x\} 0 0' is an unexpanded xacro expression; run xacro",
    ),
    "a flat origin": (one_joint("<origin xyz='0 0'/>" + LIMIT), "joint 'j' <origin> xyz='0 0' must hold 3 numbers"),
    "no geometry": (one_visual(""), "link 'a' <visual> has no <geometry>; add one or remove the element"),
    "empty geometry": (one_visual("<geometry/>"), "<geometry> must hold one shape, it holds 0"),
    "two shapes": (
        one_visual("<geometry><box size='1 1 1'/><sphere radius='1'/></geometry>"),
        "it holds 2; use one element",
    ),
    "an unknown shape": (
        one_visual("<geometry><cone radius='1'/></geometry>"),
        "<cone> is no shape of the URDF format; use box",
    ),
    "a sizeless box": (
        one_visual("<geometry><box/></geometry>"),
        "link 'a' <visual> <box> has no size; add size= with 3 num",
    ),
    "a flat box": (one_visual("<geometry><box size='1 1'/></geometry>"), "size='1 1' must hold 3 numbers"),
    "a negative box": (one_visual("<geometry><box size='1 -1 1'/></geometry>"), "has a negative size"),
    "a negative sphere": (
        one_visual("<geometry><sphere radius='-1'/></geometry>", "collision"),
        "<collision> <sphere> has a neg",
    ),
    "a nameless mesh": (one_visual("<geometry><mesh/></geometry>"), "<mesh> has no filename; name the mesh file"),
    "a flat mesh": (
        one_visual("<geometry><mesh filename='m.stl' scale='1 0 1'/></geometry>"),
        "<mesh> has a scale of zero",
    ),
    "an origin outside a visual": (
        robot("<link name='a'><origin xyz='0 0 1'/><visual><geometry><box size='1 1 1'/></geometry></visual></link>"),
        "link 'a' holds an <origin>, which has no effect there; move it into the <visual>, <collision> or <inertial>",
    ),
    "an origin in a geometry": (
        one_visual("<geometry><box size='1 1 1'/><origin rpy='0 0 1'/></geometry>"),
        "link 'a' <visual> <geometry> holds an <origin>, which has no effect there; move it into <visual>, beside <geom",
    ),
    "an origin in a geometry before the shape": (
        one_visual("<geometry><origin xyz='1 0 0'/><sphere radius='1'/></geometry>", "collision"),
        "<collision> <geometry> holds an <origin>.*move it into <collision>, beside",
    ),
    "an origin in a shape": (
        one_visual("<geometry><box size='1 1 1'><origin xyz='0 0 1'/></box></geometry>"),
        "<visual> <box> holds an <origin>, which has no effect there",
    ),
    "two origins of a visual": (
        one_visual("<origin xyz='0 0 1'/><origin xyz='0 1 0'/><geometry><box size='1 1 1'/></geometry>"),
        "link 'a' <visual> holds 2 <origin> elements where one is meant; keep one",
    ),
    "an origin without a shape": (
        one_visual("<geometry><origin/></geometry>"),
        "<geometry> must hold one shape, it holds 0",
    ),
    "a mesh on a server": (
        one_visual("<geometry><mesh filename='http://x/m.stl'/></geometry>"),
        "nothing is loaded from the net",
    ),
    "a mesh outside": (
        one_visual("<geometry><mesh filename='/etc/passwd'/></geometry>"),
        "outside the robot's folders; move it",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_invalid_values(case: str) -> None:
    text, pattern = VALUES[case]
    assert re.search(pattern, parse_error(text))


PLACES = {
    "joint 'j' <origin>": one_joint("<origin xyz='0 @ 0'/>" + LIMIT),
    "joint 'j' <origin> ": one_joint("<origin rpy='0 0 @'/>" + LIMIT),
    "joint 'j' <axis>": one_joint("<axis xyz='@ 0 0'/>" + LIMIT),
    "joint 'j' <axis> ": one_joint("<axis xyz='@ 0 0'/>", "fixed"),
    "joint 'j' <limit>": one_joint("<limit lower='@' upper='1'/>"),
    "joint 'j' <limit> ": one_joint("<limit lower='0' upper='@'/>"),
    "joint 'j' <limit>  ": one_joint("<limit lower='0' upper='1' velocity='@'/>"),
    "joint 'j' <limit>   ": one_joint("<limit lower='@' upper='@'/>", "continuous"),
    "joint 'j' <mimic>": robot(
        links("abc"), joint("j", "a", "b", LIMIT + "<mimic joint='k' offset='@'/>"), joint("k", "b", "c")
    ),
    # Elements that only other tools read; a file with such values is broken as well.
    "joint 'j' <dynamics>": one_joint(LIMIT + "<dynamics damping='@'/>"),
    "joint 'j' <safety_controller>": one_joint(LIMIT + "<safety_controller soft_lower_limit='@'/>"),
    "link 'a' <mass>": robot("<link name='a'><inertial><mass value='@'/></inertial></link>"),
    "link 'a' <inertia>": robot("<link name='a'><inertial><inertia ixx='@'/></inertial></link>"),
    "link 'a' <box>": one_visual("<geometry><box size='1 1 @'/></geometry>"),
    "link 'a' <mesh>": one_visual("<geometry><mesh filename='m.stl' scale='1 1 @'/></geometry>"),
}


@pytest.mark.parametrize("number", ["nan", "NaN", "-nan", "inf", "-INF", "+Infinity", "1e999", "1.#QNAN", "-1.#IND"])
@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_anywhere(place: str, number: str) -> None:
    parse_urdf(PLACES[place].replace("@", "0.5"))
    message = parse_error(PLACES[place].replace("@", number))
    assert place.strip() in message
    assert f"{number}" in message
    assert "is not a finite number; write one" in message


def test_truncation_at_any_byte() -> None:
    text = one_joint()
    for k in range(len(text)):
        parse_error(text[:k])


# ---- files and size --------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, said in [
        (tmp_path / "gone.urdf", "cannot be read"),
        (tmp_path, "is not a file"),
        ("a\0b", "no file name"),
    ]:
        with pytest.raises(UrdfError, match=said):
            read_urdf(path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UrdfError, match="is not a file; name the URDF file itself"):
            read_urdf(path)


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.urdf"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse file of a tebibyte
    with pytest.raises(UrdfError, match="larger than 16 MiB; a URDF holds no mesh data, check the file"):
        read_urdf(path)
    for text in (" " * (MAX_BYTES + 1), b" " * (MAX_BYTES + 1), "é" * (MAX_BYTES // 2 + 1)):
        assert "larger than 16 MiB" in parse_error(text)
    assert len(parse_urdf(one_joint() + " " * (MAX_BYTES - 1000)).links) == 2


def test_many_elements_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xml, "MAX_ELEMENTS", 1000)
    assert len(parse_urdf(chain(100)).links) == 100
    assert "more than 1000 elements of XML" in parse_error(robot("<x/>" * 1000))


HOSTILE = {
    "names of a mebibyte": lambda: robot(f"<link name='{'x' * 2**20}'/><link name='{'y' * 2**20}'/>"),
    "a long number": lambda: one_joint(f"<limit lower='0' upper='{'1' * 2**20}x'/>"),
    "a long type": lambda: one_joint(kind="revolute" * 100_000),
    "many unknown links": lambda: chain(5_000).replace("<child link='l4999'/>", "<child link='l2000000'/>"),
    "a cycle of many": lambda: chain(5_000).replace("<parent link='l0'/>", "<parent link='l4999'/>"),
    "many lost links": lambda: robot(
        links("a"), *(f"<link name='l{k}'/>" for k in range(5_000)), *(joint(f"j{k}", f"l{k}", f"l{(k + 1) % 5_000}") for k in range(5_000))
    ),
    "a cycle of mimics": lambda: robot(
        *(f"<link name='l{k}'/>" for k in range(5_001)),
        *(joint(f"j{k}", f"l{k}", f"l{k + 1}", mimic_joint(f"j{(k + 1) % 5_000}")) for k in range(5_000)),
    ),
    "line breaks in names": lambda: robot("<link name='a&#10;b'/><link name='c&#13;&#x2028;d&#x85;'/>"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_large_faults_give_short_messages_fast(case: str) -> None:
    text = HOSTILE[case]()
    started = time.perf_counter()
    parse_error(text)
    assert time.perf_counter() - started < 20


def test_a_long_chain_of_mimics_is_checked_fast() -> None:
    count = 5_000
    body = "".join(f"<link name='l{k}'/>" for k in range(count + 1))
    joints = (
        joint(f"j{k}", f"l{k}", f"l{k + 1}", mimic_joint(f"j{k + 1}") if k < count - 1 else LIMIT) for k in range(count)
    )
    text = robot(body, *joints)
    started = time.perf_counter()
    model = parse_urdf(text)
    assert time.perf_counter() - started < 20
    assert len(model.movable_joints) == count
