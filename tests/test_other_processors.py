"""The CPU kernels on processors that are not here: arm64, by a cross compiler and an emulator."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

ROOT = Path(__file__).parents[1]
EMULATOR = "qemu-aarch64"
# Clang is what macOS has; here it takes headers and libraries of GCC's cross compiler.
COMPILERS = {"gcc": ["aarch64-linux-gnu-g++"], "clang": ["clang++", "--target=aarch64-linux-gnu"]}
SOURCES = ("row_divergence_simd.cpp", "logits_simd.cpp", "matmul_simd.cpp", "dispatch_cpu.cpp", "mixture.cpp")
# As csrc/CMakeLists.txt compiles the baseline's files.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-static",
         "-pthread", "-DSCSDPO_INSTRUCTION_SET=baseline", f"-I{ROOT / 'csrc'}")  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (shutil.which(*COMPILERS["gcc"]) and shutil.which(EMULATOR)), reason=f"needs {COMPILERS['gcc']} and {EMULATOR}"
)


@pytest.fixture(scope="module", params=COMPILERS)
def arm64(request, tmp_path_factory):
    """Runs cpu_check.cpp on an emulated arm64: arguments and two matrices in, numbers out."""
    compiler = COMPILERS[request.param]
    if not shutil.which(compiler[0]):
        pytest.skip(f"needs {compiler[0]}")
    program = tmp_path_factory.mktemp("arm64") / "cpu_check"
    sources = [ROOT / "csrc" / name for name in SOURCES] + [ROOT / "tests" / "cpu_check.cpp"]
    subprocess.run([*compiler, *FLAGS, *map(str, sources), "-o", str(program)], check=True)

    def run(*arguments, first, second):
        given = first.numpy().tobytes() + second.numpy().tobytes()
        run = subprocess.run(
            [EMULATOR, str(program), *map(str, arguments)], input=given, capture_output=True, check=True
        )
        return torch.from_numpy(np.frombuffer(run.stdout, dtype=np.float32).copy())

    return run


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("distance", [1e-4, 0.5, 5.0])
def test_rows_on_arm64(arm64, beta, distance):
    """Near and far teachers, an odd vocabulary: by the stick of the tests of every other row kernel."""
    torch.manual_seed(0)
    rows, vocabulary = 5, 1003
    student = 3 * torch.randn(rows, vocabulary)
    teacher = student + distance * torch.randn(rows, vocabulary)
    exact = oracle.rows(student, teacher, beta)
    got = arm64(rows, vocabulary, beta, first=student, second=teacher)
    divergence, gradient = got[:rows], got[rows:].view(rows, vocabulary)
    limit = 2e-5 if distance > 1e-3 else 2e-3  # the difference of two rounded logits has few digits
    assert oracle.relative_error(divergence, torch.from_numpy(exact.divergence.astype(float))) < limit
    assert oracle.relative_error(gradient, torch.from_numpy(exact.gradient.astype(float))) < limit


@pytest.mark.parametrize("rows, depth, columns", [(1, 1, 1), (13, 33, 101), (50, 700, 37)])
def test_products_on_arm64(arm64, rows, depth, columns):
    torch.manual_seed(0)
    left, right = torch.randn(rows, depth), torch.randn(depth, columns)
    got = arm64(rows, depth, columns, "product", first=left, second=right).view(rows, columns)
    limit = (2 + depth**0.5) * 2**-24 * (left.double().abs() @ right.double().abs())
    assert ((got - left.double() @ right.double()).abs() <= limit).all()
