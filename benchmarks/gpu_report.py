"""What the figures of `gpu_matmul.py` mean, as tables and as a plot."""

import statistics
from pathlib import Path
from typing import Any

import gpu_weights

OURS, DENSE = "qjax", "dense"

Figures = dict[str, Any]


def floor(nbytes: int, m: int, k: int, n: int, rates: dict[str, float]) -> float:
    """The least microseconds of a product: bytes moved once, or operations."""
    moved = nbytes + 2 * m * (k + n)
    return 1e6 * max(moved / rates["bytes"], 2 * m * k * n / rates["operations"])


def judge(results: Figures, shape: tuple[int, int, int], rates: Figures) -> None:
    """Adds what figures mean: bandwidth, share of the floor, ratios."""
    m, k, n = shape
    ran = {name: r for name, r in results.items() if "us" in r}
    dense = [r["us"] for name, r in ran.items() if name.startswith(DENSE)]
    for name, r in ran.items():
        nbytes = r["weight_bytes"]
        r["gb_per_s"] = (nbytes + 2 * m * (k + n)) / r["us"] / 1e3
        r["floor_share"] = floor(nbytes, m, k, n, rates) / r["us"]
        if dense:
            r["against_dense"] = min(dense) / r["us"]
        peers = [
            other["us"]
            for peer, other in ran.items()
            if other["bits"] == r["bits"] and not peer.startswith((OURS, DENSE))
        ]
        if peers and name.startswith(OURS):
            r["against_best_peer"] = min(peers) / r["us"]


def table(title: str, results: Figures) -> str:
    """Renders the results of one shape as Markdown."""
    lines = [
        f"\n**{title}**\n",
        "| engine | us (least to most) | GB/s | of the roof | against dense "
        "| against the best peer | error | timed as |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        if "us" not in r:
            lines.append(f"| {name} | {r['failed']} | | | | | | |")
            continue
        low, high = r["spread_us"]
        ratios = (r.get(key) for key in ("against_dense", "against_best_peer"))
        dense, peer = ("" if x is None else f"{x:.2f}" for x in ratios)
        lines.append(
            f"| {name} | {r['us']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {r['gb_per_s']:.0f} | {r['floor_share']:.0%} | {dense} | {peer} "
            f"| {r['error']:.0e} | {r['how']} |"
        )
    return "\n".join(lines)


def layout_table(title: str, rows: list[Figures], rates: Figures) -> str:
    """Renders the moves between layouts as Markdown."""
    lines = [
        f"\n**{title}**\n",
        "| move | us | GB/s | of a copy |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} | | |")
            continue
        seconds = statistics.median(row["seconds"])
        speed = row["bytes"] / seconds
        row["of_copy"] = speed / rates["bytes"]
        lines.append(
            f"| {row['name']} | {1e6 * seconds:.1f} | {speed / 1e9:.0f} "
            f"| {row['of_copy']:.0%} |"
        )
    return "\n".join(lines)


def draw(report: Figures, file: Path) -> None:
    """Draws speed against M, a panel for each shape, with the roofs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shapes = sorted({tuple(r["shape"][1:]) for r in report["results"]})
    figure, panels = pyplot.subplots(
        1,
        len(shapes),
        figsize=(6 * len(shapes), 5),
        squeeze=False,
        layout="constrained",
    )
    labels: dict[str, Any] = {}
    for axes, (k, n) in zip(panels[0], shapes, strict=True):
        of_shape = [r for r in report["results"] if tuple(r["shape"][1:]) == (k, n)]
        names = dict.fromkeys(name for r in of_shape for name in r["engines"])
        ms = [r["shape"][0] for r in of_shape]
        for bits, style in ((16, "k--"), (4, "k:")):
            nbytes = int(
                k * n * (bits + (24 / gpu_weights.GROUP if bits == 4 else 0)) / 8
            )
            roof = [
                2e-6 * m * k * n / floor(nbytes, m, k, n, report["rates"]) for m in ms
            ]
            (line,) = axes.plot(ms, roof, style, linewidth=1)
            labels.setdefault(f"roof, {bits} bits", line)
        for i, name in enumerate(names):
            points = [
                (r["shape"][0], 2e-6 * r["shape"][0] * k * n / r["engines"][name]["us"])
                for r in of_shape
                if "us" in r["engines"].get(name, {})
            ]
            if points:
                marker = "o" if name.startswith(OURS) else "x"
                (line,) = axes.plot(*zip(*points, strict=True), f"C{i}{marker}-", ms=4)
                labels.setdefault(name, line)
        axes.set(xscale="log", yscale="log", title=f"{k} x {n}", xlabel="rows")
        axes.set_xscale("log", base=2)
    panels[0][0].set_ylabel("TFLOP/s")
    what = report["device"]["device"]
    title = f"Products with packed weights, {what}{report['warning']}"
    figure.suptitle(title, fontsize=9)
    figure.legend(labels.values(), labels, loc="outside right center", fontsize=7)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
