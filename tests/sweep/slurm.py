"""Stands in for Slurm: sbatch, srun, sacct or scontrol, by its first argument. Standard library only.

Jobs are processes here, each in a session of its own; what is known of them lies in the folder SLURM_TEST: the batch
files, and a file JOB with its state and, a line each, how often it was begun.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

role, *words = sys.argv[1:]
place = Path(os.environ["SLURM_TEST"])


def say(name: str, state: str, begun: int = 0) -> None:
    """Writes what is known of a job, of which nobody reads a part."""
    fresh = place / f"{name}.{os.getpid()}"
    fresh.write_text(f"{state}\n" + "begun\n" * begun)
    fresh.replace(place / name)


if role == "sbatch":
    number = 101 + len(list(place.glob("*.sh")))
    file = shutil.copy(words[0], place / f"{number}.sh")
    array = re.search(r"#SBATCH --array=0-(\d+)", Path(file).read_text())
    for index in range(int(array[1]) + 1) if array else [None]:
        name = str(number) if index is None else f"{number}_{index}"
        more = {} if index is None else {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
        say(name, "PENDING")
        subprocess.Popen(
            [sys.executable, "-S", __file__, "begin", name, file],
            env={**os.environ, **more, "SLURM_JOB_ID": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"Submitted batch job {number}")
elif role == "begin":
    name, file = words
    begun = 0
    while begun == 0 or (place / f"{name}.requeue").exists():
        (place / f"{name}.requeue").unlink(missing_ok=True)
        begun += 1
        say(name, "RUNNING", begun)
        subprocess.run(["bash", file], check=False)
    say(name, "COMPLETED", begun)
elif role == "srun":
    while words[0].startswith("-"):
        option = words.pop(0)
        if option in ("--output", "--error"):
            stream = os.open(re.sub("%[jAat]", "x", words.pop(0)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1 if option == "--output" else 2)
    # A task on each machine, which are all this one; signals are handed on.
    tasks = [subprocess.Popen(words) for _ in range(int(os.environ.get("SLURM_NNODES", 1)))]
    signal.signal(signal.SIGTERM, lambda signum, frame: [task.send_signal(signum) for task in tasks])
    sys.exit(max(abs(task.wait()) for task in tasks))
elif role == "sacct":
    print("JobID|State|NodeList")
    for job in sorted(place.iterdir()):
        if not job.suffix:
            print(f"{job.name}|{job.read_text().splitlines()[0]}|here")
elif role == "scontrol":
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1")
    else:
        assert words[0] == "requeue"
        (place / f"{words[1]}.requeue").touch()
