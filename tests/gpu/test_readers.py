"""The readers of PTX and SASS, on texts made up for them, and the compiler's pool."""

import dataclasses
import os

import pytest

from tests.gpu import compiler, conftest, ptx, sass

SASS = """
//--------------------- .text.kernel --------------------------
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R35], desc[UR14][R14.64], !P0 ;
        /*0020*/                   LDG.E.U16 R62, desc[UR14][R6.64] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   NOP ;
.L_x_0:
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/              @P1  BRA `(.L_x_0) ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
	.section	.nv.constant0.kernel,"a",@progbits
"""
PTX = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
	.reg .b64 	%rd<6>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	cvta.to.global.u64 	%rd3, %rd2;
	ld.global.v2.b32 	{%r1, %r2}, [%rd3+8];
	mov.b64 	%rd5, %rd1;
$L__BB0_1:
	mad.wide.s32 	%rd4, %r1, 2, %rd5;
	// begin inline asm
	@%p2 cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, %p1;
	// end inline asm
	cp.async.commit_group;
	@!%p3 ld.global.b16 	{ %rs1 }, [ %rd3 + 0 ];
	add.s64 	%rd5, %rd4, 64;
	@%p4 bra.uni 	$L__BB0_1;
	ret;
}
"""


def test_sass():
    instructions = sass.kernels(SASS)["kernel"]
    assert [i.kind for i in instructions] == [
        *("control", "LDGSTS.128", "LDG.16", "HMMA", "control", "control"),
        *("STG.128", "control", "control"),
    ]
    (loop,) = sass.loops(SASS)["kernel"]
    assert loop.histogram == {"HMMA": 1, "control": 1}


def test_tensor_cores_of_warp_groups():
    text = SASS.replace(
        "HMMA.16816.F32 R4, R8, R12, R4", "UTCHMMA tmem[UR5], gdesc[UR8]"
    )
    (loop,) = sass.loops(text)["kernel"]
    assert loop.number("UTCMMA") == 1
    assert loop.number("HMMA") == 0
    assert loop.matrix == 16


def test_ptx():
    loads = ptx.loads(PTX)
    assert loads.before == {1: 8}
    assert loads.loop == {0: 16, 1: 2}
    assert loads.copies == {0: [16]}


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("mm grid: [2, 3, 1] threads: [64, 1, 1]  shared_memory: 512 bytes", 512),
        (
            "kernel=mm, profile_annotation=call.2, launch dimensions=blocks: {2, 3, 1},"
            " threads/block: {64, 1, 1}, cluster_dim=nullopt",
            0,
        ),
    ],
    ids=["newest", "0.10"],
)
def test_launches(text, shared):
    lines = f"""
001: kCommandBuffer [source]
  002: kCustomKernel [] {text}
003: kCopy [sink]
"""
    found = list(compiler.read_launches(lines))
    kernel = compiler.Launch("kCustomKernel", "mm", (2, 3, 1), 64, shared, True)
    assert found == [kernel, compiler.Launch("kCopy", "", (), 0, 0, False)]


@dataclasses.dataclass(frozen=True)
class Fatal:
    def __call__(self):
        os.abort()


@dataclasses.dataclass(frozen=True)
class Wrong:
    def __call__(self):
        raise ValueError("no program")


def test_a_fatal_error_fails_its_own_test_alone():
    pool = conftest.Pool([(Fatal(), "sm_90"), (Wrong(), "sm_90")])
    with pytest.raises(pytest.fail.Exception, match="dies of Fatal"):
        pool(Fatal(), "sm_90")
    with pytest.raises(ValueError, match="no program"):
        pool(Wrong(), "sm_90")
    pool.close()
