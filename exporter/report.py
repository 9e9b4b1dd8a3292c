"""What the commands show: tables of what a schedule saves, what a run took, what verification found. Text in them is no markup (``print_tables``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..engines.manifest import Engine
from ..engines.results import GenerationResult, held_bytes, token_bytes
from .budget import cost
from .schedule import KEEP_UNIT, Schedule, unpruned_schedule
from .shape import ModelShape

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .tune import FrontPoint
    from .verify import Finding

__all__ = ["build_table", "bytes_text", "evaluation_tables", "front_table", "run_lines", "schedule_lines", "verify_table"]

AGREEMENT = ("first token", "overlap", "cosine")  # columns
REPORT_TEXT_TOKENS = 64  # prompt length at which FLOPs are shown


def build_table(engine: Engine) -> Table:
    """Visual tokens, FLOPs and KV bytes from stage to stage, before and after pruning, for the largest square image."""
    side = math.isqrt(engine.limits.max_visual_tokens)
    schedule, shape = engine.schedule, engine.shape
    pruned = cost(schedule, shape, rows=side, columns=side, text_tokens=REPORT_TEXT_TOKENS)
    full = cost(unpruned_schedule(), shape, rows=side, columns=side, text_tokens=REPORT_TEXT_TOKENS)
    pixels = side * engine.image_processor.factor
    keep = schedule.average_keep(shape.decoder.layers)
    title = f"{engine.model_name} · {_precision(engine)} · average keep {keep:.3f} · image of {pixels}×{pixels}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("part", "visual tokens", "GFLOP before", "after", "KV before", "after"):
        table.add_column(heading, justify="left" if heading == "part" else "right")

    table.add_row("patches and merger", str(side * side), _giga(full.embed_flops), _giga(pruned.embed_flops), "", "")
    if pruned.scoring_flops:
        table.add_row("importance and merging", "", "0", _giga(pruned.scoring_flops), "", "")
    for first, end in _runs(pruned.tower_tokens):
        before, after = sum(full.tower_block_flops[first:end]), sum(pruned.tower_block_flops[first:end])
        table.add_row(_span("tower", first, end), str(pruned.tower_tokens[first]), _giga(before), _giga(after), "", "")
    for first, end in _runs(pruned.decoder_tokens):
        before, after = sum(full.decoder_layer_flops[first:end]), sum(pruned.decoder_layer_flops[first:end])
        kv_before = sum(full.decoder_tokens[first:end]) * token_bytes(engine)
        kv_after = held_bytes(engine, [pruned.decoder_tokens[s.first_layer] if first <= s.first_layer < end else 0 for s in engine.segments])
        tokens = str(pruned.decoder_tokens[first])
        table.add_row(_span("decoder", first, end), tokens, _giga(before), _giga(after), bytes_text(kv_before), bytes_text(kv_after))
    table.add_section()
    kv_before = sum(full.decoder_tokens) * token_bytes(engine)
    kv_after = held_bytes(engine, [pruned.decoder_tokens[segment.first_layer] for segment in engine.segments])
    saved = f"{full.flops / pruned.flops:.2f}× less" if pruned.flops < full.flops else ""
    table.add_row("prefill", saved, _giga(full.flops), _giga(pruned.flops), bytes_text(kv_before), bytes_text(kv_after))
    return table


def schedule_lines(schedule: Schedule, shape: ModelShape) -> Iterator[str]:
    """The stages and settings of a schedule, a line each."""
    for stage in schedule.stages:
        recycled = f", merged into cells of {stage.recycle:.1f} tokens" if stage.recycle is not None else ""
        yield f"before {stage.part} {stage.layer}: keep {stage.keep / KEEP_UNIT:.3f}{recycled}"
    settings = schedule.importance
    yield f"global threshold {settings.global_threshold:.2f}, entropy weight {settings.entropy_weight:.2f}, guidance {schedule.guidance_weight:.2f}"
    if schedule.proportional_attention:
        yield f"proportional attention {schedule.proportional_attention:.2f}"
    yield f"average keep {schedule.average_keep(shape.decoder.layers):.4f}"


def run_lines(result: GenerationResult) -> Iterator[str]:
    """What a run took, a line each."""
    speed = f"{result.tokens_per_s:.0f} tokens/s" if result.tokens_per_s is not None else "one token"
    yield f"first token    {result.ttft_s * 1e3:.0f} ms (vision {result.vision_s * 1e3:.0f}, prefill {result.prefill_s * 1e3:.0f}), then {speed}"
    if result.visual_tokens:
        stages = " → ".join(f"{stage.kept} ({stage.part} {stage.layer})" for stage in result.stages)
        yield f"visual tokens  {result.visual_tokens}" + (f" → {stages}" if stages else ", nothing pruned")
    kv = result.kv_bytes
    yield f"KV cache       {bytes_text(kv.allocated)} allocated; visual part {bytes_text(kv.visual)} of {bytes_text(kv.visual_unpruned)} unpruned"


def verify_table(engine: Engine, findings: Sequence[Finding], inputs: int, seconds: float) -> Table:
    """One row a comparison."""
    title = f"{engine.path} · {_precision(engine)} · {inputs} inputs · {seconds:.0f} s"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "compared", "worst", "allowed", ""):
        table.add_column(heading, justify="right" if heading in ("worst", "allowed") else "left")
    for finding in findings:
        verdict = Text("ok", "green") if finding.passed else Text("FAILED", "red")
        quantity = f"{finding.quantity} ({finding.note})" if finding.note else finding.quantity
        table.add_row(f"({finding.rung})", quantity, f"{finding.worst:.3g}", f"{finding.tolerance:.3g}", verdict)
    return table


def evaluation_tables(results: Sequence[Evaluation]) -> Iterator[Table]:
    """A row an engine or method: what it cost, right answers, agreement with the unpruned model; and right answers per kind."""
    labelled, agreed = any(result.total for result in results), any(result.agreement for result in results)
    count = max((result.total.n for result in results if result.total), default=0)
    headings = ["keep", "FLOPs", "visual KV, fp16", "tokens", *(["right", "95 %"] if labelled else []), *(AGREEMENT if agreed else [])]
    title = "agreement with the unpruned model" if agreed else "cost alone: questions without answers, and no --reference"
    table = _table(f"{count} questions, share of right answers" if labelled else title, headings)
    for result in results:
        row = [f"{result.average_keep:.3f}", f"{result.prefill_flops:.3f}", bytes_text(result.kv_visual_bytes)]
        row.append(f"{result.visual_tokens:.0f} → {result.kept:.0f}")
        if labelled:
            row += [f"{result.total.accuracy:.3f}", "{:.3f}–{:.3f}".format(*result.total.interval)] if result.total else ["", ""]
        if agreed:
            same = result.agreement
            row += [f"{same.first_token:.3f}", f"{same.overlap:.3f}", f"{same.cosine:.4f}"] if same else [""] * len(AGREEMENT)
        table.add_row(result.name, *row)
    yield table
    kinds = list(dict.fromkeys(kind for result in results for kind in result.by_kind))
    if len(kinds) > 1:
        table = _table("by kind", ["keep", *kinds])
        for result in results:
            shares = (f"{result.by_kind[kind].accuracy:.2f}" if kind in result.by_kind else "" for kind in kinds)
            table.add_row(result.name, f"{result.average_keep:.3f}", *shares)
        yield table


def _table(title: str, headings: Sequence[str]) -> Table:
    """A table of numbers whose first column names them."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def front_table(front: Sequence[FrontPoint], resource: str, measure: str) -> Table:
    """A row a schedule, cheapest first."""
    table = Table(title=f"front of quality against {resource}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("schedule", "average keep" if resource == "kv" else "prefill FLOPs", measure):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    for number, point in enumerate(front):
        table.add_row(f"schedule-{number:02d}.json", f"{point.cost:.4f}", f"{point.value:.4f}")
    return table


def bytes_text(count: int) -> str:
    """Bytes with a binary unit."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _precision(engine: Engine) -> str:
    return engine.precision if engine.weights == "full" else f"{engine.precision}, {engine.weights} weights"


def _runs(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of equal token counts: (first, end)."""
    first = 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or tokens[place] != tokens[first]:
            yield first, place
            first = place


def _span(part: str, first: int, end: int) -> str:
    return f"{part} {first}" if end == first + 1 else f"{part} {first}–{end - 1}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.2f}"
