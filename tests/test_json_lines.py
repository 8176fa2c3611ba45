"""JSON Lines end with a line feed only: texts keep every other character that some call a line end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lerobot_files import make_episode

from jidm.datasets import DatasetWriter, open_dataset
from jidm.errors import InputError
from jidm.json_lines import format_json_lines, parse_json_lines
from jidm.rewards.scoring import read_scores

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\n"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=[f"U+{ord(x):04X}" for x in SEPARATORS])
def test_texts_survive_writing_and_reading(separator: str) -> None:
    rows = [{"task": f"pick{separator}place"}, {"task": "plain"}]
    text = format_json_lines(rows)
    assert list(parse_json_lines(text)) == rows
    assert text.count("\n") == 2
    # The standard library escapes all but ASCII if told so: another writer's form of the same values.
    assert list(parse_json_lines("\n".join(json.dumps(row) for row in rows))) == rows


def test_a_broken_line_is_named_by_its_number() -> None:
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        list(parse_json_lines('{"a": "\u2028"}\n\n{"a": \n'))


@pytest.mark.parametrize("separator", SEPARATORS[:3])
def test_data_sets_and_scores_with_such_texts_are_read(tmp_path: Path, separator: str) -> None:
    task, root = f"pick{separator}place", tmp_path / "set"
    episode = make_episode(0, 5)
    writer = DatasetWriter(
        root, fps=30, joint_names=["a", "b", "c"], cameras={"top": (64, 48)}, action_names=[], version="v2.1"
    )
    writer.write_episode(0, {"top": episode.frames}, episode.state, task=task)
    writer.finalize()
    raw = (root / "meta" / "episodes.jsonl").read_text(encoding="utf-8")
    assert separator in raw  # written unescaped, as LeRobot does
    assert open_dataset(root).episode(0).task == task
    scores = tmp_path / "scores.jsonl"
    record = {"video": f"a{separator}b.mp4", "reward": 0.5}
    scores.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_scores(scores) == [record]
    scores.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="run `git lfs pull`"):
        read_scores(scores)
