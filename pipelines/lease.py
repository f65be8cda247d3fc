"""Leases: who works on a stage key, so that it is never run twice at once and a dead owner is replaced.

`leases/KEY/000007.json` is generation 7. The highest generation owns the key; taking over is creating the
next number, which exactly one contender can do. The owner renews by replacing its own file with a higher
counter.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pbkd.errors import StageError, UserError
from pbkd.storage import Storage

log = logging.getLogger(__name__)

RENEW_SECONDS = 2.0
TTL_SECONDS = 15.0


def hex_name(name: str) -> str:
    """Return `name` if it is a stage key or digest, else raise UserError: no other path can be made of it."""
    if not re.fullmatch(r"[0-9a-f]{6,128}", name):
        raise UserError(f"{name!r} is not a stage key or digest: expected at least 6 hexadecimal digits")
    return name


class Fenced(StageError):  # noqa: N818 - the protocol's word
    """The lease was taken over by another runner: what this one made must not be published."""


@dataclass(frozen=True)
class Owner:
    """A process, so that others on its machine can see at once that it is gone.

    `space` names the kernel's boot and the PID namespace: only in the same space is a PID the same process.
    """

    host: str
    space: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> "Owner":
        """Describe the process that calls."""
        return cls(socket.gethostname(), _process_space(), os.getpid(), _process_start(os.getpid()) or "")

    def is_here(self) -> bool:
        """True if it is, or was, a process that this one can see."""
        return bool(self.started) and (self.host, self.space) == (socket.gethostname(), _process_space())

    def is_gone(self) -> bool:
        """True if the process surely ended: it lived on this machine, and no such process is there now."""
        if not self.is_here():
            return False
        started = _process_start(self.pid)
        if started is not None:
            return started != self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it lives, and /proc hides other users' processes
        return False


@dataclass(frozen=True)
class Generation:
    """What a generation file says. `owner` is None and `counter` -1 if it cannot be read."""

    number: int
    token: str = ""
    owner: Owner | None = None
    counter: int = -1
    released: bool = False
    stopping: bool = False


NEVER_LEASED = Generation(0, released=True)


@dataclass
class Lease:
    """The right to work on `key`. A pickled copy can only be asked; the original is renewed and released."""

    storage: Storage
    key: str
    generation: int
    token: str
    owner: Owner
    counter: int = 0
    released: bool = False
    stopping: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def is_current(self) -> bool:
        """True while no higher generation exists and this one is not released."""
        return self._is_mine(read_newest(self.storage))

    def is_wanted(self) -> bool:
        """True while it is current and the owner has not asked the workers to stop."""
        newest = read_newest(self.storage)
        return self._is_mine(newest) and not newest.stopping

    def ask_to_stop(self) -> None:
        """Let the workers, wherever they are, know that they are to keep their state and end."""
        self.stopping = True
        self.renew()

    def _is_mine(self, newest: Generation) -> bool:
        return newest.number == self.generation and newest.token == self.token and not newest.released

    def renew(self) -> bool:
        """Show that the owner lives; False (and nothing written) once the lease is released or fenced out."""
        with self._lock:
            if self.released or not self._has_written(read_newest(self.storage)):
                return False
            self.counter += 1
            self.storage.replace(_name(self.generation), self._content(), sync=False)
            return True

    def release(self) -> None:
        """Give the key back at once. Releasing twice, or after being fenced out, is harmless."""
        with self._lock:
            if not self.released:
                self.released = True
                if self._has_written(_read(self.storage, self.generation)):
                    self.storage.replace(_name(self.generation), self._content())

    def _has_written(self, found: Generation) -> bool:
        """Whether it is this one's file: old ones are removed, so another owner may have the number now."""
        is_readable = found.counter >= 0  # else a power cut has emptied it
        return found.number == self.generation and (found.token == self.token or not is_readable)

    def _content(self) -> bytes:
        state = {
            "token": self.token,
            "owner": asdict(self.owner),
            "counter": self.counter,
            "released": self.released,
            "stopping": self.stopping,
        }
        return json.dumps(state).encode()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, which belongs to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a lock of the new process."""
        self.__dict__.update(state, _lock=threading.Lock())


def leases_of(storage: Storage, key: str) -> Storage:
    """Return where the generations of `key` are, in the storage of a store."""
    return storage.below(f"leases/{hex_name(key)}")


def try_acquire(storage: Storage, key: str, owner: Owner | None = None, dead: int = 0) -> Lease | None:
    """Take the lease of `key` in the storage of a store if it is free; None if somebody else has it.

    `dead` is the generation a `LeaseWatcher` has judged dead: up to it, an unreleased one counts as free. Who
    gets the lease looks for the manifest once more before working: the last owner may have published.
    """
    place = leases_of(storage, key)
    newest = read_newest(place)
    if newest.number > dead and not newest.released:
        return None
    lease = Lease(place, key, newest.number + 1, uuid.uuid4().hex, owner or Owner.here())
    is_ours = place.create(_name(lease.generation), lease._content())
    # Where old generations are removed, the number may have been free because it was one of them.
    return lease if is_ours and lease.is_current() else None


@contextmanager
def held(storage: Storage, name: str, refusal: str | None = None) -> Iterator[None]:
    """Hold a lease called `name` while the block runs; whoever else wants it waits. Old generations go.

    Raises:
        UserError: there is a `refusal`, its text, and the owner is seen to live.
    """
    key = sha256(name.encode()).hexdigest()
    watcher = LeaseWatcher(storage, key)
    while (lease := try_acquire(storage, key, dead=watcher.dead())) is None:
        if refusal is not None and watcher.sees_life:
            raise UserError(refusal)
        time.sleep(storage.poll_seconds)
    try:
        for older in lease.storage.names():
            if older < _name(lease.generation):
                lease.storage.remove(older)
        with Heartbeat() as heartbeat:
            heartbeat.add(lease)
            yield
    finally:
        lease.release()


def read_newest(place: Storage) -> Generation:
    """Return the highest generation of `leases_of`; number 0, which counts as released, if there is none."""
    numbers = [int(name.removesuffix(".json")) for name in place.names() if name[0].isdigit()]
    if not numbers:
        return NEVER_LEASED
    return _read(place, max(numbers))


def _read(place: Storage, number: int) -> Generation:
    try:
        state = json.loads(place.read(_name(number)))
        owner = Owner(**state.pop("owner"))
        return Generation(number, owner=owner, **state)
    except FileNotFoundError:
        return NEVER_LEASED  # a finished stage's, removed by `pbkd store gc` just now
    except (ValueError, KeyError, TypeError):
        return Generation(number)  # emptied by a power cut: nobody renews it, so its watchers take over


def _name(generation: int) -> str:
    return f"{generation:06d}.json"


class LeaseWatcher:
    """Decides, for one waiter, that the owner of a foreign lease is dead.

    The counter has to stay the same for `ttl` seconds of this process's own monotonic clock, so neither clock
    jumps nor clocks that differ between nodes matter; an owner on the same machine is dead once its process
    is gone.

    Attributes:
        sees_life: whether, between two looks, there was a sign of the owner, or of another one.
    """

    def __init__(
        self,
        storage: Storage,
        key: str,
        ttl: float = TTL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to watch; the owner has `ttl` seconds from the first look on."""
        self._place = leases_of(storage, key)
        self._ttl = ttl
        self._clock = clock
        self._seen: tuple[int, int] | None = None
        self._since = 0.0
        self.sees_life = False

    def dead(self) -> int:
        """Look once; return the generation `try_acquire` may take over, or 0 while its owner may live."""
        newest = read_newest(self._place)
        if newest.released or (newest.owner is not None and newest.owner.is_gone()):
            return newest.number
        now = self._clock()
        if self._seen != (newest.number, newest.counter):
            self.sees_life = self._seen is not None
            self._seen, self._since = (newest.number, newest.counter), now
        return newest.number if now - self._since >= self._ttl else 0


class Heartbeat:
    """Renews all leases of this process from one background thread; a context manager."""

    def __init__(self, interval: float = RENEW_SECONDS) -> None:
        """Prepare to renew every `interval` seconds."""
        self._interval = interval
        self._leases: list[Lease] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pbkd-heartbeat", daemon=True)

    def add(self, lease: Lease) -> None:
        """Renew `lease` until it is released or fenced out."""
        with self._lock:
            self._leases.append(lease)

    def beat(self) -> None:
        """Renew every lease once. A disk that fails is reported, and tried again at the next beat."""
        with self._lock:
            leases = list(self._leases)
        for lease in leases:
            try:
                renewed = lease.renew()
            except OSError as error:
                log.warning("cannot renew the lease of stage %s, will try again: %s", lease.key[:12], error)
                continue
            if not renewed:
                if not lease.released:
                    log.warning("the lease of stage %s was taken over by another runner", lease.key[:12])
                with self._lock:
                    self._leases = [other for other in self._leases if other is not lease]

    def start(self) -> Self:
        """Begin to beat."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread. Leases still held are not released: that is for who holds them to say."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        """Begin to beat."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread."""
        self.stop()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.beat()


def _process_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""  # not Linux: only the counter tells


def _process_start(pid: int) -> str | None:
    """Return when the process started, in ticks since boot; empty for a zombie, None if it cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()  # the command name before it may hold spaces
    return "" if state in "ZX" else fields[18]
