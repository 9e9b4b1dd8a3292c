"""A search that several processes share: a study in memory, in a journal file, or in a database that several machines reach."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from .schedule import ScheduleError

__all__ = ["finished_trials", "open_storage", "open_study"]

# Processes that open an empty database at the same moment all create its tables, and all but one fail; the next try finds the tables.
OPENING_TRIES = 5
OPENING_PAUSE = 0.3  # seconds


def open_study(
    place: str | None, name: str, *, directions: Sequence[Any], sampler: Any, identity: Mapping[str, str], start: Sequence[Mapping[str, float | str]]
) -> Any:
    """Optuna's study of that name, made if it is not there; of processes that start together one makes it and queues the points to start from.

    Args:
        place: see :func:`open_storage`.
        identity: what the study is of (model, space, calibration set); kept in it.
        start: points to try first.

    Raises:
        ScheduleError: the study is of something else, or see :func:`open_storage`.
    """
    import optuna

    storage = open_storage(place)
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, sampler=sampler)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)
        known = _identity(study, identity)
        for key, value in identity.items():
            if known.get(key) != value:
                where = without_password(place)
                raise ScheduleError(f"study {name!r} in {where} was made for another {key}; choose another --study or --study-name") from None
        return study
    for key, value in identity.items():
        study.set_user_attr(key, value)
    for point in start:
        study.enqueue_trial(dict(point))
    return study


def finished_trials(study: Any) -> int:
    """Trials that were computed: neither those still queued nor those of a process that was killed."""
    import optuna

    return len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def _identity(study: Any, wanted: Mapping[str, str]) -> dict[str, str]:
    """What a study that another process has made is of; it may be about to write that down."""
    for _ in range(OPENING_TRIES):
        known: dict[str, str] = study.user_attrs
        if set(wanted) <= set(known):
            break
        time.sleep(OPENING_PAUSE)
    return known


def open_storage(place: str | None) -> Any:
    """Optuna's storage for a file (journal) or a database URL; None is memory.

    Raises:
        ScheduleError: not a URL, a database without its driver, or one that does not answer; one line, without the password.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if place is None:
        return None
    if "://" not in place:
        return JournalStorage(JournalFileBackend(place))
    from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError, ProgrammingError

    url = _database_url(place)
    shown = without_password(place)
    for left in reversed(range(OPENING_TRIES)):
        try:
            return RDBStorage(url.render_as_string(hide_password=False))
        except NoSuchModuleError:
            raise ScheduleError(f"study {shown}: SQLAlchemy has no database {url.drivername!r}; use postgresql:// or a file") from None
        except ImportError:
            install = "pip install 'vflow-export[tune]'" if url.get_backend_name() == "postgresql" else "install it, or use postgresql:// or a file"
            raise ScheduleError(f"study {shown}: the Python driver of {url.drivername} is not installed; {install}") from None
        except DBAPIError as error:
            exists = isinstance(error, (IntegrityError, ProgrammingError)) or "already exists" in str(error.orig)
            if not exists or not left:
                raise ScheduleError(f"study {shown}: {' '.join(str(error.orig).split())}") from None
        except RuntimeError as error:  # tables of another version of Optuna
            raise ScheduleError(f"study {shown}: {error}") from None
        time.sleep(OPENING_PAUSE)
    raise AssertionError("the last try returns or raises")


def without_password(place: str | None) -> str:
    """A file or URL as messages may show it."""
    if place is None or "://" not in place:
        return str(place)
    shown: str = _database_url(place).render_as_string(hide_password=True)
    return shown


def _database_url(place: str) -> Any:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        raise ScheduleError("the study's database is not a URL; write it as postgresql://user:password@host:port/database") from None
    # The driver that the extra brings, and the scheme that PostgreSQL's own programs take and SQLAlchemy does not.
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url
