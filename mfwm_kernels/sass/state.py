"""A thread's integers and predicates: how an instruction's operands are read and its results written.

A register is an integer from 0 to 2**32 - 1, a predicate a bool, and either is None if it is unknown: what memory
holds, and what floating-point instructions compute, is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .listing import Instruction, Operand, operand_of

MASK = 0xFFFFFFFF
WIDE_MASK = 0xFFFFFFFFFFFFFFFF
State = dict[str, Any]
Reader = Callable[[State], Any]
Step = Callable[[State], None]

ALWAYS = ("PT", "UPT")


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def predicate(operand: Operand) -> Reader:
    name, inverted = operand.name, operand.sign == "!"
    if name in ALWAYS:
        return lambda state: not inverted

    def read(state: State) -> bool | None:
        value = state.get(name)
        return value if value is None else value != inverted

    return read


def number(operand: Operand) -> Reader:
    """The operand's 32 bits. A negated register reads as its complement plus 1, up to 2**32, for carries."""
    if operand.kind == "number":
        value = operand.value & MASK
        return lambda state: value
    if operand.kind == "constant":
        offset = operand.value
        return _signed_reader(operand, lambda state: state["constants"].read(offset, 4))
    if operand.kind != "register":
        return lambda state: None
    if operand.name.endswith("Z"):
        return _signed_reader(operand, lambda state: 0)
    name = operand.name
    if "|" in operand.text:
        return lambda state: None if state.get(name) is None else abs(signed(state[name])) & MASK
    return _signed_reader(operand, lambda state: state.get(name))


def _signed_reader(operand: Operand, read: Reader) -> Reader:
    if operand.sign == "-":
        return lambda state: None if (value := read(state)) is None else (value ^ MASK) + 1
    if operand.sign == "~":
        return lambda state: None if (value := read(state)) is None else value ^ MASK
    return read


def wide_number(operand: Operand) -> Reader:
    """The operand's 64 bits: two registers, two words of a constant, or a number."""
    if operand.kind == "register" and not operand.name.endswith("Z"):
        low, high = operand.register(), operand.register(1)

        def read(state: State) -> int | None:
            a, b = state.get(low), state.get(high)
            return None if a is None or b is None else b << 32 | a

    elif operand.kind == "constant":

        def read(state: State) -> int | None:
            return state["constants"].read(operand.value, 8)

    elif operand.kind == "number" or operand.name.endswith("Z"):

        def read(state: State) -> int | None:
            return operand.value & WIDE_MASK

    else:
        return lambda state: None
    if operand.sign == "-":
        return lambda state: None if (value := read(state)) is None else -value & WIDE_MASK
    return read


class Operands:
    """An instruction's operands by role: the predicates it writes, the register it writes, what it reads."""

    def __init__(self, instruction: Instruction) -> None:
        rest = list(instruction.operands)
        self.carries: list[str] = []
        if rest and rest[0].kind == "predicate":
            self.carries.append(rest.pop(0).name)
        self.result = rest.pop(0) if rest else operand_of("RZ")
        while rest and rest[0].kind == "predicate" and len(rest) > 1 and rest[1].kind != "predicate":
            self.carries.append(rest.pop(0).name)
        self.sources = [operand for operand in rest if operand.kind != "predicate"]
        self.predicates = [operand for operand in rest if operand.kind == "predicate"]


def write(state: State, operand: Operand, value: int | None, words: int = 1) -> None:
    if operand.name.endswith("Z"):
        return
    for word in range(words):
        state[operand.register(word)] = None if value is None else value >> 32 * word & MASK


def forgetting(instruction: Instruction) -> Step:
    """Make the results unknown: the predicates and the register in front."""
    names: list[str] = []
    for operand in instruction.operands:
        if operand.kind == "predicate":
            names.append(operand.name)
            continue
        if operand.kind == "register":
            count = {"HGMMA": 128, "HMMA": 4, "LDSM": 4, "DMMA": 4}.get(
                instruction.opcode, 4 if "128" in instruction.modifiers else 2 if "64" in instruction.modifiers else 1
            )
            if instruction.warpgroup_shape is not None:
                # In fp32, over the 128 threads of a warpgroup.
                count = instruction.warpgroup_shape[0] * instruction.warpgroup_shape[1] // 128
            if instruction.opcode == "F2F":
                count = 2
            names += [operand.register(i) for i in range(count)]
        break
    if instruction.opcode in ("STG", "STS", "STL", "RED", "REDG", "STSM", "ST", "BAR", "LDGSTS", "LDGDEPBAR"):
        names = []
    kept = [name for name in names if name not in ALWAYS and not name.endswith("Z")]

    def step(state: State) -> None:
        for name in kept:
            state[name] = None

    return step


def arithmetic(
    compute: Callable[..., int], wide: tuple[int, ...] = (), words: int = 1
) -> Callable[[Instruction], Step]:
    """An instruction whose result is `compute` of its sources and carries. Operands in `wide` have 64 bits."""

    def build(instruction: Instruction) -> Step:
        roles = Operands(instruction)
        reads = [
            wide_number(operand) if place in wide else number(operand) for place, operand in enumerate(roles.sources)
        ]
        reads += [predicate(operand) for operand in roles.predicates]
        bits = 32 * words

        def step(state: State) -> None:
            values = [read(state) for read in reads]
            total = None if None in values else compute(*values)
            write(state, roles.result, total, words)
            for place, carry in enumerate(roles.carries):
                if carry not in ALWAYS:
                    state[carry] = None if total is None else total >> (bits + place) > 0

        return step

    return build
