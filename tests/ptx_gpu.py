"""The kernels' launchers on CPU tensors, with Triton's compiler and, in place of a GPU, ptx.py.

    with Compiled("sm_80") as compiled:
        compiled.row_divergence_triton.row_divergence(*arguments)

Triton asks its driver for the target, hands it the binary and has it launch: `Driver` is one whose binaries are PTX. So
what runs was specialised, compiled and given its arguments as on a GPU. It does so in a process of its own, since
Triton's interpreter, which the tests run kernels in, excludes its compiler from a process.
"""

import functools
import importlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ptx
import torch
from torch import Tensor

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "scsdpo_kernels"


class Compiled:
    """A process that runs launchers: its attributes are the modules of scsdpo_kernels.kernels.

    `seed` is that of the next calls' approximate instructions, see ptx.Program.

    Args:
        target: the GPU to compile for.
        changes: (file of the package, text, new text) to make in a copy of the package, which then runs.
        triton: the folder of another Triton than the installed one.
        interpreted: whether Triton's interpreter runs the kernels after all.
    """

    def __init__(self, target="sm_80", *, changes=(), triton=None, interpreted=False):
        self.seed: int | None = None
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        paths = [str(TESTS)] + ([str(triton)] if triton else [])
        if changes:
            shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
            paths.insert(0, str(folder))
        for name, old, new in changes:
            file = folder / PACKAGE.name / name
            text = file.read_text()
            if text.count(old) != 1:
                raise ValueError(f"{name}: expected {old!r} once, got it {text.count(old)} times")
            file.write_text(text.replace(old, new))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "TRITON_INTERPRET": str(int(interpreted)),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        _send(self._process.stdin, (target, interpreted, folder if changes else None), [])

    def __enter__(self) -> "Compiled":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._folder.cleanup()

    def __getattr__(self, module: str) -> "_Module":
        """Launchers of a module, which may write to tensors; what they raise, they raise as RuntimeError."""
        if module.startswith("_"):
            raise AttributeError(module)
        return _Module(functools.partial(self._call, module))

    def _call(self, module: str, function: str, *arguments: Any, **options: Any) -> Any:
        storages: list[Any] = []
        _send(self._process.stdin, (module, function, arguments, options, self.seed), storages)
        (result, error), returned = _receive(self._process.stdout)
        if error is not None:
            raise RuntimeError(error)
        for storage, changed in zip(storages, returned, strict=False):
            storage.copy_(changed)
        return result


class _Module:
    def __init__(self, call: Callable):
        self._call = call

    def __getattr__(self, function: str) -> Callable:
        return functools.partial(self._call, function)


# Between the processes: objects, in which tensors that share memory still do when they arrive.


class _Pickler(pickle.Pickler):
    def __init__(self, file, storages: list):
        super().__init__(file)
        self.storages = storages

    def persistent_id(self, obj: Any):
        if not isinstance(obj, Tensor):
            return None
        storage = obj.untyped_storage()
        known = [x.data_ptr() for x in self.storages]
        if storage.data_ptr() not in known:
            self.storages.append(storage)
            known.append(storage.data_ptr())
        return known.index(storage.data_ptr()), obj.dtype, obj.shape, obj.stride(), obj.storage_offset()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storages: list):
        super().__init__(file)
        self.storages = storages

    def persistent_load(self, pid: tuple) -> Tensor:
        index, dtype, shape, stride, offset = pid
        return torch.empty(0, dtype=dtype).set_(self.storages[index], offset, shape, stride)


def _send(stream, message: Any, storages: list) -> None:
    """`storages` may begin with memory that is to be sent in any case; it ends as all that was."""
    buffer = io.BytesIO()
    _Pickler(buffer, storages).dump(message)
    data = [bytearray(torch.empty(0, dtype=torch.uint8).set_(x).numpy()) for x in storages]
    pickle.dump((data, buffer.getvalue()), stream)
    stream.flush()


def _receive(stream) -> tuple[Any, list]:
    data, message = pickle.load(stream)
    storages = [torch.UntypedStorage(len(x)) for x in data]
    for storage, given in zip(storages, data, strict=True):
        if given:
            torch.empty(0, dtype=torch.uint8).set_(storage).copy_(torch.frombuffer(given, dtype=torch.uint8))
    return _Unpickler(io.BytesIO(message), storages).load(), storages


# In the other process.


class Driver:
    """What Triton asks of a GPU."""

    def __init__(self, target):
        self.utils, self._target = self, target
        self.seed: int | None = None
        self._programs: dict[tuple, ptx.Program] = {}

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": (99 if self._target.arch == 80 else 227) * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, threads at most)"""
        return name, binary.decode(), 0, 0, 1024

    def _program(self, text: str) -> ptx.Program:
        key = text, self.seed
        if key not in self._programs:
            self._programs[key] = ptx.Program(*key)
        return self._programs[key]

    def unload_module(self, module: str) -> None:
        pass

    def launcher_cls(self, source, metadata) -> Callable:
        types = tuple(source.signature.values())

        def launch(x, y, z, stream, text, packed, launch_metadata, enter, leave, *arguments):
            program = self._program(text)
            given = list(_given(types, arguments))
            tensors = [v for v in given if isinstance(v, Tensor)]
            numbers = [v.data_ptr() if isinstance(v, Tensor) else v for v in given]
            scratch = [0] * (len(program.parameters) - len(numbers))  # Triton's own pointers to memory it may ask for
            program.run((x, y, z), numbers + scratch, [(v.data_ptr(), _extent(v)) for v in tensors], metadata.shared)

        return launch


def _given(types: Iterable, values: Iterable) -> Iterator:
    """Arguments that are not compiled in, out of tuples."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _given(kind, value)
        elif kind != "constexpr":
            yield value


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def main() -> None:
    source, to = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes to stderr
    (target, interpreted, folder), _ = _receive(source)
    if folder is not None:  # an editable install of the package has a finder that comes before PYTHONPATH
        sys.meta_path[:] = [x for x in sys.meta_path if x.__module__.startswith("_frozen_importlib")]
        assert Path(importlib.import_module(PACKAGE.name).__file__).is_relative_to(folder)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote to holds NaN
    driver = None if interpreted else install(target)
    while True:
        try:
            (module, function, arguments, options, seed), storages = _receive(source)
        except EOFError:
            return
        try:
            if driver is not None:
                driver.seed = seed
            launchers = importlib.import_module(f"scsdpo_kernels.kernels.{module}")
            answer = getattr(launchers, function)(*arguments, **options), None
        except Exception:
            answer = None, traceback.format_exc()
        _send(to, answer, storages)


def install(target: str) -> Driver:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    CUDABackend.make_cubin = lambda self, source, *_: source.encode()
    active = Driver(GPUTarget("cuda", int(target.removeprefix("sm_")), 32))
    driver.set_active(active)
    return active


if __name__ == "__main__":
    main()
