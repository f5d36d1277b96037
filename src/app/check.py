"""Checks a configuration without training: `python -m app.check averaging=ema clip=value`.

`python -m app.check --matrix` prints which presets run with which strategy.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from app import cli
from app.begin.branch import branched, source_of_branch
from app.begin.links import are_typed, links_of
from app.begin.source import source_of
from app.cli.presets import shipped_targets
from app.config import changed_by_debug, check, describe
from app.fit import built, told_by_classes
from app.process.targets import named_in
from app.tuner.answers import read_tuned


def main(cfg: DictConfig) -> None:
    """Check, and say what is on.

    Builds what is not ours: only a model knows whether it steps its own optimizers.
    """
    cfg = told_by_classes(branched(cfg))
    links = links_of(cfg)
    for key, source in links.items():
        print(f"{key} is the data's {source}, known when they are set up: not checked")
    if are_typed(cfg, links):
        return
    config = check(cfg)
    if config.tuned is not None:
        config = config.changed(read_tuned(Path(config.tuned)))
    if config.branch_of is not None:
        source_of_branch(config)
    elif config.init_from is not None:
        source_of(config.init_from)
    if not links and named_in(config.plain) - shipped_targets():
        built(config, [])
    for line in [*changed_by_debug(cfg), *config.notes]:
        print(line)
    for name, text in describe(config.plain):
        print(f"{name:<12}{text}")
    print("ok")


if __name__ == "__main__":
    if sys.argv[1:] == ["--matrix"]:
        from app.matrix import matrix

        print(matrix())
    else:
        cli.main(main, "check", __doc__)
