"""Compiles the Triton kernels that are shipped, ahead of time, for GPUs that are not here.

    python compile_triton.py sm_90 all      prints one line of JSON a kernel

Every kernel in every configuration; of `some`, every kernel in those that use the most registers, and whole rows of
every divergence; of `few`, every kernel as what uses the most registers.

The package's own launchers are called, with tensors of a CPU, up to where a kernel would run: so what is compiled is
what they ask for. A script of its own because Triton's interpreter, which the tests run kernels in, excludes its
compiler from a process. `PYTHONPATH` chooses the Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from scsdpo_kernels.kernels import (
    logits_triton,
    question_weights_triton,
    row_divergence_triton,
    scaling_triton,
    support_triton,
)
from scsdpo_kernels.kernels.contract import Logits, PerRow, RowPolicy, RowStatistics, SupportLogits
from scsdpo_kernels.problem import ENDS, objective_of

# Shared memory of a program, in bytes: 163 KiB on sm_80, of which sm_86 and sm_89 have 99; 227 on sm_90 and sm_100.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
OBJECTIVES = [
    objective_of(0.0), objective_of(1.0), objective_of(0.5), objective_of(0.0, entry_clip=0.1),
    *(objective_of(0.5, divergence=name) for name in ("jeffreys", "skewed_forward", "skewed_reverse")),
]  # fmt: skip
# A share of each row's own: its kernels have the whole rows of both ends beside the kind's.
OWN_SHARES = [objective_of(torch.full((3,), 0.5, dtype=torch.float64), divergence=name) for name in ENDS]
EVEN, ODD = 128, 129  # multiples of 16 entries, as 151936, or not, as 50257
# (difference, dtype of the gradient, softcap): one fp32 head for both sides has a difference, and no softcap.
FORMS = [
    (True, torch.float32, 0.0),
    (False, torch.float32, 0.0),
    (False, torch.bfloat16, 0.0),
    (False, torch.bfloat16, 30.0),
]

COMMON = (FORMS[0], FORMS[2])  # a difference; a bf16 gradient
LARGEST = [OBJECTIVES[2], OBJECTIVES[-1]]  # Jensen-Shannon, and what has the most registers
POLICY = RowPolicy(torch.ones(3), torch.ones(3), None, 0.8, 1.2)


def launch_all():
    for vocabulary in (EVEN, ODD):
        launch_rows(vocabulary, OBJECTIVES, FORMS)
        launch_logits(vocabulary)
        launch_stages(vocabulary, OBJECTIVES, FORMS)
    launch_with_more(OWN_SHARES, COMMON)
    launch_supports(EVEN, OBJECTIVES, FORMS)
    for exponent, threshold in ((0.5, None), (1.0, 0.5)):
        launch_weights(exponent, threshold)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        scaling_triton.multiply(torch.ones(8, dtype=dtype), torch.ones(()))


def launch_some():
    launch_rows(EVEN, OBJECTIVES, COMMON[1:])
    launch_rows(EVEN, LARGEST, COMMON[:1])
    launch_rows(ODD, LARGEST, FORMS[3:])
    launch_logits(ODD)
    launch_stages(ODD, LARGEST, FORMS[3:])
    launch_with_more(OWN_SHARES[:1], FORMS[2:3])
    launch_supports(EVEN, LARGEST[1:], FORMS[2:])
    launch_weights(1.0, 0.5)
    scaling_triton.multiply(torch.ones(8, dtype=torch.bfloat16), torch.ones(()))


def launch_few():
    launch_rows(ODD, LARGEST[1:], FORMS[3:])
    launch_rows(EVEN, LARGEST[:1], FORMS[:1])
    launch_logits(ODD, softcaps=(30.0,))
    launch_stages(ODD, LARGEST[1:], FORMS[3:])
    launch_supports(EVEN, [], FORMS[3:])
    launch_weights(1.0, 0.5)
    scaling_triton.multiply(torch.ones(8, dtype=torch.bfloat16), torch.ones(()))


def launch_with_more(own_shares, forms_of_policy):
    """Shares of each row's own, and a policy."""
    launch_rows(EVEN, own_shares, FORMS[2:3])
    launch_rows(EVEN, OBJECTIVES[2:3], forms_of_policy, policy=POLICY)
    launch_stages(EVEN, own_shares, FORMS[2:3], policy=POLICY)


def launch_weights(exponent, threshold):
    question_weights_triton.question_weights(torch.ones(8), torch.zeros(8, dtype=torch.int64), exponent, threshold)


def logits_of(vocabulary, difference=False, softcap=0.0, dtype=torch.float32):
    stride = -(-vocabulary // 64) * 64  # as schedules.chunked has it
    student, teacher = torch.zeros(2, 3, stride, dtype=dtype)[:, :, :vocabulary]
    return Logits(student, teacher, difference, softcap)


def launch_rows(vocabulary, objectives, forms, policy=None):
    rows = PerRow(torch.ones(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3), policy=policy)
    for objective in objectives:
        for difference, dtype, softcap in forms:
            logits = logits_of(vocabulary, difference, softcap)
            gradient = torch.empty_like(logits.student, dtype=dtype)
            row_divergence_triton.row_divergence(logits, rows, objective, gradient)


def launch_supports(vocabulary, objectives, forms):
    """The short rows of supports are float64."""
    logits = logits_of(vocabulary, dtype=torch.float64)
    for objective in objectives:
        if objective.kind != "clipped":
            gradient = torch.empty_like(logits.student, dtype=torch.float32)
            row_divergence_triton.row_divergence(logits, PerRow(torch.ones(3)), objective, gradient)
    for k in (100, 250, 1000):
        support_triton.likeliest(logits_of(vocabulary).student, k)
    for difference, dtype, softcap in forms:
        launch_support(logits_of(vocabulary, difference, softcap), dtype, policy=POLICY if softcap else None)
    launch_support(logits_of(vocabulary)._replace(teacher=None), torch.bfloat16, policy=None)


def launch_support(logits, dtype, policy):
    """Teacher's logits that are not there stand for log-probabilities that a server has given."""
    double, single, ids = torch.zeros(2, 3, dtype=torch.float64), torch.ones(3), torch.zeros(3, 100, dtype=torch.int64)
    student, *teacher = support_triton.entries(logits, ids, 0.0, forbid=True)
    at = SupportLogits(ids, student, *teacher or [None], None if teacher else torch.zeros(3, 100), double)
    tail, target = RowStatistics(*double, *[single] * 5), torch.zeros(3, dtype=torch.int64)
    given = PerRow(single, target, single, policy=policy)
    for renormalize in (False, True):
        values = support_triton.support_values(at, tail, given, 1.0, renormalize=renormalize)
    g, gradient = torch.zeros(3, 101), torch.empty_like(logits.student, dtype=dtype)
    support_triton.support_gradient(
        logits, ids, at, target, values, tail.student_lse, g, 1.0, gradient, is_bounded=True
    )


def launch_stages(vocabulary, objectives, forms, policy=None):
    double, single = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    statistics = RowStatistics(double, double, *[single] * 5)
    terms = torch.zeros(4, 3, dtype=torch.float64)
    rows = PerRow(single, None if policy is None else torch.zeros(3, dtype=torch.int64), policy=policy)
    for difference in sorted({difference for difference, _, _ in forms}):
        row_divergence_triton.row_statistics(logits_of(vocabulary, difference), 1.0)
        for objective in objectives:
            row_divergence_triton.row_terms(logits_of(vocabulary, difference), objective, statistics)
    for objective in objectives:
        for difference, dtype, softcap in forms:
            logits = logits_of(vocabulary, difference, softcap)
            gradient = torch.empty_like(logits.student, dtype=dtype)
            row_divergence_triton.row_gradient(logits, objective, statistics, terms, rows, gradient)


def launch_logits(vocabulary, softcaps=(0.0, 30.0)):
    for softcap in softcaps:
        logits = logits_of(vocabulary, softcap=softcap)
        logits_triton.head_logits(logits.student, torch.zeros(vocabulary), 1.5, softcap)


class Driver:
    """Stands for the GPU that is compiled for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def loops(kernel, result, entries):
    """(all, MUFU) SASS instructions an entry in each of a row kernel's loops over whole blocks, by their addresses.

    These loops alone take a block's logits, 16 bytes at a time. The rest of the kernel runs once a row, or a few times.
    A thread has so many `entries` in a round.
    """
    if kernel.__module__ != row_divergence_triton.__name__ or "cubin" not in result.asm:
        return []
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


def described(kernel, arguments, keywords, result):
    """One line of what came of a launch."""
    form = keywords.get("form")
    tensors = [x for x in flat(arguments) if isinstance(x, torch.Tensor)]
    (vocabulary,) = {x.shape[1] for x in tensors if x.dim() == 2 and x.shape[1] in (EVEN, ODD)} or {EVEN}
    constants = {"multiple": vocabulary == EVEN, "own_shares": keywords.get("ends") is not None}
    constants |= form._asdict() if form else {k: v for k, v in keywords.items() if k in kernel.arg_names}
    constants |= {"policy": True} if any(x is POLICY.advantage for x in tensors) else {}
    options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
    return {
        "kernel": kernel.__name__,
        "elements": sorted({str(x.dtype).removeprefix("torch.") for x in tensors if x.dim() == 2 or len(tensors) < 4}),
        "constants": {name: str(value) for name, value in constants.items()},
        **options,
        **usage(result),
        "shared": result.metadata.shared,
        "loops": loops(kernel, result, form.block // (32 * options["num_warps"])) if form else [],
    }


def flat(tree):
    for x in tree:
        if isinstance(x, tuple):
            yield from flat(x)
        else:
            yield x


def main(name: str, amount: str) -> None:
    target, shared_memory = TARGETS[name]
    triton.runtime.driver.set_active(Driver(target))
    row_options = row_divergence_triton.options("cuda" if name.startswith("sm") else "hip")
    row_divergence_triton.options = lambda device_type: row_options
    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **keywords):
        result = run(kernel, *arguments, grid=grid, warmup=True, **keywords)
        line = {"triton": triton.__version__, "target": name, "shared_limit": shared_memory}
        print(json.dumps({**line, **described(kernel, arguments, keywords, result)}), flush=True)

    JITFunction.run = compile_only
    {"all": launch_all, "some": launch_some, "few": launch_few}[amount]()


if __name__ == "__main__":
    main(*sys.argv[1:])
