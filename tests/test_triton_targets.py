"""The shipped kernels, compiled ahead of time for GPUs that need not be here.

With the installed Triton, and with 3.6.0, the oldest that GPU machines are expected to have, where `./dev test` put it.
It is `some` of compile_triton.py for one GPU and a `few` for two others; with SCSDPO_COMPILE=all, every configuration
for each of TARGETS with both.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

TESTS = Path(__file__).parent
TARGETS = ("sm_90", "sm_80", "sm_100", "gfx942")
OLDEST, INSTALLED = "3.6.0", triton.__version__
WHERE = {OLDEST: Path(sys.prefix) / "triton-3.6.0", INSTALLED: None}
ALL = os.environ.get("SCSDPO_COMPILE") == "all"
# What is compiled, by version and target.
AMOUNTS = {
    (OLDEST, "sm_90"): "few",
    **{(INSTALLED, target): "some" if target == "sm_90" else "few" for target in ("sm_90", "sm_80", "gfx942")},
}
if ALL:
    AMOUNTS = {(version, target): "all" for version in WHERE for target in TARGETS}


def compile_all(version, target, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache / version / target)
    if WHERE[version] is not None:
        environment["PYTHONPATH"] = str(WHERE[version])
    command = [sys.executable, str(TESTS / "compile_triton.py"), target, AMOUNTS[version, target]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What compile_triton.py says, by version and target; two processes at a time."""
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (version, target): pool.submit(compile_all, version, target, cache)
            for version, target in AMOUNTS
            if WHERE[version] is None or WHERE[version].is_dir()
        }
        yield runs


def label(line):
    constants = " ".join(f"{name}={value}" for name, value in line["constants"].items())
    return f"{line['kernel']} {'/'.join(line['elements'])} {constants}"


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("version, target", AMOUNTS)
def test_configurations_compile_without_spills(compiled, version, target):
    if (version, target) not in compiled:
        pytest.skip(f"no Triton {version} in {WHERE[version]}; ./dev test installs it")
    lines = compiled[version, target].result()
    for line in lines:
        print(
            f"{line['triton']} {target} {label(line)} warps={line.get('num_warps', 4)}: {line['registers']} registers, "
            f"{line['shared']} bytes shared, {line['stack']} bytes spilled"
        )
    assert {line["triton"] for line in lines} == {version}
    assert {line["kernel"] for line in lines} == {
        "row_divergence_kernel", "row_statistics_kernel", "row_terms_kernel", "row_gradient_kernel",
        "head_logits_kernel", "likeliest_kernel", "entries_kernel", "support_values_kernel", "support_gradient_kernel",
        "question_weights_kernel", "multiply_kernel",
    }  # fmt: skip
    assert [label(line) for line in lines if line["stack"] != 0] == []
    assert [label(line) for line in lines if line["shared"] > line["shared_limit"]] == []


# SASS instructions an entry of a row, all loops together, by objective: what was counted, and a little.
INSTRUCTIONS = {"0": 78, "1": 67, "2": 150, "3": 113, "4": 142, "5": 148, "6": 172}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("version", WHERE if ALL else [INSTALLED])
def test_instructions_of_a_rows_entry(compiled, version):
    """On sm_90, whose rows were bound by their instructions: fp32 logits, with a bf16 gradient or a difference."""
    if (version, "sm_90") not in compiled:
        pytest.skip(f"no Triton {version} in {WHERE[version]}; ./dev test installs it")
    seen = set()
    for line in compiled[version, "sm_90"].result():
        constants, bf16 = line["constants"], "bfloat16" in line["elements"]
        if line["kernel"] != "row_divergence_kernel" or "float64" in line["elements"]:
            continue
        if constants["own_shares"] == "True":  # the loops of three objectives
            continue
        if constants["softcap"] == "True" or bf16 == (constants["difference"] == "True"):
            continue
        instructions, mufu = (sum(counts) for counts in zip(*line["loops"], strict=True))
        print(f"{label(line)}: {instructions:.1f} instructions, {mufu:.1f} MUFU, {line['registers']} registers")
        assert len(line["loops"]) == (2 if constants["objective"] in "01" else 3), label(line)
        # A policy's gradient is a product and a sum more, and a little.
        assert instructions <= INSTRUCTIONS[constants["objective"]] + 4 * ("policy" in constants), label(line)
        seen.add((constants["objective"], constants["difference"], constants["multiple"]))
    assert {objective for objective, _, _ in seen} == set(INSTRUCTIONS)
    assert not ALL or len(seen) == len(INSTRUCTIONS) * 2 * 2
