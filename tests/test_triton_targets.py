"""Every shipped kernel and configuration, compiled ahead of time for GPUs that need not be here.

With the installed Triton, and with 3.6.0, the oldest that GPU machines are expected to have, where `./dev test` put it.
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
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TRITONS = {triton.__version__: None, "3.6.0": Path(sys.prefix) / "triton-3.6.0"}
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
MATRIX_KERNELS = {"moments_kernel", "terms_kernel", "gradient_kernel", "grad_hidden_kernel"}


def compile_all(version, target, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache / version / target)
    if TRITONS[version] is not None:
        environment["PYTHONPATH"] = str(TRITONS[version])
    run = subprocess.run(
        [sys.executable, str(TESTS / "compile_triton.py"), target], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What compile_triton.py says, by version and target; two processes at a time."""
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (version, target): pool.submit(compile_all, version, target, cache)
            for version, path in TRITONS.items()
            if path is None or path.is_dir()
            for target in TARGETS
        }
        yield runs


def label(line):
    constants = {name: value for name, value in line["constants"].items() if name not in ("EVEN", "has_target")}
    return f"{line['kernel']} {'/'.join(line['elements'])} {' '.join(f'{k}={v}' for k, v in constants.items())}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", TRITONS)
def test_every_configuration_compiles_without_spills(compiled, version, target):
    if (version, target) not in compiled:
        pytest.skip(f"no Triton {version} in {TRITONS[version]}; ./dev test installs it")
    lines = compiled[version, target].result()
    for line in lines:
        print(
            f"{line['triton']} {target} {label(line)} warps={line.get('num_warps', 4)} "
            f"stages={line.get('num_stages', '-')}: {line['registers']} registers, {line['shared']} bytes shared, "
            f"{line['stack']} bytes spilled, {line['mma']}"
        )
    assert {line["triton"] for line in lines} == {version}
    assert {line["kernel"] for line in lines} >= MATRIX_KERNELS | {"row_divergence_kernel", "question_weights_kernel"}
    assert [label(line) for line in lines if line["stack"] != 0] == []
    assert [label(line) for line in lines if line["shared"] > line["shared_limit"]] == []

    matrix = [line for line in lines if line["kernel"] in MATRIX_KERNELS]
    halves = [line for line in matrix if "bf16" in line["elements"] or line["constants"]["precision"] == "tf32"]
    assert len(halves) >= 20
    for line in halves:
        assert set(line["mma"]) == {MATRIX_INSTRUCTION[target]}, label(line)
    for line in matrix:
        assert (line["bulk copies"] > 0) == (line["constants"].get("descriptors") == "True"), label(line)


# SASS instructions an entry of a row, all loops together, by objective: what was counted, and a little.
INSTRUCTIONS = {"0": 78, "1": 67, "2": 150, "3": 113}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", TRITONS)
def test_instructions_of_a_rows_entry(compiled, version):
    """fp32 logits and a bf16 gradient on sm_90, where the row kernel was bound by its instructions."""
    if (version, "sm_90") not in compiled:
        pytest.skip(f"no Triton {version} in {TRITONS[version]}; ./dev test installs it")
    seen = set()
    for line in compiled[version, "sm_90"].result():
        if line["kernel"] != "row_divergence_kernel" or line["elements"] != ["bf16", "fp32"]:
            continue
        constants = line["constants"]
        if constants["has_softcap"] == "True":
            continue
        instructions, mufu = (sum(counts) for counts in zip(*line["loops"], strict=True))
        print(f"{label(line)}: {instructions:.1f} instructions, {mufu:.1f} MUFU, {line['registers']} registers")
        assert len(line["loops"]) == (2 if constants["objective"] in "01" else 3), label(line)
        assert instructions <= INSTRUCTIONS[constants["objective"]], label(line)
        seen.add((constants["objective"], constants["difference"], constants["multiple"]))
    assert len(seen) == 4 * 2 * 2
