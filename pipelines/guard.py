"""What watches over a stage inside each of its workers: is it still wanted, and does it get on?"""

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from pipelines.lease import Lease

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
LONGER = 6
"""So many times its patience with a step the guard has with what is between steps."""
BUSY = 0.01
"""Of one core: a process that uses less does nothing."""


class Guard:
    """Looks at a stage's lease, and at its steps, from a thread of its own; a context manager.

    A training that makes no step for `patience` seconds has hung: the process ends itself, and the executor
    begins again from the last checkpoint. What is between steps (opening data, starting from a solution,
    evaluating) may take any time, unless the processor has hardly been used for `LONGER` times as long.
    Seconds count only while this process runs, so one that was suspended is not blamed for it.
    """

    def __init__(self, lease: Lease, patience: float) -> None:
        """Prepare; until the first `step` none is under way."""
        self._lease = lease
        self._patience = patience
        self._is_wanted = True
        self._steps: int | None = None  # None: no step is under way
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pbkd-guard", daemon=True)

    def step(self) -> bool:
        """Say that a step begins; returns whether the training is to end before it."""
        self._steps = (self._steps or 0) + 1
        return not self._is_wanted

    def pause(self) -> None:
        """Say that no step is under way until the next `step`: what is done meanwhile may take its time."""
        self._steps = None

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        seen, used, idle, looked = self._steps, time.process_time(), 0.0, -math.inf
        while not self._stop.wait(LOOK_SECONDS):
            if time.monotonic() - looked >= self._lease.storage.poll_seconds:
                looked = time.monotonic()
                try:
                    self._is_wanted = self._lease.is_wanted()
                except OSError as error:
                    log.warning("the lease cannot be read, will try again: %s", error)
            steps, now = self._steps, time.process_time()
            patience = self._patience * (1 if steps is not None else LONGER)
            if steps != seen or (steps is None and now - used >= BUSY * patience):
                seen, used, idle = steps, now, 0.0
                continue
            idle += LOOK_SECONDS
            if idle >= patience:
                done = "no step" if steps is not None else "nothing computed"
                log.warning("%s for %g s: this worker has hung and is ended", done, patience)
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                os._exit(1)
