"""Engines for other runtimes in the manifest: read as they were written, and refused where they contradict themselves or the graphs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from vflow.engines import Engine, EngineError, open_engine, write_engine_directory
from vflow.engines.graphs import Profile, TensorInfo
from vflow.exporter.cli import main

FILES = {name: {"file": f"rtx/{name}.engine", "log": f"rtx/{name}.log", "layers": f"rtx/{name}.json"} for name in ("vision", "language")}


def built(graph: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        **FILES[name],
        "inputs": graph["inputs"],
        "outputs": graph["outputs"],
        "profiles": [{"name": "small", "sizes": {"rows": [1, 2, 4]}}, {"name": "large", "sizes": {"rows": [3, 8, 9]}}],
        "engine_bytes": 2,
        "build_seconds": 1.5,
        "peak_memory_bytes": 1000,
    }


@pytest.fixture
def with_target(standin: Engine, tmp_path: Path) -> Callable[..., Path]:
    """``with_target(change)``: an engine directory that has engines for one target, after a change of the target's entry."""

    def make(change: Callable[[dict[str, Any]], Any] = lambda entry: None) -> Path:
        manifest = json.loads((standin.path / "manifest.json").read_text())
        del manifest["files"]
        entry = {"versions": {"library": "1.7"}, "compute_capabilities": ["8.9"]}
        entry |= {name: built(manifest["graphs"][name], name) for name in FILES}
        change(entry)
        manifest["targets"] = {"tensorrt-rtx": entry}
        with write_engine_directory(tmp_path / "engine", manifest) as folder:
            shutil.copytree(standin.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
            for name in ("rtx", "plugins"):
                (folder / name).mkdir()
            for name in ("plugins.json", "KeepTop.ptx", "KeepTop.cubin"):
                (folder / "plugins" / name).write_text("{}")
            for files in FILES.values():
                for file in files.values():
                    (folder / file).write_text("//")
        return tmp_path / "engine"

    return make


def test_targets_are_read_as_they_were_written(with_target: Callable[..., Path]) -> None:
    target = open_engine(with_target()).targets["tensorrt-rtx"]
    assert (target.name, target.versions, target.compute_capabilities) == ("tensorrt-rtx", {"library": "1.7"}, ("8.9",))
    vision = target.vision
    assert (vision.file, vision.log, vision.layers) == ("rtx/vision.engine", "rtx/vision.log", "rtx/vision.json")
    assert (vision.engine_bytes, vision.build_seconds, vision.peak_memory_bytes) == (2, 1.5, 1000)
    assert vision.profiles[0] == Profile("small", {"rows": (1, 2, 4)})
    assert isinstance(target.language.inputs[0], TensorInfo)


def test_an_engine_without_targets_has_none(standin: Engine) -> None:
    assert standin.targets == {}


def test_memory_that_was_not_measured_may_be_missing(with_target: Callable[..., Path]) -> None:
    folder = with_target(lambda entry: entry["vision"].update(peak_memory_bytes=None))
    assert open_engine(folder).targets["tensorrt-rtx"].vision.peak_memory_bytes is None


def test_the_smallest_profile_that_admits_the_sizes_is_taken(with_target: Callable[..., Path]) -> None:
    vision = open_engine(with_target()).targets["tensorrt-rtx"].vision
    assert [vision.profile_for(rows=rows) for rows in (0, 1, 4, 5, 9, 10)] == [None, 0, 0, 1, 1, None]
    assert vision.profile_for(rows=4, other=77) == 0
    assert dataclasses.replace(vision, profiles=vision.profiles[::-1]).profile_for(rows=4) == 1


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda entry: entry.pop("versions"), "field targets.tensorrt-rtx.versions is missing"),
    (lambda entry: entry.update(compute_capabilities=[8.9]), "fields targets.tensorrt-rtx.versions and compute_capabilities must hold strings"),
    (lambda entry: entry.update(language=[]), "field targets.tensorrt-rtx.language must be an object"),
    (lambda entry: entry["vision"].pop("log"), "field targets.tensorrt-rtx.vision.log is missing"),
    (lambda entry: entry["vision"].update(engine_bytes=-1), "field targets.tensorrt-rtx.vision.engine_bytes must be at least 0"),
    (lambda entry: entry["vision"].update(build_seconds="1"), "field targets.tensorrt-rtx.vision.build_seconds must be a number from 0 on"),
    (lambda entry: entry["vision"].update(peak_memory_bytes=0.5), "peak_memory_bytes must be a whole number"),
    (lambda entry: entry["vision"].update(profiles=[7]), "field targets.tensorrt-rtx.vision.profiles[] must be an object"),
    (lambda entry: entry["vision"]["profiles"][0]["sizes"].update(rows=[1, 2]), "profiles[].sizes.rows must be three whole numbers"),
    (lambda entry: entry["vision"]["profiles"][0]["sizes"].update(rows=[4, 2, 1]), "profile small: sizes of rows must ascend from 0 on"),
    (lambda entry: entry["vision"].update(file="rtx/none.engine"), "files does not list rtx/none.engine"),
    (lambda entry: entry["vision"].update(inputs=[]), "targets.tensorrt-rtx: rtx/vision.engine has other inputs or outputs than vision.onnx"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_targets_that_cannot_be_right_are_refused(with_target: Callable[..., Path], change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(EngineError, match=r"manifest\.json would not be valid") as caught:
        with_target(change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_byte_in_any_file_is_refused_by_name(with_target: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, bit: int) -> None:
    """Graphs, schedule, tokenizer, kernels, engines, logs and the manifest itself; through ``run``, as users would meet it."""
    monkeypatch.setattr("vflow.exporter.cli.stop_on_signals", lambda: None)
    folder = with_target()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert {"manifest.json", "schedule.json", "plugins/KeepTop.cubin", "rtx/language.engine", "rtx/vision.log"} <= set(files)
    random = np.random.default_rng(bit)
    for name in files:
        whole = (folder / name).read_bytes()
        damaged = bytearray(whole)
        damaged[random.integers(len(damaged))] ^= 1 << bit
        (folder / name).write_bytes(damaged)
        result = CliRunner().invoke(main, ["run", str(folder), "--prompt", "what ?"])
        (folder / name).write_bytes(whole)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {folder / name}: ") and result.stderr.count("\n") == 1
    assert CliRunner().invoke(main, ["run", str(folder), "--prompt", "what ?", "--max-new-tokens", "1"]).exit_code == 0
