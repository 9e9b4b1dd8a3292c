"""Places for results are refused before there are any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vflow.exporter.outputs import check_file, check_folder
from vflow.exporter.schedule import ScheduleError


def test_what_can_be_written_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for file in ("new.json", "old.json", tmp_path / "new.json"):
        check_file(Path(file), "schedule")
    for folder in ("new", "empty", tmp_path / "deep" / "er"):
        check_folder(Path(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.json"]


def test_what_this_user_may_not_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root, who may run this, is refused nothing
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
    with pytest.raises(ScheduleError, match=r"s\.json: may not be written; choose another place for the schedule"):
        check_file(tmp_path / "s.json", "schedule")
    with pytest.raises(ScheduleError, match=r"front: no folder can be made in .*; choose another --output"):
        check_folder(tmp_path / "front")
