"""JointMotion: slices, files, refusals."""

from __future__ import annotations

import csv
import os
import pickle
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jidm import JointMotion
from jidm.errors import InputError, MissingExtraError
from jidm.estimation.result import stack


def made(
    frames: int = 6, batch: tuple[int, ...] = (), seed: int = 0, dtype: torch.dtype = torch.float64
) -> JointMotion:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*batch, *shape, generator=random, dtype=torch.float64).to(dtype)

    s, n = frames - 1, 3
    return JointMotion(
        joint_names=("a", "b,comma", "grip"),
        joint_types=("revolute", "continuous", "prismatic"),
        time=torch.arange(frames, dtype=torch.float64) / 7,
        delta_q=draw(s, n),
        velocity=draw(s, n),
        position=draw(frames, n),
        position_std=draw(frames, n),
        covariance=draw(s, n, n),
        residual=draw(s),
        explained_fraction=draw(s),
        agreement=draw(s),
        observable=draw(s, n) > 0.5,
        valid=draw(s) > 0.5,
        provenance={"seed": 3, "nested": {"K": [1.5, 2.5]}, "none": None},
    )


def assert_same(a: JointMotion, b: JointMotion) -> None:
    for f in fields(JointMotion):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, f.name
            assert torch.equal(left, right), f.name
        else:
            assert left == right, f.name


# ---- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_a_slice_holds_its_frames_and_the_steps_between(batch: tuple[int, ...]) -> None:
    motion = made(batch=batch)
    part = motion[2:5]
    assert part.frames == 3
    assert torch.equal(part.position, motion.position[..., 2:5, :])
    assert torch.equal(part.velocity, motion.velocity[..., 2:4, :])
    assert torch.equal(part.covariance, motion.covariance[..., 2:4, :, :])
    assert torch.equal(part.valid, motion.valid[..., 2:4])
    assert torch.equal(part.time, motion.time[2:5])
    assert_same(motion[:], motion)
    assert_same(motion[1:][1:4], motion[2:5])
    assert_same(motion[-3:], motion[3:6])
    assert motion[4:5].delta_q.shape[-2] == 0


@pytest.mark.parametrize("bad", [slice(3, 3), slice(5, 2), slice(0, 6, 2), slice(9, 12), 2])
def test_slices_without_meaning_are_refused(bad: object) -> None:
    # An int is refused by the annotation check in tests and by the method itself elsewhere.
    with pytest.raises((InputError, TypeError)):
        made()[bad]  # type: ignore[index]


def test_stack_makes_a_batch() -> None:
    a, b = made(seed=1), made(seed=2)
    both = stack([a, b], torch.Size((2, 1)))
    assert both.velocity.shape == (2, 1, 5, 3)
    assert both.covariance.shape == (2, 1, 5, 3, 3)
    assert torch.equal(both.velocity[1, 0], b.velocity)
    assert torch.equal(both.time, a.time)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_load_gives_back_what_was_saved(tmp_path: Path, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    motion = made(batch=batch, dtype=dtype)
    motion.save(tmp_path / "motion.npz")
    assert_same(JointMotion.load(tmp_path / "motion.npz"), motion)
    assert os.listdir(tmp_path) == ["motion.npz"]


def test_arrays_carry_every_number() -> None:
    motion = made()
    arrays = motion.numpy()
    expected = {f.name for f in fields(JointMotion)} - {"joint_names", "joint_types", "provenance"}
    assert set(arrays) == expected
    np.testing.assert_array_equal(arrays["covariance"], motion.covariance.numpy())


def test_csv_reads_back(tmp_path: Path) -> None:
    motion = made()
    motion.to_csv(tmp_path / "motion.csv")
    with open(tmp_path / "motion.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6
    for j, name in enumerate(motion.joint_names):
        np.testing.assert_array_equal([float(r[f"position.{name}"]) for r in rows], motion.position[:, j].numpy())
        np.testing.assert_array_equal([float(r[f"velocity.{name}"]) for r in rows[:-1]], motion.velocity[:, j].numpy())
        assert rows[-1][f"velocity.{name}"] == ""
    np.testing.assert_array_equal([float(r["time"]) for r in rows], motion.time.numpy())
    assert [bool(int(r["valid"])) for r in rows[:-1]] == motion.valid.tolist()
    assert os.listdir(tmp_path) == ["motion.csv"]


def test_csv_of_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"batch shape \(2,\)"):
        made(batch=(2,)).to_csv(tmp_path / "motion.csv")
    assert os.listdir(tmp_path) == []


# ---- other forms -----------------------------------------------------------------------------------------------------


def test_repr_says_the_measures_in_one_line() -> None:
    base = made()
    observable = torch.ones_like(base.observable)
    observable[2, 1] = False  # in one of four valid steps
    valid = torch.tensor([True, True, True, True, False])
    explained = torch.tensor(
        [0.5, 0.5, 1.0, 1.0, 0.0], dtype=torch.float64
    )  # the step that is not valid does not count
    motion = replace(base, observable=observable, valid=valid, explained_fraction=explained)
    assert repr(motion) == (
        "JointMotion(6 frames in 0.714 s, 3 joints, 80% of the steps valid, 75% of the motion explained, "
        "least observable b,comma (75% of the steps))"
    )
    std = motion.position_std.clone()
    std[:, 2] += 9
    equal = replace(motion, observable=torch.ones_like(observable), position_std=std)
    assert "least observable grip (100% of the steps)" in repr(equal)
    assert (
        repr(replace(motion, valid=valid & False))
        == "JointMotion(6 frames in 0.714 s, 3 joints, 0% of the steps valid)"
    )
    assert repr(motion[2:3]) == "JointMotion(1 frames in 0 s, 3 joints)"
    assert repr(made(batch=(2,))).startswith("JointMotion(batch (2,), 6 frames")


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_notebook_shows_a_row_per_joint(batch: tuple[int, ...]) -> None:
    motion = replace(made(batch=batch), joint_names=("a", "<b>", "grip"))
    page = motion._repr_html_()
    assert page.count("<tr>") == 4 and "&lt;b&gt;" in page and "<b>" not in page
    end = f"{float(motion.position.flatten(0, -2)[-1, 2]):.4f} m"
    assert (f"<td>{end}</td>" in page) == (not batch)


def test_to_changes_the_dtype_and_keeps_time_and_flags() -> None:
    motion = made(frames=4)
    motion = replace(motion, time=motion.time + 1e6)
    half = motion.to(torch.float32)
    assert half.position.dtype == half.covariance.dtype == torch.float32
    assert torch.equal(half.time, motion.time) and torch.equal(half.valid, motion.valid)
    assert torch.equal(half.velocity, motion.velocity.float())
    assert_same(motion.to("cpu"), motion)
    assert {x.device.type for x in vars(motion.to("meta")).values() if isinstance(x, torch.Tensor)} == {"meta"}
    with pytest.raises(InputError, match="floating"):
        motion.to(torch.int64)


def test_pandas_holds_the_table_of_the_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pd = pytest.importorskip("pandas", reason="pandas is optional")
    motion = made()
    table = motion.to_pandas()
    motion.to_csv(tmp_path / "motion.csv")
    read = pd.read_csv(tmp_path / "motion.csv", index_col="time", dtype={"valid": "boolean"})
    pd.testing.assert_frame_equal(table, read)
    assert table["valid"].tolist()[:-1] == motion.valid.tolist() and table["valid"].isna().tolist() == [False] * 5 + [
        True
    ]
    with pytest.raises(InputError, match=r"batch shape \(2,\)"):
        made(batch=(2,)).to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="pip install pandas"):
        motion.to_pandas()


def test_plot_draws_the_curves() -> None:
    motion = made()
    figure = motion.plot(joints=["grip"], title="mine")
    velocity, position = figure.axes
    np.testing.assert_array_equal(velocity.get_lines()[0].get_ydata(), motion.velocity[:, 2].numpy())
    np.testing.assert_array_equal(position.get_lines()[0].get_ydata(), motion.position[:, 2].numpy())
    with pytest.raises(InputError, match="did you mean 'grip'"):
        motion.plot(joints=["gripp"])


class Bomb:
    """Would run when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def foreign(folder: Path, kind: str) -> Path:
    path = folder / "motion.npz"
    motion = made()
    motion.save(path)
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("time,position\n0,1\n")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        path.write_bytes(whole[:200] + bytes(200) + whole[400:])
    elif kind == "npy":
        with open(path, "wb") as f:
            np.save(f, np.zeros(3))
    elif kind == "other npz":
        np.savez(path, a=np.zeros(3))
    elif kind == "objects":
        np.savez(path, **{**motion.numpy(), "header": np.array([Bomb()], dtype=object)})
    elif kind == "header":
        np.savez(path, **motion.numpy(), header=np.array('{"joint_names": 3'))
    elif kind == "header of another kind":
        np.savez(path, **motion.numpy(), header=np.array("[1, 2]"))
    elif kind == "no names":
        np.savez(path, **motion.numpy(), header=np.array('{"joint_types": []}'))
    elif kind == "shapes":
        arrays = motion.numpy()
        arrays["velocity"] = arrays["velocity"][:2]
        np.savez(path, **arrays, header=np.array('{"joint_names": ["a"], "joint_types": ["b"], "provenance": {}}'))
    return path


KINDS = ["missing", "empty", "text", "pickle", "truncated", "damaged", "npy", "other npz", "objects", "header"]


@pytest.mark.parametrize("kind", [*KINDS, "header of another kind", "no names", "shapes"])
def test_foreign_files_are_refused_in_one_line(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = foreign(tmp_path, kind)
    with pytest.raises(InputError, match=r"motion\.npz") as caught:
        JointMotion.load(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "motion.npz"
    made(seed=1).save(path)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        made(seed=2).save(path)
    assert os.listdir(tmp_path) == ["motion.npz"]
    assert_same(JointMotion.load(path), made(seed=1))


def test_saving_into_a_missing_folder_says_so(tmp_path: Path) -> None:
    for write in (made().save, made().to_csv):
        with pytest.raises(InputError, match="folder"):
            write(tmp_path / "nowhere" / "motion.npz")
