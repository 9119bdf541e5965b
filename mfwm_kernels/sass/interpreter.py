"""Runs one warp of a launch through its machine code, and counts.

The warp is represented by its first lane, whose integers are computed from the launch's arguments, the block's number
and the thread's. A branch on an unknown condition, one that depends on what memory holds, is resolved by a rule, and
the run says which:

- a jump back (a loop whose length memory decides, or a wait for a barrier) is not taken: the loop runs once;
- a jump over code that calls a subroutine is taken: the code is the slow path of a division or a square root;
- any other jump forward is not taken: the code behind it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .listing import Instruction
from .semantics import step_of
from .state import State, predicate

# Far more than any kernel executes per warp: a loop that the interpreter misreads must not run forever.
STEP_LIMIT = 5_000_000
LANES = 32


class Constants:
    """Bank 0: the sizes of the launch and its arguments, at their offsets. Bank 2: the compiler's constants."""

    def __init__(self, blocks: int, threads: int, compiler: bytes = b"") -> None:
        self.bytes: dict[int, int] = {}
        self.compiler = compiler
        for place, size in enumerate((threads, 1, 1, blocks, 1, 1)):
            self.put(4 * place, size, 4)
        # The stack's end and the descriptor of global memory: no count depends on them.
        self.put(0x28, 0, 4)

    def put(self, offset: int, value: int, size: int) -> None:
        for place in range(size):
            self.bytes[offset + place] = value >> 8 * place & 255

    def read(self, offset: int, size: int, bank: int = 0) -> int | None:
        if bank == 2:
            found = self.compiler[offset : offset + size]
            return int.from_bytes(found, "little") if len(found) == size else None
        if any(offset + place not in self.bytes for place in range(size)):
            return None
        return int.from_bytes(bytes(self.bytes[offset + place] for place in range(size)), "little")


class Wait(NamedTuple):
    """The warp waits for `arriving` bytes of all its lanes, while `outstanding` are on their way, those included."""

    arriving: int
    outstanding: int


@dataclass
class Run:
    """What a warp executed: how often each instruction, its waits for loads, and the branches that a rule resolved."""

    counts: list[int]
    waits: list[Wait] = field(default_factory=list)
    assumed: set[int] = field(default_factory=set)


class _Loads:
    """The loads on their way, in batches: a batch is what the warp issues between two waits, and arrives as a whole."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.batches: list[tuple[set[str], int]] = []
        self.is_open = False
        # Asynchronous copies to shared memory, in the groups that the code closes.
        self.copies: list[int] = []
        self.open_copies = 0

    def issue(self, instruction: Instruction) -> None:
        size = instruction.width * LANES
        if instruction.opcode == "LDGSTS":
            self.open_copies += size
            return
        if not self.is_open:
            self.batches.append((set(), 0))
            self.is_open = True
        names, total = self.batches[-1]
        self.batches[-1] = (names | instruction.written, total + size)

    def outstanding(self) -> int:
        return sum(size for _, size in self.batches) + sum(self.copies) + self.open_copies

    def use(self, names: frozenset[str]) -> None:
        """Wait for the batches up to the last one that loads any of these registers."""
        last = max((i for i, (loaded, _) in enumerate(self.batches) if loaded & names), default=-1)
        if last >= 0:
            arriving = sum(size for _, size in self.batches[: last + 1])
            self.run.waits.append(Wait(arriving, self.outstanding()))
            del self.batches[: last + 1]
            self.is_open = False

    def close_group(self) -> None:
        self.copies.append(self.open_copies)
        self.open_copies = 0

    def wait_for_groups(self, left: int) -> None:
        arriving = sum(self.copies[: max(0, len(self.copies) - left)])
        if arriving:
            self.run.waits.append(Wait(arriving, self.outstanding()))
        self.copies = self.copies[max(0, len(self.copies) - left) :]


class Program:
    """A kernel's instructions, prepared to be run."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = instructions
        self.places = {instruction.address: place for place, instruction in enumerate(instructions)}
        self.steps = [step_of(instruction) for instruction in instructions]
        self.guards = [None if i.guard is None else predicate(i.guard) for i in instructions]
        self.conditions: list[Callable[[State], bool | None] | None] = [
            predicate(i.operands[0]) if i.opcode == "BRA" and i.operands[0].kind == "predicate" else None
            for i in instructions
        ]

    def is_spin(self, place: int) -> bool:
        """Whether the jump back at `place` waits for a barrier in shared memory."""
        target = self.places[self.instructions[place].target]  # type: ignore[index]
        return any(instruction.opcode == "SYNCS" for instruction in self.instructions[max(0, target - 1) : place])

    def rule(self, place: int) -> bool:
        """Whether to take the jump at `place`, whose condition is unknown."""
        target = self.places.get(self.instructions[place].target, 0)  # type: ignore[arg-type]
        return target > place and any(skipped.opcode == "CALL" for skipped in self.instructions[place + 1 : target])

    def run(self, constants: Constants, block: int, warp: int) -> Run:
        """What this warp of this block executes. Raises ValueError if the code cannot be followed."""
        state: State = {
            "constants": constants,
            "SR_TID.X": warp * LANES,
            **dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_LANEID", "SR_CgaCtaId"), 0),
            "SR_CTAID.X": block,
        }
        run = Run([0] * len(self.instructions))
        loads = _Loads(run)
        place = steps = 0
        while True:
            if place >= len(self.instructions) or steps > STEP_LIMIT:
                raise ValueError(f"the code has no end within {steps} instructions")
            steps += 1
            run.counts[place] += 1
            instruction, guard = self.instructions[place], self.guards[place]
            executes = True if guard is None else guard(state)
            if executes is False:
                place += 1
                continue
            if loads.batches and instruction.opcode != "BRA":
                loads.use(instruction.used)
            opcode = instruction.opcode
            if opcode in ("BRA", "CALL", "RET", "EXIT", "BRX"):
                following = self.follow(place, state, executes, run)
                if following is None:
                    return run
                place = following
                continue
            if executes is None:
                before = {name: state.get(name) for name in changed(instruction)}
                self.steps[place](state)
                state.update({name: value if state.get(name) == value else None for name, value in before.items()})
            else:
                self.steps[place](state)
            if instruction.is_global_load:
                loads.issue(instruction)
            elif opcode == "LDGDEPBAR":
                loads.close_group()
            elif opcode == "DEPBAR":
                loads.wait_for_groups(instruction.operands[1].value)
            place += 1

    def follow(self, place: int, state: State, executes: bool | None, run: Run) -> int | None:
        """Where a jump leads; None at the end of the warp."""
        instruction = self.instructions[place]
        condition = self.conditions[place]
        if "DIV" in instruction.modifiers:
            # Taken only if lanes have diverged.
            return place + 1
        if condition is not None and executes is not False:
            value = condition(state)
            executes = value if value is not True else executes
        if executes is False:
            return place + 1
        if instruction.opcode == "EXIT":
            if executes:
                return None
            run.assumed.add(place)
            return place + 1
        if instruction.opcode == "RET":
            address = state.get(instruction.operands[0].name)
        elif instruction.opcode == "BRX":
            # Relative to the instruction after it.
            start = state.get(instruction.operands[0].name)
            offset = int(instruction.operands[1].text, 16)
            address = None if start is None else start + offset + instruction.address + 16
        else:
            address = instruction.target
        if address is None or address not in self.places:
            raise ValueError(f"{instruction.text} leads nowhere")
        if executes is None:
            taken = self.rule(place)
            if not taken and not (self.places[address] <= place and self.is_spin(place)):
                run.assumed.add(place)
            return self.places[address] if taken else place + 1
        return self.places[address]


def changed(instruction: Instruction) -> list[str]:
    """The registers and predicates that the instruction may write."""
    names: list[str] = []
    for operand in instruction.operands:
        if operand.kind == "predicate":
            names.append(operand.name)
        elif operand.kind == "register" and not operand.name.endswith("Z"):
            names += [operand.register(i) for i in range(2)]
            break
        else:
            break
    return names
