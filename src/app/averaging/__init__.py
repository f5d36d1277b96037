"""Weight averaging: one engine, three rules.

The average lives beside the weights, as one shadow tensor for each trainable floating parameter and
each floating buffer of the state dict. Everything else (integer buffers, frozen parameters, buffers
with infinities) is shared by both. It is shown by setting data pointers: nothing is copied.
"""

from app.averaging.engine import Averaging
from app.averaging.rules import Ema, Swa, Uniform

__all__ = ["Averaging", "Ema", "Swa", "Uniform"]
