"""Kill -9 at random moments and at random calls: the same command again must end in the same bytes.

A trial's processes are forked, so that they need no start. Each is killed after a random time, or kills
itself in place of a call to the file system.
"""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter

from tools.torture.failing_files import Trigger, failing_files
from tools.torture.subject import Subject, stored

MOST_KILLS = 3  # in a row, before the command may finish


def torture(subject: Subject, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Kill until the time is over; a trial is an output that was finished after one to three kills."""
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    fork = multiprocessing.get_context("fork")
    begin, counting = time.monotonic(), Trigger()
    subject.begin()
    with failing_files([subject.output], counting, _die):
        subject.run(str(subject.output))
    longest = time.monotonic() - begin
    while not counts["trials"] or time.monotonic() < begin + seconds:
        subject.begin()
        counts["trials"] += 1
        for _ in range(chance.randint(1, MOST_KILLS)):
            at = chance.choice([0, chance.randint(1, counting.calls)])
            alive, inherited = os.pipe()
            process = fork.Process(target=_run, args=(subject, Trigger(at)))
            process.start()
            os.close(inherited)
            process.join(20 * longest if at else chance.random() * longest)
            counts["kills"] += process.is_alive() or process.exitcode == -signal.SIGKILL
            process.kill()
            process.join()
            os.read(alive, 1)  # returns when its own processes have ended too
            os.close(alive)
        try:
            subject.run(str(subject.output))
            problems = subject.problems(str(subject.output), stored(subject.output))
        except Exception as error:
            problems = [repr(error)]
        if problems:
            failures.append(f"seed {seed}, trial {counts['trials']}: {'; '.join(problems[:3])}")
    return counts, failures


def _run(subject: Subject, trigger: Trigger) -> None:
    with failing_files([subject.output], trigger, _die):
        subject.run(str(subject.output))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
