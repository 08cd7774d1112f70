"""The README says what the files say."""

import ast
import re
import sys
from pathlib import Path

import pytest

import scsdpo_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import accuracy
        import headline
        import objectives
        import shards
    finally:
        sys.path.pop(0)
    for benchmark in (accuracy, headline, objectives, shards):
        assert benchmark.with_tables(README) == README
    assert README.count("; mean KL: |") >= 2 and README.count("| estimated, not measured |") >= 1
    assert README.count("| time / four products |") >= 2 and README.count("| time / Jensen-Shannon's |") >= 1


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
