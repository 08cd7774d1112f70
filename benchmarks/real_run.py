"""What SC-SDPO, SDPO and a hard filter make of SmolLM2-135M with TRL: examples/trl_smollm2.py, for every seed.

    python benchmarks/real_run.py [--steps 30] [--seeds 3] [--add] [--output FOLDER]

A warm-up comes first, where its folder is not there yet. Then every seed has a run of each method, on the same
questions in the same order; a run is a process of its own. CPU time is that of sampling and of what follows it, without
the tests. The statistics and sentences are those of the demo (`demo/comparison.py`).

Writes FOLDER/real_run-<machine>.json after every run and prints the comparison; `benchmarks/report.py` puts it into
docs/benchmarks.md and draws it. Needs the `trl` extra and SmolLM2's wheel (`smollm2.py`); hours on two cores.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from measuring import RESULTS, alone, described, machine, path_of, write
from smollm2 import folder

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "examples")]  # where `demo` and `trl_smollm2` lie
WARM = Path(__file__).parent / ".cache" / "smollm2-135m-sums"
METHODS = {"SC-SDPO": "sc-sdpo", "SDPO": "sdpo", "hard filter": "hard-filter"}  # as the demo and the example say


def warm_up(model: str, where: str) -> None:
    import trl_smollm2  # TRL is not needed for the table

    with tempfile.TemporaryDirectory() as out:
        trl_smollm2.warm_up(model, where, output_dir=out)


def run(model: str, method: str, seed: int, steps: int) -> list[dict]:
    import trl_smollm2

    with tempfile.TemporaryDirectory() as out:
        return trl_smollm2.main(model, METHODS[method], seed, max_steps=steps, output_dir=out)


def runs_of(result: dict):
    """As the demo has them, for the seeds that every method has run."""
    from demo.learning import Point

    seeds = min(map(len, result["runs"].values()))
    return {name: [[Point(**point) for point in run] for run in runs[:seeds]] for name, runs in result["runs"].items()}


def table(result: dict) -> str:
    """One result file as Markdown."""
    from demo import comparison

    runs = runs_of(result)
    lines = [
        "SmolLM2-135M-Instruct after a warm-up, on sums and differences of numbers below 100; "
        f"{described(result['machine'])}:",
        "",
        f"```text\n{comparison.table(runs)}\n```",
        "",
        comparison.conclusion_of(runs) + " " + comparison.share_of_sampling(runs),
    ]
    return "\n".join(lines)


def sentence(result: dict) -> str:
    """What the methods come to, for README.md."""
    from demo import comparison

    runs = runs_of(result)
    starts, ends = (fmean(run[at].pass_rate for run in runs[comparison.OURS]) for at in (0, -1))
    end = comparison.at_equal(runs, "steps")
    others = ", ".join(f"{name} {end.mean(name):.2f}" for name in runs if name != comparison.OURS)
    ratio = comparison.ratio(comparison.spent(runs, lambda point: point.rollouts))
    return (
        f"SmolLM2-135M with TRL on sums, {len(runs[comparison.OURS])} seeds of {result['steps']} steps: SC-SDPO goes "
        f"from a pass rate of {starts:.2f} to {ends:.2f} ({others}; less SDPO's, {end.over(comparison.PLAIN)}) and "
        f"trains on {comparison.times(ratio)} the rollouts of SDPO."
    )


def plot(result: dict):
    """One result file as a figure."""
    from matplotlib.figure import Figure

    from demo.picture import learning_curves

    figure = Figure(figsize=(12.5, 4.9), layout="constrained", dpi=110)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for panel, axis in zip(figure.subfigures(1, 2, wspace=0.04), ("rollouts trained on", "CPU time"), strict=True):
        learning_curves(panel, runs_of(result), axis)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2, which have a standard error")
    parser.add_argument("--add", action="store_true", help="go on with the file that is there")
    parser.add_argument("--model", type=Path, help="folder of another model with a chat template")
    parser.add_argument("--warm", type=Path, default=WARM, help="where it is after the warm-up, or goes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = {"machine": machine(torch.device("cpu")), "steps": arguments.steps, "runs": {name: [] for name in METHODS}}
    if arguments.add:
        there = json.loads(path_of("real_run", result["machine"], arguments.output).read_text())
        if any(there[of] != result[of] for of in ("machine", "steps")):
            parser.error("--add: expected a file of this machine, these versions and as many steps")
        result = there
    if not arguments.warm.exists():
        alone(warm_up, str(arguments.model or folder()), str(arguments.warm))
    for seed in range(arguments.seeds):
        for method, runs in result["runs"].items():
            if len(runs) == seed:
                runs.append(alone(run, str(arguments.warm), method, seed, arguments.steps))
                write("real_run", result, arguments.output)
    print(table(result))


if __name__ == "__main__":
    main()
