"""Compiles every Triton kernel with every configuration that is shipped, ahead of time, for GPUs that are not here.

    python compile_triton.py sm_90      prints one line of JSON a kernel

A script of its own because Triton's interpreter, which the tests run kernels in, excludes its compiler from a process.
`PYTHONPATH` chooses the Triton.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scsdpo_kernels.kernels import logits_triton, question_weights_triton, row_divergence_triton

# Shared memory of a program, in bytes: 163 KiB on sm_80, of which sm_86 and sm_89 have 99; 227 on sm_90 and sm_100.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TYPES = {2: "bf16", 4: "fp32", 8: "fp64"}
INTEGERS = ["count", "vocabulary", "rows"]
FP32 = ["old_logp", "scalars", "weight", "weights", "logits", "bias", "base", "factor", "others", "centre", "log_ratio",
        "divergence_out"]  # fmt: skip


def kernels(target):
    """(kernel, element, constants, options) of all that is launched on a target."""
    options = row_divergence_triton.options("cuda" if target.startswith("sm") else "hip")
    rows = list(itertools.product((0, 1, 2, 3), ("fp32",), (False, True), ("bf16", "fp32"), (False,)))
    rows += [(objective, "fp64", False, "fp32", False) for objective in (0, 1, 2)]  # of supports
    rows += [(objective, "fp32", False, "bf16", True) for objective in (0, 1, 2, 3)]
    for objective, element, difference, gradient, softcap in rows:
        yield (
            row_divergence_triton.row_divergence_kernel,
            {"student": element, "teacher": element, "gradient_out": gradient},
            {
                "objective": objective,
                "difference": difference,
                "has_target": True,
                "has_old_logp": True,
                "has_gradient": True,
                "has_softcap": softcap,
                "BLOCK": row_divergence_triton.BLOCK,
            },
            options,
        )
    for difference in (False, True):
        constants = {"difference": difference, "BLOCK": row_divergence_triton.BLOCK}
        elements = {"student": "fp32", "teacher": "fp32", "lse": "fp64"}
        yield row_divergence_triton.row_statistics_kernel, elements, constants, options
    known = {"student": "fp32", "teacher": "fp32", "student_lse": "fp64", "teacher_lse": "fp64", "terms": "fp64"}
    for objective, difference in itertools.product((0, 1, 2, 3), (False, True)):
        constants = {"objective": objective, "difference": difference, "BLOCK": row_divergence_triton.BLOCK}
        yield row_divergence_triton.row_terms_kernel, known, constants, options
        for gradient, softcap in (("bf16", False), ("fp32", False), ("bf16", True)):
            yield (
                row_divergence_triton.row_gradient_kernel,
                {**known, "gradient_out": gradient},
                {**constants, "has_gradient": True, "has_softcap": softcap},
                options,
            )
    for softcap in (False, True):
        constants = {"has_bias": True, "has_softcap": softcap, "BLOCK": logits_triton.BLOCK}
        yield logits_triton.head_logits_kernel, {}, constants, {"num_warps": logits_triton.WARPS}
        for gradient in ("bf16", "fp32"):
            yield (
                logits_triton.tail_gradient_kernel,
                {"gradient_out": gradient},
                constants,
                {"num_warps": logits_triton.WARPS},
            )
    for exponent, threshold in ((0.5, None), (1.0, 0.5)):
        constants = {"exponent": exponent, "threshold": threshold, "BLOCK": question_weights_triton.BLOCK}
        options = {"num_warps": question_weights_triton.WARPS}
        yield question_weights_triton.question_weights_kernel, {"rewards": "fp32"}, constants, options


def compiled(kernel, elements, constants, options, target):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in elements:
            signature[name] = "*" + elements[name]
        elif name in FP32:
            signature[name] = "*fp32"
        elif name in ("target", "question_ids"):
            signature[name] = "*i64"
        elif name == "raw":
            signature[name] = "*fp64"
        elif name.endswith("stride"):
            signature[name] = "i64"
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
        if signature[name][0] == "*" or name.endswith("stride") or name == "vocabulary":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def usage(kernel):
    """Registers, and bytes of stack (spills and arrays)."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
        return {
            "registers": int(re.search(r"REG:(\d+)", text)[1]),
            "stack": int(re.search(r"STACK:(\d+)", text)[1]),
        }
    text = kernel.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "stack": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
    }


def main(name: str) -> None:
    target, shared_memory = TARGETS[name]
    for kernel, elements, constants, options in kernels(name):
        result = compiled(kernel, elements, constants, options, target)
        line = {
            "triton": triton.__version__,
            "target": name,
            "kernel": kernel.__name__,
            "elements": sorted(set(elements.values())),
            "constants": {key: str(value) for key, value in constants.items() if key in kernel.arg_names},
            **options,
            **usage(result),
            "shared": result.metadata.shared,
            "shared_limit": shared_memory,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
