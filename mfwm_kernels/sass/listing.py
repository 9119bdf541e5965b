"""The machine code that `cuobjdump -sass` prints, as instructions and operands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*?)\s*;")
REGISTER = re.compile(r"U?R(\d+|Z)")
PREDICATE = re.compile(r"U?P(\d|T)")
NUMBER = re.compile(r"-?0x[0-9a-f]+")
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\](?:\.\w+)*")
# Bytes per lane of a memory access, by modifier; 4 without one.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Operand:
    """One operand: kind is register, predicate, number, constant (in bank 0 of the launch constants) or other.

    sign is "-" (negated), "~" or "!" (inverted), or ""; value is the number, or the constant's offset.
    """

    text: str
    kind: str
    sign: str
    name: str
    value: int

    def register(self, further: int = 0) -> str:
        """The register's name, or that of a later one of a vector that starts here; RZ and URZ are always zero."""
        if self.name.endswith("Z"):
            return self.name
        prefix = "UR" if self.name.startswith("U") else "R"
        return f"{prefix}{int(self.name.removeprefix(prefix)) + further}"


def operand_of(text: str) -> Operand:
    sign = text[0] if text[:1] in ("-", "~", "!") else ""
    unsigned = text[len(sign) :]
    name = unsigned.split(".")[0].strip("|")
    if REGISTER.fullmatch(name):
        return Operand(text, "register", sign, name, 0)
    if PREDICATE.fullmatch(name):
        return Operand(text, "predicate", sign, name, 0)
    if NUMBER.fullmatch(text):
        return Operand(text, "number", "", "", int(text, 16))
    constant = CONSTANT.fullmatch(unsigned)
    return Operand(text, "constant" if constant else "other", sign, "", int(constant[1], 16) if constant else 0)


@dataclass(frozen=True)
class Instruction:
    """guard is the predicate on which it executes, or None; target the address that it may jump to, or None."""

    address: int
    guard: Operand | None
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str

    @cached_property
    def target(self) -> int | None:
        if self.opcode not in ("BRA", "CALL", "BSSY", "JMP"):
            return None
        found = re.search(r"0x[0-9a-f]+$", self.text)
        return int(found[0], 16) if found else None

    @cached_property
    def width(self) -> int:
        """Bytes per lane of a memory access."""
        return next((WIDTHS[word] for word in self.modifiers if word in WIDTHS), 4)

    @cached_property
    def is_global_load(self) -> bool:
        return self.opcode in ("LDG", "LD", "LDGSTS")

    @cached_property
    def is_global_store(self) -> bool:
        return self.opcode in ("STG", "ST", "RED", "REDG", "ATOMG", "ATOM")

    @cached_property
    def written(self) -> frozenset[str]:
        """The registers of a load's result."""
        if self.opcode not in ("LDG", "LD") or self.operands[0].kind != "register":
            return frozenset()
        count = max(1, self.width // 4)
        return frozenset(self.operands[0].register(i) for i in range(count)) - {"RZ"}

    @cached_property
    def warpgroup_shape(self) -> tuple[int, int, int] | None:
        """(M, N, K) of a warpgroup's matrix product, such as HGMMA.64x16x16."""
        shapes = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", word) for word in self.modifiers if self.opcode == "HGMMA"]
        found = next((shape for shape in shapes if shape), None)
        return None if found is None else (int(found[1]), int(found[2]), int(found[3]))

    @cached_property
    def used(self) -> frozenset[str]:
        """The registers that it needs or overwrites: all that its text names, and those that follow in a vector."""
        found = set()
        last = 0 if self.is_global_load else len(self.operands)
        for place, operand in enumerate(self.operands):
            count = vector_length(self, place) if place <= last else 2
            for name in re.findall(r"\bU?R\d+\b", operand.text):
                prefix, first = re.fullmatch(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
                found |= {f"{prefix}{int(first) + i}" for i in range(count)}
        return frozenset(found)


def vector_length(instruction: Instruction, place: int) -> int:
    """How many registers the operand at `place` spans, or a little more where that is uncertain."""
    if instruction.opcode in ("STG", "STS", "LDS", "LDG", "LDL", "STL", "LDSM", "STSM"):
        if instruction.operands[place].text.startswith(("[", "desc")):
            return 2
        return max(1, instruction.width // 4, *(int(m) for m in instruction.modifiers if m in ("2", "4")))
    if "WIDE" in instruction.modifiers or "64" in instruction.modifiers:
        return 2
    return 1


def functions_of(text: str) -> dict[str, str]:
    """The listing of each function in the text of cuobjdump -sass, by the function's name."""
    parts = re.split(r"^\s*Function : (\S+)", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def instructions_of(listing: str) -> list[Instruction]:
    """The instructions of one function.

    Padding after the last instruction is left out: NOPs and the jump to itself that ends a function.
    """
    body: list[Instruction] = []
    for line in listing.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        address, guard, opcode, modifiers, operands = match.groups()
        body.append(
            Instruction(
                int(address, 16),
                operand_of(guard) if guard else None,
                opcode,
                tuple(modifiers.split(".")[1:]),
                tuple(operand_of(operand) for operand in split_operands(operands)),
                f"{opcode}{modifiers} {operands}",
            )
        )
    while body and (body[-1].opcode == "NOP" or (body[-1].opcode == "BRA" and body[-1].target == body[-1].address)):
        body.pop()
    return body


def constants_of(text: str) -> dict[str, bytes]:
    """The compiler's constants (bank 2) of each function in the text of cuobjdump -elf, by the function's name."""
    found: dict[str, bytes] = {}
    name = ""
    for line in text.splitlines():
        heading = re.match(r"\.(?:nv\.constant2\.(\S+)\s*$)?", line)
        if heading:
            name = heading[1] or ""
        elif name and re.fullmatch(r"\s*(0x[0-9a-f]{8}\s*)+", line):
            words = b"".join(int(word, 16).to_bytes(4, "little") for word in line.split())
            found[name] = found.get(name, b"") + words
    return found


def split_operands(text: str) -> list[str]:
    """Operands are separated by commas; `RET.REL.NODEC R4 0x0` and BRX have a space instead."""
    return [part.strip() for part in re.split(r",|\s+(?=-?0x[0-9a-f]+$)", text) if part.strip()]
