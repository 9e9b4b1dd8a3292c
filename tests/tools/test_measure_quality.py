"""Tables of quality: what several processes have counted is put together as if one had."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vflow.exporter.evaluate import wilson_interval

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("measure_quality")
    sys.modules.pop("measure_quality", None)


def score(right: int, n: int) -> dict[str, Any]:
    return {"accuracy": right / n, "interval": wilson_interval(right, n), "n": n}


def result(name: str, right: int, n: int, *, target: float = 0.1, cosine: float = 0.9) -> dict[str, Any]:
    costs = {"average_keep": target, "prefill_flops": 0.5, "kv_visual_bytes": 10, "visual_tokens": 256.0, "kept": 26.0}
    agreement = {"first_token": 0.5, "overlap": 0.8, "cosine": cosine}
    return {"target": target, "name": name, **costs, "total": score(right, n), "by_kind": {"shape": score(right, n)}, "agreement": agreement}


def test_shards_are_joined_question_by_question(tool: Any, tmp_path: Path) -> None:
    for shard, (right, n, cosine) in enumerate(((5, 10, 0.8), (20, 30, 1.0))):
        document = {"setup": {"samples": n, "side": 448}, "results": [result("a", right, n, cosine=cosine)]}
        (tmp_path / f"keep-{shard}-of-2.json").write_text(json.dumps(document))
    joined = tool.load(tmp_path, "keep")
    assert joined["setup"]["samples"] == 40
    (only,) = joined["results"]
    assert only["total"] == {"accuracy": 25 / 40, "interval": list(wilson_interval(25, 40)), "n": 40}
    assert only["by_kind"]["shape"]["n"] == 40
    assert only["agreement"]["cosine"] == pytest.approx((0.8 * 10 + 1.0 * 30) / 40)
    assert json.loads((tmp_path / "keep.json").read_text()) == joined


def test_a_budget_that_a_method_cannot_meet_is_a_dash(tool: Any) -> None:
    rows = [result("unpruned", 9, 10, target=1.0), result("a", 8, 10, target=0.1), result("a", 9, 10, target=0.2), result("b", 5, 10, target=0.2)]
    lines = tool.pivot(rows, (0.2, 0.1))
    assert lines[0] == "| | 0.2 | 0.1 |"
    assert lines[3].startswith("| a | 0.900 (") and "| 0.800 (" in lines[3]
    assert lines[4].startswith("| b | 0.500 (") and lines[4].endswith("| — |")


def test_only_the_rows_asked_for_are_measured_again(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, names = tmp_path / "keep.json", ["unpruned", "a", "tuned", "b", "tuned"]
    rows = [(number / 10, SimpleNamespace(name=name)) for number, name in enumerate(names)]
    results = [result(candidate.name, 1, 4, target=target) for target, candidate in rows]
    document = {"setup": {"samples": 4, "side": 448}, "results": results}
    path.write_text(json.dumps(document))
    bench = tool.Bench.__new__(tool.Bench)
    bench.questions = [None] * 4
    monkeypatch.setattr(bench, "by_keep", lambda: rows, raising=False)
    monkeypatch.setattr(bench, "measure", lambda chosen: {"results": [result(c.name, 3, 4, target=t) for t, c in chosen]}, raising=False)
    bench.measure_again(path, ["tuned"])
    after = json.loads(path.read_text())
    assert [row["total"]["accuracy"] for row in after["results"]] == [0.25, 0.25, 0.75, 0.25, 0.75]
    bench.questions = [None] * 5
    with pytest.raises(SystemExit, match="has 4 questions; give --samples so many"):
        bench.measure_again(path, ["tuned"])
