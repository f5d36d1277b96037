"""Training techniques that work together, composed from configuration."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback

__all__ = ["callbacks", "run"]

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


def callbacks(*overrides: str, config_dir: str | Path | None = None) -> "list[Callback]":
    """The techniques as callbacks of anybody's Trainer, or of LightningCLI.

        Trainer(callbacks=app.callbacks("averaging=ema", "clip=adaptive", "accumulate=constant"))

    They are composed from the presets of the command line and checked as there, but nothing is on
    that is not typed. Their order is that in which they act; put your own behind them. What only
    `app.run` has: a number of optimizer steps that is exact where the accumulation changes, a cut
    run that goes on bit for bit, and checkpoints that are whole after a power cut.

    Args:
        overrides: of accumulate, clip, averaging and callbacks, as typed: "averaging.decay=0.99".
        config_dir: folder of presets of your own, as --config-dir.

    Raises:
        ValueError: with the key as typed, the rule, the value, and what to type instead.
    """
    from app import library

    return library.callbacks(*overrides, config_dir=config_dir)


class _Run(ModuleType):
    """The room `app.run`, which is called too."""

    def __call__(
        self,
        *overrides: str,
        model: Any = None,
        data: Any = None,
        name: str | None = None,
        config_dir: str | Path | None = None,
    ) -> dict[str, Any] | None:
        """Train, as `python -m app.train` with the same words does; what result.json says.

            app.run("averaging=ema", "trainer.max_epochs=3", model=mine, data=theirs, name="mine")

        An object is trained as it is, also again, and then has the weights that the run delivers:
        of its best checkpoint, or of the last with test=last. It keeps its own optimizers unless
        `optimizer=` is typed. A class is made by the run, with what is typed as "+model.lr=0.1":
        that is recorded, so that `app.evaluate` and all finders can make it again.

        Args:
            overrides: as typed.
            model, data: a LightningModule and a LightningDataModule, or their classes.
            name: the folder below runs/, by default the time; the same name again continues.
            config_dir: folder of presets of your own, as --config-dir.

        Raises:
            ValueError: with the key as typed, the rule, the value, and what to type instead.
        """
        from app import library

        return library.run(*overrides, model=model, data=data, name=name, config_dir=config_dir)


from app import run  # noqa: E402  # a room is set as an attribute when it is imported: so now

run.__class__ = _Run
