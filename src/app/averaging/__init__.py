"""Weight averaging: one engine, and rules that say when to update, and by how much.

The average lives beside the weights, as one shadow tensor for each trainable floating parameter and
each floating buffer of the state dict. Everything else (integer buffers, frozen parameters, buffers
with infinities, or that a validation changes) is shared by both. It is shown by setting data
pointers: nothing is copied.
"""

from app.averaging import rules
from app.averaging.engine import Averaging, AveragingTrainer
from app.averaging.rules import *  # noqa: F403  # a rule is named where it stands

__all__ = ["Averaging", "AveragingTrainer", *rules.__all__]
