"""Does a software-pipelined loop overwrite a tile that a tensor core is still reading?

On sm_90 and sm_100 a dot reads its tiles from shared memory asynchronously, while the program continues and copies
later tiles into a ring of slots. If the ring is one slot short, a copy overwrites the slot that a dot still reads, and
some products are wrong. (On sm_80 a dot reads registers, so its code has none of these dots.)

`races` interprets the text of Triton's GPU dialect: it evaluates integers and slots, runs each loop until every ring
has been filled several times, and compares each write to shared memory with the reads of the dots in flight.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Iterations to interpret of each loop. Rings have 2 to 8 slots.
ITERATIONS = 24

# The name of a value, and of one of the several results of an operation.
NAME = r"%[\w$.-]+"
VALUE = NAME + r"(?:#\d+)?"

INTEGERS: dict[str, Callable[[int, int], Any]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.xori": operator.xor,
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "slt": operator.lt,
    "sle": operator.le,
    "sgt": operator.gt,
    "sge": operator.ge,
}
VIEWS = ("ttg.memdesc_trans", "ttg.memdesc_reshape", "ttg.memdesc_subslice", "ttg.memdesc_reinterpret")
# Operations that write shared memory, and which of their operands they write.
WRITES = {"ttg.async_copy_global_to_local": 1, "ttg.local_store": 1, "ttng.async_tma_copy_global_to_local": 1}


class Operation(NamedTuple):
    result: str
    name: str
    text: str
    regions: list[list[Operation]]

    def operands(self) -> list[str]:
        """The operands in order, without those in brackets."""
        return re.findall(VALUE, re.sub(r"\[[^]]*\]", "", self.text.split(" : ")[0]))


class Slot(NamedTuple):
    """One slot of a ring in shared memory, or the whole buffer if number is None."""

    buffer: str
    number: int | None

    def overlaps(self, other: Slot) -> bool:
        return self.buffer == other.buffer and (None in (self.number, other.number) or self.number == other.number)


class Dot(NamedTuple):
    """A dot in flight: the slots that it reads, and on sm_100 the barriers at which it arrives."""

    reads: list[Slot]
    barriers: list[Slot]


def races(ttgir: str) -> list[str]:
    """A sentence for each buffer that is overwritten while a dot may read it.

    Raises ValueError if the code uses shared memory in a way that this module cannot follow.
    """
    if "ttng.warp_group_dot " not in ttgir and "ttng.tc_gen5_mma" not in ttgir:
        return []
    interpreter = _Interpreter()
    interpreter.run(parsed(ttgir))
    return list(dict.fromkeys(interpreter.found.values()))


def parsed(text: str) -> list[Operation]:
    return _region(iter(text.splitlines()))[0]


def _region(lines: Iterator[str]) -> tuple[list[Operation], str]:
    """The operations up to the line that closes the region, and that line."""
    operations: list[Operation] = []
    for line in lines:
        line = re.sub(r" loc\(#?\w*\)$", "", line.strip())
        if line.startswith("}"):
            return operations, line
        match = re.match(rf'(?:({NAME})(?::\d+)? = )?"?([a-z]\w*(?:\.\w+)*)"?(.*)', line)
        if match is None:
            continue
        regions: list[list[Operation]] = []
        while line.endswith("{"):
            inside, line = _region(lines)
            regions.append(inside)
        operations.append(Operation(match[1] or "", match[2], match[3], regions))
    return operations, ""


class _Interpreter:
    """Runs operations. `values` holds each value as an int or a Slot, or None if it is unknown."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.slots: dict[str, int] = {}
        self.in_flight: list[Dot] = []
        # How many tiles have been written and read so far, by buffer.
        self.written: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.found: dict[str, str] = {}

    def run(self, operations: list[Operation]) -> list[Any]:
        """Run `operations` and return what the region yields."""
        for operation in operations:
            values = [self.values.get(value) for value in operation.operands()]
            if operation.name == "scf.yield":
                return values
            result = self.evaluate(operation, values)
            if operation.result:
                self.values[operation.result] = result
                if isinstance(result, list):
                    self.values.update({f"{operation.result}#{i}": value for i, value in enumerate(result)})
                    self.values[operation.result] = result[0] if result else None
        return []

    def evaluate(self, operation: Operation, values: list[Any]) -> Any:
        """The result of the operation: a list if it may have several."""
        name, text = operation.name, operation.text
        if name == "arith.constant":
            number = re.match(r" (-?\d+|true|false)\b", text)
            return None if number is None else int({"true": 1, "false": 0}.get(number[1], number[1]))
        if name in INTEGERS:
            return None if None in values else INTEGERS[name](*values)
        if name == "arith.cmpi":
            compare = COMPARISONS.get(text.split(",")[0].strip())
            return None if None in values or compare is None else int(compare(*values))
        if name == "arith.select":
            return None if values[0] is None else values[1] if values[0] else values[2]
        if name == "ttg.local_alloc":
            return self.allocate(operation)
        if name == "ttg.memdesc_index":
            return self.slot_of(operation, values[0])
        if name in VIEWS:
            return values[0]
        if name in WRITES:
            self.write(self.known(operation, values[WRITES[name]]))
        elif name == "ttng.warp_group_dot":
            self.dot(operation, values, [])
            if "isAsync = true" not in text:
                self.in_flight = []
        elif name == "ttng.warp_group_dot_wait":
            pendings = re.search(r"pendings = (\d+)", text)
            left = int(pendings[1]) if pendings else 0
            self.in_flight = self.in_flight[max(0, len(self.in_flight) - left) :]
            return values
        elif name.startswith("ttng.tc_gen5_mma"):
            # The operands from the sixth on are barriers.
            self.dot(operation, values, [self.known(operation, value) for value in values[5:]])
        elif name == "ttng.tc_gen5_commit":
            barrier = self.known(operation, values[0])
            self.in_flight = [dot if dot.barriers else Dot(dot.reads, [barrier]) for dot in self.in_flight]
        elif name == "ttng.wait_barrier":
            self.wait(self.known(operation, values[0]))
        elif name == "scf.for":
            return self.loop(operation)
        elif name == "scf.if":
            return self.branch(operation, values[0])
        else:
            for region in operation.regions:
                self.run(region)
        return None

    def known(self, operation: Operation, value: Any) -> Slot:
        if not isinstance(value, Slot):
            raise ValueError(f"{operation.name}{operation.text} uses shared memory that cannot be followed")
        return value

    def allocate(self, operation: Operation) -> Slot:
        shape = re.search(r"!ttg\.memdesc<([\dx]+)x", operation.text)
        self.slots[operation.result] = int(shape[1].split("x")[0]) if shape else 1
        buffer = Slot(operation.result, None)
        if operation.operands():
            self.slots[operation.result] = 1
            self.write(buffer)
        return buffer

    def slot_of(self, operation: Operation, ring: Any) -> Slot | None:
        index = re.search(rf"\[({VALUE})\]", operation.text)
        number = self.values.get(index[1]) if index else None
        if not isinstance(ring, Slot) or number is None:
            # Tensor memory, or an unknown slot: `known` raises if an operation uses it.
            return None
        return Slot(ring.buffer, number)

    def dot(self, operation: Operation, values: list[Any], barriers: list[Slot]) -> None:
        # Only operands in shared memory matter: a dot reads registers when it starts, and no copy writes tensor memory.
        types = re.split(r"(?=!ttg\.memdesc<|tensor<)", operation.text.split(" : ", 1)[1])[1:3]
        in_shared = [type_.startswith("!ttg") and "tensor_memory" not in type_ for type_ in types]
        reads = [self.known(operation, v) for v, shared in zip(values[:2], in_shared, strict=True) if shared]
        self.read.update(slot.buffer for slot in reads)
        self.in_flight = [*self.in_flight, Dot(reads, barriers)]

    def wait(self, barrier: Slot) -> None:
        """Dots finish in order: the first one that arrives at `barrier` has finished, and so have those before it."""
        for i, dot in enumerate(self.in_flight):
            if any(barrier.overlaps(arrival) for arrival in dot.barriers):
                self.in_flight = self.in_flight[i + 1 :]
                return

    def write(self, slot: Slot) -> None:
        tile = self.written[slot.buffer]
        self.written[slot.buffer] += 1
        if any(slot.overlaps(read) for dot in self.in_flight for read in dot.reads):
            name, count = re.sub(r"^%|_\d+$", "", slot.buffer), self.slots[slot.buffer]
            # A loop of n stages copies tile i + n - 1 in the iteration that multiplies tile i.
            stages = tile - self.read[slot.buffer] + 2
            self.found.setdefault(
                slot.buffer,
                f"a copy of {name} overwrites the tile that a dot in flight reads: {count} slots, {stages} stages",
            )

    def loop(self, operation: Operation) -> list[Any]:
        head = re.match(rf" ({NAME}) = ({VALUE}) to {VALUE} step ({VALUE})", operation.text)
        if head is None:
            raise ValueError(f"{operation.name}{operation.text} cannot be followed")
        carried = re.search(r"iter_args\(([^)]*)\)", operation.text)
        pairs = re.findall(rf"({NAME}) = ({VALUE})", carried[1]) if carried else []
        inner, state = [name for name, _ in pairs], [self.values.get(value) for _, value in pairs]
        first, step = self.values.get(head[2]), self.values.get(head[3])
        for iteration in range(ITERATIONS):
            self.values[head[1]] = None if first is None or step is None else first + iteration * step
            self.values.update(zip(inner, state, strict=True))
            state = self.run(operation.regions[0])
        return state

    def branch(self, operation: Operation, condition: int | None) -> list[Any]:
        regions = [*operation.regions, []][:2]
        if condition is not None:
            return self.run(regions[0 if condition else 1])
        before, yielded, left = self.in_flight, [], []
        for region in regions:
            self.in_flight = before
            yielded.append(self.run(region))
            left.append(self.in_flight)
        # A dot has finished only if both branches wait for it.
        self.in_flight = max(left, key=len)
        return [a if a == b else None for a, b in zip(*yielded, strict=False)]
