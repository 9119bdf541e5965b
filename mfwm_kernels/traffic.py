"""The fewest bytes that a launch moves: each distinct element of a tensor that the kernel reads once, and each that it
writes once. Which pointers a kernel reads and writes is taken from its Triton IR."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

VALUE = r"%[\w$.-]+"


class Argument(NamedTuple):
    """An argument of a compiled kernel: its bits, its size in bytes, and the bytes of the tensor if it is a pointer."""

    value: int
    size: int
    tensor_bytes: int = 0


class Accesses(NamedTuple):
    """Places among a kernel's arguments of the pointers that it reads, and that it writes."""

    read: frozenset[int]
    written: frozenset[int]


def with_distinct_names(ttir: str) -> Iterator[str]:
    """Lines without locations, in which no two values share a name: MLIR gives the values of sibling regions the same
    names."""
    scopes: list[dict[str, str]] = [{}]
    numbers = itertools.count()

    def define(scope: dict[str, str], match: re.Match[str]) -> str:
        scope[match[0]] = f"%{next(numbers)}"
        return scope[match[0]]

    def known(match: re.Match[str]) -> str:
        return next((scope[match[0]] for scope in reversed(scopes) if match[0] in scope), match[0])

    for given in ttir.splitlines():
        line = given if "tt.func" in given else re.sub(r"loc\(.*$", "", given)
        if line.lstrip().startswith("}"):
            scopes.pop()
        inner: dict[str, str] = {}
        # Operands first, because a value may have the name of one outside its region.
        result, equals, rest = line.partition(" = ") if re.match(rf"\s*{VALUE}(:\d+)? = ", line) else ("", "", line)
        if "tt.func" in line or line.lstrip().startswith("^"):
            rest = re.sub(rf"{VALUE}(?=:)", partial(define, inner), rest)
        else:
            # The values that a loop defines are followed by an equals sign, its operands are not.
            rest = re.sub(rf"{VALUE}(?![\w$.-]| = )", known, rest)
            rest = re.sub(rf"{VALUE}(?= = )", partial(define, inner), rest)
        result = re.sub(VALUE, partial(define, scopes[-1]), result)
        if line.rstrip().endswith("{"):
            scopes.append(inner)
        else:
            scopes[-1].update(inner)
        yield result + equals + rest


def accesses_of(ttir: str) -> Accesses:
    """Follows each pointer from the arguments through every operation up to loads and stores."""
    lines = list(with_distinct_names(ttir))
    origins: dict[str, frozenset[int]] = {}
    read: set[int] = set()
    written: set[int] = set()
    before: dict[str, frozenset[int]] | None = None
    # Twice, because what a loop carries may depend on what its body computes.
    while before != origins:
        before = dict(origins)
        for line in lines:
            if "tt.func public" in line:
                for place, name in enumerate(re.findall(rf"({VALUE}): (?:!tt\.ptr|[if]\d+)", line)):
                    origins[name] = frozenset([place])
                continue
            for carried, initial in re.findall(rf"({VALUE}) = ({VALUE})(?=[,)])", line):
                origins[carried] = origins.get(carried, frozenset()) | origins.get(initial, frozenset())
            match = re.match(rf"\s*(?:({VALUE})(?::\d+)? = )?\"?([\w.]+)\"?(.*)", line)
            if match is None:
                continue
            result, name, rest = match.groups()
            operands = [value.split("#")[0] for value in re.findall(rf"{VALUE}(?:#\d+)?", rest)]
            if name in ("tt.load", "tt.store") or name.startswith(("tt.atomic", "tt.descriptor")):
                found = origins.get(operands[0], frozenset())
                if not found:
                    raise ValueError(f"no argument leads to the pointer of {line.strip()}")
                if name != "tt.load":
                    written |= found
                if name != "tt.store":
                    read |= found
                continue
            if result:
                found = frozenset().union(*(origins.get(value, frozenset()) for value in operands))
                origins[result] = origins.get(result, frozenset()) | found
    return Accesses(frozenset(read), frozenset(written))


def fewest_bytes(arguments: Sequence[Argument], accesses: Accesses) -> tuple[int, int]:
    """(read, written) by a launch with these arguments, in the kernel's order."""

    def distinct(places: frozenset[int]) -> int:
        tensors: dict[int, int] = {}
        for argument in (arguments[place] for place in places):
            tensors[argument.value] = max(argument.tensor_bytes, tensors.get(argument.value, 0))
        return sum(tensors.values())

    return distinct(accesses.read), distinct(accesses.written)
