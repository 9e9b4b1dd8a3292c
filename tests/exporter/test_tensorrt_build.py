"""``build --target tensorrt-rtx`` on a machine without a GPU: what it writes, what it refuses, and what is left when it is stopped."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support import HANDLED_SIGNALS, MAX_TEXT_TOKENS, MAX_VISUAL_TOKENS, picture
from test_tensorrt_network import SCHEDULE
from vflow.engines import EngineError, open_engine
from vflow.engines.backends.cuda import gpu_capability
from vflow.engines.graphs import GRAPHS, BuiltEngine
from vflow.engines.manifest import Engine, Limits
from vflow.exporter.cli import main
from vflow.exporter.schedule import Schedule, Stage
from vflow.exporter.tensorrt import targets as tensorrt_targets
from vflow.exporter.tensorrt.engine import EngineJob
from vflow.exporter.tensorrt.graph import graph_for_target
from vflow.exporter.tensorrt.library import load_library
from vflow.exporter.tensorrt.profiles import vision_profiles
from vflow.exporter.tensorrt.targets import RTX_CAPABILITIES, build_target, check_targets

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")

PRESETS = ("progressive", "tower")
PLAN_MAGIC = b"vtrt"  # how a serialized engine of TensorRT for RTX begins
LIMITS = ("--max-visual-tokens", "256", "--max-text-tokens", "64")
LOCAL_GPU = gpu_capability()


def call(*arguments: Any) -> Result:
    """The command in this process."""
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    try:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """The small model in fp16 at keep 0.1, with engines of both graphs, by preset."""
    engines = {}
    for preset in PRESETS:
        output = tmp_path_factory.mktemp("rtx") / preset
        options = ("--keep", 0.1, "--preset", preset, "--precision", "fp16", "--target", "onnxruntime", "--target", "tensorrt-rtx", *LIMITS)
        capabilities = ("--compute-capability", "8.9") if preset == "tower" else ()
        result = call("build", "--model", "tiny", "--output", output, *options, *capabilities)
        assert result.exit_code == 0, result.output
        assert "build tensorrt-rtx vision" in result.stderr and "build tensorrt-rtx language" in result.stderr
        engines[preset] = open_engine(output)
    return engines


def engines_of(engine: Engine) -> dict[str, BuiltEngine]:
    target = engine.targets["tensorrt-rtx"]
    return {"vision": target.vision, "language": target.language}


# ------------------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("preset", PRESETS)
def test_both_graphs_are_built_and_described(built: dict[str, Engine], preset: str) -> None:
    engine = built[preset]
    target = engine.targets["tensorrt-rtx"]
    assert set(target.versions) == {"tensorrt_rtx", "polygraphy", "onnx"}
    assert target.compute_capabilities == (("8.9",) if preset == "tower" else ())
    files = {path.relative_to(engine.path).as_posix() for path in engine.path.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *engine.files}  # no graph that was made for the parser stays
    assert not (engine.path / "plugins").exists()  # it takes function bodies
    for name, graph in engines_of(engine).items():
        assert graph.file == f"tensorrt-rtx/{name}.engine"
        plan = (engine.path / graph.file).read_bytes()
        assert plan[:4] == PLAN_MAGIC
        assert len(plan) == graph.engine_bytes > 1_000_000
        assert 0 < graph.build_seconds < 600
        assert graph.peak_memory_bytes is None or graph.peak_memory_bytes > graph.engine_bytes
        assert {graph.file, graph.log, graph.layers} <= set(engine.files)
        log = (engine.path / graph.log).read_text()
        assert "Engine generation completed" in log
        assert str(engine.path.parent) not in log
    assert [profile.name for profile in target.language.profiles] == ["prefill", "decode"]
    assert [profile.name for profile in target.vision.profiles] == ["square", "tall", "wide"]


@pytest.mark.parametrize("preset", PRESETS)
def test_interfaces_are_those_of_the_graphs_with_capacities_as_numbers(built: dict[str, Engine], preset: str) -> None:
    engine = built[preset]
    capacity = {f"capacity_{number}": segment.capacity for number, segment in enumerate(engine.segments)}
    for name, graph in engines_of(engine).items():
        model = onnx.load(engine.path / f"{name}.onnx", load_external_data=False)
        for tensors, values in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            assert [tensor.name for tensor in tensors] == [value.name for value in values]
            for tensor, value in zip(tensors, values, strict=True):
                dimensions = value.type.tensor_type.shape.dim
                assert tensor.shape == tuple(capacity.get(d.dim_param, d.dim_param) or d.dim_value for d in dimensions)
                assert tensor.dtype == onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    caches = [tensor for tensor in engines_of(engine)["language"].inputs if tensor.name.startswith("past_key_values")]
    assert len(caches) == 2 * engine.shape.decoder.layers
    assert all(isinstance(size, int) for tensor in caches for size in tensor.shape[1:])


@pytest.mark.parametrize("preset", PRESETS)
def test_layer_reports_say_that_every_attention_has_its_lengths(built: dict[str, Engine], preset: str) -> None:
    engine = built[preset]
    report = json.loads((engine.path / engines_of(engine)["language"].layers).read_text())
    attention = [row["attention"] for row in report if row["type"] == "ATTENTION_INPUT"]
    assert len(attention) == engine.shape.decoder.layers
    assert all(row["causality"] == "LOWER_RIGHT" and row["key_value_lengths"] and row["decomposable"] for row in attention)
    assert len({row["key_value_lengths"] for row in attention}) == len(engine.segments)


@pytest.mark.parametrize("preset", PRESETS)
def test_profiles_share_the_weights(built: dict[str, Engine], preset: str) -> None:
    """An engine that held them once for each profile would fill the GPU that it was pruned for."""
    engine = built[preset]
    total = 0
    for graph in engines_of(engine).values():
        found = re.search(r"Total Weights Memory: (\d+) bytes", (engine.path / graph.log).read_text())
        assert found is not None
        total += int(found[1])
    assert total < 1.1 * (engine.path / "weights.bin").stat().st_size


@pytest.mark.skipif(LOCAL_GPU is not None, reason="there is a GPU here")
def test_engines_are_not_deserialised_without_a_gpu_and_that_is_the_only_reason(built: dict[str, Engine]) -> None:
    """The library asks for the GPU's properties first: nothing of a plan can be read without one, so the network was checked instead."""
    library = load_library("tensorrt-rtx")
    library.log.clear()
    graph = engines_of(built["progressive"])["language"]
    plan = (built["progressive"].path / graph.file).read_bytes()
    assert library.trt.Runtime(library.loaders.get_trt_logger()).deserialize_cuda_engine(plan) is None
    assert any("CUDA driver version is insufficient" in line or "no CUDA-capable device" in line for line in library.said("ERROR"))


def test_a_flipped_byte_is_refused_by_name(built: dict[str, Engine], tmp_path: Path) -> None:
    source = built["progressive"]
    copy = Path(shutil.copytree(source.path, tmp_path / "engine"))
    names = [name for name in source.files if name.startswith("tensorrt-rtx/")]
    assert len(names) == 6
    for name in names:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(EngineError, match=f"{name}: damaged, its SHA-256 is not the one built"):
            open_engine(copy)
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    open_engine(copy)


@pytest.mark.skipif(LOCAL_GPU is not None, reason="there is a GPU here")
@pytest.mark.parametrize("command", [("run", "--prompt", "how many objects are there ?"), ("verify",), ("verify", "--bisect")], ids=" ".join)
def test_running_and_verifying_engines_need_a_gpu_and_say_so(built: dict[str, Engine], command: tuple[str, ...]) -> None:
    result = call(*command, built["tower"].path, "--target", "tensorrt-rtx")
    refused(result, "no NVIDIA GPU that CUDA can use")
    assert result.stderr.rstrip().endswith("use ONNX Runtime")


def test_an_altered_engine_is_refused_by_name_before_anything_else(built: dict[str, Engine], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built["tower"].path, tmp_path / "engine"))
    with (copy / "tensorrt-rtx" / "language.engine").open("r+b") as file:
        file.seek(1000)
        file.write(b"altered")
    result = call("run", copy, "--target", "tensorrt-rtx", "--prompt", "how many objects are there ?")
    refused(result, "tensorrt-rtx/language.engine: damaged, its SHA-256 is not the one built; build the engine again")


def test_run_takes_the_graphs_of_such_a_directory(built: dict[str, Engine], tmp_path: Path) -> None:
    Image.fromarray(picture(14, 14)).save(tmp_path / "picture.png")
    engine = built["tower"].path
    result = call("run", engine, "--image", tmp_path / "picture.png", "--prompt", "how many objects are there ?", "--max-new-tokens", 2, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["visual_tokens"]["input"] == 16


# ------------------------------------------------------------------------------------------------------------ what is refused


def refused(result: Result, message: str) -> None:
    """One line, exit code 1, and nothing traced."""
    assert result.exit_code == 1, result.output
    assert [line for line in result.stderr.splitlines() if message in line] == [result.stderr.splitlines()[-1]]
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "trace" not in result.stderr
    assert result.stdout == ""


def build_random(checkpoint: Path, output: Path, *options: Any) -> Result:
    return call("build", "--model", checkpoint, "--output", output, *LIMITS, *options)


@pytest.mark.parametrize("package", ["tensorrt_rtx", "polygraphy"])
def test_a_missing_package_is_named_with_what_to_install(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find_spec = tensorrt_targets.util.find_spec
    monkeypatch.setattr(tensorrt_targets.util, "find_spec", lambda name: None if name == package else find_spec(name))
    result = build_random(random_checkpoint, tmp_path / "e", "--target", "tensorrt-rtx")
    refused(result, f"--target tensorrt-rtx needs {package}; pip install 'vflow-export[tensorrt-rtx]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(LOCAL_GPU is not None, reason="there is a GPU here")
def test_tensorrt_needs_a_gpu_and_says_so(random_checkpoint: Path, tmp_path: Path) -> None:
    result = build_random(random_checkpoint, tmp_path / "e", "--target", "tensorrt")
    refused(result, "--target tensorrt builds on an NVIDIA GPU and there is none here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("capability", ["9.0", "8.7", "ampere"])
def test_an_unknown_compute_capability_is_refused(random_checkpoint: Path, tmp_path: Path, capability: str) -> None:
    result = build_random(
        random_checkpoint, tmp_path / "e", "--target", "tensorrt-rtx", "--compute-capability", "8.9", "--compute-capability", capability
    )
    refused(result, f"--compute-capability {capability}: TensorRT for RTX builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1")


def test_known_compute_capabilities_are_those_of_the_library() -> None:
    names = load_library("tensorrt-rtx").trt.ComputeCapability.__members__
    assert {f"SM{capability.replace('.', '')}" for capability in RTX_CAPABILITIES} == set(names) - {"NONE", "CURRENT"}
    check_targets(["tensorrt-rtx"], RTX_CAPABILITIES)


def test_the_gpu_here_is_asked_for_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """What libcuda answers for one GPU of compute capability 8.9."""

        failing = ""

        def __getattr__(self, name: str) -> Any:
            def function(*arguments: Any) -> int:
                if name == "cuDeviceGetAttribute":
                    arguments[0]._obj.value = {75: 8, 76: 9}[arguments[1]]
                return 100 if name == self.failing else 0

            return function

    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert gpu_capability() == "8.9"
    driver.failing = "cuInit"  # a driver without a GPU
    assert gpu_capability() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert gpu_capability() is None


# ------------------------------------------------------------------------------------- one engine in a process of its own


@pytest.fixture
def source(build: Callable[..., Engine], random_checkpoint: Path, tmp_path: Path) -> tuple[Engine, Path]:
    """An engine without targets, and a folder with its graphs in which targets can be built."""
    engine = build(random_checkpoint, SCHEDULE, "fp16")
    return engine, Path(shutil.copytree(engine.path, tmp_path / "engine"))


def build_here(engine: Engine, folder: Path, progress: Callable[[str, float], None] = lambda phase, share: None) -> dict[str, Any]:
    graphs = {"vision": engine.vision, "language": engine.language}
    return build_target("tensorrt-rtx", folder, graphs, engine.segments, Limits(MAX_VISUAL_TOKENS, MAX_TEXT_TOKENS), progress=progress)


def test_windows_and_proportional_attention_in_several_segments_are_built(
    build: Callable[..., Engine], windowed_checkpoint: Path, tmp_path: Path
) -> None:
    """The library crashes where a second cache of one column is written by TensorScatter."""
    stages = (Stage("tower", 2, 600, 2.0), Stage("decoder", 0, 400), Stage("decoder", 2, 150))
    engine = build(windowed_checkpoint, Schedule(stages, proportional_attention=1.5), "fp16")
    folder = Path(shutil.copytree(engine.path, tmp_path / "engine"))
    built = build_here(engine, folder)
    for name in GRAPHS:
        assert (folder / built[name]["file"]).read_bytes()[:4] == PLAN_MAGIC
    layers = json.loads((folder / "tensorrt-rtx" / "vision.layers.json").read_text())
    assert sum(row["attention"]["mask"] is not None for row in layers if row["type"] == "ATTENTION_INPUT") == 2  # blocks 0 and 2


def test_a_model_with_deepstack_is_built(build: Callable[..., Engine], deepstack_checkpoint: Path, tmp_path: Path) -> None:
    stages = (Stage("tower", 2, 600, 2.0), Stage("decoder", 0, 400), Stage("decoder", 1, 150))  # before and behind layers that add features
    engine = build(deepstack_checkpoint, Schedule(stages, guidance_weight=0.3), "fp16")
    folder = Path(shutil.copytree(engine.path, tmp_path / "engine"))
    built = build_here(engine, folder)
    for name in GRAPHS:
        assert (folder / built[name]["file"]).read_bytes()[:4] == PLAN_MAGIC


def test_what_stops_a_build_ends_the_process_that_builds(source: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    def interrupt(phase: str, share: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        build_here(*source, interrupt)
    assert len(started) == 1
    assert started[0].returncode is not None
    assert not list(source[1].glob(".tensorrt-rtx-*"))


def test_a_graph_that_cannot_be_built_is_said_in_one_line(source: tuple[Engine, Path]) -> None:
    engine, folder = source
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, folder / "vision.onnx")
    with pytest.raises(EngineError, match=r"^vision graph: \.tensorrt-rtx-vision\.onnx: tensorrt-rtx cannot parse it \(.*NoSuchOperator.*\)$"):
        build_here(engine, folder)


def before_it_dies(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Wait, so that the job is always written to a process that reads no more."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def test_a_process_that_dies_is_said_in_one_line(source: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_targets.sys, "executable", shutil.which("false"))
    started = subprocess.Popen
    monkeypatch.setattr(tensorrt_targets.subprocess, "Popen", lambda *arguments, **options: before_it_dies(started(*arguments, **options)))
    with pytest.raises(EngineError, match=r"^tensorrt-rtx died building the vision graph \(exit code 1\)$"):
        build_here(*source)


def job_of(engine: Engine, folder: Path) -> EngineJob:
    """The vision graph's, ready to run."""
    (folder / "tensorrt-rtx").mkdir()
    job = tensorrt_targets._job("tensorrt-rtx", folder, "vision", engine.vision, engine.segments, vision_profiles(engine.limits), (), None)
    onnx.save(graph_for_target("tensorrt-rtx", folder / "vision.onnx", engine.segments), job.graph)
    return job


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_stays_an_error_of_the_system(source: tuple[Engine, Path]) -> None:
    """So that whoever writes the directory says what to do about it."""
    job = dataclasses.replace(job_of(*source), engine="/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        tensorrt_targets._run(job, lambda: None)
    assert caught.value.errno == errno.ENOSPC


def test_the_process_ends_when_whoever_started_it_does(source: tuple[Engine, Path]) -> None:
    """As after SIGKILL, when nothing can be cleaned up: its stdin closes."""
    engine, folder = source
    job = job_of(engine, folder)
    process = subprocess.Popen([sys.executable, "-m", "vflow.exporter.tensorrt.engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    answer, _ = process.communicate(json.dumps(job.to_dict()).encode() + b"\n", timeout=60)
    assert process.returncode == 1
    assert answer == b""
    assert not Path(job.engine).exists()


def test_the_process_does_not_load_what_only_exporting_needs() -> None:
    """PyTorch would be a third of its memory, and of its time."""
    code = "import sys, vflow.exporter.tensorrt.engine; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_job_survives_being_written_as_json(built: dict[str, Engine]) -> None:
    graph = built["tower"].targets["tensorrt-rtx"].language
    job = EngineJob("tensorrt-rtx", "g", "e", "l", "r", graph.inputs, graph.outputs, graph.profiles, ("8.9",), "p")
    assert EngineJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_build_that_is_stopped_leaves_no_engine(random_checkpoint: Path, tmp_path: Path, number: signal.Signals, graph: str) -> None:
    output = tmp_path / "engine"
    command = [sys.executable, "-c", "from vflow.exporter.cli import main; main()", "build", "--model", str(random_checkpoint)]
    options = ["--output", str(output), "--precision", "fp32", "--target", "tensorrt-rtx", *LIMITS]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    for line in process.stderr:
        if f"build tensorrt-rtx {graph}" in line:
            break
    time.sleep(1.0)
    process.send_signal(number)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    process.wait(60)
    assert not output.exists()
    if number == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []
    for left in tmp_path.iterdir():
        with pytest.raises(EngineError):
            open_engine(left)
