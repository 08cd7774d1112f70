"""Puts the result files of all benchmarks into README.md, and draws them.

    python benchmarks/report.py [--output FOLDER]

Between `<!-- benchmarks/NAME.py -->` and the `<!-- end -->` after it come the tables of every results/NAME-*.json;
beside each file lies its plot, where a benchmark has one and matplotlib is installed, which carries the file's digest.
With --output it draws and prints those of another folder instead.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

import accuracy
import objectives
import processors
import row_kernels
import scaling
import shards
import throughput
from measuring import RESULTS

README = Path(__file__).parents[1] / "README.md"
BENCHMARKS = (throughput, processors, scaling, objectives, row_kernels, accuracy, shards)
END = "<!-- end -->"


def name_of(benchmark) -> str:
    return benchmark.__name__.split(".")[-1]


def results(benchmark, folder: Path = RESULTS) -> dict[Path, dict]:
    return {path: json.loads(path.read_text()) for path in sorted(folder.glob(f"{name_of(benchmark)}-*.json"))}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_tables(readme: str) -> str:
    """README text with every benchmark's tables between its marks."""
    for benchmark in BENCHMARKS:
        begin = f"<!-- benchmarks/{name_of(benchmark)}.py -->\n"
        before, rest = readme.split(begin)
        tables = "\n\n".join(map(benchmark.table, results(benchmark).values()))
        readme = before + begin + tables + "\n" + END + rest.split(END, 1)[1]
    return readme


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
        README.write_text(with_tables(README.read_text()))


if __name__ == "__main__":
    main()
