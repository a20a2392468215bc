"""Several processes that train one model: each computes its share of every batch, and the gradients are averaged.

    accelerate launch --num_processes 2 -m mage_core.training --dataset single-mnist --preset gpu

Accelerate starts the processes, chooses their devices and carries the tensors. On a CPU its launcher asks for MPI, and
`torchrun --nproc-per-node 2 -m -- mage_core.training` starts them. Every process knows the whole batch, for what is
drawn is a function of the step, and takes its slice: the mean of all gradients is what one process computes alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
from torch import Tensor


class Alone:
    """The only process there is: nothing to share, nobody to wait for."""

    index, count = 0, 1
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.index == 0

    def part(self, size: int) -> slice:
        """This process' places of a batch of `size`; ValueError where it cannot be shared evenly."""
        if size % self.count:
            raise ValueError(f"a batch of {size} cannot be shared evenly by {self.count} processes: choose a multiple "
                             f"of {self.count} (--set mage.batch=..., vqvae.batch=...)")
        each = size // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all processes in each tensor's place."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order."""
        return rows

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Put the main process' values in the place of everybody's."""

    def any(self, said: bool) -> bool:
        """Whether a process says so."""
        return said

    def wait(self) -> None:
        """Until every process is here."""


class Several(Alone):
    """One of the processes that Accelerate has started."""

    def __init__(self, cpu: bool):
        from accelerate import PartialState   # several processes need it, one does not
        self.state = PartialState(cpu=cpu, timeout=timedelta(hours=12))   # one draws tokens, the others wait for them
        self.index, self.count, self.device = self.state.process_index, self.state.num_processes, self.state.device

    def average(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        from accelerate.utils import reduce
        flat = reduce(torch.cat([tensor.detach().float().flatten() for tensor in tensors]), "mean")   # one message
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))

    def gather(self, rows: Tensor) -> Tensor:
        from accelerate.utils import gather
        return gather(rows.contiguous())

    def copy(self, tensors: Iterable[Tensor]) -> None:
        from accelerate.utils import broadcast
        for tensor in tensors:
            tensor.detach().copy_(broadcast(tensor.detach().clone(memory_format=torch.contiguous_format)))

    def any(self, said: bool) -> bool:
        from accelerate.utils import reduce
        return bool(reduce(torch.tensor([float(said)], device=self.device), "sum").item())

    def wait(self) -> None:
        self.state.wait_for_everyone()


ALONE = Alone()


def processes(device: str | torch.device | None = None) -> Alone:
    """Those that `accelerate launch` or `accelerate.notebook_launcher` started; else this one alone.

    `device` "cpu" keeps them from taking GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    return Several(cpu=device is not None and torch.device(device).type == "cpu")
