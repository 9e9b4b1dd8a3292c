"""What docs/triton.md and deploy/ say agrees with the code. Nothing of it is run: there is no Docker and no cluster here."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from vflow.engines import kv_segments
from vflow.engines.batcher import DEFAULT_SLOTS
from vflow.engines.gauges import GAUGES
from vflow.engines.triton_server.interface import INPUTS, OUTPUTS, PARAMETERS
from vflow.engines.triton_server.model import SHOWN, STUCK_SECONDS
from vflow.engines.triton_server.settings import DEFAULT_DRAIN, DEFAULT_QUEUE_LIMIT
from vflow.exporter.presets import preset_schedule
from vflow.exporter.schedule import unpruned_schedule
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
QWEN2_VL_2B = ModelShape(
    TowerShape(blocks=32, embed_dim=1280, heads=16, mlp_dim=5120, patch_dim=1176, merge_size=2),
    DecoderShape(layers=28, hidden_size=1536, heads=12, kv_heads=2, head_dim=128, mlp_dim=8960, vocab_size=151936),
)


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """The Kubernetes objects, by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())}


@pytest.fixture(scope="module")
def container(objects: dict[str, Any]) -> dict[str, Any]:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_objects_belong_together(objects: dict[str, Any], container: dict[str, Any]) -> None:
    assert set(objects) == {"Deployment", "Service", "PodMonitor", "HorizontalPodAutoscaler"}
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == objects["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {port["targetPort"]: port["port"] for port in objects["Service"]["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in objects["PodMonitor"]["spec"]["podMetricsEndpoints"]} <= set(ports)
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", objects["Deployment"]["metadata"]["name"])
    volumes = {volume["name"] for volume in objects["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}


def test_kubernetes_waits_longer_than_triton_drains(objects: dict[str, Any], container: dict[str, Any]) -> None:
    (timeout,) = (int(argument.partition("=")[2]) for argument in container["args"] if argument.startswith("--exit-timeout-secs="))
    (pause,) = (int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"] if word.isdigit())
    assert objects["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > timeout + pause
    assert timeout > DEFAULT_DRAIN


def test_what_is_scaled_on_is_a_gauge_that_the_model_has(objects: dict[str, Any]) -> None:
    (metric,) = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in [GAUGES[field][0] for field in SHOWN]
    assert float(metric["pods"]["target"]["averageValue"]) < DEFAULT_QUEUE_LIMIT
    (rule,) = yaml.safe_load((ROOT / "deploy" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == name and rule["seriesQuery"].startswith(name + "{")
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_the_probe_is_a_module_of_the_package(container: dict[str, Any]) -> None:
    command = container["livenessProbe"]["exec"]["command"]
    assert command[1] == "-m" and (ROOT / Path(*command[2].removeprefix("vflow.").split(".")).with_suffix(".py")).is_file()
    assert command[2] in GUIDE


def test_the_image_is_pinned_and_copies_what_the_package_is_built_from() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    assert re.search(r"^ARG TRITON=\d\d\.\d\d$", text, re.MULTILINE)
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"engines", "exporter", "plugins", "pyproject.toml"} <= set(copied)


def test_the_guide_names_every_tensor_parameter_and_gauge() -> None:
    rows = [line for line in GUIDE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])}
    tensors = {spec.name for spec in (*INPUTS, *OUTPUTS)}
    assert named == tensors | set(PARAMETERS) | {GAUGES[field][0] for field in SHOWN} | {"infer"}
    for spec in INPUTS:
        (row,) = (row for row in rows if f"`{spec.name}`" in row.split("|")[1])
        assert row.split("|")[2].strip().startswith(f"{spec.dtype} [")
    for default in (
        f"at a time ({DEFAULT_SLOTS})",
        f"may wait ({DEFAULT_QUEUE_LIMIT})",
        f"is unloaded ({DEFAULT_DRAIN:g})",
        f"within {STUCK_SECONDS} s",
    ):
        assert default in GUIDE


@pytest.mark.parametrize("text_tokens", [1024, 256])
def test_the_worked_example_is_what_the_formula_gives(text_tokens: int) -> None:
    layers = QWEN2_VL_2B.decoder.layers
    bytes_of_slots = []
    for schedule in (unpruned_schedule(), preset_schedule("progressive", QWEN2_VL_2B, 0.1)):
        segments = kv_segments(schedule, layers, max_visual_tokens=1280, max_text_tokens=text_tokens)
        if text_tokens == 1024:
            assert " + ".join(f"{segment.layers} × {segment.capacity:,}" for segment in segments) in GUIDE
        bytes_of_slots.append(sum(segment.layers * segment.capacity for segment in segments) * 2 * 2 * 128 * 2)
    slots = [8 * 2**30 // size for size in bytes_of_slots]
    if text_tokens == 1024:
        assert all(f"{size:,} | {count} |" in GUIDE for size, count in zip(bytes_of_slots, slots, strict=True))
    else:
        assert f"{bytes_of_slots[0]:,} and {bytes_of_slots[1]:,} bytes, {slots[0]} and {slots[1]} slots" in GUIDE
        assert f"{math.ceil(500 / slots[0])} replicas, or {math.ceil(500 / slots[1])}" in GUIDE
