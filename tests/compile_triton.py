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

from scsdpo_kernels.kernels import (
    divergence_triton,
    logits_triton,
    question_weights_triton,
    row_divergence_triton,
    scaling_triton,
)

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
    for variant in itertools.chain(row_kernels(target), logits_kernels()):
        kernel, elements, constants, options = variant
        for multiple in (True, False):  # of 16 entries, as 151936, or not, as 50257
            yield kernel, elements, {**constants, "multiple": multiple}, options
    yield from weight_kernels()
    for element in ("bf16", "fp32", "fp16"):
        constants, options = {"BLOCK": scaling_triton.BLOCK}, {"num_warps": scaling_triton.WARPS}
        yield scaling_triton.multiply_kernel, {"gradient": element, "by": "fp32"}, constants, options


def row_kernels(target):
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


def logits_kernels():
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


def weight_kernels():
    for exponent, threshold in ((0.5, None), (1.0, 0.5)):
        constants = {"exponent": exponent, "threshold": threshold, "BLOCK": question_weights_triton.BLOCK}
        options = {"num_warps": question_weights_triton.WARPS}
        yield question_weights_triton.question_weights_kernel, {"rewards": "fp32"}, constants, options


class Driver:
    """Stands for the GPU that is compiled for: kernels ask which one it is."""

    def __init__(self, target):
        self.get_current_target = lambda: target


def compiled(kernel, elements, constants, options, target):
    multiple = constants.get("multiple", True)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in elements:
            signature[name] = "*" + elements[name]
        elif name == "mixture":
            numbers = ("fp32",) * 8
            signature[name] = divergence_triton.Mixture("fp32", "fp32", "fp32", numbers, numbers)
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
        aligned = name == "vocabulary" and multiple
        aligned = aligned or name.endswith("stride")
        if str(signature[name])[0] == "*" or aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def loops(kernel, result, constants, options):
    """(all, MUFU) SASS instructions an entry in each of a row kernel's loops over whole blocks, by their addresses.

    These loops alone take a block's logits, 16 bytes at a time. The rest of the kernel runs once a row, or a few times.
    """
    if "BLOCK" not in constants or kernel.__module__ != row_divergence_triton.__name__ or "cubin" not in result.asm:
        return []
    entries = constants["BLOCK"] // (32 * options["num_warps"])  # of a thread in one round
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", _cuobjdump("-sass", result.asm["cubin"]))
        if "NOP" not in text
    ]
    found = []
    for last, text in code:
        branch = re.search(r"BRA\S* (?:\S+, )?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < last:
            body = [text for address, text in code if int(branch[1], 16) <= address <= last]
            if 4 * sum(bool(re.search(r"LD\S*\.128", text)) for text in body) >= 2 * entries:
                found.append((len(body) / entries, sum("MUFU" in text for text in body) / entries))
    return found


def _cuobjdump(option, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return subprocess.check_output([tool, option, file.name], text=True)


def usage(kernel):
    """Registers, and bytes of stack (spills and arrays)."""
    if "cubin" in kernel.asm:
        text = _cuobjdump("-res-usage", kernel.asm["cubin"])
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
    triton.runtime.driver.set_active(Driver(target))
    for kernel, elements, constants, options in kernels(name):
        result = compiled(kernel, elements, constants, options, target)
        line = {
            "triton": triton.__version__,
            "target": name,
            "kernel": kernel.__name__,
            "elements": sorted(set(elements.values())),
            "constants": {
                key: str(value) for key, value in constants.items() if key in kernel.arg_names or key == "multiple"
            },
            **options,
            **usage(result),
            "shared": result.metadata.shared,
            "shared_limit": shared_memory,
            "loops": loops(kernel, result, constants, options),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
