"""python -m benchmarks.report: write the tables and pictures of every results file.

Writes benchmarks/README.md and, per device, docs/roofline-<device>.svg and docs/scaling-<device>.svg; and replaces the
text between the `results` markers of README.md by five rows of the newest results of each kind of device and the
multi-frame tax. Every figure comes from benchmarks/results/*.json. A device's figures under glibc's default allocator
(`python -m benchmarks --default-allocator`, saved in <device>-default-allocator.json) get a column next to the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .bench_ops import PRODUCTS
from .measure import ALLOCATOR, DEFAULT_ALLOCATOR

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"
# The ops that README.md shows, each at its first measured size: in bf16 where the device multiplies it, else in fp32.
SHOWN = (
    "multi_horizon_loss",
    "video_pyramid",
    "fan_out",
    "multi_horizon_linear",
    "multi_horizon_linear_cross_entropy",
)
ORDER = (PRODUCTS, "eager", "torch.compile", "F.linear_cross_entropy", "Liger", "CCE", "QuACK", "modded-nanogpt")


def load() -> dict[str, dict[str, Any]]:
    """The stem of each results file -> the results of a device."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    read = {file.stem: json.loads(file.read_text()) for file in files}
    return {stem: results for stem, results in read.items() if "ops" in results}


def devices(all_results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The results that get a section of their own."""
    return [(stem, results) for stem, results in all_results.items() if not stem.endswith(DEFAULT_ALLOCATOR)]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(row: dict[str, Any]) -> str:
    return f"{three_digits(row['median_ms'])} ({three_digits(row['p20_ms'])} to {three_digits(row['p80_ms'])})"


def three_digits(number: float) -> str:
    """Three significant digits, never with an exponent: 0.694, 22.7, 4,050."""
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 100 else f"{number:.3g}"


def ops_table(results: dict[str, Any], dtype: str, by_default: dict[str, Any] | None = None) -> str:
    """Each contender at each size: time, share of the roof, ratio to torch.compile; `by_default` in the last column."""
    lines = []
    beside = {
        (*sort_key(row), row["contender"]): f"{milliseconds(row)}, {row['share_of_roof']:.0%}{to_compile(row, ', ')}"
        for row in ([] if by_default is None else by_default["ops"])
        if row["dtype"] == dtype and row["status"] == "ok"
    }
    for row in sorted((row for row in results["ops"] if row["dtype"] == dtype), key=sort_key):
        head = [f"`{row['op']}`", row["size"], row["contender"]]
        if row["status"] != "ok":
            lines.append([*head, row["status"], "", "", "", ""])
        else:
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            figures = [milliseconds(row), f"{row['share_of_roof']:.0%}", to_compile(row), error]
            lines.append([*head, *figures, beside.get((*sort_key(row), row["contender"]), "")])
    head = ["op", "size", "contender", "ms, median (20 to 80 %)", "of the roof", "to torch.compile", "error"]
    head.append("the same with the default allocator")
    return table(head, lines) if beside else table(head[:-1], (line[:-1] for line in lines))


def to_compile(row: dict[str, Any], before: str = "") -> str:
    return "" if row["to_compile"] is None else f"{before}{row['to_compile']:.2f}x"


def sort_key(row: dict[str, Any]) -> tuple[str, str, int]:
    contender = row["contender"]
    return row["op"], row["size"], ORDER.index(contender) if contender in ORDER else len(ORDER)


def best(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Per op, size and dtype: the row of our fastest backend, and of the fastest rival."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(results["ops"], key=sort_key):
        if row["status"] == "ok" and row["contender"] != PRODUCTS:
            groups.setdefault((row["op"], row["size"], row["dtype"]), []).append(row)
    for rows in groups.values():
        ours = [row for row in rows if row["contender"].startswith("mfwm")]
        theirs = [row for row in rows if not row["contender"].startswith("mfwm")]
        if ours:
            yield (
                min(ours, key=lambda row: row["median_ms"]),
                min(theirs, key=lambda row: row["median_ms"], default=None),
            )


def multiplies_bf16(results: dict[str, Any]) -> bool:
    environment = results["environment"]
    return bool(environment["driver"]) or environment["cpu_multiplies_bf16"]


def short_table(results: dict[str, Any]) -> str:
    dtype = "bf16" if multiplies_bf16(results) else "fp32"
    rows = {}
    for mine, rival in best(results):
        if mine["dtype"] == dtype:
            rows.setdefault(mine["op"], (mine, rival))
    lines = []
    for mine, rival in (rows[op] for op in SHOWN if op in rows):
        ratio = "" if rival is None else f"{rival['median_ms'] / mine['median_ms']:.2f}x {rival['contender']}"
        lines.append(
            [
                f"`{mine['op']}`",
                f"{mine['size']}, {mine['dtype']}",
                mine["contender"].removeprefix("mfwm "),
                three_digits(mine["median_ms"]),
                f"{mine['share_of_roof']:.0%}",
                ratio,
            ]
        )
    return table(("op", "size", "backend", "ms", "of the roof", "speed over the best rival"), lines)


def train_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        head = [f"{row['size']}, {row['dtype']}", row["contender"]]
        if row["status"] != "ok":
            lines.append([*head, row["status"], "", "", "", ""])
            continue
        lines.append(
            [
                *head,
                three_digits(row["next_frame_ms"]),
                three_digits(row["median_ms"]),
                f"**{row['tax']:.2f}x**",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['memory_tax']:.2f}x",
            ]
        )
    head = ("size", "contender", "next frame, ms", "four horizons, ms", "tax", "peak MiB", "memory tax")
    return table(head, lines)


def rollout_table(results: dict[str, Any]) -> str:
    lines = [
        [row["contender"], three_digits(row["ms_per_frame"]), f"{row['over_cached']:.1f}x"]
        for row in results["rollout"]
    ]
    return table(("64 frames", "ms a frame", "to cached"), lines)


def rollout_sentence(results: dict[str, Any]) -> str:
    (row,) = (row for row in results["rollout"] if row["contender"] == "cached")
    steps = row["steps"]
    return (
        f"One clip, fp32. Cached and uncached pixels, in -1..1, differ by at most {row['apart_from_uncached']:.0e}. "
        f"For its past a cached rollout holds {row[f'bytes_at_{steps // 2}'] / 2**20:.1f} MiB after {steps // 2} "
        f"frames and {row[f'bytes_at_{steps}'] / 2**20:.1f} MiB after {steps}. A loop that recomputes the last "
        "16 frames forgets what is further back, and gives other frames."
    )


def title(results: dict[str, Any]) -> str:
    here = results["environment"]
    versions = [f"torch {here['torch']}"]
    if here["driver"]:
        versions += [f"Triton {here['triton']}", f"driver {here['driver']}"]
    if not here["driver"]:
        versions.append(f"allocator: {here['allocator']}")
    return f"{here['device']} ({', '.join(versions)}; {here['date']})"


def scaling(results: dict[str, Any], file: Path) -> None:
    """Plot milliseconds of multi_horizon_loss against pixels of its video, one line per axis and dtype."""
    import matplotlib

    rows = results.get("scaling", [])
    if not rows:
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mfwm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for axis, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in rows):
        line = sorted((r["pixels"], r["median_ms"]) for r in rows if (r["size"], r["dtype"]) == (axis, dtype))
        style = {"marker": "o", "linestyle": "-" if dtype == "bf16" else "--"}
        axes.plot(*zip(*line, strict=True), label=f"more {axis}, {dtype}", **style)
    axes.set(xscale="log", yscale="log", xlabel="pixels of the video", ylabel="ms, forward and backward")
    axes.set_title(f"multi_horizon_loss on {title(results)}", fontsize=8)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def scaling_table(results: dict[str, Any]) -> str:
    """The cost of a pixel at the smallest and at the largest size of each axis."""
    lines = []
    rows = results["scaling"]
    for axis, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in rows):
        line = sorted((r["pixels"], r["ns_per_pixel"]) for r in rows if (r["size"], r["dtype"]) == (axis, dtype))
        growth = line[-1][0] / line[0][0]
        lines.append([f"{axis}, {dtype}", f"{growth:.0f}x", f"{line[0][1]:.2f}", f"{line[-1][1]:.2f}"])
    return table(("what grows", "by", "ns a pixel at the smallest", "at the largest"), lines)


def roofline(results: dict[str, Any], file: Path) -> None:
    """Plot FLOP/s against FLOP per byte that must move: our ops and torch.compile, under the measured roofs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mfwm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    rows = [row for row in results["ops"] if row["status"] == "ok" and row["dtype"] == "bf16"]
    if not rows:
        return
    bandwidth = max(row["copy_gb_per_s"] for row in rows) * 1e9
    peak = max(row["matmul_tflop_per_s"] for row in rows) * 1e12
    intensities = [row["floor_flops"] / row["floor_bytes"] for row in rows]
    lowest, highest = min(intensities) / 2, max(*intensities, 2 * peak / bandwidth) * 2
    grid = [lowest, peak / bandwidth, highest]
    axes.plot(grid, [min(peak, bandwidth * x) / 1e12 for x in grid], color="black", label="measured roof")
    for contender, marker in (("torch.compile", "x"), ("mfwm", "o")):
        chosen = [row for row in rows if row["contender"].startswith(contender)]
        axes.scatter(
            [row["floor_flops"] / row["floor_bytes"] for row in chosen],
            [row["floor_flops"] / row["median_ms"] / 1e9 for row in chosen],
            marker=marker,
            label=contender,
        )
        for row in chosen if contender == "mfwm" else []:
            where = row["floor_flops"] / row["floor_bytes"], row["floor_flops"] / row["median_ms"] / 1e9
            axes.annotate(f"{row['op']} {row['size']}", where, fontsize=6, xytext=(4, -8), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s", title=title(results))
    axes.legend()
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def page(all_results: dict[str, dict[str, Any]]) -> str:
    parts = [
        "# Benchmarks",
        "`make bench` (or `python -m benchmarks`) measures forward and backward of every op on this machine, at the "
        "sizes of its record, interleaved with eager PyTorch, torch.compile and libraries that do the same work. Each "
        "is checked against the fp64 reference before it is timed (torch.compile, to avoid compiling twice, at the "
        "full size against the eager formula). The bare matrix products of multi_horizon_linear and of the token loss "
        "have rows of their own. The roof of a row is the larger of the fewest bytes over the copy bandwidth and the "
        "FLOPs over the rate of a large matrix product, both measured in the same run. The multi-frame tax is the time "
        "of a training step with four horizons over that of the same trunk's next-frame step. `python -m "
        "benchmarks.report` writes this page.",
        "On a CPU every contender runs with `" + " ".join(f"{k}={v}" for k, v in ALLOCATOR.items()) + "`: by "
        "default glibc returns large blocks to the system, and every new output costs page faults. `python -m "
        "benchmarks --default-allocator --op OP` measures with the default; its figures, if any, are in the last "
        "column (ms, share of the roof, ratio to torch.compile).",
        "A CPU without bf16 products (AVX2) emulates them, many times slower than fp32. Our ops then multiply in fp32, "
        "and so do the bare products and the roof; the rivals' formulas stay in bf16.",
    ]
    for stem, results in devices(all_results):
        parts.append(f"## {title(results)}")
        if results["train"]:
            parts += ["### The multi-frame tax", train_table(results["train"])]
        if results.get("rollout"):
            parts += ["### Closed-loop rollouts of the demo's model", rollout_table(results), rollout_sentence(results)]
        for dtype in ("bf16", "fp32"):
            if any(row["dtype"] == dtype for row in results["ops"]):
                by_default = all_results.get(stem + DEFAULT_ALLOCATOR)
                parts += [f"### Ops, {dtype}", ops_table(results, dtype, by_default)]
        if (ROOT / "docs" / f"roofline-{stem}.svg").exists():
            parts.append(f"![roofline](../docs/roofline-{stem}.svg)")
        if results.get("scaling"):
            parts += ["### How the cost of multi_horizon_loss grows", scaling_table(results)]
            parts.append(f"![scaling](../docs/scaling-{stem}.svg)")
    return "\n\n".join(parts) + "\n"


def short(all_results: dict[str, dict[str, Any]]) -> str:
    """What README.md shows: the newest results of each kind of device, GPUs first, then CPUs that multiply bf16."""
    newest: dict[tuple[bool, bool], dict[str, Any]] = {}
    for _, results in devices(all_results):
        environment = results["environment"]
        kind = bool(environment["driver"]), multiplies_bf16(results)
        if results["train"] and (kind not in newest or environment["date"] > newest[kind]["environment"]["date"]):
            newest[kind] = results
    parts = []
    for _, results in sorted(newest.items(), reverse=True):
        first = results["train"][0]["size"]
        tax = [row for row in results["train"] if row["size"] == first]
        parts += [title(results) + ":", short_table(results), train_table(tax)]
    return "\n\n".join(parts)


def main() -> None:
    results = load()
    if not results:
        sys.exit("benchmarks/results holds no results: run python -m benchmarks first")
    for stem, one in devices(results):
        roofline(one, ROOT / "docs" / f"roofline-{stem}.svg")
        scaling(one, ROOT / "docs" / f"scaling-{stem}.svg")
    (ROOT / "benchmarks" / "README.md").write_text(page(results))
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{short(results)}\n\n{END}{after}")
    print(f"benchmarks/README.md and README.md from {len(results)} results files")


if __name__ == "__main__":
    main()
