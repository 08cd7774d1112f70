"""Lays the Triton part of this package out as a source tree for Hugging Face's kernel-builder (kind torch-noarch).

    python packaging/hf_kernels.py FOLDER [--repo-id OWNER/NAME]

FOLDER then has build.toml, flake.nix and torch-ext/scsdpo_kernels/, which is this package's own Python. kernel-builder
adds torch-ext/scsdpo_kernels/_ops.py, whose namespace of operators is another in every build, so that several versions
can be loaded in one process. Nothing is compiled, so what is made there refuses tensors on a CPU.
"""

import argparse
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "scsdpo_kernels"
NAMESPACE = 'NAMESPACE = "scsdpo_kernels"'
NAMESPACE_OF_THE_BUILD = (
    'from ._ops import add_op_namespace_prefix\n\nNAMESPACE = add_op_namespace_prefix("").partition("::")[0]'
)
BUILD = """\
[general]
name = "scsdpo-kernels"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cuda", "rocm"]
"""
HUB = """
[general.hub]
repo-id = "{}"
"""
FLAKE = """\
{
  description = "Flake for scsdpo-kernels";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""


def assemble(folder: Path, repo_id: str | None = None) -> Path:
    """Writes the tree into a folder that does not exist or is empty; returns where its package is.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: scsdpo_kernels/ops.py has no single line that names the operators' namespace.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder: expected an empty one, got {folder}, which holds something")
    package = folder / "torch-ext" / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
    ops = package / "ops.py"
    if (lines := ops.read_text()).count(NAMESPACE) != 1:
        raise ValueError(f"ops.py: expected the line {NAMESPACE!r} once, got it {lines.count(NAMESPACE)} times")
    before, after = lines.split(NAMESPACE)
    ops.write_text(before + NAMESPACE_OF_THE_BUILD + after)
    hub = HUB.format(repo_id) if repo_id else ""
    (folder / "build.toml").write_text(f"{BUILD}{hub}\n[torch-noarch]\n")
    (folder / "flake.nix").write_text(FLAKE)
    shutil.copy(PACKAGE.parent / "LICENSE", folder)
    return package


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo-id", help="where kernel-builder uploads to")
    arguments = parser.parse_args()
    print(assemble(arguments.folder, arguments.repo_id))
