"""How a command ends: a user's mistake is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

from ..errors import EndedElsewhere, UserError

#: What the machine may refuse (space, permission): no bug of ours, and its own message says it.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
#: Seconds that a process outlives another's error. torchrun ends all as soon as one ends, and that has to speak first.
PATIENCE = 5.0
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
    os.write(sys.stderr.fileno(), f"{_program}: interrupted\n".encode())
    os._exit(128 + signum)


def heed_interrupts() -> None:
    """All is imported: from here on Ctrl-C is an exception again, and what was begun can be ended in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(program: str, run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """What `run` answers, or 2 after a mistake of the user's or a refusal of the machine's, 130 after Ctrl-C."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output (`head`, say) has seen enough. What is left to print goes nowhere, at the exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except EndedElsewhere:
        time.sleep(PATIENCE)
        return 2
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        message = str(error)
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return 130
    print(f"{program}: {message}", file=sys.stderr)
    return 2
