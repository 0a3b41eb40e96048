"""Kill -9 at random moments: the same build again must end in the same bytes."""

import multiprocessing
import random
import shutil
import time
from collections import Counter

from tools.torture.subject import Subject, stored

MOST_KILLS = 3  # in a row, before a build may finish


def torture(subject: Subject, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Kill builds until the time is over; a trial is a cache that was finished after one to three kills."""
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    cache = subject.folder / "killed"
    fork = multiprocessing.get_context("fork")
    begin = time.monotonic()
    subject.build(str(cache))
    longest = time.monotonic() - begin
    while time.monotonic() < begin + seconds:
        shutil.rmtree(cache)
        counts["trials"] += 1
        for _ in range(chance.randint(1, MOST_KILLS)):
            build = fork.Process(target=subject.build, args=(str(cache),))
            build.start()
            build.join(chance.random() * longest)
            counts["kills"] += build.is_alive()
            build.kill()
            build.join()
        try:
            subject.build(str(cache))
            problems = subject.problems(str(cache), stored(cache))
        except Exception as error:
            problems = [repr(error)]
        if problems:
            failures.append(f"seed {seed}, trial {counts['trials']}: {'; '.join(problems[:3])}")
    return counts, failures
