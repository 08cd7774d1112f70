"""The CUDA row kernel without a GPU: formulas, launch, machine code, and that a run on the host finds its bugs.

Its results are tested with the other row kernels', in test_row_divergence.py.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_on_host
import numpy as np
import pytest
import torch
from conftest import DEVICE

from scsdpo_kernels import kernels
from scsdpo_kernels.kernels import native
from scsdpo_kernels.kernels.contract import Logits, PerRow
from scsdpo_kernels.problem import objective_of

CSRC = cuda_on_host.CSRC
HEADER = 832  # row_geometry.h's kRowHeader


# ---------------------------------------------------------------------------------------------------------------------
# divergence.h, entry by entry


def exact_entry(p, d, beta):
    """(divergence, score, slope) in long double, of q = p e^d."""
    p, d, beta = (np.longdouble(x) for x in (p, d, beta))
    above = np.expm1(d)  # q / p - 1
    if beta == 0:
        return p * (np.exp(d) * d - above), 0, -p * above
    if beta == 1:
        return p * (above - d), -d, p * -d
    a = np.log1p(beta * above)
    return p * (beta * np.exp(d) * d - (1 + beta * above) * a), -a, p * -a


DISTANCES = [0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.999, 1.001, 2, 3.9, 4.1, 10, 19, 21, 40, 80]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("beta", [0, 1e-6, 1e-3, 0.1, 0.5, 0.7, 0.999, 1 - 1e-6, 1])
def test_an_entry_against_long_double(device, beta):
    """To 6e-6 relative over the grid of p and d = log(q / p), and never negative."""
    entry = getattr(cuda_on_host.module(), f"entry_on_{device}")
    for p in (1e-37, 1e-20, 1e-7, 1e-3, 0.4, 1.0):
        for d in (x for size in DISTANCES for x in (size, -size)):
            p, d = np.float32(p), np.float32(d)
            q = np.longdouble(p) * np.exp(np.longdouble(d))
            if q > 1.0001 or 0 < q < 1.2e-38:
                continue
            got = entry(p, np.float32(q), d, beta)
            expected = exact_entry(p, d, beta)
            if 0 < abs(d) < 1e-3:  # where long double cancels: p d²/2 times both shares
                expected = ((beta * (1 - beta) if 0 < beta < 1 else 1) * p * np.longdouble(d) ** 2 / 2, *expected[1:])
            assert got[0] >= 0
            for value, want in zip(got, expected, strict=True):
                assert abs(value - want) <= 6e-6 * abs(want) + 1e-38, (p, d, got, expected)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("beta", [0, 1e-3, 0.5, 0.9, 1])
def test_an_entry_that_one_side_forbids(device, beta):
    """The limits as q → 0 and p → 0: share · p log(1 / share), or infinite where a KL divergence is."""
    entry = getattr(cuda_on_host.module(), f"entry_on_{device}")
    nothing = entry(0.0, 0.0, float("nan"), beta)
    assert nothing[0] == 0 and nothing[2] == 0
    no_q = entry(0.25, 0.0, float("-inf"), beta)
    no_p = entry(0.0, 0.25, float("inf"), beta)
    if 0 < beta < 1:
        np.testing.assert_allclose(no_q[:2], [-0.25 * (1 - beta) * np.log1p(-beta), -np.log1p(-beta)], rtol=1e-6)
        np.testing.assert_allclose(no_p[0], -0.25 * beta * np.log(beta), rtol=1e-6)
        assert no_p[2] == 0
    else:
        assert no_q[0] == (0.25 if beta == 0 else np.inf) and no_p[0] == (np.inf if beta == 0 else 0.25)
        assert no_q[2] == (0.25 if beta == 0 else np.inf) and no_p[2] == (-0.25 if beta == 0 else 0)
    for p, q in ((float("nan"), 0.1), (0.1, float("nan"))):
        assert np.isnan(entry(p, q, float("nan"), beta)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Launch

H200 = {"shared_per_multiprocessor": 228 * 1024, "shared_per_block": 227 * 1024, "shared_reserved": 1024, "cluster": 16}


def geometry(vocabulary, logit_bytes=4, **limits):
    return native._C.row_geometry(vocabulary, logit_bytes, native._C.GpuLimits(**{**H200, **limits}))


@pytest.mark.parametrize("logit_bytes", [4, 2])
@pytest.mark.parametrize("largest", [16, 8, 1, 0])
@pytest.mark.parametrize("shared", [227, 99])
def test_geometry_of_every_vocabulary(logit_bytes, largest, shared):
    """From 1 to 1,000,000: the slices hold the row and nothing overflows; what no cluster holds is streamed."""
    limits = {"cluster": largest, "shared_per_block": shared * 1024, "shared_per_multiprocessor": (shared + 1) * 1024}
    sizes = {1, 7, 50257, 100278, 128256, 151936, 262144, 1_000_000}
    for vocabulary in sizes | set(range(1, 200)) | set(np.geomspace(1, 1e6, 400).astype(int).tolist()):
        got = geometry(vocabulary, logit_bytes, **limits)
        least = -(-vocabulary // max(largest, 1))
        room = (shared * 1024 - HEADER) // (2 * logit_bytes)
        if got.cluster == 0:
            assert largest == 0 or -(-least // 8) * 8 > room, vocabulary
            continue
        assert got.cluster in (1, 2, 4, 8, 16) and got.cluster <= largest
        assert got.slice % 8 == 0 and got.cluster * got.slice >= vocabulary
        assert got.shared_bytes == HEADER + 2 * got.slice * logit_bytes <= shared * 1024
        assert got.threads % 32 == 0 and 64 <= got.threads <= 768
        blocks = min(3, (shared + 1) * 1024 // (got.shared_bytes + 1024))
        assert got.threads * blocks <= 768 and blocks >= 1
        pieces = -(-got.slice * logit_bytes // (32 * got.threads))
        assert pieces <= 8, vocabulary  # row_divergence_cuda.cu's kPieces
        for smaller in (1, 2, 4, 8):
            if smaller < got.cluster:  # would not have let as many blocks run side by side
                bytes_there = HEADER + 2 * logit_bytes * (-(-vocabulary // smaller // 8) * 8) + 1024
                assert bytes_there > shared * 1024 or (shared + 1) * 1024 // bytes_there < blocks or vocabulary < 200


def test_geometry_of_the_models():
    """Three blocks to a multiprocessor of an H200, but for a quarter of a million fp32 logits."""
    expected = {50257: (8, 256), 100278: (16, 256), 151936: (16, 256), 262144: (16, 768)}
    assert {v: (geometry(v).cluster, geometry(v).threads) for v in expected} == expected
    assert geometry(151936).shared_bytes + 1024 == 228 * 1024 // 3
    assert geometry(262144, 2).cluster == 16 and geometry(262144, 2).threads == 256
    assert geometry(1).cluster == 1 and geometry(1).threads == 64
    assert geometry(463_232).cluster == 16 and geometry(463_233).cluster == 0


# ---------------------------------------------------------------------------------------------------------------------
# The machine at hand


def rows(vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(3, vocabulary, generator=generator) * 3
    return student, student + 0.3 * torch.randn(3, vocabulary, generator=generator)


def run(student, teacher, row_schedule="auto", beta=0.5, gradient=True):
    out = torch.full_like(student, torch.nan) if gradient else None
    scalars = native.row_divergence_cuda(*given(student, teacher, beta), out, row_schedule=row_schedule)
    return scalars.divergence, out


def given(student, teacher, beta):
    logits = Logits(student, teacher, difference=False, softcap=0.0)
    return logits, PerRow(torch.ones(len(student))), objective_of(beta)


on_host = pytest.mark.skipif(DEVICE != "cpu", reason="the kernels run on the GPU")


@on_host
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("shared", [4096, 2**17])
def test_the_order_of_threads_and_copies_does_not_change_a_bit(monkeypatch, beta, gradient, shared):
    """Several rows to a cluster, bulk copies that arrive whenever they like."""
    student, teacher = rows(4096)
    results = []
    for seed, clusters in ((0, 1), (1, 1), (2, 2), (3, 3)):
        cuda_on_host.install(monkeypatch, shared=shared, seed=seed, clusters=clusters)
        results.append(run(student, teacher, beta=beta, gradient=gradient))
    for divergence, out in results[1:]:
        assert torch.equal(divergence, results[0][0])
        assert not gradient or torch.equal(out, results[0][1])


@on_host
def test_what_a_gpu_cannot_hold_is_streamed_or_raises(monkeypatch):
    student, teacher = rows(4096)
    exact = native.row_divergence(*given(student, teacher, 0.5)).divergence
    for machine in ({"capability": 8}, {"shared": 2048, "largest_cluster": 8}, {"largest_cluster": 0}):
        cuda_on_host.install(monkeypatch, **machine)
        torch.testing.assert_close(run(student, teacher)[0], exact, rtol=1e-5, atol=0)
        with pytest.raises(ValueError, match="no cluster of blocks"):
            run(student, teacher, "cluster")
    cuda_on_host.install(monkeypatch, shared=4096, largest_cluster=8)  # two blocks' room is not three's
    torch.testing.assert_close(run(*rows(3000), "cluster")[0][:1], run(*rows(3000), "streaming")[0][:1])


@on_host
def test_an_error_of_the_runtime_has_its_name(monkeypatch):
    cuda_on_host.install(monkeypatch)
    monkeypatch.setattr(native, "_stream", lambda device: (1, 0))  # there is one device
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        run(*rows(64))


def test_why_cuda_cannot_run(monkeypatch):
    assert "needs an NVIDIA GPU" in native.why_not_cuda(torch.device("cpu"))
    if DEVICE == "cpu" and hasattr(native._C, "cuda_error"):  # no driver
        assert "CUDA runtime" in native.why_not_cuda(torch.device("cuda", 0))
    monkeypatch.setattr(native, "_C", SimpleNamespace())
    assert "without a CUDA compiler" in native.why_not_cuda(torch.device("cuda", 0))
    monkeypatch.setattr(native, "_C", SimpleNamespace(row_divergence_cuda=None, cuda_error=lambda: None))
    for capability, runs in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert (native.why_not_cuda(torch.device("cuda", 0)) is None) == runs


def test_a_row_kernel_that_cannot_run_raises_and_says_why(monkeypatch):
    with pytest.raises(ValueError, match=r"SCSDPO_ROW_KERNEL: expected one of auto, .*got 'cutlass'"):
        kernels.kernels_of(torch.device("cpu"), "cutlass")
    assert kernels.kernels_of(torch.device("cpu"), "triton").row_divergence is native.row_divergence  # a GPU's choice
    monkeypatch.setattr(native, "why_not_cuda", lambda device: "no compiler")
    for name in ("cuda", "cuda-cluster", "cuda-streaming"):
        with pytest.raises(ValueError, match=f"SCSDPO_ROW_KERNEL={name} cannot run: no compiler"):
            kernels.kernels_of(torch.device("cuda"), name)
    from scsdpo_kernels.kernels import row_divergence_triton

    assert kernels.kernels_of(torch.device("cuda")).row_divergence is row_divergence_triton.row_divergence
    monkeypatch.setattr(native, "why_not_cuda", lambda device: None)
    assert kernels.kernels_of(torch.device("cuda"), "triton").row_divergence is row_divergence_triton.row_divergence
    for name in ("auto", "cuda", "cuda-cluster", "cuda-streaming"):
        chosen = kernels.kernels_of(torch.device("cuda"), name).row_divergence
        assert chosen.func is native.row_divergence_cuda
        assert chosen.keywords == {"row_schedule": name.removeprefix("cuda-").replace("cuda", "auto")}


# ---------------------------------------------------------------------------------------------------------------------
# That the host run sees what is wrong with a kernel


MUTATIONS = {
    "nothing": ("", ""),
    "a barrier of the cluster is missing": ("  gpu::cluster_barrier();\n}\n\ntemplate <int n>",
                                            "}\n\ntemplate <int n>"),
    "a row is read before it has arrived": ("      gpu::await(&header.delivery[piece], turn);\n", ""),
    "a delivery is waited for in the wrong turn": ("delivery[piece], turn);", "delivery[piece], 1 ^ turn);"),
    "the next row arrives over one in use": ("        gpu::block_barrier();\n        if (gpu::thread() == 0) order",
                                             "        if (gpu::thread() == 0) order"),
    "a row is not published to the block": ("as_sums(total), rows, task.mix, r, row);\n    gpu::block_barrier();",
                                            "as_sums(total), rows, task.mix, r, row);"),
    "a warp's sums are read too early": ("of_warps[warp][i] = x[i];\n  }\n  gpu::block_barrier();",
                                         "of_warps[warp][i] = x[i];\n  }"),
    "sums are overwritten while they are read": ("told ^= 1;\n    if (leads) header.of.finish",
                                                 "if (leads) header.of.finish"),
    "a row's sums are read while the next one's are written": ("gpu::block_barrier();  // the next row's maxima",
                                                              "// the next row's maxima"),
    "a block leaves while it is read": ("  gpu::cluster_barrier();  // nobody leaves", "  // nobody leaves"),
}  # fmt: skip


@on_host
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_found_on_the_host(name, tmp_path):
    """Results change, or the run never ends."""
    old, new = MUTATIONS[name]
    source = (CSRC / "row_divergence_cuda.cu").read_text()
    assert old == "" or source.count(old) == 1, name
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from types import SimpleNamespace
import cuda_on_host, test_cuda, torch
from scsdpo_kernels.kernels import native
patch = SimpleNamespace(setattr=setattr)
student, teacher = test_cuda.rows(4096)
exact = torch.empty_like(student)
for beta, shared in ((0.5, 4096), (1.0, 2**17)):  # clusters of 16 blocks, and of one
    divergence = native.row_divergence(*test_cuda.given(student, teacher, beta), exact).divergence
    for seed in range(6):
        cuda_on_host.install(patch, shared=shared, seed=seed, clusters=1, source={str(tmp_path / "kernel.cu")!r})
        got, out = test_cuda.run(student, teacher, "cluster", beta=beta)
        torch.testing.assert_close(got, divergence, rtol=1e-5, atol=0)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-8)
"""
    texts = {source: True} if old == "" else {source.replace(old, new): False}
    for text, right in texts.items():
        (tmp_path / "kernel.cu").write_text(text)
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
        assert (process.returncode == 0) == right, process.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The built module


def tool(name):
    import triton

    there = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(there) if there.exists() else shutil.which(name)


@pytest.mark.skipif(not hasattr(native._C, "row_divergence_cuda"), reason="built without a CUDA compiler")
def test_resources_of_the_built_module():
    """No stack (no spills, no local arrays), and registers for the blocks that row_geometry plans side by side."""
    listing = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", native._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    usage = re.findall(r"(sm_\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing)
    architecture, kernels = None, {}
    for name, function, *numbers in usage:
        if name:
            architecture = name
        else:
            kernels[architecture, function] = [int(x) for x in numbers]
    assert {name for name, _ in kernels} >= {"sm_80", "sm_90"}
    assert len(kernels) == 32 * len({name for name, _ in kernels})  # 4 objectives, 2 dtypes, 2 teachers, 2 kernels
    for (name, function), (registers, stack, shared, local) in kernels.items():
        assert stack == 0 and local == 0, (name, function)
        assert registers <= 80, (name, function)  # of 65536: 768 threads
        assert shared <= 1024, (name, function)  # the launch asks for the rest


@pytest.mark.skipif(not hasattr(native._C, "row_divergence_cuda"), reason="built without a CUDA compiler")
def test_machine_code_of_the_cluster():
    """Bulk copies, 16-byte shared loads, distributed shared memory; 16-byte loads of the streaming kernel."""
    listing = subprocess.run(
        [tool("cuobjdump"), "-sass", "-arch", "sm_90", native._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", listing, re.DOTALL))
    cluster = [code for name, code in functions.items() if "row_cluster" in name]
    streaming = [code for name, code in functions.items() if "row_streaming" in name]
    assert len(cluster) == len(streaming) == 16
    for code in cluster:
        assert "UBLKCP" in code and "UCGABAR" in code and re.search(r"LDS\.(64|128)", code)
        assert "LDG.E.128" not in code  # no logit goes another way
    for code in streaming:
        assert code.count("LDG.E.128") >= 8
