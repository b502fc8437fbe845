"""Stands in for `ssl-ib-train` where a test is about the sweep: FOLDER CONFIG RESULTS BEHAVIOUR. Standard library only.

`hang` and `stop_parent` wait for SIGTERM and leave as a run that was stopped; called again, such a run ends at once.
`done_but_killed` is killed after its last file. `stubborn` does not listen, and sends its parent two Ctrl-C.
"""

import os
import signal
import sys
import time
from pathlib import Path

folder, config, results, behaviour = Path(sys.argv[1]), *sys.argv[2:]


def leave(signum, frame):
    (folder / "saved").touch()
    sys.exit(128 + signum)


signal.signal(signal.SIGTERM, leave)
print("threads", os.environ.get("OMP_NUM_THREADS"))
again = folder.exists()
if behaviour == "refuse":
    print("a warning\nssl-ib-train: this cannot be", file=sys.stderr)
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(config)
if behaviour == "die" and not again:
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "pid").write_text(str(os.getpid()))
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.3)
    time.sleep(60)
if behaviour in ("hang", "stop_parent") and not again:
    if behaviour == "stop_parent":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(600)  # Longer than a busy machine takes to send it.
(folder / "results.json").write_text(results)
if behaviour == "done_but_killed":
    os.kill(os.getpid(), signal.SIGKILL)
