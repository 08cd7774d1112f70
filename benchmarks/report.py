"""Writes the tables of all result files into docs/benchmarks.md, a short one into README.md, and draws the figures.

    python benchmarks/report.py [--output FOLDER]

In docs/benchmarks.md the tables of every results/NAME-*.json stand between `<!-- benchmarks/NAME.py -->` and the next
`<!-- end -->`. README.md has a few cases of throughput.py and sentences of trainer_step.py and real_run.py, between
`<!-- benchmarks/report.py -->` and `<!-- end -->`.
A benchmark's plot lies beside its result file and carries the file's digest, as README.md's figure (`headline.py`) does
that of two; drawing needs matplotlib.
With --output the program draws and prints the results of another folder and leaves both pages alone.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

import accuracy
import headline
import kernel_times
import matmuls
import objectives
import processors
import real_run
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
    real_run,
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

# README.md shows these cases of throughput.py on a GPU, by the name that a reader understands, and these baselines.
STEP = "Qwen3-8B, bfloat16, 256 rollouts, 63% of the questions at weight 0, "
SHORT = {
    "Qwen3-8B, bfloat16, 8192 tokens": "8192 tokens",
    "Qwen3-8B, bfloat16, 8192 tokens, top-100 and tail": "8192 tokens, TopK(100)",
    "Qwen3-8B, bfloat16, 256 tokens": "256 tokens",
    STEP + "tokens of weight 0 removed by hand": "256 rollouts, zero-weight tokens removed by hand",
    STEP + "padding removed": "256 rollouts, zero-weight tokens left to the loss",
}
BASELINES = (
    "torch.compile'd eager", "SDPO, eager", "hand-filtered eager", "fused_linear_jsd", "chunked_divergence",
)  # fmt: skip


def name_of(benchmark) -> str:
    return benchmark.__name__.split(".")[-1]


def results(benchmark, folder: Path = RESULTS) -> dict[Path, dict]:
    return {path: json.loads(path.read_text()) for path in sorted(folder.glob(f"{name_of(benchmark)}-*.json"))}


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


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
    tables = map(short_table, filter(_on_gpu, results(throughput).values()))
    sentences = (of.sentence(result) for of in (trainer_step, real_run) for result in results(of).values())
    short = "\n\n".join([*tables, *sentences])
    return {full: text, readme: between_marks(readme.read_text(), "report", short)}


def _on_gpu(result: dict) -> bool:
    return "cuda" in result["machine"]


def short_table(result: dict) -> str:
    """A few cases of one result of throughput.py on a GPU."""
    cases = {case["name"]: case["implementations"] for case in result["cases"]}
    records = [cases[name] for name in SHORT]
    labels = [next(x[name]["label"] for x in records if "label" in x.get(name, {})) for name in BASELINES]
    lines = [
        f"Jensen-Shannon, forward and backward, with Qwen3-8B's head in bf16 on {timed(result['machine'])}. Each cell "
        "has the time, as a multiple of ours where it is a baseline's, the peak memory over inputs and gradients, and "
        "the relative error of the gradients against float64. In a step of 256 rollouts, 63% of the questions have "
        "weight 0.",
        "",
        "| | ours | " + " | ".join(labels) + " |",
        "|---" * (2 + len(labels)) + "|",
    ]
    for (name, called), record in zip(SHORT.items(), records, strict=True):
        ours = record["chunked"]
        cells = [_short_cell(f"{1e3 * ours['seconds']:.1f} ms", ours)]
        for baseline in (record.get(name, {}) for name in BASELINES):
            if "seconds" not in baseline:
                cells.append("—")
                continue
            weights = " *" if name.startswith(STEP) and not baseline["token_weights"] else ""
            cells.append(_short_cell(f"{baseline['seconds'] / ours['seconds']:.2f} ×", baseline, weights))
        lines.append(f"| {called} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short_cell(time: str, record: dict, weights: str = "") -> str:
    off = max(record["errors"].get(name, 0.0) for name in throughput.GRADIENTS)
    return f"{time}{weights}, {record['peak_mib']:.0f} MiB, " + (f"**{off:.0e}**" if record["wrong"] else f"{off:.0e}")


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
        if importlib.util.find_spec("matplotlib"):
            times, errors = (json.loads(path.read_text()) for path in headline.SOURCES)
            headline.plot(times, errors).savefig(headline.PATH, metadata={"Source": digest(*headline.SOURCES)})
        for page, text in pages().items():
            page.write_text(text)


if __name__ == "__main__":
    main()
