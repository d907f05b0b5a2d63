"""Compiles every Triton kernel to machine code, which takes no GPU, and prints what the tests look at as JSON.

A process of its own, because a process either compiles kernels or interprets them:

    python -m tests.kernels.compile_triton 90
"""

from __future__ import annotations

import json
import os
import re
import sys

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fiftyfold.kernels.triton import activations, embedding, linear, tokens, weights
from fiftyfold.kernels.triton.activations import LARGEST_CHUNK

POINTERS = {
    "x": "*fp32", "y": "*fp32", "codes": "*i8", "packed": "*u8", "scales": "*fp32", "sums": "*i32", "largest": "*fp32",
    "weight_scale": "*fp32", "bias": "*fp32", "partial": "*i32", "tokens": "i32", "outputs": "i32", "blocks": "i32",
    "columns": "i32", "padded": "i32", "size": "i32", "divisor": "fp32", "lowest": "fp32", "highest": "fp32",
    "weight": "*fp32", "thresholds": "*fp32", "counts": "*i32",
    "clip": "fp32",
}  # fmt: skip
GRID = {"HAS_CLIP": True, "STATIC": False, "CHUNK": 1024}
WEIGHT = {"HAS_CLIP": True, "CHUNK": 1024}
CAPABILITY = int(sys.argv[1])
EARLY = {"EARLY": CAPABILITY >= 90}
PRODUCT = {"HAS_BIAS": True, "SPLIT": 1, **EARLY}
KERNELS = [
    ("quantize", activations._quantize_kernel, {}, {**GRID, **EARLY}),
    ("quantize_long", activations._quantize_kernel, {}, {**GRID, "CHUNK": LARGEST_CHUNK, **EARLY}),
    ("fake_quantize", activations._fake_quantize_kernel, {}, GRID),
    *(
        (
            f"embedding_{bits}",
            embedding._embedding_kernel,
            {"tokens": "*i64", "scale": "*fp16"},
            {"BITS": bits, "CHUNK": 256},
        )
        for bits in (1, 2, 3)
    ),
    *(
        (
            f"tokens_{bits}",
            tokens._tokens_kernel,
            {"codes": "*i32", "packed": "*i32"},
            {"HAS_BIAS": True, **EARLY, "BITS": bits, "OUTPUTS": 16 // bits, "BLOCKS": tokens.LARGEST_BLOCKS},
        )
        for bits in (1, 2)
    ),
    *(
        (
            f"matrix_{bits}_{count}",
            linear._matrix_kernel,
            {},
            {**PRODUCT, "BITS": bits, "TOKENS": plan.tokens, "OUTPUTS": plan.outputs, "BLOCKS": plan.blocks},
        )
        for bits in (1, 2)
        for count in (16, 32, 64, 128, 1024)
        for plan in [linear.choose_plan(count, 4096, 16, 132)]
    ),
    ("sum", weights._sum_kernel, {"sums": "*fp64"}, {**WEIGHT, "BEYOND": True, "PER_GROUP": 1}),
    ("largest", weights._largest_kernel, {}, WEIGHT),
    *(
        (f"write_{bits}", weights._write_kernel, {"scales": "*fp16"}, {**WEIGHT, "BITS": bits, "PER_GROUP": 1})
        for bits in (1, 2, 8)
    ),
    ("finish", linear._finish_kernel, {}, {**PRODUCT, "BITS": 2, "SPLIT": 4, "OUTPUTS": 256}),
]


def compiled(kernel, types, constants, warps):
    """Return what is to be looked at of one kernel."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, POINTERS.get(name)) for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if str(signature[name]).startswith("*")
        },
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    result = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    ptx = result.asm["ptx"]
    return {
        "bytes": len(result.asm["cubin"]),
        "shared": result.metadata.shared,
        "fused": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "approximate": len(re.findall(r"div\.(full|approx)", ptx)),
        "dp4a": len(re.findall(r"dp4a\.u32\.s32", ptx)),
        "tensor_cores": len(re.findall(r"(?:w?g?mma)[\w.]*\.s32\.s8\.s8", ptx)),
        "local": len(re.findall(r"\.local\b", ptx)),
    }


def main() -> None:
    """Compile all of them for one compute capability."""
    found = {
        name: compiled(kernel, types, constants, 8 if constants.get("CHUNK") == LARGEST_CHUNK else 4)
        for name, kernel, types, constants in KERNELS
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
