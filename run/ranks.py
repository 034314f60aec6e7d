"""The processes of a run: data parallelism by shared lists, gathered results and summed gradients.

torchrun starts the processes and tells each its rank; without torchrun there is one. Every rank draws the
same questions, takes its share of the work, and sees all results in the order of the questions, so that a
run gives the same numbers whatever the number of ranks, up to rounding. gloo on CPUs, NCCL on GPUs.
"""

import contextlib
import gc
import os
import time

import torch
import torch.distributed as dist

from run.stop import Signals, Stopped


class Ranks:
    """This process among the run's, as torchrun started it; alone when it did not. Collectives take turns in order.

    ValueError where there are more processes than GPUs.
    """

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda, here = torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if cuda and here > (found := torch.cuda.device_count()):
            raise ValueError(f"torchrun was told to start {here} processes, and there are GPUs for {found}; set "
                             "--nproc-per-node to that, or CUDA_VISIBLE_DEVICES= to run on CPUs")  # fmt: skip
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.signals: Signals | None = None  # where all agree on a stop: see stop.Signals
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    def share(self, items: list) -> list:
        """This rank's items."""
        return items[self.rank :: self.world]

    def gather(self, items: list) -> list:
        """Everyone's shares, back in the order that `share` cut up."""
        if self.world == 1:
            return items
        self.meet()
        shares = [None] * self.world
        dist.all_gather_object(shares, items)
        whole: list = [None] * sum(map(len, shares))
        for rank, part in enumerate(shares):
            whole[rank :: self.world] = part
        return whole

    def together(self, work):
        """work()'s result; where it fails on any rank with a ValueError, all ranks raise the first one's."""
        result = error = None
        try:
            with self.signals.open() if self.signals else contextlib.nullcontext():
                result = work()
        except ValueError as problem:
            error = str(problem)
        except Stopped:
            if not self.signals:
                raise
            # else all are told when they meet, in the next line
        if errors := [e for e in self.gather([error]) if e]:
            raise ValueError(errors[0])
        return result

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Adds up tensors over all ranks, in place."""
        if self.world > 1:
            self.meet()
            for tensor in tensors:
                dist.all_reduce(tensor)

    def meet(self) -> None:
        """Waits until all have come. A collective ends before Python hears a signal; this lets one through.

        Where a stop has to be agreed upon, all raise Stopped if one was asked to.
        """
        if self.world == 1:
            return
        asked = torch.tensor(self.signals.number if self.signals else 0, device=self.device)
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
        while not work.is_completed():
            time.sleep(0.0005)
        work.wait()
        if self.signals and not self.signals.busy and asked:
            self.signals.number = int(asked)
            raise Stopped

    def leave(self) -> None:
        """Before an early exit: the others may be gone, so nothing is waited for."""
        self.world = 1

    def close(self) -> None:
        if self.world > 1:
            gc.collect()  # what still holds the group, as a cut model does, would outlive it and abort the exit
            dist.destroy_process_group()
