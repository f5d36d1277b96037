"""Training techniques that work together, composed from configuration."""

from pathlib import Path

# In a wheel `conf` stands inside the package; in a checkout and an editable install beside `src`,
# where the repository root on the package's path makes it `app.conf` too.
IN_CHECKOUT = not (Path(__file__).parent / "conf").is_dir()
if IN_CHECKOUT:
    __path__.append(str(Path(__file__).parents[2]))

DISTRIBUTION = "effective-training"
"""What pip calls this package: `app` on the public index is somebody else's."""


def pip_install(extra: str) -> str:
    """What to type for the packages of an extra, where this package is installed as it is here."""
    what = f"-e '.[{extra}]'" if IN_CHECKOUT else f"'{DISTRIBUTION}[{extra}]'"
    return f"pip install {what}"
