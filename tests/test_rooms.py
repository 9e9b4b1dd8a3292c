"""The rooms import each other as docs/architecture.md allows, and running an engine needs neither PyTorch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("plugins", "exporter", "engines")
# Room → what it may import of the others: whole rooms, or modules.
ALLOWED = {
    "plugins": set(),
    "exporter": {"plugins", "engines"},
    "engines": {"exporter.shape", "exporter.schedule", "exporter.budget", "exporter.weight_files"},
}
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub"}
LIGHT_EXPORTER = (  # used where nothing is built
    "shape.py", "schedule.py", "budget.py", "weight_files.py", "presets.py", "doctor.py", "child_process.py", "cli.py", "cli_bench.py",
    "tensorrt_llm.py", "tiny/scenes.py",
    *(f"bench/{name}.py" for name in ("child", "engine", "genai", "limits", "measurement", "openvino", "report", "runner", "subjects")),
)  # fmt: skip


def modules(room: str) -> Iterator[Path]:
    yield from sorted((ROOT / room).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names that a module imports, and whether that happens when it is loaded."""
    package = ["vflow", *file.relative_to(ROOT).parent.parts]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lazy = {id(inner) for outer in ast.walk(tree) if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) for inner in ast.walk(outer)}
    for outer in ast.walk(tree):  # what only a type checker reads
        if isinstance(outer, ast.If) and ast.unparse(outer.test).endswith("TYPE_CHECKING"):
            lazy |= {id(inner) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, id(node) not in lazy
            for alias in node.names:
                yield f"{module}.{alias.name}", id(node) not in lazy


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_architecture_allows(room: str) -> None:
    wrong = []
    for file in modules(room):
        for name, _ in imports(file):
            parts = name.split(".")
            if parts[0] != "vflow" or len(parts) < 3 or parts[1] == room:
                continue
            if parts[1] not in ALLOWED[room] and ".".join(parts[1:3]) not in ALLOWED[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_package_module_imports_tools_or_tests() -> None:
    assert [
        f"{file.relative_to(ROOT)} imports {name}"
        for room in ROOMS
        for file in modules(room)
        for name, _ in imports(file)
        if name.split(".")[0] in ("tools", "tests", "plugins", "exporter", "engines")
    ] == []


def test_running_and_planning_load_nothing_heavy() -> None:
    light = [*modules("engines"), *(ROOT / "exporter" / name for name in LIGHT_EXPORTER)]
    loaded = [
        f"{file.relative_to(ROOT)} imports {name}" for file in light for name, at_load in imports(file) if at_load and name.split(".")[0] in HEAVY
    ]
    assert loaded == []


@pytest.mark.parametrize("statement", ["import vflow.engines", "import vflow.exporter.cli", "import vflow.exporter.presets"])
def test_importing_what_users_run_loads_neither_pytorch_nor_transformers(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("room", ROOMS)
def test_files_hold_one_idea_each(room: str) -> None:
    """docs of the house style: a file over about 400 lines is two ideas."""
    assert [str(file) for file in modules(room) if len(file.read_text(encoding="utf-8").splitlines()) > 400] == []


@pytest.mark.parametrize("room", ROOMS)
def test_exported_names_exist(room: str) -> None:
    import importlib

    for file in modules(room):
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(["vflow", *(part for part in parts if part != "__init__")]))
        assert [name for name in getattr(module, "__all__", []) if not hasattr(module, name)] == []
