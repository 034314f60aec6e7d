"""Stopping a run by SIGTERM or Ctrl-C at a moment at which its state can be saved (checkpoint.py)."""

import contextlib
import signal
from collections.abc import Callable


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


class Signals:
    """Turns SIGTERM and SIGINT into Stopped, but never between `hold` and `release`.

    Between them weights, optimizer and logs may belong to different steps. A signal that comes then raises Stopped in
    `release`. During a long kernel Python notices a signal only after the kernel.

    saves: whether this rank saves the checkpoint. A rank that does not save only notes the signal: rank 0 may need it
    to finish an update. together: all ranks save together (shards), so none may stop alone. Then a signal is noted, it
    interrupts only `interruptible` work, and all ranks raise Stopped when they next meet (Ranks.meet).
    """

    def __init__(self, saves: bool, together: bool):
        self.saves, self.together, self.number = saves, together, 0
        self.changing = False  # between hold and release
        self.held = not saves or together

    def handle(self, number: int, frame) -> None:
        self.number = number
        if not self.held:
            self.held = True  # a second signal must not interrupt the saving
            raise Stopped

    def hold(self) -> None:
        self.held = self.changing = True

    def release(self) -> None:
        self.changing = False
        if self.together:
            return  # Ranks.meet asks
        if self.saves and self.number:
            raise Stopped  # and still held
        self.held = not self.saves

    @contextlib.contextmanager
    def interruptible(self):
        """With `together`: work without collectives, which a signal may interrupt."""
        self.held = self.changing
        try:
            yield
        finally:
            self.held = True


@contextlib.contextmanager
def saved_when_stopped(ranks, sharded: bool, save: Callable[[], None]):
    """Runs a training loop and yields its Signals. If a signal stops it: save(), then SystemExit with 128 + the signal.

    With replicas rank 0 alone calls save, with shards all ranks do.
    """
    signals = Signals(ranks.rank == 0, sharded)
    handlers = {number: signal.signal(number, signals.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    ranks.signals = signals if sharded else None
    try:
        yield signals
    except (Stopped, RuntimeError) as error:
        if isinstance(error, Stopped):
            signals.hold()
            save()
        elif ranks.rank == 0 or not signals.number:  # otherwise a collective failed because rank 0 has stopped
            raise  # not saved: after this error weights and step may not match
        ranks.leave()
        raise SystemExit(128 + signals.number) from None
    finally:
        ranks.signals = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
