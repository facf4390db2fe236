"""The loop of a grading process: one JSON line in, one JSON line out, until its input ends.

Lines are `[answer, gold, cpu_seconds]` and `[correct, canonical]`; the first line out says that the process is ready. A
comparison that needs more CPU time than allowed ends the process by a signal whose default action is in place, which also
stops code that never returns to the interpreter. CPU time, unlike wall time, does not depend on what else the machine does.
The process is not used again afterwards: an exception in the middle of a comparison could leave wrong entries in sympy's
caches, and later grades would depend on earlier ones.
"""

import contextlib
import json
import os
import signal
import sys

from .equivalence import judge

HAS_CPU_LIMIT = hasattr(signal, "setitimer")
"""Not on Windows: there the caller's limit on wall time is the only one."""


def serve(memory_bytes: int) -> None:
    """Answer requests from standard input; standard output belongs to the answers, whatever libraries print."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    judge("x+1", "1+x")  # loads what is loaded at first use, so that every request meets the same process
    os.dup2(nowhere, sys.stderr.fileno())
    sys.setrecursionlimit(3000)
    _limit_memory(memory_bytes)
    if HAS_CPU_LIMIT:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        answer, gold, cpu_seconds = json.loads(line)
        _set_cpu_alarm(cpu_seconds)
        judgement = judge(answer, gold)
        _set_cpu_alarm(0)
        print(json.dumps(judgement), file=answers, flush=True)


def _limit_memory(memory_bytes: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # where the system has or allows no such limit
        import resource

        ceiling = resource.getrlimit(resource.RLIMIT_AS)[1]
        allowed = memory_bytes if ceiling == resource.RLIM_INFINITY else min(memory_bytes, ceiling)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, ceiling))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _set_cpu_alarm(cpu_seconds: float) -> None:
    if HAS_CPU_LIMIT:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
