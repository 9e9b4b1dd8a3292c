"""The wheel built from the tree works outside the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD_INPUTS = ("engines", "exporter", "plugins", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "training_state.pt"))
        elif source.exists():
            (folder / "tree").mkdir(exist_ok=True)
            shutil.copy(source, folder / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder), str(folder / "tree")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("vflow_export-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as an installer would put it into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(installed: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code with the installed packages before the editable ones, in an empty folder."""
    head = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]; "
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-c", head + code, *arguments], capture_output=True, text=True, env=environment, cwd=installed.parent)


def test_the_wheel_holds_one_package_and_no_tests_or_tools(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vflow"}
    assert {name.split("/")[1] for name in names if name.startswith("vflow/")} == {"engines", "exporter", "plugins"}
    assert not [name for name in names if "training_state" in name or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names) == (ROOT / "LICENSE").exists()


def test_the_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    expected = {f"vflow/{file.relative_to(ROOT).as_posix()}" for room in ("engines", "exporter", "plugins") for file in (ROOT / room).rglob("*.py")}
    assert expected - packed == set()


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint-2.5", "checkpoint-3"])
def test_the_wheel_holds_the_small_models(wheel: Path, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"):
        assert f"vflow/exporter/tiny/{folder}/{name}" in packed


def test_what_is_installed_is_imported_from_there(installed: Path) -> None:
    code = "import vflow.engines, vflow.exporter.build, vflow.plugins.compaction as c; print(vflow.engines.__file__, c.__file__)"
    done = python(installed, code)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed)) for path in done.stdout.split())


def test_the_installed_command_runs(installed: Path) -> None:
    entry_points = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "vflow-export = vflow.exporter.cli:main" in entry_points.read_text()
    done = python(installed, "from vflow.exporter.cli import main; main()", "--help")
    assert done.returncode == 0, done.stderr
    assert "Compile vision-language models with pruned visual tokens" in done.stdout
    done = python(installed, "from vflow.exporter.cli import main; main()", "--version")
    assert "0.1.0" in done.stdout


@pytest.mark.slow
def test_the_installed_command_builds_and_runs_an_engine(installed: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    main = "from vflow.exporter.cli import main; main()"
    limits = ("--max-visual-tokens", "64", "--max-text-tokens", "64")
    done = python(installed, main, "build", "--model", str(random_checkpoint), "--keep", "0.2", "--output", str(tmp_path / "engine"), *limits)
    assert done.returncode == 0, done.stderr
    done = python(installed, main, "run", str(tmp_path / "engine"), "--prompt", "what is there ?", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
