"""The README says what the files say."""

import ast
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import scsdpo_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import report
    finally:
        sys.path.pop(0)
    assert report.with_tables(README) == README
    for benchmark in report.BENCHMARKS:
        files = report.results(benchmark)
        assert files, f"no result of {report.name_of(benchmark)}"
        for path in files if hasattr(benchmark, "plot") else ():
            assert Image.open(path.with_suffix(".png")).text["Source"] == report.digest(path), f"old plot of {path}"
    plots = re.findall(r"\]\((benchmarks/results/[\w.-]+\.png)\)", README)
    assert len(plots) >= 3 and all((ROOT / plot).exists() for plot in plots)


def test_public_names_are_in_the_table():
    table = README.split("## Public names")[1].split("\n\n")[1]
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == set(scsdpo_kernels.__all__)


def test_snippets_are_python():
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 10
    for snippet in snippets:
        ast.parse(snippet)


@pytest.mark.parametrize("command", re.findall(r"^\./dev (\w+)", README, re.MULTILINE))
def test_commands_exist(command):
    assert f"  {command})" in (ROOT / "dev").read_text()
