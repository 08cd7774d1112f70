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

from scsdpo_kernels.kernels import divergence_triton, logits_triton, question_weights_triton, row_divergence_triton
from scsdpo_kernels.schedules import tiled

# Shared memory of a program, in bytes: 163 KiB on sm_80, of which sm_86 and sm_89 have 99; 227 on sm_90 and sm_100.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TYPES = {2: "bf16", 4: "fp32", 8: "fp64"}
INTEGERS = [
    "magnitude",
    "width",
    "teacher_width",
    "count",
    "vocabulary",
    "tiles_each",
    "splits",
    "first_column",
    "slab_columns",
    "columns",
    "first",
    "last",
    "parts",
    "rows",
]
FP32 = ["target_logits", "old_logp", "scratch", "partial", "scalars", "row", "weight", "weights", "entropy", "logits",
        "bias", "base", "factor", "others", "centre", "log_ratio", "divergence_out"]  # fmt: skip
OPERANDS = ["student", "teacher", "student_head", "teacher_head", "head", "slab"]


def kernels(target):
    """(kernel, element, constants, options) of all that is launched on a target."""
    for variant in itertools.chain(row_kernels(target), logits_kernels()):
        kernel, elements, constants, options = variant
        for multiple in (True, False):  # of 16 entries, as 151936, or not, as 50257
            yield kernel, elements, {**constants, "multiple": multiple}, options
    yield from tiled_kernels(target)
    for exponent, threshold in ((0.5, None), (1.0, 0.5)):
        constants = {"exponent": exponent, "threshold": threshold, "BLOCK": question_weights_triton.BLOCK}
        options = {"num_warps": question_weights_triton.WARPS}
        yield question_weights_triton.question_weights_kernel, {"rewards": "fp32"}, constants, options


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


def tiled_kernels(target):
    for bytes_, tile in ((b, t) for b in (2, 4) for t in tiled.TILES[target, b]):
        # descriptors, shared, difference, precision: fp32 heads that are shared are projected as a difference, and on
        # matrix units where PyTorch is told so
        variants = [(False, True, False, "ieee"), (False, False, False, "ieee")]
        if bytes_ == 2 and target in ("sm_90", "sm_100"):
            variants = [(True, True, False, "ieee"), (True, False, False, "ieee"), (False, True, False, "ieee")]
        elif bytes_ == 4:
            variants = [(False, True, True, "ieee"), (False, False, False, "ieee"), (False, True, True, "tf32")]
        for has_descriptors, shared, difference, precision in variants:
            constants = {
                "shared": shared,
                "difference": difference,
                "descriptors": has_descriptors,
                "EVEN": True,
                "precision": precision,
                **tile.blocks(),
            }
            options = tile.options()
            for kernel, objectives in (
                (tiled.moments_kernel, (0, 2)),
                (tiled.terms_kernel, (None,)),
                (tiled.gradient_kernel, (0, 2)),
            ):
                for objective in objectives:
                    operands = dict.fromkeys(OPERANDS, TYPES[bytes_])
                    yield kernel.fn, operands, {**constants, "objective": objective}, options
    # Widths that are no multiples of 64, and sides of different dtypes, take the tiles of fp32.
    tile = tiled.TILES[target, 4][0]
    constants = {"difference": False, "descriptors": False, "EVEN": False, "precision": "ieee", **tile.blocks()}
    mixed = {**dict.fromkeys(OPERANDS, "bf16"), "teacher": "fp32", "teacher_head": "fp32"}
    for operands, shared in ((dict.fromkeys(OPERANDS, "bf16"), True), (mixed, False)):
        for kernel in (tiled.moments_kernel, tiled.terms_kernel, tiled.gradient_kernel):
            yield kernel.fn, operands, {**constants, "shared": shared, "objective": 2}, tile.options()
    tile = tiled.GRAD_HIDDEN_TILES[target, 4]
    constants = {"halves": True, "EVEN": False, "precision": "ieee", **tile.blocks()}
    yield tiled.grad_hidden_kernel, dict.fromkeys(OPERANDS, "bf16"), constants, tile.options()
    for bytes_ in (2, 4):
        tile = tiled.GRAD_HIDDEN_TILES[target, bytes_]
        constants = {"halves": bytes_ == 2, "EVEN": True, "precision": "ieee", **tile.blocks()}
        yield tiled.grad_hidden_kernel, dict.fromkeys(OPERANDS, TYPES[bytes_]), constants, tile.options()
    small = dict.fromkeys(OPERANDS, "bf16")
    for objective in (0, 1, 2):
        yield (
            tiled.conclude_kernel,
            small,
            {"objective": objective, "has_target": True, "has_old_logp": True, "ROWS": 128},
            {},
        )
    yield tiled.value_kernel, small, {"ROWS": 128}, {}
    yield tiled.target_kernel, small, {"WIDTH": 1024}, {}


class Driver:
    """Stands for the GPU that is compiled for: kernels ask which one it is."""

    def __init__(self, target):
        self.get_current_target = lambda: target


def compiled(kernel, elements, constants, options, target):
    multiple = constants.get("multiple", True) and constants.get("EVEN", True)
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
        elif name in ("kept", "target", "student_rows", "teacher_rows", "question_ids"):
            signature[name] = "*i64"
        elif name == "grad_hidden":
            signature[name] = "*i16" if constants["halves"] else "*fp32"
        elif name in ("low", "raw"):
            signature[name] = {"low": "*u8", "raw": "*fp64"}[name]
        elif name.endswith("stride"):
            signature[name] = "i64"
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
        aligned = name in ("width", "teacher_width", "slab_columns", "vocabulary") and multiple
        aligned = aligned or (name.endswith("stride") and constants.get("EVEN", True))
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
    """Registers, bytes of stack (spills and arrays), and how often the target's matrix instruction stands there."""
    if "cubin" in kernel.asm:
        text = _cuobjdump("-res-usage", kernel.asm["cubin"])
        ptx = kernel.asm["ptx"]
        return {
            "registers": int(re.search(r"REG:(\d+)", text)[1]),
            "stack": int(re.search(r"STACK:(\d+)", text)[1]),
            "mma": {name: ptx.count(name) for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in ptx},
            "bulk copies": ptx.count("cp.async.bulk.tensor"),
        }
    text = kernel.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "stack": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
        "mma": {"v_mfma": text.count("v_mfma")} if "v_mfma" in text else {},
        "bulk copies": 0,
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
