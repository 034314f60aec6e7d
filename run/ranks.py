"""The processes of a run: shared lists, gathered results, summed gradients.

torchrun starts the processes and tells each its rank; without torchrun there is one. All ranks draw the same questions,
each works on its share, and all see the results in the order of the questions. So a run gives the same numbers with any
number of ranks, up to rounding. CPUs use gloo, GPUs use NCCL.
"""

import contextlib
import gc
import signal
import sys
import threading
import time
import typing

import torch
import torch.distributed as dist

from run.progress import launched, say
from run.stop import Signals, Stopped, handled


class Ranks:
    """This process as one of the run's processes. All ranks must call the collectives in the same order.

    Raises ValueError for a wrong environment. If there are more processes than GPUs, or if the processes do not find
    each other, a line says so, and SystemExit follows.
    """

    def __init__(self):
        self.rank, self.world, local, here = launched()
        cuda = torch.cuda.is_available()
        if cuda and here > (found := torch.cuda.device_count()):
            if local:
                time.sleep(10)  # torchrun kills all when one exits; the first one on this machine must print before
                raise SystemExit(2)
            self.refuse(f"torchrun was told to start {here} processes, and there are GPUs for {found}; set "
                        "--nproc-per-node to that, or CUDA_VISIBLE_DEVICES= to run on CPUs")  # fmt: skip
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.signals: Signals | None = None  # set if all ranks must agree on a stop
        self.noted: Signals | None = None  # set if this rank notes a signal, and ends when rank 0 has
        if self.world > 1:
            waits = f"rank {self.rank} of {self.world}, as the environment says, waits for others"
            late = threading.Timer(10, say, [waits])
            late.start()
            try:
                with handled(signal.SIG_DFL):  # this call would not notice a handler of Python's
                    dist.init_process_group("nccl" if cuda else "gloo")
            except (RuntimeError, ValueError) as error:
                self.refuse(f"the processes do not find each other: {str(error).splitlines()[0]}")
            finally:
                late.cancel()

    def refuse(self, line: str) -> typing.NoReturn:
        """As long as the ranks have not met, each speaks for itself."""
        say(f"train.py: {line}", sys.stderr)
        raise SystemExit(2)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if kind and (issubclass(kind, KeyboardInterrupt) or self.device.type == "cuda"):
            self.leave()  # NCCL would wait for the others here, and the error would never be printed
        if self.world > 1:
            gc.collect()  # a sharded model still holds the process group, which would abort the exit
            dist.destroy_process_group()

    def share(self, items: list) -> list:
        """This rank's items."""
        return items[self.rank :: self.world]

    def gather(self, items: list) -> list:
        """The shares of all ranks, in the order of the list that `share` cut."""
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
        """work()'s result. If it raises ValueError on any rank, all ranks raise the first one's."""
        result = error = None
        try:
            with self.signals.interruptible() if self.signals else contextlib.nullcontext():
                result = work()
        except ValueError as problem:
            error = str(problem)
        except Stopped:
            if not self.signals:
                raise
            # With signals, the gather below tells all ranks.
        if errors := [e for e in self.gather([error]) if e]:
            raise ValueError(errors[0])
        return result

    def on_first(self, work):
        """work()'s result on rank 0, given to all ranks. An error there is raised on all."""
        return self.gather([self.together(lambda: work() if self.rank == 0 else None)])[0]

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Sums tensors over all ranks, in place."""
        if self.world > 1:
            self.meet()
            for tensor in tensors:
                dist.all_reduce(tensor)

    def total(self, *counts: int) -> list[int]:
        """Each count summed over all ranks."""
        if self.world == 1:
            return list(counts)
        sums = torch.tensor(counts, device=self.device)
        self.sum_([sums])
        return sums.tolist()

    def meet(self) -> None:
        """Waits until all ranks are here. Unlike the collective that follows, this wait lets a signal through.

        If a stop must be agreed on, all ranks raise Stopped as soon as one of them was told to stop.
        """
        if self.world == 1:
            return
        asked = torch.tensor(self.signals.number if self.signals else 0, device=self.device)
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
        since = time.monotonic()
        while not work.is_completed():
            time.sleep(0.0005)
            if self.noted and self.noted.number and time.monotonic() - since > 10:
                raise RuntimeError("rank 0 has stopped")  # gloo says so by itself, NCCL waits
        work.wait()
        if self.signals and not self.signals.changing and asked:
            self.signals.number = int(asked)
            raise Stopped(self.signals.number)

    def leave(self) -> None:
        """Before an early exit: the other ranks may be gone, so this rank waits for none of them."""
        self.world = 1
