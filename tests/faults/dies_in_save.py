"""`ssl-ib-train` in a process that is killed at a place of its third checkpoint: `python dies_in_save.py PLACE ...`.

before: before it writes its file; after: after it has; last: when all have, before the checkpoint has its name.
"""

import os
import signal
import sys

from ssl_ib.cli.train import main
from ssl_ib.record import shards

place, rank = sys.argv[1], os.environ["RANK"]
counts = {"write": 0, "finish": 0}
write, settle = shards._Storage.write_data, shards.settle


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_data(storage, *given):
    counts["write"] += 1
    fatal = counts["write"] == 3 and rank == "1"
    if fatal and place == "before":
        dies()
    answer = write(storage, *given)
    if fatal and place == "after":
        dies()
    return answer


def settled(folder):
    counts["finish"] += 1
    if counts["finish"] == 3 and place == "last":
        dies()
    settle(folder)


shards._Storage.write_data, shards.settle = write_data, settled
sys.exit(main(sys.argv[2:]))
