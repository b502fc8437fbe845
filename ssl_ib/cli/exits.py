"""How a command ends: a user's mistake is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from ..errors import UserError

#: What the machine may refuse (space, permission): no bug of ours, and its own message says it.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


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
