"""What `python -m mfwm_kernels.aot --report` prints: the cost of every kernel on an H200, by its machine code.

`report(...)` compiles the launches of each op at the benchmark sizes for sm_90 and runs some warps of each through the
machine code (mfwm_kernels.sass). `worse(new, old)` lists what got worse. docs/gpu.md explains the columns.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cuda_launches
from .aot_compile import processes, use
from .launch_costs import ARCHITECTURE, Work, identified, measures_of
from .launches import META, PRODUCTS, Call, Phase, calls, phases
from .op import Op

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# An H200: multiprocessors, warp instructions a second of each of their 4 schedulers, bytes and FLOPs a second.
ISSUED_PER_S = 132 * 4 * 1.98e9
BYTES_PER_S = 4.3e12
FLOPS_PER_S = {"bf16": 790e12, "fp32": 60e12}
# The share of each limit that a good kernel reaches, and the time of a launch in a CUDA graph.
REACHED = {"bytes": 0.9, "issue": 0.55, "flops": 0.75}
# With one block per SM nothing runs while it waits at a barrier.
ISSUE_OF_ONE_BLOCK = 0.4
# If a kernel only reads, fewer bytes in flight than this per SM do not keep the memory busy. Nothing waits for a store,
# so a kernel that writes too needs as many as correspond to the share of its reads.
BYTES_IN_FLIGHT = 24 * 1024
LAUNCH_US = 2.0
# Kernels that take less are at the end of the table.
SHORT_US = 5.0
# A kernel got worse if its instructions grew by more than this.
TOLERATED = 0.05


class Case(NamedTuple):
    """A forward or backward of an op on a backend, at a size in a dtype."""

    op: str
    backend: str
    size: str
    dtype: str
    phase: str


def cases(
    ops: Sequence[Op], backends: Sequence[str], sizes: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[Case, Phase, Call]]:
    """At these benchmark sizes for GPUs, or at all if `sizes` is empty."""
    for op, backend in itertools.product(ops, backends):
        if backend not in op.backends:
            continue
        for call in calls(op):
            dtype = next((name for name in dtypes if DTYPES[name] == call.dtype), None)
            if dtype and call.name in op.bench and (not sizes or call.name in sizes):
                for phase, content in phases(call, backend).items():
                    yield Case(op.name, backend, call.name, dtype, phase), content, call


def report(
    ops: Sequence[Op], backends: Sequence[str], sizes: Sequence[str], dtypes: Sequence[str], jobs: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows of kernels and rows of calls."""
    use(ARCHITECTURE)
    found = list(cases(ops, backends, sizes, dtypes))
    work: dict[tuple[str, str], Work] = {}
    places: dict[tuple[str, str], dict[Any, int]] = defaultdict(dict)
    uses: dict[Case, list[tuple[tuple[str, str], int]]] = {}
    for case, phase, _ in found:
        uses[case] = []
        for launch in phase.launches:
            name, key, kernel, launched = identified(case.op, case.size, launch)
            entry = work.setdefault((name, key), Work(name, kernel, []))
            place = places[name, key].setdefault(launched, len(entry.launches))
            if place == len(entry.launches):
                entry.launches.append(launched)
            uses[case].append(((name, key), place))
    print(f"{len(work)} kernels to compile")
    with processes(jobs) as pool:
        results = dict(zip(work, pool.map(measures_of, work.values()), strict=True))
    kernels = [
        row
        for case, _, _ in found
        for row in kernel_rows(case, [(key[0], results[key][place]) for key, place in uses[case]])
    ]
    return {"kernels": kernels, "calls": [call_row(*entry, kernels) for entry in found]}


def kernel_rows(case: Case, launched: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A row per kernel: sums over its launches in this phase, and the worst of what is not a sum."""
    for name in dict.fromkeys(name for name, _ in launched):
        launches = [measures for kernel, measures in launched if kernel == name]
        row = {**case._asdict(), "kernel": name, "launches": len(launches)}
        row |= {key: sum(m[key] for m in launches) for key in ("instructions", "bytes", "read_bytes", "flops")}
        row |= {
            key: max(m[key] for m in launches)
            for key in ("barriers", "registers", "shared_bytes", "spilled_bytes", "warps", "programs")
        }
        row |= {key: min(m[key] for m in launches) for key in ("blocks_per_sm", "bytes_in_flight")}
        row["assumed_branches"] = max(m["assumed_branches"] for m in launches)
        for kind in ("loads", "stores"):
            widths: Counter[int] = Counter()
            for m in launches:
                widths.update({width: count / len(launches) for width, count in m[kind].items()})  # type: ignore[misc]
            row[kind] = {str(width): round(count, 2) for width, count in sorted(widths.items(), reverse=True)}
        row["instructions"] = round(row["instructions"])
        row["barriers"] = round(row["barriers"], 2)
        row["bytes_in_flight"] = round(row["bytes_in_flight"])
        yield row | times_of(row)


def times_of(row: dict[str, Any]) -> dict[str, float]:
    """The floors in us, and the predicted time, without that of launching."""
    issue, moved = row["instructions"] / ISSUED_PER_S * 1e6, row["bytes"] / BYTES_PER_S * 1e6
    flops = row["flops"] / FLOPS_PER_S["bf16"] * 1e6
    issued = ISSUE_OF_ONE_BLOCK if row["blocks_per_sm"] == 1 else REACHED["issue"]
    starved = needed_bytes(row) / row["bytes_in_flight"] if row["bytes_in_flight"] else 0
    predicted = max(moved * max(1 / REACHED["bytes"], starved), issue / issued, flops / REACHED["flops"])
    rounded = {"issue_us": issue, "byte_us": moved, "ratio": issue / moved if moved else 0.0, "predicted_us": predicted}
    return {name: round(value, 3) for name, value in rounded.items()}


def needed_bytes(row: dict[str, Any]) -> float:
    """The bytes in flight per SM that keep the memory busy with this share of reads."""
    return BYTES_IN_FLIGHT * row["read_bytes"] / row["bytes"] if row["bytes"] else 0.0


def call_row(case: Case, phase: Phase, call: Call, kernels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Launches and torch ops of a phase; the floor of the op (forward and backward) stands in the forward's row."""
    products = [op for op in phase.torch_ops if op.name in PRODUCTS]
    small = [op for op in phase.torch_ops if op.name not in PRODUCTS]
    own = [row for row in kernels if all(row[field] == value for field, value in case._asdict().items())]
    if case.phase == "backward" and call.op.gradients_in_forward:
        # The kernel that scales the gradients returns at once if the upstream gradient is 1, as that of a loss is.
        own = []
    launches = len(phase.launches) + len(phase.torch_ops)
    moved = sum(op.nbytes for op in small) / BYTES_PER_S
    multiplied = sum(max(op.flops / FLOPS_PER_S[case.dtype], op.nbytes / BYTES_PER_S) for op in products)
    predicted = (
        sum(row["predicted_us"] for row in own)
        + (moved / REACHED["bytes"] + multiplied / REACHED["flops"]) * 1e6
        + launches * LAUNCH_US
    )
    row = {**case._asdict(), "launches": len(phase.launches), "products": len(products), "small_ops": len(small)}
    row |= {"product_us": round(multiplied * 1e6, 3), "predicted_us": round(predicted, 3)}
    if case.phase == "forward":
        cost = call.op.cost(call.op.bench[case.size](call.dtype, META))
        row["floor_us"] = round(max(cost.bytes / BYTES_PER_S, cost.flops / FLOPS_PER_S[case.dtype]) * 1e6, 3)
    return row


def worse(new: dict[str, list[dict[str, Any]]], old: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence for everything in `new` that is worse than in `old`, or not in it."""
    found = []
    for kind, fields in (("kernels", (*Case._fields, "kernel")), ("calls", Case._fields)):
        before = {tuple(row[field] for field in fields): row for row in old[kind]}
        for row in new[kind]:
            key = tuple(row[field] for field in fields)
            problems = problems_of(row, before[key]) if key in before else ["not compared, because it is new"]
            found += [f"{' '.join(key)}: {problem}" for problem in problems]
    return found


def problems_of(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    problems = []
    for field, grows_to in (
        ("instructions", 1 + TOLERATED),
        ("barriers", 1),
        ("spilled_bytes", 1),
        ("launches", 1),
        ("products", 1),
        ("small_ops", 1),
    ):
        if field in old and new[field] > old[field] * grows_to:
            problems.append(f"{field} {old[field]:,} -> {new[field]:,}")
    if "blocks_per_sm" in old and new["blocks_per_sm"] < old["blocks_per_sm"]:
        problems.append(f"blocks per SM {old['blocks_per_sm']} -> {new['blocks_per_sm']}")
    return problems


KERNEL_HEADER = (
    f"{'kernel (of op)':45}{'size':18}{'dtype':6}{'phase':9}{'times':>5}{'Minstr':>9}{'issue us':>10}{'byte us':>9}"
    f"{'ratio':>7}{'bar':>7} {'loads by width':30}{'stores by width':26}{'regs':>5}"
    f"{'warps':>6}{'b/SM':>5}{'KB fly':>7}{'need':>6}{'spill':>6}{'pred us':>9}"
)
CALL_HEADER = (
    f"{'op':36}{'backend':9}{'size':18}{'dtype':6}{'phase':9}{'launches':>9}{'products':>9}{'small ops':>10}"
    f"{'pred us':>10}{'floor us':>10}{'share of roof':>14}"
)


def kernel_line(row: dict[str, Any]) -> str:
    """A ~ marks instructions that depend on what memory holds, and so are estimated."""
    loads, stores = (" ".join(f"{w}B:{n:g}" for w, n in row[kind].items()) for kind in ("loads", "stores"))
    name = row["kernel"] if row["kernel"].startswith(row["op"]) else f"{row['kernel']} ({row['op']})"
    name = name if row["backend"] == "triton" else f"CUDA C++ {name}"
    return (
        f"{name[:44]:45}{row['size']:18}{row['dtype']:6}{row['phase']:9}{row['launches']:5}"
        f"{'~' if row['assumed_branches'] else ' '}{row['instructions'] / 1e6:8.2f}"
        f"{row['issue_us']:10.1f}{row['byte_us']:9.1f}{row['ratio']:7.2f}{row['barriers']:7.1f} {loads[:29]:30}"
        f"{stores[:25]:26}{row['registers']:5}{row['warps']:6}{row['blocks_per_sm']:5}"
        f"{row['bytes_in_flight'] / 1024:7.1f}{needed_bytes(row) / 1024:6.1f}{row['spilled_bytes']:6}"
        f"{row['predicted_us']:9.1f}"
    )


def call_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Under each backward (or a forward without one) the op's floor, and the share of it that is predicted."""
    predicted = 0.0
    floor = 0.0
    for place, row in enumerate(rows):
        is_forward = row["phase"] == "forward"
        predicted = row["predicted_us"] + (0 if is_forward else predicted)
        floor = row["floor_us"] if is_forward else floor
        last = place + 1 == len(rows) or rows[place + 1]["phase"] == "forward"
        end = f"{floor:10.1f}{floor / predicted:14.0%}" if last and predicted else ""
        yield (
            f"{row['op']:36}{row['backend']:9}{row['size']:18}{row['dtype']:6}{row['phase']:9}{row['launches']:9}{row['products']:9}"
            f"{row['small_ops']:10}{row['predicted_us']:10.1f}{end}"
        )


def compact(report: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with a line per row."""
    tables = []
    for name, rows in report.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        tables.append(f'  "{name}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(tables) + "\n}\n"


def main(
    ops: Sequence[Op],
    backends: Sequence[str],
    sizes: Sequence[str],
    dtypes: Sequence[str],
    jobs: int,
    file: str,
    compare: str,
) -> int:
    """Print the tables, the worst ratios of each dtype first, and write them to `file`; 1 if anything is worse."""
    if "cuda" in backends and cuda_launches.absent():
        print(f"No CUDA C++ kernels: {cuda_launches.absent()}")
        backends = [backend for backend in backends if backend != "cuda"]
    old = json.loads(Path(compare).read_text()) if compare else None
    found = report(ops, backends, sizes, dtypes, jobs)
    print(KERNEL_HEADER)
    for row in sorted(found["kernels"], key=lambda row: (row["dtype"], row["predicted_us"] < SHORT_US, -row["ratio"])):
        print(kernel_line(row))
    print(f"\n{CALL_HEADER}")
    for line in call_lines(found["calls"]):
        print(line)
    if file:
        Path(file).write_text(compact(found))
    problems = worse(found, old) if old else []
    for problem in problems:
        print(f"WORSE {problem}")
    if old:
        print(f"{len(found['kernels'])} kernels compared with {compare}: {len(problems)} figures are worse")
    return bool(problems)
