"""Stopping a run by SIGTERM or Ctrl-C at a moment at which its state can be saved (checkpoint.py)."""

import contextlib
import signal
from collections.abc import Callable


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


class Signals:
    """Turns SIGTERM and SIGINT into Stopped, but never between `hold` and `release`.

    Held are the short moments in which weights, optimizer and logs belong to different steps. A signal that comes then
    raises Stopped in `release`. In a long kernel Python notices a signal after the kernel.

    saves: whether this rank saves the checkpoint. One that does not only notes the signal, for it would wait in vain.
    ranks: given where all ranks save together (shards). Then none may stop alone: a signal is noted, it interrupts only
    `interruptible` work, and all ranks raise Stopped when they next meet (Ranks.meet).
    """

    def __init__(self, saves: bool = True, ranks=None):
        self.saves, self.ranks, self.number = saves, ranks, 0
        self.changing = False  # between hold and release
        self.held = not saves or ranks is not None

    def __enter__(self):
        self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        if self.ranks:
            self.ranks.signals = self
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.ranks:
            self.ranks.signals = None

    def handle(self, number: int, frame) -> None:
        self.number = number
        if not self.held:
            self.held = True  # a second signal must not interrupt the saving
            raise Stopped

    def hold(self) -> None:
        self.held = self.changing = True

    def release(self) -> None:
        self.changing = False
        if self.ranks:
            return  # Ranks.meet asks
        if self.saves and self.number:
            raise Stopped  # and still held
        self.held = not self.saves

    @contextlib.contextmanager
    def interruptible(self):
        """With ranks: work without collectives, which a signal may interrupt."""
        self.held = self.changing
        try:
            yield
        finally:
            self.held = True


@contextlib.contextmanager
def saved_when_stopped(ranks, sharded: bool, save: Callable[[], None]):
    """Runs a training loop; yields its Signals. When a signal stops it: save(), then SystemExit with 128 + the signal.

    save: of replicas rank 0 calls it alone, of shards all ranks call it.
    """
    with Signals(ranks.rank == 0, ranks if sharded else None) as signals:
        try:
            yield signals
        except (Stopped, RuntimeError) as error:
            if isinstance(error, Stopped):
                signals.hold()
                save()
            elif ranks.rank == 0 or not signals.number:  # else a collective failed because rank 0 has stopped
                raise  # unsaved: where the error came from, weights and step may not belong together
            ranks.leave()
            raise SystemExit(128 + signals.number) from None
