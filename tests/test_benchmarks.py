"""What benchmarks measure on, and that a wrong implementation cannot pass for a right one."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import implementations
import inputs


@pytest.mark.parametrize(("width", "vocabulary"), [(128, 5003), (512, 16000)])
def test_entropies_are_those_of_reasoning_rollouts(width, vocabulary):
    """Half of the tokens below 0.01 nats, 20 % above 0.67; a teacher whose logits are as far as asked for."""
    hidden, weight, teacher = inputs.reasoning(1500, width, vocabulary, distance=0.1)
    entropy = inputs.entropies(hidden, weight)
    assert (entropy < inputs.LOW[1]).double().mean().item() == pytest.approx(inputs.LOW[0], abs=0.05)
    assert (entropy > inputs.HIGH[1]).double().mean().item() == pytest.approx(1 - inputs.HIGH[0], abs=0.04)
    apart = ((teacher - hidden) @ weight.T).std().item()
    assert apart == pytest.approx(0.1, rel=0.03)
    with pytest.raises(ValueError, match="width"):
        inputs.reasoning(100, 16, vocabulary)
    again = inputs.reasoning(1500, width, vocabulary, distance=0.1)
    assert all(torch.equal(a, b) for a, b in zip(again, (hidden, weight, teacher), strict=True))


@pytest.mark.parametrize("beta", accuracy.OBJECTIVES)
def test_implementations_are_one_function(beta):
    """In fp32, far from the teacher, every one that runs here has float64's loss and gradients."""
    tensors = inputs.reasoning(8, 128, 300, distance=1.0)
    expected = accuracy.gradients(accuracy.exact, tuple(x.double() for x in tensors), beta)
    ran = []
    for name, implementation in implementations.IMPLEMENTATIONS.items():
        if "compile" in name or implementation.why_not(torch.device("cpu")):
            continue
        got = accuracy.gradients(implementation.loss, tensors, beta)
        for what, exact in expected.items():
            assert (got[what].double() - exact).norm() <= 1e-3 * exact.norm(), (name, what)
        ran.append(name)
    assert {"chunked", "reference", "eager PyTorch"} <= set(ran)


def test_a_peer_that_is_not_there_says_why(monkeypatch):
    monkeypatch.setattr(implementations, "_is_installed", lambda package: package != "trl")
    cpu = torch.device("cpu")
    assert implementations.IMPLEMENTATIONS["chunked_divergence"].why_not(cpu) == "trl is not installed"
    assert implementations.IMPLEMENTATIONS["fused_linear_jsd"].why_not(cpu)
    assert implementations.IMPLEMENTATIONS["chunked"].why_not(cpu) is None


def test_errors_show():
    assert accuracy._cell(0.02) == "**2e-02**" and accuracy._cell(float("nan")) == "**nan**"
    assert accuracy._cell(3e-7) == "3e-07"
