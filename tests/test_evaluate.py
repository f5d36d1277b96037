"""What may be changed of a run that is evaluated."""

from collections.abc import Callable
from typing import Any

import pytest

from app.errors import Refused
from app.evaluate import overridden

REFUSED = {
    "zzz": "overrides must be KEY=VALUE, got zzz; type 'overrides=[\"seed=1\"]'",
    "model.chanels=3": "model.chanels is not a key; did you mean model.channels?",
    "model.channels=-1": "model.channels must be >= 1, got -1; type model.channels=25",
    "data.eval_batch_size=many": "data.eval_batch_size must be a number, as 1000 is, got many; "
    "leave it out",
    "data.eval_batch_size=2.5": "data.eval_batch_size: value '2.5' of type 'float' could not be "
    "converted to Integer",
    "trainer.accelerator=zzz": "trainer.accelerator: invalid value 'zzz', expected one of [auto, "
    "cpu, gpu, mps, tpu]",
    "model=null": "model must not be null; leave it out",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_the_run_could_not_have_had_is_refused(checked: Callable[..., Any], word: str) -> None:
    with pytest.raises(Refused) as refusal:
        overridden(checked().plain, [word])
    assert str(refusal.value) == REFUSED[word]


@pytest.mark.parametrize(
    "typed",
    ["averaging=swa", "accumulate=constant", "scheduler=plateau", "optimizer=adamw", "model=mlp",
     "clip=percentile", "callbacks=early_stopping", "logger=tensorboard", "strategy=fsdp",
     "data=digits", "sharing=mmap", "tuner=full", "precision=bf16"],
)  # fmt: skip
def test_every_value_of_a_run_may_be_typed_again(checked: Callable[..., Any], typed: str) -> None:
    config = checked(typed).plain
    group = typed.partition("=")[0]
    words = [
        f"{group}.{key}={value}"
        for key, value in config[group].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    found = overridden(config, [*words, "seed=7"])
    assert found.seed == 7
    assert found[group] == config[group]
