"""What each instruction does to a thread's integers and predicates.

An instruction that is not in this file makes its results unknown, so an omission here can make a branch unknown but
no number wrong.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable

from .listing import WIDTHS, Instruction
from .state import (
    ALWAYS,
    MASK,
    WIDE_MASK,
    Operands,
    State,
    Step,
    arithmetic,
    forgetting,
    number,
    predicate,
    signed,
    write,
)

COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def build_imad(instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    convert = (lambda value: value) if "U32" in modifiers else lambda value: signed(value & MASK)
    if "WIDE" in modifiers:
        return arithmetic(
            lambda a, b, c, *carry: (convert(a) * convert(b) & WIDE_MASK) + c + sum(carry), wide=(2,), words=2
        )(instruction)
    if "HI" in modifiers:
        return arithmetic(lambda a, b, c, *carry: (convert(a) * convert(b) + c) >> 32 & MASK, wide=(2,))(instruction)
    return arithmetic(lambda a, b, c, *carry: (a * b & MASK) + c + sum(carry))(instruction)


def build_iadd3(instruction: Instruction) -> Step:
    if "64" in instruction.modifiers:
        return arithmetic(lambda *values: sum(values), wide=(0, 1, 2), words=2)(instruction)
    return arithmetic(lambda *values: sum(values))(instruction)


def build_lea(instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    if "HI" not in modifiers:
        return arithmetic(lambda a, b, shift, *carry: (a << shift & MASK) + b + sum(carry))(instruction)
    if "SX32" in modifiers:
        return arithmetic(lambda a, b, shift, *carry: (signed(a & MASK) >> (32 - shift) & MASK) + b + sum(carry))(
            instruction
        )
    return arithmetic(
        lambda a, b, c, shift, *carry: (((c & MASK) << 32 | a & MASK) >> (32 - shift) & MASK) + b + sum(carry)
    )(instruction)


def build_shf(instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    left, high, wrap = "L" in modifiers, "HI" in modifiers, "W" in modifiers
    wide = "U64" in modifiers or "S64" in modifiers
    is_signed = "S32" in modifiers or "S64" in modifiers

    def compute(low: int, shift: int, top: int) -> int:
        shift = shift % 32 if wrap else min(shift, 63 if wide else 32)
        if left:
            if high:
                return ((top << 32 | low) << shift) >> 32 & MASK
            return low << shift & MASK
        value = (signed(top) if is_signed else top) << 32 | low
        return value >> shift >> (32 if high else 0) & MASK

    return arithmetic(compute)(instruction)


def build_lop3(instruction: Instruction) -> Step:
    roles = Operands(instruction)
    first, second, third = (number(operand) for operand in roles.sources[:3])
    lut = roles.sources[3].value
    terms = [bits for bits in range(8) if lut >> bits & 1]

    def step(state: State) -> None:
        a, b, c = first(state), second(state), third(state)
        value: int | None
        if a is None or b is None or c is None:
            value = None
            if lut == 0xC0 and 0 in (a, b):
                value = 0
        else:
            value = 0
            for bits in terms:
                part = (a if bits & 4 else ~a) & (b if bits & 2 else ~b) & (c if bits & 1 else ~c)
                value |= part & MASK
        write(state, roles.result, value)
        for name in roles.carries:
            if name not in ALWAYS:
                state[name] = None if value is None else value != 0

    return step


def build_plop3(instruction: Instruction) -> Step:
    targets = [operand.name for operand in instruction.operands[:2]]
    reads = [predicate(operand) for operand in instruction.operands[2:5]]
    tables = [operand.value for operand in instruction.operands[5:7]]

    def step(state: State) -> None:
        indices = [0]
        for read in reads:
            value = read(state)
            indices = [i << 1 | bit for i in indices for bit in ((0, 1) if value is None else (int(value),))]
        for name, table in zip(targets, tables, strict=False):
            if name not in ALWAYS:
                results = {table >> i & 1 for i in indices}
                state[name] = bool(results.pop()) if len(results) == 1 else None

    return step


def both(a: bool | None, b: bool | None) -> bool | None:
    return False if a is False or b is False else None if a is None or b is None else True


def either(a: bool | None, b: bool | None) -> bool | None:
    return True if a is True or b is True else None if a is None or b is None else False


def build_isetp(instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    compare = next((COMPARISONS[m] for m in modifiers if m in COMPARISONS), None)
    if compare is None:
        return forgetting(instruction)
    strict = COMPARISONS[{"LE": "LT", "GE": "GT"}.get(modifiers[0], modifiers[0])]
    equal_matters = modifiers[0] != "NE"
    combine = either if "OR" in modifiers else both
    if "XOR" in modifiers:
        return forgetting(instruction)
    convert = (lambda value: value & MASK) if "U32" in modifiers else lambda value: signed(value & MASK)
    targets = [operand.name for operand in instruction.operands[:2]]
    first, second = number(instruction.operands[2]), number(instruction.operands[3])
    given = predicate(instruction.operands[4])
    below = predicate(instruction.operands[5]) if "EX" in modifiers else None

    def step(state: State) -> None:
        a, b = first(state), second(state)
        result: bool | None = None
        if a is not None and b is not None:
            a, b = convert(a), convert(b)
            if below is None:
                result = compare(a, b)
            elif a != b:
                # The low words matter only if the high words are equal.
                result = strict(a, b) if equal_matters else True
            else:
                result = below(state)
        other = given(state)
        for name, value in zip(targets, (result, None if result is None else not result), strict=True):
            if name not in ALWAYS:
                state[name] = combine(value, other)

    return step


def build_sel(instruction: Instruction) -> Step:
    target, a, b, chosen = instruction.operands[:4]
    first, second, condition = number(a), number(b), predicate(chosen)

    def step(state: State) -> None:
        choice, x, y = condition(state), first(state), second(state)
        value = (x if x == y else None) if choice is None else x if choice else y
        write(state, target, None if value is None else value & MASK)

    return step


def extremum(instruction: Instruction) -> Callable[[int, int, bool], int]:
    convert = (lambda value: value & MASK) if "U32" in instruction.modifiers else lambda value: signed(value & MASK)
    return lambda a, b, least: (min if least else max)(a, b, key=convert) & MASK


def build_minimum(instruction: Instruction) -> Step:
    return arithmetic(extremum(instruction))(instruction)


def build_add_minimum(instruction: Instruction) -> Step:
    of = extremum(instruction)
    return arithmetic(lambda a, b, c, least: of(a + b & MASK, c, least))(instruction)


def build_sgxt(instruction: Instruction) -> Step:
    def compute(value: int, bits: int) -> int:
        value &= (1 << bits) - 1
        return value if "U32" in instruction.modifiers or not bits else signed(value, bits) & MASK

    return arithmetic(compute)(instruction)


def build_prmt(instruction: Instruction) -> Step:
    def compute(a: int, selectors: int, b: int) -> int:
        parts, value = b << 32 | a & MASK, 0
        for place in range(4):
            selector = selectors >> 4 * place & 15
            byte = parts >> 8 * (selector & 7) & 255
            value |= ((255 if byte >> 7 else 0) if selector & 8 else byte) << 8 * place
        return value

    return forgetting(instruction) if instruction.modifiers else arithmetic(compute)(instruction)


def build_move(instruction: Instruction) -> Step:
    return arithmetic(lambda value, *mask: value & MASK, words=1)(instruction)


def build_special(instruction: Instruction) -> Step:
    """S2R and CS2R: registers that the GPU sets, such as the thread's number."""
    target, source = instruction.operands[0], instruction.operands[1].text
    words = 2 if instruction.opcode == "CS2R" and "32" not in instruction.modifiers else 1
    return lambda state: write(state, target, 0 if source == "SRZ" else state.get(source), words)


def build_constant(instruction: Instruction) -> Step:
    """LDC: a launch constant, or one of the compiler's (bank 2), at a fixed place or one in a register."""
    target, source = instruction.operands[:2]
    size = WIDTHS[instruction.modifiers[0]] if instruction.modifiers else 4
    place = re.fullmatch(r"c\[0x([02])\]\[(?:(R\d+))?\+?(-?0x[0-9a-f]+)?\]", source.text)
    if place is None or size not in (1, 2, 4, 8):
        return forgetting(instruction)
    bank, index, offset = int(place[1]), place[2], int(place[3] or "0", 16)
    is_signed = bool(instruction.modifiers) and instruction.modifiers[0].startswith("S")

    def step(state: State) -> None:
        start = state.get(index) if index else 0
        value = None if start is None else state["constants"].read(start + offset & MASK, size, bank)
        if value is not None and is_signed:
            value = signed(value, 8 * size) & MASK
        write(state, target, value, 2 if size == 8 else 1)

    return step


def float_bits(value: float, up: bool = False) -> int:
    """The bits of the fp32 nearest to `value`, or the next one above it."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
    return bits + 1 if up and rounded < value else bits


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & MASK))[0])


def build_to_float(instruction: Instruction) -> Step:
    """Conversions of integers, with which code for integer division begins."""
    modifiers = instruction.modifiers
    if {"F64", "F16", "BF16", "S64", "U8", "S8", "U16", "S16"} & set(modifiers):
        return forgetting(instruction)
    if "U64" in modifiers:
        return arithmetic(lambda value: float_bits(value, "RP" in modifiers), wide=(0,))(instruction)
    convert = (lambda value: value) if "U32" in modifiers else lambda value: signed(value & MASK)
    return arithmetic(lambda value: float_bits(convert(value), "RP" in modifiers))(instruction)


def build_reciprocal(instruction: Instruction) -> Step:
    if instruction.modifiers != ("RCP",):
        return forgetting(instruction)

    def compute(bits: int) -> int:
        value = float_of(bits)
        return float_bits(math.inf if value == 0 else 1 / value)

    return arithmetic(compute)(instruction)


def build_to_integer(instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    if "TRUNC" not in modifiers or not {"U32", "U64"} & set(modifiers):
        return forgetting(instruction)
    words = 2 if "U64" in modifiers else 1
    largest = (1 << 32 * words) - 1

    def compute(bits: int) -> int:
        value = float_of(bits)
        return 0 if math.isnan(value) or value < 0 else largest if value > largest else int(value)

    return arithmetic(compute, words=words)(instruction)


def build_shuffle(instruction: Instruction) -> Step:
    """SHFL.IDX from lane 0 broadcasts what lane 0 holds; other shuffles' results are unknown."""
    target, source, lane = instruction.operands[1:4]
    if "IDX" not in instruction.modifiers or lane.name != "RZ":
        return forgetting(instruction)
    read = number(source)
    return lambda state: write(state, target, read(state))


def build_check(instruction: Instruction) -> Step:
    """FCHK asks whether a division needs its slow path; assume that it does not."""
    name = instruction.operands[0].name
    return lambda state: state.__setitem__(name, False)


def build_vote(instruction: Instruction) -> Step:
    """A vote of the warp's lanes on a predicate: assume that they agree."""
    target, *_, given = instruction.operands
    if target.kind != "predicate":
        return forgetting(instruction)
    read = predicate(given)
    return lambda state: state.__setitem__(target.name, read(state))


def build_half_pair(instruction: Instruction) -> Step:
    """HFMA2 with zeros as factors loads a constant, which the text writes as two fp16 numbers."""
    target, *factors = instruction.operands[:3]
    if any(factor.name != "RZ" for factor in factors):
        return forgetting(instruction)
    high, low = (struct.unpack("<H", struct.pack("<e", float(half.text)))[0] for half in instruction.operands[3:5])
    return lambda state: write(state, target, high << 16 | low)


def build_packed(instruction: Instruction) -> Step:
    """P2R packs predicates into a register. Bits of unknown predicates make all of it unknown."""
    target, kept = instruction.operands[0], number(instruction.operands[2])
    mask = instruction.operands[3].value
    if instruction.modifiers or instruction.operands[1].text not in ("PR", "UPR"):
        return forgetting(instruction)
    names = {i: f"{instruction.operands[1].text[:-1]}{i}" for i in range(7) if mask >> i & 1}

    def step(state: State) -> None:
        below = kept(state)
        bits = {i: state.get(name) for i, name in names.items()}
        known = below is not None and None not in bits.values()
        write(state, target, below & ~mask & MASK | sum(1 << i for i in bits if bits[i]) if known else None)

    return step


def build_unpacked(instruction: Instruction) -> Step:
    """R2P sets predicates from a register."""
    source, mask = number(instruction.operands[1]), instruction.operands[-1].value

    def step(state: State) -> None:
        value = source(state)
        for i in range(7):
            if mask >> i & 1:
                state[f"P{i}"] = None if value is None else bool(value >> i & 1)

    return step


# Opcodes with a form for uniform registers, whose name has a U in front.
UNIFORM = frozenset(
    ["UIMAD", "UIADD3", "ULEA", "USHF", "ULOP3", "UPLOP3", "UISETP", "USEL", "USGXT", "UPRMT", "UMOV", "ULDC", "UIMNMX"]
)
BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    "IMAD": build_imad,
    "IADD3": build_iadd3,
    "VIADD": arithmetic(lambda a, b: a + b),
    "IABS": arithmetic(lambda a: abs(signed(a & MASK))),
    "LEA": build_lea,
    "SHF": build_shf,
    "LOP3": build_lop3,
    "PLOP3": build_plop3,
    "ISETP": build_isetp,
    "SEL": build_sel,
    "IMNMX": build_minimum,
    "VIMNMX": build_minimum,
    "VIADDMNMX": build_add_minimum,
    "SGXT": build_sgxt,
    "PRMT": build_prmt,
    "MOV": build_move,
    "R2UR": build_move,
    "S2R": build_special,
    "S2UR": build_special,
    "CS2R": build_special,
    "LDC": build_constant,
    "I2F": build_to_float,
    "I2FP": build_to_float,
    "MUFU": build_reciprocal,
    "F2I": build_to_integer,
    "SHFL": build_shuffle,
    "FCHK": build_check,
    "VOTE": build_vote,
    "VOTEU": build_vote,
    "HFMA2": build_half_pair,
    "P2R": build_packed,
    "UP2UR": build_packed,
    "R2P": build_unpacked,
}


def step_of(instruction: Instruction) -> Step:
    """A function that executes the instruction, whatever its guard, on a state."""
    base = instruction.opcode
    build = BUILDERS.get(base.removeprefix("U") if base in UNIFORM else base)
    return forgetting(instruction) if build is None else build(instruction)
