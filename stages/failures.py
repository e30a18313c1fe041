"""When one process of a run fails: all end, and the message that is seen first is that of the one that failed.

By themselves the others would tell what a broken connection looks like from their side, or wait for hours. A process
that fails tells its message at once and leaves it in a file in `<run>/.failures`. The others look there twice a second:
what they are doing is broken off with `RankFailed`, and one that hangs in the middle of a collective is ended after
`GRACE`. An error that another's end may have caused (`is_consequence`) first waits for that other's word.

    Lightning's launcher   looks after its children every 5 s, and kills the leader with -9 when one has failed: a child
                           therefore stays until the leader has told what happened (`stay`)
    torchrun               ends the other workers at once, and shows the message as root cause (TORCHELASTIC_ERROR_FILE)
    srun                   with --kill-on-bad-exit as torchrun; without it the files do the same
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.durable import write_durably
from stages import ranks
from stages.telling import RankFailed, spoken

FOLDER = ".failures"
PATIENCE = 5.0
"""Seconds that a broken connection waits for the word of the rank that broke it."""
GRACE = 12.0
"""Seconds after which a process that does not end by itself is ended."""

_CONNECTION = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|TCPStore|Socket Timeout|process group|Timed out waiting",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """What one process told about its end. at: Unix time (s)."""

    rank: str
    message: str
    trace: str
    at: float

    def __str__(self) -> str:
        """What a process says that ends because of it."""
        return f"{ranks.spoken(self.rank)} failed: {self.message}"


class Failures:
    """What this process tells the others, and hears from them. Nothing happens where there is one process.

    Args:
        run: the run directory.
        session: name of this launch; earlier launches do not count.
    """

    def __init__(self, run: Path, session: str) -> None:
        global _open
        self.folder, self.rank = run / FOLDER, ranks.global_rank()
        self._prefix = hashlib.sha256(session.encode()).hexdigest()[:16]
        self._told: BaseException | None = None  # what this process has told
        self._watcher: threading.Thread | None = None
        self._over, self._ending, self._lock = threading.Event(), False, threading.Lock()
        _open = self

    def watch(self) -> None:
        """Begins to look after the others, where there are any; until then nothing is told or heard. To be called while
        they are there: Lightning's leader takes its traces out of the environment when a fit ends."""
        if ranks.several() and self._watcher is None:
            main = threading.main_thread().ident
            self._watcher = threading.Thread(target=self._watch, args=(main,), name="failures", daemon=True)
            self._watcher.start()

    def forget(self) -> None:
        """Removes what earlier launches have left."""
        for path in self.folder.glob("*.json"):
            if not path.name.startswith(self._prefix):
                path.unlink(missing_ok=True)

    def end(self, failed: bool) -> None:
        """This process has come to its end, one way or the other: nothing is broken off any more. One that failed is
        still ended if it hangs."""
        global _open
        with self._lock:
            self._ending = True
        if not failed:
            self._over.set()
            _open = None if _open is self else _open

    def others(self) -> list[Failure]:
        """What other processes of this launch have told, the first first."""
        found = [Failure(**json.loads(path.read_bytes())) for path in self.folder.glob(f"{self._prefix}-*.json")]
        return sorted((f for f in found if f.rank != self.rank), key=lambda failure: failure.at)

    def cause(self, error: BaseException) -> Failure | None:
        """The failure of another process that is behind this error. Waits for its word where that may still come."""
        if self._watcher is None or isinstance(error, KeyboardInterrupt) or error is self._told:
            return None
        if not isinstance(error, SystemExit) and not is_consequence(error):
            return None
        until = time.monotonic() + (0 if isinstance(error, SystemExit) else PATIENCE)
        while not (others := self.others()) and time.monotonic() < until:
            time.sleep(0.1)
        return others[0] if others else None

    def tell(self, error: BaseException) -> None:
        """Says it on stderr and to the others, once; not if another's failure is behind it, or another told the same.
        Of several errors the first counts."""
        if self._watcher is None or self._told is not None or not isinstance(error, Exception):
            return
        if self.cause(error) is not None:
            return
        self._told, message = error, spoken(error)
        if not any(failure.message == message for failure in self.others()):
            print(f"error: {ranks.spoken(self.rank)}: {message}", file=sys.stderr, flush=True)
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        failure = Failure(self.rank, message, trace, time.time())
        self.folder.mkdir(exist_ok=True)
        write_durably(self.folder / f"{self._prefix}-{self.rank}.json", json.dumps(asdict(failure)).encode())
        _tell_torchrun(message)

    @property
    def told(self) -> bool:
        """Whether this process has said what went wrong."""
        return self._told is not None

    def _watch(self, main: int) -> None:
        found: float | None = None
        while not self._over.wait(0.5):
            if self._told is None and not (others := self.others()):
                continue
            found = found or time.monotonic()
            passed = time.monotonic() - found
            if passed > GRACE + (0 if self._told is None else STAY):
                if self._told is None:
                    print(f"error: {others[0]}", file=sys.stderr, flush=True)
                os._exit(1)
            with self._lock:  # now, and again: code that catches every exception may swallow one
                if not self._ending and self._told is None and (passed == 0 or passed > GRACE / 2):
                    _raise_in(main, RankFailed)


_open: Failures | None = None
"""Those of the run that is open in this process, or was when it failed."""


def current() -> Failures | None:
    """What the process at hand tells and hears, while a run is open."""
    return _open


def is_consequence(error: BaseException | None) -> bool:
    """Whether the end of another process may have caused it: a connection broke, here or in an error before it."""
    while error is not None:
        of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
        if of_torch or isinstance(error, (ConnectionError, RankFailed)):
            return True
        if isinstance(error, RuntimeError) and _CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


STAY = 20.0
"""Seconds that a child which failed waits for its leader to end first."""


def stay() -> None:
    """At the end of a process that failed: one that the leader started stays until the leader is gone."""
    if ranks.LEADER not in os.environ or ranks.is_leader():
        return
    _close_connections()  # or the leader waits for this process in a collective
    until = time.monotonic() + STAY
    while not ranks.orphaned() and time.monotonic() < until:
        time.sleep(0.1)


def _close_connections() -> None:
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    """At that thread's next step in Python; a thread inside of a library is not disturbed."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _tell_torchrun(message: str) -> None:
    """The form that torch.distributed.elastic.multiprocessing.errors reads."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
