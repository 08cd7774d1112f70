"""A mode of PyTorch's dispatcher that sees what happens inside of this package's operators.

A plain one sees the operator alone: what its implementation calls, runs with the mode off.
"""

from typing import Any

from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from scsdpo_kernels.ops import NAMESPACE


class Inside(TorchDispatchMode):
    def saw(self, func: OpOverload, args: tuple, out: Any) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            with self:
                return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.saw(func, args, out)
        return out
