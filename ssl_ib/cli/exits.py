"""How a command ends: a user's mistake is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from ..errors import EndedElsewhere, UserError

#: What the machine may refuse (space, permission, a broken disk): no bug of ours, and its own message says it.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
#: Seconds that a process outlives another's error. torchrun ends all as soon as one ends, and that has to speak first.
PATIENCE = 5.0
#: How gloo and NCCL say that another process of the group is there no more.
_LOST = re.compile(r"gloo/transport|connection (was likely )?(closed|reset)|ncclRemoteError", re.IGNORECASE)
#: What torch says where the machine's memory does not suffice.
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
#: What `_end` calls the command.
_program = ""


def end_at_interrupts(program: str) -> None:
    """From here to `heed_interrupts`, Ctrl-C ends the process at once, with one line: while modules are being imported.

    Only for a process of the command line's own. An import that is broken off by KeyboardInterrupt may raise anything
    in its place. Where Ctrl-C is ignored, as in a script's background jobs, it stays ignored.
    """
    global _program
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _program = program
        signal.signal(signal.SIGINT, _end)


def _end(signum: int, frame: object) -> None:
    with suppress(OSError):
        os.write(2, f"{_program}: interrupted\n".encode())
    os._exit(128 + signum)


def heed_interrupts() -> None:
    """All is imported: from here on Ctrl-C is an exception again, and what was begun can be ended in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(program: str, run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """What `run` answers, or 2 after a mistake of the user's or a refusal of the machine's, 130 after Ctrl-C.

    141 where nobody reads the output any more, 129 where the terminal was closed.
    """
    _open_streams()
    code = _code(program, run, interrupted)
    for stream in (sys.stdout, sys.stderr):
        with _told(stream):
            stream.flush()
    if _program:
        # What is left is Python's own end, which Ctrl-C would fill with tracebacks.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _code(program: str, run: Callable[[], int], interrupted: str) -> int:
    code = 2
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except EndedElsewhere:
        time.sleep(PATIENCE)
        return 2
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno == errno.EIO and (_is_gone(sys.stdout) or _is_gone(sys.stderr)):
            return code if code != 2 else 128 + signal.SIGHUP
        if error.errno not in REFUSALS:
            raise
        message, code = str(error), 2
    except (MemoryError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if "RANK" in os.environ and _LOST.search(str(error)):
            process, reason = os.environ["RANK"], reason.rpartition("] ")[2].partition(". ")[0]
            message = f"another process has ended, and process {process} cannot go on without it ({reason})"
            with _told(sys.stderr):
                print(f"{program}: {message}", file=sys.stderr, flush=True)
            time.sleep(PATIENCE)
            return 2
        # torch's own error of a GPU, and what it says of the machine's memory.
        torchs = type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error)
        if not (torchs or isinstance(error, MemoryError)):
            raise
        message = f"out of memory{': ' if reason else ''}{reason}; a smaller batch_size, or more accumulate, takes less"
    except SystemExit as error:
        # Nothing here calls it; a run that ends like this would pass for a finished one.
        place = traceback.extract_tb(error.__traceback__)[-1]
        message, code = f"sys.exit({error}) in the middle of the work ({place.filename}:{place.lineno})", 2
    except KeyboardInterrupt:
        message, code = interrupted, 130
    with _told(sys.stderr):
        print(f"{program}: {message}", file=sys.stderr, flush=True)
    return code


def _open_streams() -> None:
    """Gives a process that was started with closed streams some that go nowhere; the next files would take their place.

    What the output's encoding lacks is escaped: no name of a file or a class ends a run.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest number that is free, which is the closed stream's.
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape") and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_gone(stream: TextIO) -> bool:
    """Whether what a stream writes to has hung up: a closed terminal."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def _told(stream: TextIO) -> Iterator[None]:
    """Where nobody can be told any more, what is left to print goes nowhere, at the exit too."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
