"""Writes the tables of all result files into docs/benchmarks.md, a short one into README.md, and draws the plots.

    python benchmarks/report.py [--output FOLDER]

In docs/benchmarks.md the tables of every results/NAME-*.json stand between `<!-- benchmarks/NAME.py -->` and the next
`<!-- end -->`. README.md has a few cases of throughput.py and a sentence of trainer_step.py, between
`<!-- benchmarks/report.py -->` and `<!-- end -->`.
A benchmark's plot lies beside its result file and carries the file's digest; drawing needs matplotlib.
With --output the program draws and prints the results of another folder and leaves both pages alone.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

import accuracy
import kernel_times
import matmuls
import objectives
import processors
import row_kernels
import scaling
import shards
import throughput
import trainer_step
from measuring import RESULTS, timed

ROOT = Path(__file__).parents[1]
BENCHMARKS = (
    throughput,
    trainer_step,
    kernel_times,
    matmuls,
    processors,
    scaling,
    objectives,
    row_kernels,
    accuracy,
    shards,
)
END = "<!-- end -->"

# README.md shows these cases of throughput.py, by the name that a reader understands, and these implementations: of a
# result file that has all of them.
ON_CPU = {
    "Qwen3-8B, bfloat16, 256 rows": "Qwen3-8B, bf16, 256 tokens",
    "Qwen3-0.6B, bfloat16, 1024 rows": "Qwen3-0.6B, bf16, 1024 tokens",
    "Qwen3-0.6B, float32, 1024 rows": "Qwen3-0.6B, fp32, 1024 tokens",
    "D = 512, V = 8192, float32, 256 rollouts, 63% of the questions at weight 0, rows of weight 0 removed by hand":
        "One step of 256 rollouts, zero-weight tokens removed by hand",
    "D = 512, V = 8192, float32, 256 rollouts, 63% of the questions at weight 0, padding removed":
        "The same step, zero-weight tokens left to the loss",
}  # fmt: skip
ON_GPU = {
    "Qwen3-8B, bfloat16, 8192 rows": "Qwen3-8B, bf16, 8192 tokens",
    "Qwen3-8B, bfloat16, 256 rows": "Qwen3-8B, bf16, 256 tokens",
}
SHORT = (
    (ON_GPU, ("torch.compile'd eager", "SDPO, eager", "fused_linear_jsd", "chunked_divergence")),
    (ON_CPU, ("eager PyTorch", "torch.compile'd eager", "SDPO, eager", "chunked_divergence")),
)


def name_of(benchmark) -> str:
    return benchmark.__name__.split(".")[-1]


def results(benchmark, folder: Path = RESULTS) -> dict[Path, dict]:
    return {path: json.loads(path.read_text()) for path in sorted(folder.glob(f"{name_of(benchmark)}-*.json"))}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def between_marks(text: str, name: str, tables: str) -> str:
    """A page's text with these tables between the marks of a file."""
    begin = f"<!-- benchmarks/{name}.py -->\n"
    before, rest = text.split(begin)
    return before + begin + tables + "\n" + END + rest.split(END, 1)[1]


def pages() -> dict[Path, str]:
    """Each page that has generated tables, with its text as it should be."""
    full, readme = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
    text = full.read_text()
    for benchmark in BENCHMARKS:
        tables = "\n\n".join(map(benchmark.table, results(benchmark).values()))
        text = between_marks(text, name_of(benchmark), tables)
    gpus_first = sorted(results(throughput).values(), key=lambda result: "cuda" not in result["machine"])
    steps = map(trainer_step.sentence, results(trainer_step).values())
    short = "\n\n".join(filter(None, [*map(short_table, gpus_first), *steps]))
    return {full: text, readme: between_marks(readme.read_text(), "report", short)}


def short_table(result: dict) -> str:
    """A few cases of one result of throughput.py, or nothing where a case was not measured."""
    cases = {case["name"]: case["implementations"] for case in result["cases"]}
    on_gpu = "cuda" in result["machine"]
    shown, implementations = SHORT[0 if on_gpu else 1]
    if not cases.keys() >= shown.keys():
        return ""
    labels = [cases[next(iter(shown))][name].get("label", name) for name in implementations]
    lines = [
        f"Forward and backward of the Jensen-Shannon divergence on {timed(result['machine'])}. Each cell has the time, "
        "as a multiple of ours where it is a baseline's, the peak memory over inputs and gradients, and the relative "
        "error of the gradients against float64.",
        "",
        "| | ours | " + " | ".join(labels) + " |",
        "|---" * (2 + len(labels)) + "|",
    ]
    for name, called in shown.items():
        ours = cases[name]["chunked"]
        time = f"{1e3 * ours['seconds']:.1f} ms" if on_gpu else f"{ours['seconds']:.2f} s"
        cells = [_short_cell(time, ours)]
        for record in (cases[name][baseline] for baseline in implementations):
            ran = "seconds" in record
            cells.append(_short_cell(f"{record['seconds'] / ours['seconds']:.2f} ×", record) if ran else "—")
        lines.append(f"| {called} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short_cell(time: str, record: dict) -> str:
    off = max(record["errors"].get(name, 0.0) for name in throughput.GRADIENTS)
    return f"{time}, {record['peak_mib']:.0f} MiB, " + (f"**{off:.0e}**" if record["wrong"] else f"{off:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="a folder of result files to show instead")
    arguments = parser.parse_args()
    for benchmark in BENCHMARKS:
        for path, result in results(benchmark, arguments.output or RESULTS).items():
            if hasattr(benchmark, "plot") and importlib.util.find_spec("matplotlib"):
                benchmark.plot(result).savefig(path.with_suffix(".png"), metadata={"Source": digest(path)})
            if arguments.output:
                print(f"\n## {path.stem}\n\n{benchmark.table(result)}")
    if not arguments.output:
        for page, text in pages().items():
            page.write_text(text)


if __name__ == "__main__":
    main()
