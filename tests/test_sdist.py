"""The source distribution holds what the repository holds: it compiles, and its tests find what they read."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="scikit-build-core: pip install '.[tests]'")

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with the files that git knows")
def test_the_sdist_is_the_repository(tmp_path):
    """Nothing of build/, environments or caches, which git ignores."""
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    known = set(subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")) - {""}
    assert packed - {"PKG-INFO"} == known
    needed = {"pyproject.toml", "csrc/CMakeLists.txt", "csrc/bindings.cpp", "README.md", "LICENSE", "tests/conftest.py"}
    assert needed <= packed
    assert path.stat().st_size < 2 * 2**20


def test_one_version():
    """In all the places that have to be changed for a release."""
    found = {
        "pyproject.toml": r'^version = "(.*)"$',
        "scsdpo_kernels/__init__.py": r'^__version__ = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
    }
    found = {name: re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE) for name, pattern in found.items()}
    assert all(len(versions) == 1 for versions in found.values()) and len({x for (x,) in found.values()}) == 1, found
