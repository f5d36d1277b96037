"""TensorBoard."""

from lightning.pytorch.loggers import TensorBoardLogger

from app import pip_install
from app.process.ranks import ranks


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, but without the metric `hp_metric`, which nobody measures.

    Args:
        save_dir: folder above the files.
        name: their folder.
        version: folder below it; empty for none.
    """

    def __init__(self, *, save_dir: str, name: str, version: str) -> None:
        super().__init__(save_dir, name=name, version=version, default_hp_metric=False)


def tensorboard_where_installed(*, save_dir: str, name: str, version: str) -> TensorBoard | None:
    """TensorBoard's files; None, said in a line, where TensorBoard is missing."""
    try:
        return TensorBoard(save_dir=save_dir, name=name, version=version)
    except ModuleNotFoundError:
        if ranks().is_first:
            install = pip_install("tensorboard")
            print(f"no TensorBoard is installed: metrics are in metrics.csv; to have it {install}")
        return None
