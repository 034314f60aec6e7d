"""Stopping by SIGTERM, Ctrl-C or a closed terminal (SIGHUP): a run saves its state first (checkpoint.py)."""

import contextlib
import signal
import threading
from collections.abc import Callable


class Stopped(KeyboardInterrupt):
    """Stopped(number): this signal came."""

    def __str__(self):
        return f"stopped by {signal.Signals(*self.args).name}"


@contextlib.contextmanager
def handled(handle: Callable):
    """Inside the `with`, each signal that ends a process calls handle(number, frame) instead.

    SIGHUP stays ignored if it is, as by nohup.
    """
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        numbers = []
    handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def raised():
    """Inside the `with`, the first such signal raises Stopped. Yields a list of those that came.

    Later ones are only noted, so that they do not disturb the end.
    """
    came: list[int] = []

    def handle(number: int, frame) -> None:
        came.append(number)
        if len(came) == 1:
            raise Stopped(number)

    with handled(handle):
        yield came


class Signals:
    """Turns a signal that ends a process into Stopped, but never between `hold` and `release`.

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
            raise Stopped(number)

    def hold(self) -> None:
        self.held = self.changing = True

    def release(self) -> None:
        self.changing = False
        if self.together:
            return  # Ranks.meet asks
        if self.saves and self.number:
            raise Stopped(self.number)  # and still held
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
    ranks.signals = signals if sharded else None
    ranks.noted = None if sharded or ranks.rank == 0 else signals
    with handled(signals.handle):
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
            ranks.signals = ranks.noted = None
