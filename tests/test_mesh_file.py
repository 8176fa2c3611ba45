"""Mesh files are read whole and in meters, or refused by one line that names the file and what is wrong."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh
from urdf_text import robot

from jidm.errors import EmbodimentError, JidmWarning, MissingExtraError
from jidm.robot.mesh_file import READABLE_FORMATS, read_mesh_file
from jidm.robot.shape_mesh import shape_mesh, visual_meshes
from jidm.robot.surface import sample_surface
from jidm.robot.urdf.reader import parse_urdf

SIZE = (0.2, 0.4, 0.6)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"


def box(kind: str, size: tuple[float, ...] = SIZE) -> bytes:
    """A box in one of the formats; "ply-text" and "stl-text" are the text forms of PLY and STL."""
    mesh = trimesh.creation.box(extents=size)
    if kind == "ply-text":
        content = trimesh.exchange.ply.export_ply(mesh, encoding="ascii")
    elif kind == "gltf":
        content = mesh.export(file_type="gltf", merge_buffers=True, embed_buffers=True)["model.gltf"]
    else:
        content = mesh.export(file_type="stl_ascii" if kind == "stl-text" else kind)
    return content.encode() if isinstance(content, str) else content


KINDS = ("stl", "stl-text", "obj", "dae", "ply", "ply-text", "glb", "gltf", "off")


def written(folder: Path, kind: str, content: bytes, name: str = "arm") -> Path:
    path = folder / f"{name}.{kind.partition('-')[0]}"
    path.write_bytes(content)
    return path


def visual(file: str, scale: str = "1 1 1") -> str:
    return f"<visual><geometry><mesh filename='{file}' scale='{scale}'/></geometry></visual>"


def extent(folder: Path, file: str, scale: str = "1 1 1") -> np.ndarray:
    """Size of a robot of one mesh [m]."""
    model = parse_urdf(robot(f"<link name='a'>{visual(file, scale)}</link>"), directory=folder)
    return shape_mesh(model.links[0].visuals[0], "r").extents


def refusal(path: Path) -> str:
    with pytest.raises(EmbodimentError) as error:
        read_mesh_file(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


# ---- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_in_meters(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, box(kind))
    np.testing.assert_allclose(extent(tmp_path, path.name), SIZE, rtol=1e-5)
    np.testing.assert_allclose(extent(tmp_path, path.name, "2 1 .5"), np.multiply(SIZE, (2, 1, 0.5)), rtol=1e-5)
    upper = path.rename(tmp_path / path.name.upper())
    np.testing.assert_allclose(extent(tmp_path, upper.name), SIZE, rtol=1e-5)


@pytest.mark.parametrize(
    ("meter", "unit"), [("1", 1.0), ("0.01", 0.01), ("0.0254", 0.0254), ("1e-3", 0.001), ("2.5", 2.5)]
)
@pytest.mark.parametrize("up", ["X_UP", "Y_UP", "Z_UP"])
def test_the_unit_of_collada_is_applied_once_and_its_up_axis_is_not(
    tmp_path: Path, meter: str, unit: float, up: str
) -> None:
    text = box("dae", tuple(x / unit for x in SIZE)).decode()
    asset = f"<asset><unit name='u' meter='{meter}'/><up_axis>{up}</up_axis></asset>"
    text, count = re.subn(r"<asset>.*?</asset>", asset, text, flags=re.DOTALL)
    assert count == 1
    path = written(tmp_path, "dae", text.encode())
    np.testing.assert_allclose(extent(tmp_path, path.name), SIZE, rtol=1e-5)
    np.testing.assert_allclose(extent(tmp_path, path.name, "2 1 -.5"), np.multiply(SIZE, (2, 1, 0.5)), rtol=1e-5)
    model = parse_urdf(robot(f"<link name='a'>{visual(path.name)}</link>"), directory=tmp_path)
    np.testing.assert_allclose(np.ptp(sample_surface(model, 3000).p_link.numpy(), axis=0), SIZE, rtol=0.05)
    pytest.importorskip("pybullet")
    from jidm.sim.meshes import shape_meshes

    drawn = trimesh.util.concatenate([part for part, _ in shape_meshes(model.links[0].visuals[0].geometry, "r")])
    np.testing.assert_allclose(drawn.extents, SIZE, rtol=1e-5)


def test_collada_without_a_unit_is_in_meters_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    text = box("dae").decode()
    for asset in ("", "<asset/>", "<asset><unit name='meter'/></asset>"):
        path = written(tmp_path, "dae", re.sub(r"<asset>.*?</asset>", asset, text, flags=re.DOTALL).encode())
        assert read_mesh_file(path)[1] == 1.0
    for meter in ("0", "-1", "abc", "", "nan", "inf", "0,01"):
        asset = f"<asset><unit meter='{meter}'/></asset>"
        path = written(tmp_path, "dae", re.sub(r"<asset>.*?</asset>", asset, text, flags=re.DOTALL).encode())
        assert f"states <unit meter='{meter}'>, which is no length" in refusal(path)


@pytest.mark.parametrize("kind", ["stl", "stl-text", "obj", "glb", "off"])
def test_bytes_behind_the_end_are_ignored(tmp_path: Path, kind: str) -> None:
    for tail in (b"\0", bytes(10), bytes(49), bytes(5000)):
        path = written(tmp_path, kind, box(kind) + tail)
        assert trimesh.util.concatenate(read_mesh_file(path)[0].dump()).area == pytest.approx(0.88, rel=1e-5)
    if kind == "stl":
        assert len(read_mesh_file(written(tmp_path, kind, box(kind) + b"exported by CAD"))[0].dump()[0].faces) == 12


def test_a_binary_stl_whose_header_begins_with_solid_is_binary(tmp_path: Path) -> None:
    content = b"solid arm".ljust(80, b" ") + box("stl")[80:]
    assert len(read_mesh_file(written(tmp_path, "stl", content))[0].dump()[0].faces) == 12
    assert "its header names 12 triangles" in refusal(written(tmp_path, "stl", content[:-60]))


# ---- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_never_read_in_part(tmp_path: Path, kind: str) -> None:
    """Either refused, or every triangle is there: the last bytes of text formats may be blanks or half a number."""
    mesh = trimesh.creation.icosphere(subdivisions=1)
    original = {"stl-text": "stl_ascii"}.get(kind, kind)
    if kind == "ply-text":
        content = trimesh.exchange.ply.export_ply(mesh, encoding="ascii")
    elif kind == "gltf":
        content = mesh.export(file_type="gltf", merge_buffers=True, embed_buffers=True)["model.gltf"]
    else:
        content = mesh.export(file_type=original)
    content = content.encode() if isinstance(content, str) else content
    count = len(content)
    steps = {*range(1, 60), *np.linspace(60, count, 60, dtype=int).tolist()}
    for cut in sorted(steps):
        path = written(tmp_path, kind, content[: count - cut])
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                faces = sum(len(g.faces) for g in read_mesh_file(path)[0].geometry.values())
        except EmbodimentError as error:
            assert path.name in str(error)
            continue
        lost_line_break = kind == "obj" and any("ends without a line break" in str(w.message) for w in warned)
        # An OBJ has no mark of its end: cut between two lines, it cannot be told from a whole one.
        between_lines = kind == "obj" and content[: count - cut].endswith(b"\n")
        assert faces == mesh.faces.shape[0] or lost_line_break or between_lines, cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; get the file again"),
        (b" \n\t", "is empty"),
        (LFS, "is a git-LFS pointer, not the mesh; run git lfs pull in its repository"),
        (b"<!DOCTYPE html>\n<html>404</html>", "is a web page, not a mesh; download the file itself"),
        (b"no mesh at all", ""),
        (bytes(range(256)) * 4, ""),
    ],
)
def test_other_content_is_named(tmp_path: Path, kind: str, content: bytes, said: str) -> None:
    message = refusal(written(tmp_path, kind, content))
    assert said in message
    assert "pycollada" not in message and "mesh_roots" not in message


DAMAGED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a short binary STL": (
        "stl",
        lambda: box("stl")[:-60],
        r"header names 12 triangles, which take 684 bytes, it has 624",
    ),
    "a header of no triangles": (
        "stl",
        lambda: box("stl")[:80] + bytes(4) + box("stl")[84:],
        "header names 0 triangles",
    ),
    "half a header": ("stl", lambda: box("stl")[:50], "it has 50 bytes, fewer than its header"),
    "a text STL without its end": (
        "stl",
        lambda: box("stl-text").replace(b"endsolid", b""),
        "last facet or solid has no end",
    ),
    "a text STL with words": ("stl", lambda: box("stl-text").replace(b"vertex 0.1", b"vertex oops", 1), ""),
    "a text STL with NaN": ("stl", lambda: box("stl-text").replace(b"vertex 0.1", b"vertex nan", 1), "12 triangles"),
    "an OBJ without faces": ("obj", lambda: box("obj").partition(b"\nf ")[0], "8 vertices and 0 faces"),
    "an OBJ cut in a face": (
        "obj",
        lambda: b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 0\nf 1 2 3\nf 2 4",
        "its last line 'f 2 4'",
    ),
    "an OBJ with unused vertices": (
        "obj",
        lambda: b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 0\nv 2 2 2\nf 1 2 3\nf 2 4 3",
        "its last line 'f 2 4 3'",
    ),
    "a PLY without its end": ("ply", lambda: box("ply")[:-5], "has not the length that its header states"),
    "a text PLY without its end": ("ply", lambda: box("ply-text")[:-40], "names 20 rows of data"),
    "a GLB without its end": ("glb", lambda: box("glb")[:-5], "is cut off: its header names"),
    "a glTF without its end": ("gltf", lambda: box("gltf")[:-5], "is cut off or no glTF document"),
    "an OFF without its end": ("off", lambda: box("off")[:-20], "names 20 rows of data"),
    "a DAE without its end": ("dae", lambda: box("dae")[:-20], "is cut off or damaged: not well-formed XML"),
    "a DAE without geometry": ("dae", lambda: box("dae").replace(b"<geometry id=", b"<geometry id='x' old="), ""),
    "a DAE without a scene": (
        "dae",
        lambda: re.sub(rb"<scene>.*</scene>", b"", box("dae"), flags=re.DOTALL),
        "no <scene>",
    ),
    "a DAE with a wrong index": ("dae", lambda: re.sub(rb"<p>\d+ ", b"<p>9999 ", box("dae")), "beyond the limits"),
    "a DAE with entities": (
        "dae",
        lambda: b"<!DOCTYPE c [<!ENTITY a 'b'>]><COLLADA>&a;</COLLADA>",
        "holds XML entities",
    ),
    "another XML": ("dae", lambda: b"<robot/>", "outermost element is <robot>"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    kind, content, said = DAMAGED[case]
    assert said in refusal(written(tmp_path, kind, content()))


def test_files_beside_a_gltf(tmp_path: Path) -> None:
    files = trimesh.creation.box(extents=SIZE).export(file_type="gltf", merge_buffers=True)
    buffer = next(name for name in files if name.endswith(".bin"))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path = (tmp_path / "model.gltf").rename(tmp_path / "arm.gltf")
    np.testing.assert_allclose(extent(tmp_path, path.name), SIZE, rtol=1e-5)
    (tmp_path / buffer).write_bytes(files[buffer][:-8])
    assert f"needs the file '{buffer}', which is cut off" in refusal(path)
    (tmp_path / buffer).write_bytes(LFS)
    assert f"needs the file '{buffer}', which is a git-LFS pointer" in refusal(path)
    (tmp_path / buffer).unlink()
    assert f"needs the file '{buffer}' in its folder, which is missing" in refusal(path)
    # A whole neighbor of the name that trimesh falls back to is never read in the place of a damaged file.
    (tmp_path / "model.gltf").write_bytes(box("gltf"))
    assert "is cut off" in refusal(written(tmp_path, "gltf", box("gltf")[:-9]))


@pytest.mark.parametrize("gone", ["library_materials", "library_effects"])
def test_collada_without_its_colors_keeps_its_shape(tmp_path: Path, gone: str) -> None:
    text, count = re.subn(f"<{gone}>.*</{gone}>", "", box("dae").decode(), flags=re.DOTALL)
    assert count == 1
    written(tmp_path, "dae", text.encode())
    np.testing.assert_allclose(extent(tmp_path, "arm.dae"), SIZE, rtol=1e-5)


@pytest.mark.parametrize("picture", [None, b"", LFS, b"\x89PNG broken"])
def test_missing_and_damaged_textures_keep_the_shape(tmp_path: Path, picture: bytes | None) -> None:
    (tmp_path / "m.mtl").write_text("newmtl m\nKd 1\nmap_Kd picture.png\n")
    if picture is not None:
        (tmp_path / "picture.png").write_bytes(picture)
    triangle = "usemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1\n"
    for library in ("m.mtl", "gone.mtl"):
        path = written(tmp_path, "obj", f"mtllib {library}\n{triangle}".encode())
        np.testing.assert_allclose(extent(tmp_path, path.name), (1, 1, 0))


# ---- formats that are not read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["step", "STP", "iges", "igs", "blend", "usd", "usda", "usdz", "fbx", "3ds", "x3d", "sldprt"]
)
def test_formats_that_are_not_read_are_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"arm.{ending}"
    path.write_text("ISO-10303-21;")
    message = refusal(path)
    assert f"the format {ending.upper()} is not read; read are " in message
    assert all(kind.upper() in message for kind in READABLE_FORMATS)
    assert "Convert it" in message and "pycollada" not in message and "pip install" not in message
    bare = tmp_path / "arm"
    bare.write_text("x")
    assert "the format of a file without an ending is not read" in refusal(bare)


def test_pycollada_is_named_only_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "collada", None)
    for kind in KINDS:
        path = written(tmp_path, kind, box(kind) if kind != "dae" else b"<COLLADA><scene/></COLLADA>")
        if kind == "dae":
            with pytest.raises(MissingExtraError, match=r"arm\.dae needs the package 'pycollada'"):
                read_mesh_file(path)
        else:
            read_mesh_file(path)


# ---- robots with a shape that cannot be used -------------------------------------------------------------------------


def three_links(folder: Path, *, hand: str) -> str:
    written(folder, "stl", box("stl"))
    fixed = "<joint name='{0}{1}' type='fixed'><parent link='{0}'/><child link='{1}'/></joint>"
    shapes = {
        "arm": visual("arm.stl"),
        "hand": hand,
        "foot": "<visual><geometry><sphere radius='.1'/></geometry></visual>",
    }
    links = (f"<link name='{name}'>{shape}</link>" for name, shape in shapes.items())
    return robot(*links, fixed.format("arm", "hand"), fixed.format("arm", "foot"))


def test_one_link_that_cannot_be_used_is_a_warning_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    empty = box("stl")[:80] + bytes(4)
    written(tmp_path, "stl", empty, "none")
    for hand, words in (
        (
            visual("gone.stl"),
            (r"gone\.stl", r"was not found \(looked for .*gone\.stl\)", "--mesh-roots", "link 'hand'"),
        ),
        (visual("flat.obj"), ("link 'hand'", r"flat\.obj", "has no area")),
        (visual("none.stl"), ("link 'hand'", r"none\.stl", "has no area")),
        ("<visual><geometry><sphere radius='0'/></geometry></visual>", ("link 'hand'", "has no area")),
    ):
        model = parse_urdf(three_links(tmp_path, hand=hand), directory=tmp_path)
        with pytest.warns(JidmWarning) as warned:
            surface = sample_surface(model, 400)
        assert len(warned) == 1
        assert all(re.search(word, str(warned[0].message)) for word in words)
        assert set(surface.link.tolist()) == {model.link_index("arm"), model.link_index("foot")} and len(surface) == 400
        with pytest.raises(EmbodimentError, match="no shape can be used"):
            sample_surface(model, 400, links=["hand"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample_surface(model, 400, links=["arm", "foot"])


def test_a_damaged_file_is_an_error_with_link_and_file_unless_its_link_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, "stl", box("stl")[:-60], "cut")
    model = parse_urdf(three_links(tmp_path, hand=visual("cut.stl")), directory=tmp_path)
    with pytest.raises(EmbodimentError, match=r"robot 'r', link 'hand': mesh .*cut\.stl is cut off"):
        sample_surface(model, 400)
    surface = sample_surface(model, 400, links=["arm", "f*t"])
    assert set(surface.link.tolist()) == {model.link_index("arm"), model.link_index("foot")}
    assert {index for index, _ in visual_meshes(model, "foot")} == {model.link_index("foot")}


def test_unknown_links_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    model = parse_urdf(three_links(tmp_path, hand=""), directory=tmp_path)
    for links, said in (
        (["amr"], "has no link 'amr': did you mean 'arm'"),
        (["arm", "leg_*"], r"has no link 'leg_\*': known: arm, foot, hand"),
        ([], "names no link; leave it out"),
        (["hand"], r"no visual shapes to sample in the links chosen \(hand\)"),
    ):
        with pytest.raises(EmbodimentError, match=said):
            sample_surface(model, 100, links=links)
