"""A moving average of a model's trainable parameters (SDPO's teacher), sharded as FSDP2 shards them.

    θ' ← θ' + rate (θ − θ')

It is in the model's place only while the teacher runs, so that it needs no second model.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class EMATeacher:
    """Begins as the model's own parameters, in fp32; of this process's shards."""

    def __init__(self, module: nn.Module, rate: float, device: str | None = None):  # None: where parameters are
        self.module, self.rate = module, rate
        self.average = {name: own.to(device, torch.float32, copy=True) for name, own in self._own()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the model's parameters; afterwards the model's own numbers, every bit of them."""
        kept = {name: own.clone() for name, own in self._own()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def update(self) -> None:
        for name, own in self._own():
            self.average[name].lerp_(own.to(self.average[name]), self.rate)

    def save(self, folder: str) -> None:
        torch.save({name: value.cpu() for name, value in self.average.items()}, self._path(folder))

    def load(self, folder: str) -> None:
        """From a checkpoint of as many processes, as verl's own; a warning, and no change, where it has none.

        Raises:
            ValueError: it is another model's.
        """
        path = self._path(folder)
        if not os.path.exists(path):
            warnings.warn(f"{path}: expected the moving-average teacher, found none; it starts anew", stacklevel=2)
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        expected, got = ({name: tuple(x.shape) for name, x in of.items()} for of in (self.average, saved))
        if expected != got:
            names = sorted(set(expected.items()) ^ set(got.items()))
            raise ValueError(f"{path}: expected this model's parameters, got others, as {names[0]}")
        for name, value in saved.items():
            self.average[name].copy_(value)

    @staticmethod
    def _path(folder: str) -> str:
        processes, rank = dist.get_world_size(), dist.get_rank()
        return os.path.join(folder, f"ema_teacher_world_size_{processes}_rank_{rank}.pt")

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        """This process's part of each trainable parameter. What FSDP2 has gathered of them is given up first.

        Modules hold gathered parameters in place of their own for as long as these are there.
        """
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                whole = parameter.detach()
                yield name, whole.to_local() if hasattr(whole, "to_local") else whole

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, own in self._own():
            own.copy_(values[name])


__all__ = ["EMATeacher"]
