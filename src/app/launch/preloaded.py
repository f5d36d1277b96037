"""What the server has imported from which the ranks of a run are forked.

It starts neither threads nor devices: a forked process could use neither.
"""

from app.imports import importing

with importing():
    import app.build  # noqa: F401
