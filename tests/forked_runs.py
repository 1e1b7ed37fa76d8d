"""
Starts the processes of several runs out of one that has imported everything: a run takes seconds, not twenty.

Each is an ordinary process to its end, with a log of its own.
"""

import json
import os
import sys
import time
from pathlib import Path

# All that a run imports.
from p2p_trainer import launch, recipe  # noqa: F401


def fork(argv, environment, log):
    """Start a process; in it, this returns `None`."""
    pid = os.fork()
    if pid:
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv[1:] = argv
    return None


def wait(started, patience):
    """Exit status and seconds of each process; one that does not end in time is killed: status -9."""
    begun, ended = time.monotonic(), {}
    while len(ended) < len(started):
        late = time.monotonic() - begun > patience
        for pid in set(started) - set(ended):
            if late:
                os.kill(pid, 9)
            found, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if found:
                ended[pid] = (os.waitstatus_to_exitcode(status), time.monotonic() - begun)
        time.sleep(0.05)
    return [ended[pid] for pid in started]


def main(path):
    jobs = json.loads(path.read_text())
    ended = {}
    for name, processes in jobs["runs"].items():
        started = []
        for process in processes:
            pid = fork(**process)
            if pid is None:
                launch.main()
                return
            started.append(pid)
        ended[name] = wait(started, jobs["patience"])
    path.with_suffix(".ended").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
