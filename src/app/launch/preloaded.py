"""What the server has imported from which the ranks of a run, and the jobs of a sweep, are forked.

It starts neither threads nor devices: a forked process could use neither. It ends with the last
process that uses it, not by a signal to the whole group, also while it imports: it is who tells how
the others ended.
"""

import signal

from app.process.imports import importing

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
with importing():
    import app.run.build  # noqa: F401
