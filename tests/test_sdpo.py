"""scsdpo.sdpo in the official SDPO repository: its own actor with and without, on a CPU, at the pinned commit.

The repository's Python part stands beside the checkout, as ../shared/fixtures/lasgroup-SDPO-<commit>.tar.gz; nothing of
it is in this project. Both runs are processes of their own, since the fork's package is named verl, too.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("tensordict", reason="verl: ./dev verl")
pytest.importorskip("ray", reason="verl: ./dev verl")

import torch
from sdpo_cases import CASES, REWARDS

TESTS = Path(__file__).parent
FIXTURE = TESTS.parents[1] / "shared" / "fixtures" / "lasgroup-SDPO-0e6d510.tar.gz"
TOLERANCE = 1e-6  # times the whole gradient's norm
pytestmark = pytest.mark.skipif(
    not FIXTURE.exists(), reason=f"no ../shared/fixtures/{FIXTURE.name} beside the checkout"
)


@pytest.fixture(scope="module")
def fork(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fork")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(root, filter="data")
    (folder,) = root.iterdir()
    return folder


def python(fork: Path, *arguments: str, modules: str = "") -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")} | {
        "PYTHONPATH": os.pathsep.join([str(fork), *sys.path]),
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if modules:
        environment["VERL_USE_EXTERNAL_MODULES"] = modules
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(fork, tmp_path_factory) -> dict[str, dict]:
    root, found = tmp_path_factory.mktemp("results"), {}
    for name, modules in (("stock", ""), ("ours", "scsdpo.sdpo")):
        out = python(fork, str(TESTS / "sdpo_fork.py"), str(root / name), modules=modules)
        assert out.returncode == 0, out.stderr[-4000:]
        found[name] = torch.load(root / name)
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_forks_own(results, case):
    stock, ours = results["stock"][case], results["ours"][case]
    for result in (stock, ours):
        assert not isinstance(result, str), result
    assert ours["loss"] == pytest.approx(stock["loss"], rel=2e-6)
    assert stock["gradients"].keys() == ours["gradients"].keys()
    expected = torch.cat([x.flatten() for x in stock["gradients"].values()])
    got = torch.cat([x.flatten() for x in ours["gradients"].values()])
    assert expected.norm() > 1e-3
    error = (got - expected).norm() / expected.norm()
    print(f"{case}: gradients apart by {error:.1e}")
    assert error <= TOLERANCE


def test_weights_are_of_scores_and_beside_the_forks_own(results):
    for case in ("question weights", "question weights beside others"):
        stock, ours = (results[name][case]["weights"] for name in ("stock", "ours"))
        assert torch.equal(stock, ours)
    weights = results["ours"]["question weights"]["weights"][:, 0]
    rate = torch.tensor(REWARDS, dtype=torch.float32).view(4, 4).mean(1)
    raw = (rate * (1 - rate)).sqrt()
    torch.testing.assert_close(weights, (raw / raw[raw > 0].mean()).repeat_interleave(4))


def test_rollouts_without_weight_are_not_run(results):
    """8 of 16 have a weight, one of them no teacher; one at a time, the others are two tokens each."""
    tokens = results["ours"]["question weights, one at a time"]["tokens"]
    full = results["stock"]["question weights, one at a time"]["tokens"]
    assert len(tokens) == len(full) == 16
    assert sorted(tokens) == [2] * 9 + [full[0]] * 7
    assert "scsdpo/rollouts_run" in results["ours"]["question weights"]["metrics"]


def test_packed_sequences_have_no_padding(results):
    packed, padded = (results["ours"][case]["tokens"] for case in ("packed", "question weights"))
    assert sum(packed) < sum(padded)


def test_what_would_be_another_loss_is_refused(results):
    assert re.match("actor.use_kl_loss: expected none", results["ours"]["refused"]["use_kl_loss"])
    assert re.match("actor.calculate_entropy: expected none", results["ours"]["refused"]["entropy"])


def test_another_verl_is_refused():
    pytest.importorskip("verl_on_cpu", reason="verl is not installed", exc_type=ImportError)
    with pytest.raises(ImportError, match=r"scsdpo\.sdpo is made for lasgroup/SDPO at 0e6d510, scsdpo\.verl for"):
        import scsdpo.sdpo  # noqa: F401
