"""One study, several processes: a journal file and a PostgreSQL database, which the test starts itself, as users share them.

What runs in another process is at the top of this file: that process imports it anew.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from support import picture
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.schedule import Schedule, ScheduleError
from vflow.exporter.search_space import Budget, SearchSpace
from vflow.exporter.tune import CalibrationSample, FlowObjective, TuneResult, tune_schedule

optuna = pytest.importorskip("optuna")
pwd = pytest.importorskip("pwd", reason="needs a Unix: the server runs as another user")

TRIALS = (4, 5)  # of the two processes: the space's points to start from, and some random ones
PATIENCE = 120  # seconds for the other process: both import PyTorch and load a model
STUDY = "shared"

meeting: Barrier  # of both processes


def arrive(barrier: Barrier) -> None:
    global meeting
    meeting = barrier


class MeetingObjective(FlowObjective):
    """Counts its trials, and is in its first one at the same time as the other process is."""

    counted = 0

    def score(self, schedule: Schedule) -> float:
        self.counted += 1
        if self.counted == 1:
            meeting.wait(PATIENCE)
        return super().score(schedule)


def tune(objective: FlowObjective, storage: str, trials: int, *, seed: int = 0, fingerprint: str = "abc") -> TuneResult:
    space = SearchSpace.for_model(objective.shape, Budget(keep=0.4))
    return tune_schedule(objective, space, fingerprint=fingerprint, trials=trials, seed=seed, storage=storage, study_name=STUDY)


def calibration() -> list[CalibrationSample]:
    return [CalibrationSample((picture(3, 4),), "how many objects are there ?")]


def tune_with_the_other(checkpoint: Path, storage: str, seed: int) -> tuple[int, float, int]:
    """What a process does: trials of its own, the best value it found or was told of, and its process id."""
    torch.set_num_threads(1)
    try:
        objective = MeetingObjective(open_checkpoint(str(checkpoint)), calibration())
        if "://" in storage:
            importlib.import_module("psycopg")
            optuna.storages.RDBStorage("sqlite://")  # with all that this imports in place,
        meeting.wait(PATIENCE)  # both open the study, and make it, at the same moment
        result = tune(objective, storage, TRIALS[seed], seed=seed)
    except BaseException:
        meeting.abort()  # the other need not wait for us
        raise
    return objective.counted, result.value, os.getpid()


# What runs in the test's own process.

PASSWORD = "hidden"  # the server asks for none; no message may show it
SERVER_USERS = ("postgres", "nobody")  # PostgreSQL refuses to run as root; the first that exists runs it then


def binary(name: str) -> str | None:
    """A program of PostgreSQL; Debian keeps them off the path, in a folder a version."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: [int(n) for n in path.parts[4].split(".") if n.isdigit()])
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def server_account() -> dict[str, Any]:
    """Whom to run the server as, as ``subprocess`` takes it; empty: as ourselves."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = next(known[name] for name in SERVER_USERS if name in known)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a server of our own, on a socket in a folder of its own; gone afterwards."""
    initdb, pg_ctl = binary("initdb"), binary("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed (Debian, Ubuntu: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="vflow-pg-"))  # not tmp_path: its parents are closed to other users, and a socket's path is short
    data, log, account = str(folder / "data"), folder / "log", server_account()
    if account:
        os.chown(folder, account["user"], account["group"])

    def call(*command: str) -> int:
        with log.open("a") as output:  # not a pipe: the server would hold it open
            return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **account).returncode

    try:
        assert call(initdb, "-D", data, "-U", "vflow", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C") == 0, log.read_text()
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
        assert call(pg_ctl, "start", "-w", "-D", data, "-o", options) == 0, log.read_text()
        yield f"postgresql://vflow:{PASSWORD}@/postgres?host={folder}"
    finally:
        call(pg_ctl, "stop", "-w", "-m", "immediate", "-D", data)
        shutil.rmtree(folder)


@pytest.fixture(params=["journal", "postgres"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A file, or the URL of a database; in optuna's form as well."""
    if request.param == "postgres":
        pytest.importorskip("psycopg")
        return request.getfixturevalue("postgres")
    return str(tmp_path / "study.log")


@pytest.fixture(scope="module")
def objective(random_checkpoint: Path) -> FlowObjective:
    return FlowObjective(open_checkpoint(str(random_checkpoint)), calibration())


def stored(storage: str) -> Any:
    """The study as Optuna reads it."""
    if "://" in storage:
        return optuna.load_study(study_name=STUDY, storage=storage.replace("postgresql://", "postgresql+psycopg://"))
    return optuna.load_study(study_name=STUDY, storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage)))


def test_two_processes_share_a_study_and_a_third_resumes_it(storage: str, random_checkpoint: Path, objective: FlowObjective) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=arrive, initargs=(context.Barrier(2),)) as pool:
        arguments = [(random_checkpoint, storage, seed) for seed in (0, 1)]
        results = pool.starmap_async(tune_with_the_other, arguments, chunksize=1).get(3 * PATIENCE)
    assert len({process for _, _, process in results} | {os.getpid()}) == 3
    assert tuple(own for own, _, _ in results) == TRIALS

    study = stored(storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * sum(TRIALS)
    assert [trial.number for trial in study.trials] == list(range(sum(TRIALS)))
    assert len({tuple(sorted(trial.params.items())) for trial in study.trials}) == sum(TRIALS)  # no point was queued by both
    assert max(value for _, value, _ in results) == study.best_value == max(trial.value for trial in study.trials)

    third = tune(objective, storage, 1, seed=2)
    assert third.trials == sum(TRIALS) + 1
    assert third.value == stored(storage).best_value >= study.best_value
    assert objective.score(third.schedule) == pytest.approx(third.value, abs=1e-9)  # the stored point is that schedule again

    with pytest.raises(ScheduleError, match="another model") as error:
        tune(objective, storage, 1, fingerprint="def")
    assert is_one_line(error.value)
    assert len(stored(storage).trials) == third.trials


def is_one_line(error: ScheduleError) -> bool:
    return "\n" not in str(error) and PASSWORD not in str(error)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"postgresql://vflow:{PASSWORD}@127.0.0.1:1/postgres", r"127\.0\.0\.1.* port 1 "),
        (f"nothing://vflow:{PASSWORD}@host/study", "has no database 'nothing'"),
        (f"postgresql://vflow:{PASSWORD}@host:port/study", "not a URL"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_in_one_line(objective: FlowObjective, url: str, message: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ScheduleError, match=message) as error:
        tune(objective, url, 1)
    assert is_one_line(error.value)


def test_a_missing_driver_is_named_with_what_to_install(objective: FlowObjective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ScheduleError, match=r"pip install 'vflow-export\[tune\]'") as error:
        tune(objective, f"postgresql://vflow:{PASSWORD}@127.0.0.1:1/postgres", 1)
    assert is_one_line(error.value)


def test_trials_that_nobody_has_finished_are_not_counted(objective: FlowObjective, tmp_path: Path) -> None:
    path = str(tmp_path / "study.log")
    assert tune(objective, path, 1).trials == 1  # and the other points to start from are still queued
    stored(path).ask()  # and left, as by a process that was killed
    assert tune(objective, path, 1).trials == 2
