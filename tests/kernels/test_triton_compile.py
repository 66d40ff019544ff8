"""The Triton kernels go through Triton's compiler, down to machine code, on any machine that has Triton."""

from __future__ import annotations

import os
from typing import Any

import pytest

from limbeck.kernels import triton_rows
from tests.kernels.definitions import LOSSES

if not triton_rows.AVAILABLE:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets its kernels here, and compiles none", allow_module_level=True)

POINTERS = {
    "divergence": "*fp32",
    "cross_entropy": "*fp32",
    "labels": "*i64",
    "factors": "*fp32",
    "tails": "*fp32",
    "raw_tails": "*fp32",
    "shares": "*fp32",
    "raw_shares": "*fp32",
    "classes": "i32",
    "stride": "i32",
    "student_stride": "i32",
    "teacher_stride": "i32",
}


def machine_code(kernel: Any, logits: str, **constants: Any) -> bytes:
    """For an H100, whether there is one or not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {**POINTERS, "logits": logits, "student": logits, "teacher": logits}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_dense(name: str, full: bool) -> None:
    flags = {"GRADIENT": full, "LABELS": full, "RAW": full, "BLOCK": triton_rows.BLOCK}
    for logits in ("*bf16", "*fp32"):
        assert machine_code(triton_rows._dense, logits, DIVERGENCE=name, **flags)


@pytest.mark.parametrize("raw", [False, True])
def test_sparse(raw: bool) -> None:
    for logits in ("*bf16", "*fp16", "*fp32"):
        for kernel in (triton_rows._tails, triton_rows._powers):
            assert machine_code(kernel, logits, RAW=raw, BLOCK=triton_rows.BLOCK)
