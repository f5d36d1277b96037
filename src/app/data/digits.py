"""scikit-learn's handwritten digits: a smoke test, every model comes to 98 %."""

import torch

from app import pip_install
from app.data.in_memory import InMemoryData, Splits
from app.errors import Refused


class Digits(InMemoryData):
    """1,797 images of 8x8, cut into parts by a permutation of `split_seed`.

    Features (n, 64) float32 in 0..1, the rows of an image one after the other; labels 0 to 9.
    Whatever is neither validation nor test is trained on. Raises ImportError without scikit-learn.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        shuffle: bool,
        num_features: int,
        num_classes: int,
        num_val: int,
        num_test: int,
        split_seed: int,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            shuffle=shuffle,
            num_features=num_features,
            num_classes=num_classes,
        )
        self.num_val = num_val
        self.num_test = num_test
        self.split_seed = split_seed

    def load(self) -> Splits:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            install = pip_install("digits")
            raise Refused(f"data=digits needs scikit-learn; type {install}") from error
        images, digits = load_digits(return_X_y=True)
        features = torch.from_numpy(images).float() / 16
        labels = torch.from_numpy(digits).long()
        num_eval = self.num_val + self.num_test
        if num_eval >= len(labels):
            raise Refused(
                f"data.num_val + data.num_test must be < {len(labels)}, all images there are, "
                f"got {num_eval}; type data.num_val=300 data.num_test=400"
            )
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(len(labels), generator=generator)
        val, test, train = order.tensor_split((self.num_val, num_eval))
        return Splits(
            train=(features[train], labels[train]),
            val=(features[val], labels[val]),
            test=(features[test], labels[test]),
        )
