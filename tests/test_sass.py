"""The reader of machine code, on small texts written by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from mfwm_kernels.sass import interpreter
from mfwm_kernels.sass.interpreter import Constants, Program, Wait
from mfwm_kernels.sass.listing import Instruction, functions_of, instructions_of
from mfwm_kernels.sass.measure import arguments_at, measured
from mfwm_kernels.sass.occupancy import blocks_per_sm


def assembled(*lines: str) -> list[Instruction]:
    """The instructions at 0x00, 0x10, ...; a line may start with `name:`, to which other lines may jump."""
    labels = {line.split(":")[0]: 16 * i for i, line in enumerate(lines) if ":" in line}
    text = ["\t\tcode for sm_90", "\t\tFunction : written_by_hand"]
    for place, line in enumerate(lines):
        body = line.split(":")[-1].strip()
        for name, address in labels.items():
            body = body.replace(f"<{name}>", hex(address))
        text.append(f"        /*{16 * place:04x}*/   {body} ;    /* 0x0000000000007918 */")
        text.append("                                   /* 0x000fe20000000f00 */")
    return instructions_of(functions_of("\n".join(text))["written_by_hand"])


def run_of(*lines: str, arguments: tuple[tuple[int, int], ...] = (), block: int = 0, warp: int = 0) -> Any:
    constants = Constants(blocks=100, threads=128)
    arguments_at(constants, arguments)
    return Program(assembled(*lines)).run(constants, block, warp)


def value_of(*lines: str, arguments: tuple[tuple[int, int], ...] = ()) -> int:
    """What R0 holds at the end: the number of times that a loop runs which counts it down."""
    ends = ("loop: ISETP.NE.AND P6, PT, R0, RZ, PT", "VIADD R0, R0, 0xffffffff", "@P6 BRA <loop>", "EXIT")
    return int(run_of(*lines, *ends, arguments=arguments).counts[len(lines)]) - 1


def test_functions_of_a_library_are_told_apart() -> None:
    text = (
        "\tcode for sm_90\n\t\tFunction : a\n  /*0000*/ EXIT ;\n\t\tFunction : b\n  /*0000*/ NOP ;\n  /*0010*/ EXIT ;\n"
    )
    assert {name: len(instructions_of(listing)) for name, listing in functions_of(text).items()} == {"a": 1, "b": 2}


def test_a_listing_has_operands_guards_and_targets_and_no_padding() -> None:
    body = assembled("@!P0 LDG.E.64 R2, desc[UR4][R8.64+0x10]", "@P1 BRA <end>", "end: EXIT", "BRA 0x30", "NOP", "NOP")
    assert [instruction.opcode for instruction in body] == ["LDG", "BRA", "EXIT"]
    load, jump, _ = body
    assert load.guard is not None and (load.guard.sign, load.guard.name) == ("!", "P0")
    assert (load.width, load.written) == (8, {"R2", "R3"})
    assert jump.target == 0x20


@pytest.mark.parametrize(
    "text, width",
    [
        ("LDG.E.U8 R0, desc[UR4][R2.64]", 1), ("LDG.E.U16.CONSTANT R0, desc[UR4][R2.64]", 2),
        ("LDG.E R0, desc[UR4][R2.64]", 4), ("STG.E.64 desc[UR4][R2.64], R6", 8),
        ("LDG.E.EF.128 R4, desc[UR4][R2.64]", 16), ("LDGSTS.E.BYPASS.128 [R17+0xc000], desc[UR14][R34.64], P5", 16),
    ],
)  # fmt: skip
def test_widths_of_global_accesses(text: str, width: int) -> None:
    (access,) = assembled(text)
    assert access.width == width
    assert access.is_global_load != access.is_global_store
    assert not assembled(text.replace("LDG.", "LDS.").replace("STG.", "STS.").replace("LDGSTS", "LDSM"))[
        0
    ].is_global_load


def test_nested_loops_run_as_often_as_the_arguments_say() -> None:
    run = run_of(
        "MOV R0, RZ",
        "outer: MOV R1, RZ",
        "inner: VIADD R1, R1, 0x1",
        "ISETP.GE.AND P0, PT, R1, c[0x0][0x210], PT",
        "@!P0 BRA <inner>",
        "IADD3 R0, R0, 0x2, RZ",
        "ISETP.LT.U32.AND P1, PT, R0, c[0x0][0x218], PT",
        "@P1 BRA <outer>",
        "EXIT",
        arguments=((7, 4), (10, 8)),
    )
    assert run.counts == [1, 5, 35, 35, 35, 5, 5, 5, 1]
    assert not run.assumed


def test_a_loop_whose_length_memory_holds_runs_once_and_is_an_assumption() -> None:
    run = run_of(
        "LDG.E R4, desc[UR4][R2.64]", "MOV R0, RZ", "loop: VIADD R0, R0, 0x1", "ISETP.LT.AND P0, PT, R0, R4, PT",
        "@P0 BRA <loop>", "EXIT",
    )  # fmt: skip
    assert run.counts == [1] * 6
    assert run.assumed == {4}


def test_a_wait_for_a_barrier_is_no_assumption() -> None:
    run = run_of("spin: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA <spin>", "EXIT")
    assert run.counts == [1, 1, 1]
    assert not run.assumed


def test_a_branch_on_memory_runs_the_code_that_it_may_skip_but_not_a_slow_path() -> None:
    load = "LDG.E R4, desc[UR4][R2.64]", "ISETP.EQ.AND P0, PT, R4, RZ, PT"
    assert run_of(*load, "@P0 BRA <end>", "FADD R5, R5, R5", "end: EXIT").counts == [1, 1, 1, 1, 1]
    slow = run_of(*load, "@P0 BRA <end>", "CALL.REL.NOINC <sub>", "end: EXIT", "sub: RET.REL.NODEC R4 0x0")
    assert slow.counts == [1, 1, 1, 0, 1, 0]


def test_predicated_instructions_are_issued_whether_or_not_they_execute() -> None:
    lines = ("S2R R0, SR_TID.X", "ISETP.LT.U32.AND P0, PT, R0, 0x20, PT", "@P0 BRA <first>",
             "@!P0 MOV R1, 0x1", "first: @P0 MOV R1, 0x2", "EXIT")  # fmt: skip
    assert run_of(*lines, warp=0).counts == [1, 1, 1, 0, 1, 1]
    assert run_of(*lines, warp=1).counts == [1, 1, 1, 1, 1, 1]
    exits = ("S2R R0, SR_CTAID.X", "ISETP.GE.AND P0, PT, R0, 0x5, PT", "@P0 EXIT", "EXIT")
    assert run_of(*exits, block=5).counts == [1, 1, 1, 0]
    assert run_of(*exits, block=4).counts == [1, 1, 1, 1]


def test_a_call_returns_to_the_address_in_its_register() -> None:
    run = run_of("MOV R4, 0x20", "CALL.REL.NOINC <sub>", "EXIT", "sub: NOP", "RET.REL.NODEC R4 0x0")
    assert run.counts == [1, 1, 1, 1, 1]


def test_a_switch_jumps_through_the_compilers_table() -> None:
    body = assembled(
        "S2R R4, SR_CTAID.X", "LDC.U8 R1, c[0x0][R4+0x210]", "SHF.L.U32 R1, R1, 0x2, RZ", "LDC R2, c[0x2][R1+0x4]",
        "BRX R2 -0x50", "EXIT", "NOP", "EXIT", "NOP", "BRA.DIV UR4, 0x60", "EXIT",
    )  # fmt: skip
    constants = Constants(2, 32, b"".join(address.to_bytes(4, "little") for address in (0x50, 0x80, 0x60)))
    arguments_at(constants, [(0, 1), (1, 1)])
    first, second = (Program(body).run(constants, block, 0).counts for block in (0, 1))
    assert first == [1] * 5 + [0, 0, 0, 1, 1, 1]
    assert second == [1] * 5 + [0, 1, 1, 0, 0, 0]


def test_code_that_cannot_be_followed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "STEP_LIMIT", 1000)
    for lines in (
        ["BRX R2 -0x10", "EXIT"],
        ["CALL.REL.NOINC 0x90", "EXIT"],
        ["RET.REL.NODEC R4 0x0"],
        ["MOV R0, RZ"],
        ["loop: BRA <loop>", "EXIT"],
    ):
        with pytest.raises(ValueError, match=r"nowhere|no end"):
            run_of(*lines)


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["MOV R1, 0xffffffff", "IADD3 R0, P0, R1, 0x1, RZ", "IADD3.X R0, R0, 0x4, RZ, P0, !PT"], 5),
        # 64-bit 5 - 7, whose low word borrows: the high word is ~0 + 0.
        (["MOV R1, 0x7", "IADD3 R2, P0, -R1, 0x5, RZ", "IADD3.X R3, ~RZ, RZ, RZ, P0, !PT", "IADD3 R0, R3, 0x4, RZ"], 3),
        (["MOV R1, 0x3", "IMAD R0, R1, 0x5, R1"], 18),
        (["MOV R1, -0x3", "IMAD.WIDE R2, R1, 0x5, RZ", "IADD3 R0, R3, 0x9, RZ"], 8),
        (["MOV R1, -0x1", "IMAD.HI.U32 R0, R1, 0x9, RZ"], 8),
        (["MOV R1, 0x3", "LEA R0, R1, 0x2, 0x2"], 14),
        (["MOV R1, 0xc0000000", "LEA.HI R0, R1, 0x5, RZ, 0x2"], 8),
        (["MOV R1, -0x8", "LEA.HI.X.SX32 R2, R1, 0x5, 0x2, PT", "MOV R0, R2"], 5),
        (["MOV R1, -0x10", "SHF.R.S32.HI R1, RZ, 0x2, R1", "IADD3 R0, R1, 0x7, RZ"], 3),
        (["MOV R1, 0x1", "SHF.R.U64 R0, RZ, 0x1e, R1"], 4),
        (["MOV R1, 0xc0000000", "SHF.L.U64.HI R0, R1, 0x1, RZ"], 1),
        (["MOV R1, 0x6", "LOP3.LUT R0, R1, 0x3, RZ, 0x3c, !PT"], 5),
        (["MOV R1, 0x6", "LOP3.LUT P0, RZ, R1, 0x4, RZ, 0xc0, !PT", "SEL R0, RZ, 0x9, !P0"], 9),
        (["MOV R1, 0xfd", "SGXT R1, R1, 0x8", "VIADD R0, R1, 0x5"], 2),
        (["MOV R1, 0xff0", "SGXT.U32 R0, R1, 0x5"], 16),
        (["MOV R1, -0x5", "VIMNMX R1, R1, 0x2, PT", "VIADD R0, R1, 0x8"], 3),
        (["MOV R1, -0x5", "VIMNMX.U32 R0, R1, 0x2, PT"], 2),
        (["MOV R1, -0x5", "IABS R0, R1"], 5),
        (["MOV R1, 0x070605", "PRMT R0, R1, 0x4441, RZ"], 6),
        (["HFMA2.MMA R0, -RZ, RZ, 0, 2.384185791015625e-07"], 4),
        (["ISETP.EQ.AND P3, PT, RZ, RZ, PT", "P2R R1, PR, RZ, 0x8", "MOV R0, R1"], 8),
        (["ISETP.NE.AND P0, PT, RZ, RZ, PT", "PLOP3.LUT P1, PT, P0, PT, PT, 0x2a, 0x0", "SEL R0, 0x3, 0x4, P1"], 3),
        (["ISETP.GT.U32.AND P0, PT, RZ, 0x1, PT", "ISETP.GE.AND.EX P1, PT, RZ, RZ, PT, P0", "SEL R0, 0x3, 0x4, P1"], 4),
        (["S2R R1, SR_TID.X", "ULDC.64 UR4, c[0x0][0x210]", "IMAD.U32 R0, RZ, RZ, UR5"], 2),
    ],
)  # fmt: skip
def test_integers(lines: list[str], expected: int) -> None:
    assert value_of(*lines, arguments=((2 << 32, 8),)) == expected


def test_a_compilers_division_is_exact() -> None:
    """What the compiler emits for an unsigned 32-bit division: a reciprocal in fp32 and two corrections."""
    draw = random.Random(1)
    lines = (
        "ULDC UR5, c[0x0][0x214]", "LDC R44, c[0x0][0x210]", "I2F.U32.RP R3, UR5", "MUFU.RCP R3, R3",
        "IADD3 R8, R3, 0xffffffe, RZ", "F2I.FTZ.U32.TRUNC.NTZ R9, R8", "IMAD.MOV.U32 R8, RZ, RZ, RZ",
        "IMAD.MOV R7, RZ, RZ, -R9", "IMAD R7, R7, UR5, RZ", "IMAD.HI.U32 R9, R9, R7, R8", "IMAD.HI.U32 R8, R9, R44, RZ",
        "IMAD.MOV R7, RZ, RZ, -R8", "IMAD R4, R7, UR5, R44", "ISETP.GE.U32.AND P0, PT, R4, UR5, PT",
        "@P0 IADD3 R4, R4, -UR5, RZ", "@P0 VIADD R8, R8, 0x1", "ISETP.GE.U32.AND P1, PT, R4, UR5, PT",
        "@P1 VIADD R8, R8, 0x1", "MOV R0, R8",
    )  # fmt: skip
    for _ in range(200):
        divisor = math.ceil(2 ** draw.uniform(0, 31))
        dividend = min(draw.randrange(2**32), divisor * 40)
        assert value_of(*lines, arguments=((dividend, 4), (divisor, 4))) == dividend // divisor


def test_loads_that_nothing_uses_in_between_are_in_flight_together() -> None:
    def load(first: int) -> str:
        return f"LDG.E.128 R{first}, desc[UR4][R2.64]"

    serial = run_of(load(4), "FADD R20, R4, R5", load(8), "FADD R20, R8, R9", "EXIT")
    assert serial.waits == [Wait(512, 512), Wait(512, 512)]
    together = run_of(load(4), load(8), "FADD R20, R7, R7", "FADD R20, R8, R9", "EXIT")
    assert together.waits == [Wait(1024, 1024)]
    prefetched = run_of(load(4), load(8), "FADD R20, R4, R4", load(4), "FADD R20, R4, R4", "EXIT")
    assert prefetched.waits == [Wait(1024, 1024), Wait(512, 512)]
    ahead = run_of(load(4), "FADD R20, R12, R12", load(8), "FADD R20, R8, R8", load(12), "FADD R20, R13, RZ", "EXIT")
    assert ahead.waits == [Wait(1024, 1024), Wait(512, 512)]


def test_asynchronous_copies_arrive_by_group() -> None:
    copy = "LDGSTS.E.BYPASS.128 [R17], desc[UR14][R30.64]"
    lines = (copy, "LDGDEPBAR", copy, copy, "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "DEPBAR.LE SB0, 0x0", "EXIT")
    assert run_of(*lines).waits == [Wait(512, 1536), Wait(1024, 1024)]


def test_a_matrix_product_forgets_only_its_result() -> None:
    product = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR12], R24, gsb0"
    for name, runs in (("R31", 1), ("R32", 2)):
        counter = f"IADD3 {name}, {name}, 0x1, RZ", f"ISETP.LT.AND P0, PT, {name}, 0x2, PT"
        found = run_of(f"MOV {name}, RZ", product, *counter, "@P0 BRA 0x10", "EXIT")
        assert found.counts[1] == runs


def test_counts_of_a_launch() -> None:
    body = assembled(
        "S2R R0, SR_CTAID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", "@P0 EXIT", "LDG.E.64 R4, desc[UR4][R2.64]",
        "BAR.SYNC.DEFER_BLOCKING 0x0", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0",
        "STG.E.U16 desc[UR4][R2.64], R5", "EXIT",
    )  # fmt: skip
    found = measured(Program(body), (), blocks=64, warps=4, registers=40, shared_bytes=0)
    # Half of the blocks exit after three instructions.
    assert found.warp_instructions == 4 * 64 * (3 + 8) / 2
    assert (found.barriers, found.loads, found.stores) == (0.5, {8: 0.5}, {2: 0.5})
    assert found.flops == 32 * 2 * 64 * 128 * 16
    assert found.blocks_per_sm == 12
    assert found.bytes_in_flight == 12 * 4 * 256


@pytest.mark.parametrize(
    "registers, shared_bytes, warps, blocks",
    [(32, 0, 8, 8), (128, 0, 16, 1), (112, 0, 16, 1), (128, 0, 8, 2), (40, 0, 4, 12), (255, 0, 4, 2), (16, 0, 1, 32),
     (32, 113 * 1024, 4, 2), (32, 114 * 1024, 4, 1), (255, 0, 16, 0), (65, 0, 4, 7)],
)  # fmt: skip
def test_blocks_per_sm(registers: int, shared_bytes: int, warps: int, blocks: int) -> None:
    assert blocks_per_sm(registers, shared_bytes, warps) == blocks
