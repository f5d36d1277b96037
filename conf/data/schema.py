"""What a run is trained, validated and tested on; prediction reads the test part.

The small sets stay in memory and are served by slicing whole batches, in an order that depends only
on the run's seed and the epoch: `shuffle` draws nothing from the global RNG, and a run continues in
mid-epoch with exactly the next batch. Batches hold features (batch, num_features) float32 and
labels (batch,) int64.

| preset  | what it is                                                | source                    |
|---------|-----------------------------------------------------------|---------------------------|
| mnist1d | 15,000 generated signals, shipped: techniques show here   | arXiv 2011.14439          |
| digits  | 1,797 images of 8x8: a smoke test (pip install app[digits]) | scikit-learn load_digits |
| custom  | any LightningDataModule: data._target_=theirpkg.TheirData |                           |
"""

from dataclasses import dataclass

from omegaconf import MISSING

from ..rules import require


@dataclass(kw_only=True)
class InMemoryData:
    """What every data set in memory has."""

    batch_size: int = MISSING
    """Samples in one training batch of one process, >= 1; the last of an epoch may be smaller."""
    eval_batch_size: int = MISSING
    """Samples in one batch of validation, test and prediction, >= 1."""
    shuffle: bool = MISSING
    """A new order of the training samples every epoch; false: the order of the file."""
    num_features: int = MISSING
    """Features of a sample, a fact of the data; models read it."""
    num_classes: int = MISSING
    """Classes, a fact of the data; models read it."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "eval_batch_size"):
            size = getattr(self, key)
            require(size >= 1, f"data.{key}", "be >= 1", size, f"type data.{key}=128")


@dataclass(kw_only=True)
class Mnist1d(InMemoryData):
    """MNIST-1D: 4,000 signals to train, 1,000 to validate, 10,000 to test."""

    _target_: str = "app.data.mnist1d.Mnist1d"


@dataclass(kw_only=True)
class Digits(InMemoryData):
    """scikit-learn's handwritten digits, split by a seed of their own."""

    _target_: str = "app.data.digits.Digits"
    num_val: int = MISSING
    """Images to validate on, >= 1."""
    num_test: int = MISSING
    """Images to test on, >= 1; the rest of the 1,797 is trained on."""
    split_seed: int = MISSING
    """Seed of the split, >= 0; apart from the run's seed, so that runs can be compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_val >= 1, "data.num_val", "be >= 1", self.num_val, "type data.num_val=300")
        require(
            self.num_test >= 1, "data.num_test", "be >= 1", self.num_test, "type data.num_test=400"
        )
        require(
            self.split_seed >= 0,
            "data.split_seed",
            "be >= 0",
            self.split_seed,
            "type data.split_seed=0",
        )


PRESETS = {"mnist1d": Mnist1d, "digits": Digits}
