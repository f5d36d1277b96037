"""Training techniques that work together, composed from configuration."""

from pathlib import Path

# In a wheel `conf` stands inside the package; in a checkout and an editable install beside `src`,
# where the repository root on the package's path makes it `app.conf` too.
if not (Path(__file__).parent / "conf").is_dir():
    __path__.append(str(Path(__file__).parents[2]))
