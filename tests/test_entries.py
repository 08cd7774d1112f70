"""csrc/divergence.h, entry by entry, against long double."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pybind11
import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """entry_of.cpp, compiled."""
    library = tmp_path_factory.mktemp("entries") / f"entry_of{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{x}" for x in (pybind11.get_include(), sysconfig.get_path("include"), CSRC)]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"]
    sources = [TESTS / "entry_of.cpp", CSRC / "mixture.cpp"]
    subprocess.run(["c++", *flags, *includes, *sources, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("entry_of", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.entry_of


def exact_entry(p, d, beta, divergence="jensen_shannon"):
    """(divergence, score, slope) in long double, of q = p e^d."""
    p, d, beta = (np.longdouble(x) for x in (p, d, beta))
    above = np.expm1(d)  # q / p - 1
    if beta == 0:
        return p * (np.exp(d) * d - above), 0, -p * above
    if beta == 1:
        return p * (above - d), -d, p * -d
    a = np.log1p(beta * above)
    if divergence == "jeffreys":
        reverse = p * (above - d)
        return (1 - beta) * p * (np.exp(d) * d - above) + beta * reverse, -d, -p * ((1 - beta) * above + beta * d)
    if divergence == "skewed_forward":
        b = np.log1p((1 - beta) * np.expm1(-d))  # log(m / q)
        score = -above / (1 + beta * above)
        return p * np.exp(d) * ((1 - beta) * np.expm1(-d) - b), score, p * score
    if divergence == "skewed_reverse":
        score = (1 - beta) * beta * above / (1 + beta * above) - a
        return p * (beta * above - a), score, p * score
    return p * (beta * np.exp(d) * d - (1 + beta * above) * a), -a, p * -a


DISTANCES = [0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.999, 1.001, 2, 3.9, 4.1, 10, 19, 21, 40, 80]


CURVATURES = {  # second derivatives at d = 0, by β
    "jensen_shannon": lambda beta: beta * (1 - beta),
    "jeffreys": lambda beta: 1,
    "skewed_forward": lambda beta: (1 - beta) ** 2,
    "skewed_reverse": lambda beta: beta**2,
}


@pytest.mark.parametrize("beta", [0, 1e-6, 1e-3, 0.1, 0.5, 0.7, 0.999, 1 - 1e-6, 1])
@pytest.mark.parametrize("p", [1e-37, 1e-20, 1e-7, 1e-3, 0.4, 1.0])
@pytest.mark.parametrize("divergence", CURVATURES)
def test_an_entry_against_long_double(entry, beta, p, divergence):
    """To 6e-6 relative for every d = log(q / p), and never negative."""
    for d in (x for size in DISTANCES for x in (size, -size)):
        p, d = np.float32(p), np.float32(d)
        q = np.longdouble(p) * np.exp(np.longdouble(d))
        if q > 1.0001 or 0 < q < 1.2e-38:
            continue
        got = entry(p, np.float32(q), d, beta, divergence)
        expected = exact_entry(p, d, beta, divergence)
        if 0 < abs(d) < 1e-3:  # where long double cancels: p d²/2 times both shares
            curvature = CURVATURES[divergence](beta) if 0 < beta < 1 else 1
            expected = (curvature * p * np.longdouble(d) ** 2 / 2, *expected[1:])
        assert got[0] >= 0
        for value, want in zip(got, expected, strict=True):
            assert abs(value - want) <= 6e-6 * abs(want) + 1e-38, (p, d, got, expected)


@pytest.mark.parametrize("beta", [0, 1e-3, 0.5, 0.9, 1])
def test_an_entry_that_one_side_forbids(entry, beta):
    """The limits as q → 0 and p → 0: share · p log(1 / share), or infinite where a KL divergence is."""
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
