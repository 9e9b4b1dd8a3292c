"""Plots of quality against cost and of times, with matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outputs import check_file
from .schedule import ScheduleError

if TYPE_CHECKING:
    from .evaluate import Evaluation

__all__ = ["NOTHING_TO_PLOT", "PlotLine", "check_plot", "evaluation_plot", "first_token_plot", "plot_lines"]

PlotLine = Sequence[tuple[float, float]]  # (cost, quality), in the order in which they are joined
ENDINGS = (".png", ".svg", ".pdf")
MARKERS = "osD^vP*X<>ph"
NOTHING_TO_PLOT = "nothing to plot: the data has no answers and no --reference was given"


def plot_lines(lines: Mapping[str, PlotLine], path: Path, *, cost: str, quality: str, title: str, emphasised: Sequence[str] = ()) -> None:
    """Draw one line a method, cost on a logarithmic axis; the format follows the file's ending (.png, .svg, .pdf).

    Raises:
        ScheduleError: matplotlib is missing, or the ending is none that it writes.
    """
    pyplot = _import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (name, points) in enumerate(lines.items()):
        strong = name in emphasised or not emphasised
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6 if strong else 4,
            linewidth=2.2 if strong else 1,
            alpha=1 if strong else 0.65,
            label=name,
        )
    axes.set(xlabel=cost, ylabel=quality, title=title, xscale="log")
    ticks = [0.05, 0.1, 0.2, 0.3, 0.5, 1.0]
    low = min((point[0] for points in lines.values() for point in points), default=0.05)
    axes.set_xticks([tick for tick in ticks if tick >= low / 1.5], [f"{tick:g}" for tick in ticks if tick >= low / 1.5])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(pyplot, figure, path)


def evaluation_plot(results: Sequence[Evaluation], path: Path) -> None:
    """Right answers, or where there are no labels the overlap, against prefill FLOPs: a line a method over its keeps."""
    labelled = all(result.total for result in results)
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in sorted(results, key=lambda result: result.prefill_flops):
        quality = result.total.accuracy if labelled and result.total else result.agreement.overlap if result.agreement else None
        if quality is None:
            raise ScheduleError(NOTHING_TO_PLOT)
        lines.setdefault(result.name, []).append((result.prefill_flops, quality))
    quality_name = "share of right answers" if labelled else "overlap of the first token's distribution with the unpruned model's"
    plot_lines(lines, path, cost="prefill FLOPs, share of the unpruned", quality=quality_name, title="Quality against cost")


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before what is to be plotted takes its time.

    Raises:
        ScheduleError: as ``plot_lines`` and ``check_file``.
    """
    _import_pyplot()
    if path.suffix not in ENDINGS:
        raise ScheduleError(f"{path}: end its name in .png, .svg or .pdf")
    check_file(path, "plot")


def first_token_plot(values: Mapping[str, Any], path: Path) -> None:
    """Median time to first token of every subject, a bar for each and a panel a side, from ``bench_values``.

    Raises:
        ScheduleError: as ``plot_lines``.
    """
    pyplot = _import_pyplot()
    results = values["results"]
    sides = [entry["side"] for entry in results[0]["sides"]]
    figure, panels = pyplot.subplots(1, len(sides), figsize=(1 + 4.5 * len(sides), 1.5 + 0.5 * len(results)), layout="constrained", squeeze=False)
    names = [Path(result["name"]).name if result["kind"] == "engine" else result["name"] for result in results]
    for number, (side, axes) in enumerate(zip(sides, panels[0], strict=True)):
        medians = [result["sides"][number]["median_s"] for result in results]
        vision = [entry["vision"] or 0.0 for entry in medians]
        rest = [entry["first token"] - part for entry, part in zip(medians, vision, strict=True)]
        told = [entry["prefill"] is not None for entry in medians]
        axes.barh(names, vision, label="vision")
        axes.barh(names, [part if known else 0.0 for part, known in zip(rest, told, strict=True)], left=vision, label="prefill and sampling")
        if not all(told):
            axes.barh(names, [0.0 if known else part for part, known in zip(rest, told, strict=True)], color="grey", label="not told apart")
        axes.set(title=f"{side}×{side}", xlabel="seconds to first token", yticks=range(len(names)) if number == 0 else [])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)  # no bar is behind it
    _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ScheduleError(f"{path}: {error}; end its name in .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)


def _import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ScheduleError("plots need matplotlib: pip install 'vflow-export[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
