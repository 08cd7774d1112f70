"""What benchmarks measure on, that they run, and that a wrong implementation cannot pass for a right one."""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

from scsdpo_kernels import TopK, linear_divergence
from scsdpo_kernels.kernels import native

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import implementations
import inputs
import measuring
import objectives
import processors
import report
import row_kernels
import scaling
import throughput

CPU = torch.device("cpu")
BENCHMARKS = Path(throughput.__file__).parent


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
    """In fp32, far from the teacher, every one that is installed has float64's loss and gradients; uncompiled."""
    tensors, device = inputs.reasoning(8, 128, 300, distance=1.0, device=DEVICE), torch.device(DEVICE)
    expected = accuracy.gradients(accuracy.exact, tuple(x.double() for x in tensors), beta)
    ran, absent = set(), set()
    with torch.compiler.set_stance("force_eager"):
        for name, implementation in implementations.IMPLEMENTATIONS.items():
            if reason := implementation.why_not(device):
                assert reason.endswith("is not installed"), name
                absent.add(name)
                continue
            got = accuracy.gradients(implementation.loss, tensors, beta)
            for what, exact in expected.items():
                assert (got[what].double() - exact).norm() <= 1e-3 * exact.norm(), (name, what)
            ran.add(name)
    assert ran | absent == set(implementations.IMPLEMENTATIONS)
    assert ran >= {"chunked", "reference", "eager PyTorch", "torch.compile'd eager"}


def test_colours_are_distinct_and_found_by_stored_labels():
    assert set(implementations.COLOURS) == set(implementations.IMPLEMENTATIONS)
    assert len(set(implementations.COLOURS.values())) == len(implementations.COLOURS)
    stored = {"scsdpo_kernels, chunked": "chunked", "trl 1.0 SDPO, eager": "SDPO, eager",
              "eager PyTorch": "eager PyTorch", "liger-kernel 0.1 fused_linear_jsd": "fused_linear_jsd",
              "torch.compile'd eager": "torch.compile'd eager",
              "unsloth-zoo 2 fused_linear_jsd": implementations.UNSLOTH}  # fmt: skip
    for text, name in stored.items():
        assert implementations.colour_of(text) == implementations.COLOURS[name]
    with pytest.raises(KeyError):
        implementations.colour_of("another package 1.0 loss")


def test_a_peer_that_is_not_there_says_why(monkeypatch):
    monkeypatch.setattr(implementations, "_is_installed", lambda package: package != "trl")
    assert implementations.IMPLEMENTATIONS["chunked_divergence"].why_not(CPU) == "trl is not installed"
    assert implementations.IMPLEMENTATIONS["chunked"].why_not(CPU) is None
    assert "top-K" in implementations.IMPLEMENTATIONS["eager PyTorch"].why_not(CPU, top_k=100)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "Triton's interpreter" in implementations.IMPLEMENTATIONS["fused_linear_jsd"].why_not(CPU)


def test_errors_show():
    assert accuracy._cell(0.02) == "**2e-02**" and accuracy._cell(float("nan")) == "**nan**"
    assert accuracy._cell(3e-7) == "3e-07"


@pytest.mark.parametrize("zeros", [0.0, 0.63, 0.78])
def test_rollouts_are_a_step_of_the_paper(zeros):
    """Whole questions of weight 0, the mean of the others' weights 1, mean length and padding as reported."""
    lengths, weight = inputs.rollouts(zeros)
    by_question = weight.view(inputs.QUESTIONS, inputs.ROLLOUTS)
    assert torch.equal(by_question.amin(1), by_question.amax(1))
    degenerate = by_question[:, 0] == 0
    assert degenerate.double().mean().item() == pytest.approx(zeros, abs=0.5 / inputs.QUESTIONS)
    assert by_question[~degenerate, 0].mean().item() == pytest.approx(1)
    assert 180 <= lengths.double().mean() <= 370 and lengths.min() >= 1 and lengths.max() <= inputs.LONGEST
    assert 0.8 < 1 - (lengths.sum() / (len(lengths) * lengths.max())).item() < 0.98


def case(**options) -> throughput.Case:
    return throughput.Case("tiny", "float32", **options)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(throughput.HEADS, "tiny", (128, 301))
    slow = ("compile", "fused_linear_jsd")  # the latter is Triton in its interpreter
    every = implementations.IMPLEMENTATIONS.items()
    fast = {name: x for name, x in every if not any(text in name for text in slow)}
    for module in (throughput, scaling):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", fast)


@pytest.mark.parametrize("zeros", [0.63, 0.78])
def test_layouts_have_the_same_loss(tiny, zeros):
    """Padded, without padding, or without rows of weight 0: the same sum, and the same gradient of the head."""
    found = {}
    for layout in throughput.LAYOUTS:
        given = throughput.problem(case(layout=layout, zeros=zeros, shorter=64), CPU)
        given.step(throughput.IMPLEMENTATIONS["chunked"].loss)
        rows = sum(len(hidden) for hidden, *_ in given.micro_batches)
        found[layout] = rows, given.kept, given.weight.grad
    rows, kept, gradients = zip(*found.values(), strict=True)
    response, own, padded = rows
    assert padded > 3 * response > 3 * own == 3 * kept[0] and len(set(kept)) == 1
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-6)


def test_throughput_and_its_report(tiny, monkeypatch, tmp_path):
    """Every kind of case, written, read and shown; a loss that is wrong is said to be, one that raises has no time."""

    def wrong(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
        options = {"token_weight": token_weight, "support": None if top_k is None else TopK(top_k)}
        return 1.01 * linear_divergence(hidden, weight, teacher, beta=beta, **options).loss

    def raising(*_, **__):
        raise RuntimeError("out of luck")

    for name, loss in (("wrong", wrong), ("raising", raising)):
        other = implementations.Implementation(loss, "torch", top_k=True)
        monkeypatch.setitem(throughput.IMPLEMENTATIONS, name, other)
        monkeypatch.setitem(implementations.IMPLEMENTATIONS, name, other)
    given = [case(rows=70), case(rows=70, top_k=5), case(rows=9, trained_head=False, objective="forward KL")]
    given += [case(layout=layout, zeros=0.63, shorter=128) for layout in throughput.LAYOUTS]
    measured = [throughput.measure(x, CPU, 1) for x in given]
    for x, record in zip(given, measured, strict=True):
        of = record["implementations"]
        assert of["wrong"]["wrong"] and not of["chunked"]["wrong"] and not of["eager PyTorch"].get("wrong", False)
        assert of["raising"] == {"why_not": "RuntimeError: out of luck"}
        assert ("why_not" in of["eager PyTorch"]) == (x.top_k is not None)
        assert all(y["seconds"] > 0 and len(y["all_seconds"]) == 1 for y in of.values() if "why_not" not in y)
    result = {"machine": measuring.machine(CPU), "repeats": 1, "cases": measured}
    path = measuring.write("throughput", result, tmp_path)
    assert list(report.results(throughput, tmp_path)) == [path]
    shown = throughput.table(json.loads(path.read_text()))
    assert shown.count("| tiny, float32,") == len(given) and shown.count("**, off by 1e-02") == 0
    assert shown.count("off by 1e-02**") == len(given)
    assert len(throughput.plot(json.loads(path.read_text())).axes[0].get_yticklabels()) == len(given)


def test_cases_come_from_several_calls(tiny, monkeypatch, tmp_path):
    """--add keeps the cases that are there, in their order; not those of other settings."""
    monkeypatch.setattr(throughput, "cases", lambda _: [case(rows=9), case(rows=8), case(rows=8, trained_head=False)])
    monkeypatch.setattr(throughput, "alone", lambda function, *arguments: function(*arguments))

    def call(*arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["throughput.py", "--device", "cpu", "--output", str(tmp_path), *arguments])
        throughput.main()
        return json.loads(next(tmp_path.glob("throughput-*.json")).read_text())["cases"]

    (frozen,) = call("--repeats", "1", "--cases", "frozen")
    added = call("--repeats", "1", "--cases", "9 tokens", "--add")
    assert [x["name"] for x in added] == ["tiny, float32, 9 tokens", frozen["name"]] and added[1] == frozen
    with pytest.raises(SystemExit):
        call("--repeats", "2", "--cases", "9 tokens", "--add")
    assert [x["rows"] for x in call("--repeats", "1", "--cases", "9 tokens")] == [9]


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_pytest_benchmark(tmp_path):
    """Every phase is timed, or says why not, and its record says on what; `--benchmark-compare` runs."""
    script = f"""
import pytest, throughput
throughput.HEADS["tiny"] = (128, 301)  # in the processes that it starts, too
for name in set(throughput.IMPLEMENTATIONS) - {{"chunked", "reference", "eager PyTorch", "fused_linear_jsd"}}:
    del throughput.IMPLEMENTATIONS[name]
throughput.cases = lambda device: [
    throughput.Case("tiny", "float32", 70, trained_head=False),
    throughput.Case("tiny", "float32", layout="response", zeros=0.63, shorter=64),
]
if __name__ == "__main__":
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-storage", {str(tmp_path)!r}]
    options.append({str(BENCHMARKS / "test_throughput.py")!r})
    for last in (["--benchmark-save=x"], ["--benchmark-compare", "--benchmark-json", {str(tmp_path / "out.json")!r}]):
        assert pytest.main(options + last) == 0
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(BENCHMARKS)
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, "-W", "ignore", tmp_path / "run.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {x["name"]: x for x in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert len(found) == 3 * 3 + 2 * 2  # `reference` has no step, and a step no backward of its own
    keys = {"N", "V", "D", "dtype", "device", "share of rows with a weight", "peak_mib", "bytes of inputs", "machine",
            "errors", "wrong"}  # fmt: skip
    for name, benchmark in found.items():
        extra = benchmark["extra_info"]
        assert extra.keys() >= keys and not extra["wrong"], name
        assert (extra["V"], extra["D"], extra["machine"]["versions"]["torch"]) == (301, 128, torch.__version__)
        assert ("backward" in name) != (extra.keys() >= {"TFLOP/s", "share of products"})
        assert extra["share of rows with a weight"] == 1 or (0.2 < extra["share of rows with a weight"] < 0.6)
        assert benchmark["stats"]["median"] > 0


def test_scaling_and_row_kernels(tiny, monkeypatch, tmp_path):
    few = {"chunked": scaling.IMPLEMENTATIONS["chunked"]}
    monkeypatch.setattr(scaling, "IMPLEMENTATIONS", few)
    tried = []
    monkeypatch.setattr(scaling, "alone", lambda _, *at: tried.append(at[:3]) or (None if at[2] == 600 else 7.0))
    arguments = argparse.Namespace(device="cpu", rows=32, width=128, vocabulary=300, repeats=1)
    shape = {"rows": 32, "width": 128, "vocabulary": 300}
    result = {"machine": measuring.machine(CPU), "shape": shape, "repeats": 1, "times": scaling.times(arguments),
              "peaks": list(scaling.peaks(arguments))}  # fmt: skip
    threads = torch.get_num_threads()
    assert [p["x"] for p in result["times"]["rows"]] == [16, 32, 64, 128, 256]
    assert len(result["times"]["kept rows"]) == len(scaling.SHARES) and len(result["times"]["threads"]) == threads
    assert scaling.exponent([{"x": x, "seconds": 3 * x**1.5} for x in (1.0, 2.0, 8.0)]) == pytest.approx(1.5)
    shown = scaling.table(json.loads(json.dumps(result)))
    own = "| scsdpo_kernels, chunked | 7 | 7 |"
    assert "| rows | 16 | 256 |" in shown and f"{own} 7 | 7 | 7 |\n" in shown and f"{own} too much | 7 |" in shown
    assert len(tried) == len(set(tried)) == 8  # a point of both series is measured once
    assert len(scaling.plot(result).axes) == 3
    parts = [row_kernels.value(16, 128, 300, "float32", CPU, 1), row_kernels.row_kernels(2**22, 0.1, CPU, 1)]
    shown = row_kernels.table({"machine": result["machine"], "repeats": 1, "parts": parts})
    assert shown.count("| chunked |") == 3 and shown.count("\n| cpu |") == 6


def test_objectives():
    """Every objective and part of a head has its time, its rows' time, and float64's gradients."""
    arguments = argparse.Namespace(rows=16, width=128, vocabulary=301, repeats=1)
    *_, records = objectives.measure(arguments, CPU)
    for name, record in records.items():
        # Logits of a softcap or of another head are not subtracted before they are rounded: PyTorch's fp32 is no worse.
        limit = 2 if name == "softcap" or "teacher" in name else 0.3
        assert record["seconds"] > 0 and record["error_hidden"] < limit * record["error_hidden_eager"], name
        part = name.startswith(("TopK", "TopLogprobs", "SampledToken"))  # a difference of times, which may be any
        assert "LoRA" in name or "teacher" in name or part or record["seconds_of_256_rows"] > 0
        assert ("seconds_of_256_rows" in record) == ("LoRA" not in name and "teacher" not in name)
    shape = {"rows": 16, "width": 128, "vocabulary": 301}
    shown = objectives.table({"machine": measuring.machine(CPU), "shape": shape, "repeats": 1, "objectives": records})
    assert all(f"\n| {name} | " in shown for name in records) and len(records) == 21


def test_peaks_are_over_inputs_and_gradients():
    leaf = torch.zeros(2**22, requires_grad=True)  # 16 MiB

    def run():
        held = torch.ones(2**24)  # 64 MiB
        (leaf * held.sum()).sum().backward()

    run()
    assert 48 < measuring.peak_mib(run, [leaf], CPU) < 160


def test_a_first_turn_does_not_count_and_a_process_is_ones_own():
    turns = []
    times = measuring.interleaved({name: lambda name=name: turns.append(name) for name in "ab"}, 3, CPU)
    assert turns == list("abababab") and {name: len(x) for name, x in times.items()} == {"a": 3, "b": 3}
    assert measuring.alone(os.getpid) != os.getpid()


def test_cases_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        every = throughput.cases(device)
        assert len({x.name for x in every}) == len(every) == len(set(map(dataclasses.astuple, every)))


def test_processors():
    """Every instruction set that this processor has, in its own process and with its own libraries' limits."""
    before = dict(os.environ)
    try:
        records = processors.measure(["9,128,301"], repeats=1)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert [record["instruction_set"] for record in records] == list(
        native.instruction_sets()[1:] or native.instruction_sets()
    )
    assert all(record[dtype] > 0 for record in records for dtype in ("products", *processors.DTYPES))
    shown = processors.table({"machine": measuring.machine(CPU), "repeats": 1, "records": records})
    assert f"| {native.instruction_sets()[-1]} | 9, 128, 301 |" in shown
