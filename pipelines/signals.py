"""How a run is asked to end: SIGINT, SIGTERM and SIGUSR2, each with an exit code of its own."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Stop(KeyboardInterrupt):
    """The run was asked to end; `code` is what to exit with: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextmanager
def stopping() -> Iterator[None]:
    """Raise Stop at the first signal. What follows is the orderly end, which a second SIGINT cuts short."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    asked: Stop | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked is not None:
            if number == signal.SIGINT:
                os._exit(128 + number)
            return
        asked = Stop(number)
        raise asked

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt as error:
        if asked is None or error is asked:
            raise
        raise asked from error  # Ray raises one of its own where it was waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
