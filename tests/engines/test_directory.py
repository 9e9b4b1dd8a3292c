"""The engine directory: whole or absent when written, and checked byte for byte when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vflow.engines import Engine, EngineError, open_engine, write_engine_directory
from vflow.engines.directory import file_sha256

Edit = Callable[[Path, Callable[[dict[str, Any]], None]], None]
MakeStandin = Callable[..., Path]


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest as a builder would give it."""
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    values.pop("files")
    return values


def refusal(folder: Path, **options: Any) -> str:
    """The one line with which an engine is refused."""
    with pytest.raises(EngineError) as caught:
        open_engine(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_engine_is_read_as_it_was_written(standin: Engine) -> None:
    assert standin.family == "qwen2_vl" and standin.precision == "fp32" and standin.model_fingerprint == "0123abcd"
    assert [(s.first_layer, s.end_layer, s.keep, s.visual_capacity, s.capacity) for s in standin.segments] == [
        (0, 2, 512, 20, 180),
        (2, 3, 256, 10, 170),
    ]
    assert set(standin.files) == {"vision.onnx", "language.onnx", "schedule.json", "tokenizer.json", "chat_template.jinja"}
    assert standin.files["vision.onnx"].sha256 == file_sha256(standin.path / "vision.onnx")
    assert standin.language.input_names[0] == "input_ids" and standin.language.inputs[1].shape == (3, "B", "S")
    assert not [path for path in standin.path.parent.iterdir() if path != standin.path]


def test_an_engine_from_before_towers_had_windows_has_none(make_standin: MakeStandin, edit_manifest: Edit) -> None:
    folder = make_standin()
    edit_manifest(folder, lambda m: [m["shape"]["tower"].pop(name) for name in ("mlp_matrices", "window", "full_blocks", "deepstack_blocks")])
    tower = open_engine(folder).shape.tower
    assert (tower.mlp_matrices, tower.window, tower.full_blocks, tower.deepstack_blocks) == (2, 0, (), ())


def test_files_in_subfolders_belong_to_the_engine(standin: Engine, tmp_path: Path) -> None:
    with write_engine_directory(tmp_path / "engine", manifest_of(standin.path)) as folder:
        shutil.copytree(standin.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (folder / "kernels").mkdir()
        (folder / "kernels" / "a.ptx").write_text("//")
    assert open_engine(tmp_path / "engine").files["kernels/a.ptx"].size == 2
    (tmp_path / "engine" / "kernels" / "a.ptx").unlink()
    assert "kernels/a.ptx: missing; build the engine again" in refusal(tmp_path / "engine")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("out of luck"), SystemExit(3)])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), write_engine_directory(tmp_path / "engine", {}) as folder:
        (folder / "weights.bin").write_bytes(b"half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no space left on the disk; free some"), write_engine_directory(tmp_path / "engine", {}):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_build_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), write_engine_directory(tmp_path / "engine", {}):
        raise PermissionError(errno.EACCES, "checkpoint")


def test_a_manifest_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="field format is missing"), write_engine_directory(tmp_path / "engine", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_without_force(standin: Engine) -> None:
    with pytest.raises(EngineError, match="exists already; choose another folder or use --force"), write_engine_directory(standin.path, {}):
        pytest.fail("entered")


def test_force_replaces_an_engine_and_an_empty_folder(make_standin: MakeStandin, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    target.mkdir()
    make_standin(target, force=True)
    make_standin(target, force=True, precision="fp16")
    assert open_engine(target).precision == "fp16"
    assert list(tmp_path.iterdir()) == [target]


def test_force_keeps_the_old_engine_when_the_build_fails(make_standin: MakeStandin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_standin(tmp_path / "engine")
    with pytest.raises(KeyboardInterrupt), write_engine_directory(target, {}, force=True):
        raise KeyboardInterrupt
    rename, calls = os.rename, []

    def failing(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(EngineError, match="cannot be put there"):
        make_standin(target, force=True, precision="fp16")
    assert open_engine(target).precision == "fp32"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json"])
def test_force_never_replaces_a_folder_that_is_not_an_engine(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(EngineError, match="is not an engine directory, so --force does not"), write_engine_directory(folder, {}, force=True):
        pytest.fail("entered")
    assert (folder / name).exists()


def test_force_never_deletes_what_a_user_put_beside_the_engine(make_standin: MakeStandin, tmp_path: Path) -> None:
    target = make_standin(tmp_path / "engine")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(EngineError, match=r"holds notes\.txt"):
        make_standin(target, force=True)
    assert (target / "notes.txt").exists()


def test_a_target_that_appears_during_the_build_is_not_overwritten(standin: Engine, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    with pytest.raises(EngineError, match="exists already"), write_engine_directory(target, manifest_of(standin.path)) as folder:
        shutil.copytree(standin.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        target.mkdir()
        (target / "other").write_text("somebody else's")
    assert (target / "other").exists()


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot be written"), write_engine_directory(tmp_path / "file" / "engine", {}):
        pytest.fail("entered")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_what_a_killed_build_leaves_is_not_an_engine(tmp_path: Path) -> None:
    script = """
        import sys, time
        from vflow.engines import write_engine_directory
        with write_engine_directory(sys.argv[1], {}) as folder:
            (folder / "weights.bin").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
    """
    target = tmp_path / "engine"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.iterdir()
    assert not target.exists() and ".partial-" in left.name
    assert "left over by a build that was stopped" in refusal(left)
    assert "no such engine directory" in refusal(target)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_writers_killed_at_random_moments_leave_nothing_or_the_whole(standin: Engine, tmp_path: Path) -> None:
    """Copying, hashing, flushing and renaming; whole builds are killed in test_interrupts.py, which takes longer."""
    script = """
        import json, os, random, shutil, signal, sys, time
        from pathlib import Path
        from vflow.engines import write_engine_directory
        source, out = Path(sys.argv[1]), Path(sys.argv[2])

        def write(target):
            manifest = json.loads((source / "manifest.json").read_text())
            with write_engine_directory(target, manifest) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
                with open(folder / "weights.bin", "wb") as file:
                    for _ in range(64):
                        file.write(os.urandom(1 << 18))

        began = time.monotonic()
        write(out / "whole")
        seconds = time.monotonic() - began
        for number, share in enumerate(random.Random(11).uniform(0, 1) for _ in range(10)):
            child = os.fork()
            if not child:
                write(out / str(number) / "engine")
                os._exit(0)
            time.sleep(share * seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(standin.path), str(tmp_path)], check=True)
    unfinished = 0
    for number in range(10):
        for path in (tmp_path / str(number)).glob("*"):
            if path.name == "engine":
                open_engine(path)
            else:
                assert "left over by a build that was stopped" in refusal(path)
                unfinished += 1
    assert unfinished >= 1


def test_folders_that_are_no_engines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no such engine directory" in refusal(tmp_path / "none")
    assert "is a file" in refusal(tmp_path / "file")
    assert "manifest.json: missing, so this is not an engine directory" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json: not JSON" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    assert "must be a JSON object" in refusal(tmp_path)


FIELD_DAMAGE: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("newer format", lambda m: m.update(format=2), "format 2 is newer than"),
    ("unknown family", lambda m: m.update(family="llava"), "family 'llava' is not known"),
    ("unknown precision", lambda m: m.update(precision="int4"), "precision 'int4' is not known"),
    ("missing field", lambda m: m.pop("tokens"), "field tokens is missing"),
    ("missing inner field", lambda m: m["limits"].pop("max_text_tokens"), "field limits.max_text_tokens is missing"),
    ("wrong type", lambda m: m["shape"]["decoder"].update(layers="3"), "field shape.decoder.layers must be a whole number"),
    ("boolean for a number", lambda m: m["limits"].update(max_text_tokens=True), "limits.max_text_tokens must be a whole number"),
    ("zero size", lambda m: m["shape"]["tower"].update(blocks=0), "shape.tower.blocks must be at least 1"),
    ("window", lambda m: m["shape"]["tower"].update(window=-1), "shape.tower.window must be at least 0"),
    ("blocks", lambda m: m["shape"]["tower"].update(full_blocks=["7"]), "field shape.tower.full_blocks must be a list of blocks"),
    ("DeepStack", lambda m: m["shape"]["tower"].update(deepstack_blocks=[-1]), "field shape.tower.deepstack_blocks must be a list of blocks"),
    ("null", lambda m: m.update(segments=None), "field segments must be a list"),
    ("bad schedule", lambda m: m["schedule"]["stages"][0].update(keep=4096), "schedule: stage before decoder 0: keep"),
    ("schedule of another model", lambda m: m["schedule"].update(model="ffff"), "schedule was made for model ffff"),
    ("stage outside the model", lambda m: m["schedule"]["stages"][1].update(layer=9), "this model's decoder has layers 0..2"),
    ("segments of another schedule", lambda m: m["segments"].pop(), "segments do not follow"),
    ("segment too small", lambda m: m["limits"].update(max_text_tokens=999), "is smaller than limits ask for"),
    ("bad stop tokens", lambda m: m["tokens"].update(stop=["x"]), "tokens.stop must be a list of token ids"),
    ("bad mean", lambda m: m["image_processor"].update(image_mean=[1, 2]), "image_processor.image_mean must be three numbers"),
    ("zero std", lambda m: m["image_processor"].update(image_std=[1, 0, 1]), "image_std must be positive"),
    ("other merge size", lambda m: m["image_processor"].update(merge_size=4), "merge_size differs"),
    ("no graph", lambda m: m["graphs"].pop("vision"), "field graphs.vision is missing"),
    ("bad tensor", lambda m: m["graphs"]["vision"]["inputs"][0].update(shape=[None]), "graphs.vision.inputs[].shape must hold"),
    ("unlisted graph", lambda m: m["graphs"]["vision"].update(cpu_file="vision.cpu.onnx"), "files does not list vision.cpu.onnx"),
    ("graph that is no name", lambda m: m["graphs"]["vision"].update(cpu_file=1), "graphs.vision.cpu_file must be"),
    ("unlisted file", lambda m: m["files"].pop("tokenizer.json"), "files does not list tokenizer.json"),
    ("bad checksum", lambda m: m["files"]["vision.onnx"].update(sha256="xyz"), "sha256 must be 64 hexadecimal digits"),
    ("another checksum", lambda m: m["files"]["vision.onnx"].update(sha256="0" * 64), "vision.onnx: damaged"),
    ("another size", lambda m: m["files"]["vision.onnx"].update(size=1), "bytes, was built with 1"),
]
ESCAPES = ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", "\\\\host\\secret", ""]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in FIELD_DAMAGE], ids=[case[0] for case in FIELD_DAMAGE])
def test_a_manifest_that_is_wrong_is_refused_by_field(
    make_standin: MakeStandin, edit_manifest: Edit, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = make_standin()
    edit_manifest(folder, change)
    line = refusal(folder)
    assert message in line and line.startswith(str(folder)) and line.endswith("build the engine again")


@pytest.mark.parametrize("name", ESCAPES)
def test_a_file_outside_the_folder_is_refused(make_standin: MakeStandin, edit_manifest: Edit, name: str) -> None:
    folder = make_standin()
    edit_manifest(folder, lambda m: m["files"].update({name: {"sha256": "0" * 64, "size": 0}}))
    assert "outside the engine's folder" in refusal(folder)


def test_a_link_that_leads_outside_is_refused(make_standin: MakeStandin, tmp_path: Path) -> None:
    folder = make_standin()
    shutil.move(folder / "vision.onnx", tmp_path / "elsewhere")
    (folder / "vision.onnx").symlink_to(tmp_path / "elsewhere")
    assert "leads outside the engine's folder" in refusal(folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_byte_in_any_file_is_found(standin: Engine, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(standin.path, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(sorted([*standin.files, "manifest.json"])))
    damaged = bytearray((folder / name).read_bytes())
    place, bit = data.draw(st.integers(0, len(damaged) - 1)), data.draw(st.integers(0, 7))
    damaged[place] ^= 1 << bit
    (folder / name).write_bytes(damaged)
    if name == "manifest.json":  # what is wrong with it may be a field
        assert f"{name}: " in refusal(folder)
    else:
        assert f"{name}: damaged" in refusal(folder)
        assert open_engine(folder, check_hashes=False).path == folder


def test_a_manifest_that_another_hand_wrote_is_refused(make_standin: MakeStandin) -> None:
    folder = make_standin()
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"stand-in"', '"stand-on"'))
    assert refusal(folder).endswith("manifest.json: damaged, its checksum is not that of its fields; build the engine again")
    (folder / "manifest.json").write_text(json.dumps(json.loads(text), sort_keys=True))  # the same fields in another order
    open_engine(folder)


def test_a_cut_or_missing_file_is_found_without_reading_hashes(make_standin: MakeStandin) -> None:
    folder = make_standin()
    (folder / "language.onnx").write_bytes((folder / "language.onnx").read_bytes()[:-1])
    assert "language.onnx: has" in refusal(folder, check_hashes=False)
    (folder / "language.onnx").unlink()
    assert "language.onnx: missing" in refusal(folder, check_hashes=False)


def test_hashing_keeps_up_with_large_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    began = time.perf_counter()
    assert file_sha256(path) == "3b6a07d0d404fab4e23b6d34bc6696a6a312dd92821332385e5af7c01c421351"
    assert time.perf_counter() - began < 5  # 13 MB/s: a loop byte by byte would not make it, a busy machine does
