"""Training techniques that work together, composed from configuration."""

from pathlib import Path

# In a checkout and in an editable install `conf` stands beside `src`, in a wheel inside the package.
# With the repository root on the package's path `app.conf` is importable in both.
if not (Path(__file__).parent / "conf").is_dir():
    __path__.append(str(Path(__file__).parents[2]))
