"""One training run at a time fills a store: which it is stands in a small file, for as long as it lasts."""

from __future__ import annotations

import json
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from hf_influence.errors import StoreError
from hf_influence.saving import write_json

APART = 2.0
"""Seconds by which two readings of the time a process was created may differ, as clocks are set."""


@dataclass(frozen=True)
class Claim:
    """A training run's right to write to a store.

        claim = Claim.take(path)    # refused while another run lives
        claim.check()               # before each point that is begun or ended
        claim.release()             # the run is over

    A run on another machine may be dead or alive, and nobody here can tell; it may have been resumed here. So it is
    taken over, and stops at its next look at the file, as does one that began in the same moment as another. Containers
    that share the name of a machine and not the numbers of its processes do not see each other: a living run in another
    one passes for dead and is taken over as well, unless some process here has its number and began when it did.

    Attributes:
        path: Folder of the store.
        host: Name of the machine.
        pid: Number of the process there.
        created: When that process began, in seconds since 1970.
        token: Random, another one for each run.
    """

    path: Path
    host: str
    pid: int
    created: float
    token: str

    @classmethod
    def take(cls, path: str | Path) -> Claim:
        """For a run of this process.

        Raises:
            StoreError: The run of another process of this machine is filling the store, or nothing can be written.
        """
        path, own = Path(path), psutil.Process()
        claim = cls(path, socket.gethostname(), own.pid, own.create_time(), secrets.token_hex(8))
        other = _read(path)
        if other is not None and other.host == claim.host and other.pid != claim.pid and other._lives():
            begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.created))
            raise StoreError(
                f"{path} is being filled by another training run ({other.whose}, begun {begun}), and the rows of two "
                "runs in one folder would be mixed up. Give each run a folder of its own, or end that process first. "
                f"If it is at other work by now, delete {_file(path)}."
            )
        about = asdict(claim)
        del about["path"]
        write_json(_file(path), about, suffix=f".{claim.token}.part")
        return claim

    @classmethod
    def of_another(cls, path: Path) -> Claim | None:
        """That of a run of another process which has not ended, or was cut short; `None` if there is none."""
        other, own = _read(path), psutil.Process()
        if other is not None and other._is_of(socket.gethostname(), own.pid, own.create_time()):
            return None
        return other

    @property
    def whose(self) -> str:
        """In words."""
        return f"process {self.pid} on {self.host}"

    def check(self) -> None:
        """Stop, if another run has taken the store over.

        Raises:
            StoreError: Names it.
        """
        now = _read(self.path)
        if now is None:
            raise StoreError(
                f"{_file(self.path)}, which says that this training run fills {self.path}, is gone: the folder was "
                "deleted, or another run has begun and ended there, and rows of two would be mixed up. This run writes "
                "no more to it. Train into another folder, or resume from the last checkpoint."
            )
        if now.token != self.token:
            same = now._is_of(self.host, self.pid, self.created)
            raise StoreError(
                f"another training run ({now.whose}{', this very one' if same else ''}) has begun to fill {self.path}, "
                "and the rows of two runs in one folder would be mixed up. This one writes no more to it. Give each "
                "run, and each callback, a folder of its own; what is in this one belongs to the other run."
            )

    def release(self) -> None:
        """The run is over; the file of another is left alone."""
        now = _read(self.path)
        if now is not None and now.token == self.token:
            _file(self.path).unlink(missing_ok=True)

    def _is_of(self, host: str, pid: int, created: float) -> bool:
        """Whether it is that of this process: numbers are given out again."""
        return (self.host, self.pid) == (host, pid) and abs(self.created - created) < APART

    def _lives(self) -> bool:
        """Whether the process is there, seen from its machine."""
        try:
            process = psutil.Process(self.pid)
            dead = process.status() == psutil.STATUS_ZOMBIE
            return not dead and abs(process.create_time() - self.created) < APART
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:  # of another user, who does not let us look
            return True


def _file(path: Path) -> Path:
    return path / "run.json"


def _read(path: Path) -> Claim | None:
    """What the file says; `None` if it is not there, or says nothing."""
    try:
        about: dict[str, Any] = json.loads(_file(path).read_text(encoding="utf-8"))
        return Claim(path, str(about["host"]), int(about["pid"]), float(about["created"]), str(about["token"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{_file(path)} cannot be read ({error}). See to the disk, or choose another path.") from error
    except (ValueError, KeyError, TypeError):
        return None
