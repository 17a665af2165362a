"""A picture per figure, out of its newest line.

Owns: PNG files in results/plots. Does not own: measuring, or the lines.

Invariant: a picture shows one run; rounds of different runs or machines never meet in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from bench import results

_GROUPS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "hot_get": (("_cpu_us", "server CPU, µs per request"), ("_per_s", "requests per second")),
    "tls_get": (("_cpu_us", "server CPU, µs per request"), ("_per_s", "requests per second")),
    "peer_get": (("_cpu_us", "CPU of both nodes, µs per request"), ("_per_s", "requests per second")),
    "cold_get": (("_cpu_us_per_mib", "CPU, µs per MiB"), ("_mb_s", "MB/s"), ("_first_ms", "ms to first byte")),
    "put": (("_mb_s", "MB/s"), ("_cpu_us_per_mib", "CPU of kos, µs per MiB")),
    "uploads": (
        ("_mb_s", "MB/s"),
        ("_node_us_per_mib", "CPU of kos, µs per MiB"),
        ("_client_us_per_mib", "CPU of the client, µs per MiB"),
    ),
    "small_files": (("_per_s", "requests per second"), ("_cpu_us", "CPU of kos, µs per request")),
    "memory": (("_mb", "MB"),),
    "scaling": (
        ("_cpu_share", "CPU of a daemon, of a core"),
        ("_build_ms", "to build a ring, ms"),
        ("_moved_over_share", "blocks that move, over the share of who leaves"),
        ("_worst", "blocks of one object: most over its share"),
    ),
}
_COLOURS: Final = {"kos": "#1f77b4", "nginx": "#2ca02c", "direct": "#7f7f7f", "floor": "#8c564b"}


def draw(figure: str) -> Path | None:
    """Draw the newest full run of a figure; None where there is none yet."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lines = results.lines(figure)
    if not lines:
        return None
    line = lines[-1]
    groups = _GROUPS[figure]
    picture, axes = pyplot.subplots(1, len(groups) + 1, figsize=(6 * (len(groups) + 1), 5), layout="constrained")
    for axis, (suffix, title) in zip(axes, groups, strict=False):
        _values(axis, {n: v for n, v in line["values"].items() if n.endswith(suffix)}, suffix, title)
    _ratios(axes[-1], line["ratios"])
    machine = line["machine"]
    picture.suptitle(f"{figure} · {line['commit']} · {line['date']} · {machine['cpu']}, {machine['cores']} cores")
    path = results.RESULTS / "plots" / f"{figure}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    pyplot.close(picture)
    return path


def _values(axis: Any, values: dict[str, Any], suffix: str, title: str) -> None:
    """Medians as bars, single rounds as dots; logarithmic where they differ by more than a hundred times."""
    names = [name.removesuffix(suffix) for name in values]
    medians = [v["median"] for v in values.values()]
    colours = [_COLOURS.get(name.split("_")[0], "#9467bd") for name in names]
    axis.barh(names, medians, color=colours, alpha=0.7)
    for i, v in enumerate(values.values()):
        axis.plot(v["rounds"], [i] * len(v["rounds"]), "k.", markersize=4)
        axis.annotate(f"{v['median']:g}", (v["median"], i), xytext=(4, 4), textcoords="offset points", fontsize=8)
    if medians and max(medians) > 100 * max(min(medians), 1e-9):
        axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_title(title)
    axis.tick_params(axis="y", labelsize=8)


def _ratios(axis: Any, ratios: dict[str, Any]) -> None:
    """Ratios with their limits: green held, red missed, grey without a limit."""
    colours = {True: "#2ca02c", False: "#d62728", None: "#bbbbbb"}
    axis.barh(
        list(ratios),
        [r["of_medians"] for r in ratios.values()],
        color=[colours[r.get("held")] for r in ratios.values()],
    )
    for i, r in enumerate(ratios.values()):
        limit = r.get("at_most", r.get("at_least"))
        if limit is not None:
            axis.plot([limit, limit], [i - 0.4, i + 0.4], "k-", linewidth=2)
        axis.annotate(
            f"{r['of_medians']:g}", (r["of_medians"], i), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
    axis.invert_yaxis()
    axis.set_title("ratios (bar: the limit)")
    axis.tick_params(axis="y", labelsize=8)
