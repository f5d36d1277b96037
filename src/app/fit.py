"""One run, from a checked configuration to its result."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from app.begin import branch, defaults, links
from app.begin.branch import branched, refuse_unstable, source_of_branch
from app.begin.defaults import GROUPS, is_of_user, unsaid
from app.begin.links import are_typed, known_by, links_of
from app.begin.longer import RELAY, extension, reopen
from app.begin.source import source_of
from app.cli.presets import shipped_targets
from app.config import (
    Config,
    changed_by_debug,
    check,
    folders,
    is_slurm,
    max_requeues,
    what_decides,
    with_overrides,
)
from app.errors import Refused, Unreadable
from app.launch.start import placed, run_ranks
from app.process.asked import asked
from app.process.imports import importing
from app.process.ranks import ranks, started_elsewhere
from app.process.requeue import heeding
from app.process.targets import named_in, refuse_targets
from app.record.folder import RunFolder, refuse_unwritable
from app.record.kept import kept_steps
from app.record.states import State
from app.tuner.answers import recalled
from app.tuner.keys import startable, value_at

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from app.run.build import Run
    from app.screen.start import StartTable
    from app.stop.pruning import PrunesTrial


KEPT = ("init_from", "branch_of", "extended")
"""What a result.json says of how the run began, also when it is continued."""


def objective(name: str | None, metrics: Mapping[str, float]) -> float | None:
    """The metric of this name; None where no name is given.

    Raises Refused where the run has no such metric.
    """
    if name is None:
        return None
    if name not in metrics:
        raise Refused(
            f"objective must be one of {', '.join(sorted(metrics))}, the metrics of the run, got "
            f"{name}; type objective={_nearest(name, metrics)}"
        )
    return metrics[name]


def _nearest(name: str, metrics: Iterable[str]) -> str:
    return next(iter(get_close_matches(name, sorted(metrics), n=1, cutoff=0)), "null")


def run(
    cfg: DictConfig, *, typed: Sequence[str], objects: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Train a composed configuration, in as many processes as it asks for.

    Returns the content of result.json; None where the run ended after the finders.

    Args:
        typed: what to note in overrides.yaml.
        objects: by group, `model` or `data`, what is not to be made but was made by the caller.

    Raises:
        Refused: where the configuration is not allowed, or its folder holds another run.
        RankFailed: where one of several processes failed.
        SystemExit: where it was asked to stop: 128 and the signal.
    """
    with heeding(cfg.name, max_requeues=max_requeues(cfg.launch)):
        return _run(cfg, list(typed), objects or {})


def _run(cfg: DictConfig, typed: list[str], objects: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        cfg = linked(told_by_classes(branched(cfg)))
        config = check(startable(cfg)).holding(objects)
        if config.launch is not None and not is_slurm(config.launch):
            raise Refused(
                "launch=local runs the jobs of a sweep, and this is one run; type -m as well, or "
                "launch=none"
            )
        config = placed(config)
    except ValueError:
        RunFolder(Path(cfg.run_dir)).remove_if_empty()
        raise
    folder = RunFolder(Path(config.run_dir))
    everyone = ranks()
    with ExitStack() as stack:

        def prepared() -> dict[str, Any]:
            stack.enter_context(folder.locked())
            return prepare(config, folder)

        found = everyone.first(prepared)
        for line in [*changed_by_debug(cfg), *config.notes] if everyone.is_first else ():
            print(line)
        if found["result"] is not None:
            if everyone.is_first:
                status = found["result"]["status"]
                print(f"{folder.path} is {status}; see {folder.result_path}")
            return dict(found["result"])
        if started_elsewhere() or config.trainer.devices == 1:
            return work(config, found["tuned"], typed)
        result: dict[str, Any] | None = run_ranks(work, config, found["tuned"], typed)
        return result


def told_by_classes(cfg: DictConfig) -> DictConfig:
    """The configuration with what the constructors of the user's classes have for keys not set.

    A run that is continued keeps what it began with, whatever they have become.
    """
    if not any(is_of_user(cfg, group) for group in GROUPS):
        return cfg
    try:
        check(startable(cfg))  # before torch is imported
    except (InterpolationResolutionError, Refused) as error:
        if re.search(r"\b(model|data)\.", str(error)) is None:
            raise  # the others may be of such a key
    found, before = unsaid(cfg), recorded(cfg)
    if before is not None:
        names = {f"{group}.{name}" for group in GROUPS for name in before.get(group) or ()}
        found = {key: value_at(before, key) for key in found if key in names}
    return with_overrides(cfg, found)


def recorded(cfg: DictConfig) -> dict[str, Any] | None:
    """What the run had that would be continued; None where there is none, or it is torn."""
    folder = RunFolder(Path(cfg.run_dir))
    try:
        is_anew = cfg.resume == "never" or folder.has_not_begun()
        return None if is_anew else folder.read_config()
    except Unreadable:
        return None


def linked(cfg: DictConfig) -> DictConfig:
    """The configuration with what the data tell it, which the first process asks them.

    A run that is continued keeps what it has been told.
    """
    told = links_of(cfg)
    if not told:
        return cfg
    if not are_typed(cfg, told):
        check(startable(cfg))  # before the data take their time

    def values() -> dict[str, Any]:
        before = recorded(cfg) or {}
        if before.get("link") == told:
            return {key: value_at(before, key) for key in told}
        return asked_of(cfg, told)

    return with_overrides(cfg, ranks().first(values))


def asked_of(cfg: DictConfig, told: Mapping[str, str]) -> dict[str, Any]:
    """What the data know, of which nothing else is left in the process."""
    with importing():
        from app.run.build import set_up
        from app.throwaway.trace import left_as_found
    data: Any = OmegaConf.to_container(cfg.data, resolve=True, enum_to_str=True)
    with left_as_found({"data": data}):
        return known_by(set_up(data, seed=cfg.seed), told)


def prepare(config: Config, folder: RunFolder) -> dict[str, Any]:
    """The result of a run that is finished, and the overrides that an earlier search found.

    Raises Refused where the folder holds another run.
    """
    folder.refuse_shared()
    refuse_unwritable(folders(config.composed))
    if config.resume == "never":
        folder.move_aside()
    folder.forget_torn()
    tuned = recalled(config, folder)
    if not folder.config_path.exists():
        try:
            refuse_beginning(config.changed(tuned or {}))
        except Refused:
            folder.remove_if_empty()
            raise
    longer = {}
    if config.extend:
        longer = extension(config.changed(tuned or {}).plain, folder, how=config.extend)
    if longer:
        said = "  ".join(f"{key} {old} -> {new}" for key, (old, new) in longer.items())
        print(f"extending {folder.path}: {said}", flush=True)
        reopen(folder, longer, how=config.extend)
    else:
        folder.refuse_changes(config.changed(tuned or {}).plain)
    result = folder.read_result()
    has_ended = result is not None and State(result["status"]).is_done
    return {"result": result if has_ended else None, "tuned": tuned}


def refuse_beginning(config: Config) -> None:
    """Raise Refused where a new run could not be built, before its folder is taken by it."""
    if config.branch_of is not None:
        refuse_unstable(source_of_branch(config), config)
    elif config.init_from is not None:
        source_of(config.init_from)
    if named_in(config.plain) - shipped_targets():
        with importing():
            from app.run.build import technique_settings

            refuse_targets(config.plain | technique_settings(config))


def work(
    config: Config, tuned: Mapping[str, Any] | None, typed: list[str]
) -> dict[str, Any] | None:
    """What each rank does: search, if that has not been done, then fit and test."""
    with heeding(config.name, max_requeues=max_requeues(config.launch)):
        try:
            return search_and_train(config, tuned, typed)
        except BaseException:
            if asked.first is None:
                ranks().tell_failure()
            raise


def search_and_train(
    config: Config, tuned: Mapping[str, Any] | None, typed: list[str]
) -> dict[str, Any] | None:
    """Search, if that has not been done, then fit and test."""
    folder = RunFolder(Path(config.run_dir))
    if tuned is None and config.tuner is not None:
        with importing():
            from app.tuner.find import find
        tuned = find(config, folder.path)
    config = config.changed(tuned or {})
    told = links_of(config.composed)
    if told and any(k.startswith("data.") for k in tuned or ()) and folder.read_config() is None:
        config = config.changed(ranks().first(lambda: asked_of(config.composed, told)))
    ranks().refuse_different(what_decides(config.plain))
    if not config.fit:
        return None
    if ranks().is_first:
        folder.write_config(config.plain, typed)
    return train(config, folder)


def train(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Fit and test; returns the content of result.json, which is written also on a failure."""
    with importing():
        from app.begin.relaid import Relaid
        from app.logger.tracking import Tracking
        from app.pictures.curves import draw_curves
        from app.record.result import Record
        from app.run.build import seed_all, technique_settings
        from app.run.checkpoint import newest_intact
        from app.run.measured import tested
        from app.screen.start import StartTable
        from app.stop.signals import StopsOnSignal
    is_first = ranks().is_first
    before = folder.read_result() or {}
    record = Record(config.plain, folder, writes=is_first)
    record.content |= {name: before[name] for name in KEPT if name in before}
    record.content["continued_after"] = before.get("continued_after", [])
    own = ranks().first(lambda: str(newest_intact(folder.checkpoints) or "")) or None
    checkpoint = own
    if own is None and config.branch_of is not None:
        checkpoint = ranks().first(lambda: str(source_of_branch(config)))
        record.content["branch_of"] = {"run": config.branch_of, "step": config.branch_at}
    noted = record.note_continued if checkpoint == own else None
    start = StartTable(config.plain | technique_settings(config), noted)
    tracking = Tracking(config.plain, folder.path, lambda: facts(start, record.content))
    with tracking.told(record.content), record.kept(), ExitStack() as given_back:
        with record.phase("build"):
            pruning = pruning_of(config)
            begins = config if checkpoint is None else config.but(init_from=None)
            relaid = [Relaid(lays_out=config.extend == RELAY)] if config.extend else []
            run = built(begins, [start, tracking, *relaid, *pruning, StopsOnSignal()])
            given_back.callback(run.hooks.release)
        start.beside.append(lambda: branch.rows(config))
        start.beside.append(lambda: defaults.rows(config.composed))
        told = links_of(config.composed)
        start.beside.append(lambda: links.rows(told, {k: value_at(config.plain, k) for k in told}))
        if run.initial is not None:
            start.beside.append(run.initial.rows)
            record.content["init_from"] = run.initial.report  # filled when the fit begins
        if checkpoint is not None and is_first:
            print(f"{'continuing' if own else 'branching'} from {checkpoint}", flush=True)
        tracking.loggers = run.trainer.loggers
        ranks().first(bool)  # all begin at once: where they listen, nobody comes before them
        with record.phase("fit"):
            try:
                run.trainer.fit(run.model, datamodule=run.data, ckpt_path=checkpoint)
            except (KeyboardInterrupt, SystemExit, RuntimeError) as stop:
                if asked.first is None:
                    raise  # nobody asked: not the end of a rank that left before this one
                raise SystemExit(asked.exit_code) from stop  # Lightning's is another
            asked.release()
            run.refuse_untrained()
        kept = run.checkpoints()
        kind = "last" if config.test == "last" or kept["best"] == kept["last"] else "best"
        delivered = kind if kept[kind] else None
        record.content |= {
            **run.measured(delivered),
            "optimizer_steps": run.trainer.global_step,
            "epochs": run.trainer.current_epoch,
            "batch": start.batch or before.get("batch", {}),  # no step was left to make
            "checkpoints": {name: path and folder.within(path) for name, path in kept.items()},
        }
        if kept_at := kept_steps(folder.checkpoints):
            kept_in = [folder.within(str(path)) for path in kept_at.values()]
            record.content["kept_checkpoints"] = kept_in
        if top := {folder.within(path): float(score) for path, score in run.top().items()}:
            record.content["top_checkpoints"] = top
        record.write()  # what is known now is not measured again where the test is cut
        is_pruned = any(callback.has_pruned for callback in pruning)
        if is_pruned:
            record.outcome = State.pruned
        elif config.test != "none" and run.has_test():
            where = tested(run.trainer, delivered)  # before it restores what callbacks knew then
            with record.phase("test"):
                seed_all(config.seed)
                metrics = run.test(kept[kind])
            measured, of = record.content["metrics"], record.content["metrics_of"]
            of_test = {}
            for name, value in metrics.items():
                # a validation may have logged the same name
                taken = of.get(name, {}).get("on") == "validation"
                of_test[f"test_{name}" if taken else name] = value
            measured |= of_test
            of |= dict.fromkeys(of_test, where)
        if is_first:
            with record.phase("curves"):
                try:
                    draw_curves(
                        folder.path / "metrics.csv", folder.path / "curves.png", record.content
                    )
                except OSError as error:  # a picture does not fail a run
                    print(f"no curves are drawn: {error}")
    if is_first:
        print(f"{record.outcome}  {outcome(record.content)}\n{folder.result_path}")
    return record.content


def facts(start: "StartTable", content: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a run beside its configuration, once training starts."""
    commit = content["git_commit"]
    return {"num_parameters": start.num_parameters, "git_commit": commit, **start.batch}


def outcome(result: Mapping[str, Any]) -> str:
    """What a run delivers, in a line: what was measured of it, and nothing of other weights."""
    of = result["metrics_of"]
    places = {name: where for name, where in of.items() if where["on"] != "train"}
    # the test is of what is delivered; without one, what was validated is
    tests = [where for where in places.values() if where["on"] == "test"]
    steps = {where["step"] for where in tests or places.values() if where["checkpoint"]}
    shown = [name for name, where in places.items() if where["step"] in steps] or [*of]
    text = "  ".join(f"{name} {result['metrics'][name]:.4g}" for name in sorted(shown))
    where = next((of[name] for name in shown if name in places), None)
    if where is None:
        return text
    named = f"{where['checkpoint']} checkpoint, " if where["checkpoint"] else ""
    return f"{text}  ({named}epoch {where['epoch']}, step {where['step']})"


def built(config: Config, callbacks: "Sequence[Callback]") -> "Run":
    """The objects of a run, with the finders that act inside its fit."""
    with importing():
        from app.run.build import build
    if config.tuner is None or not config.tuner.milestones:
        return build(config, callbacks)
    from app.tuner.milestones import finders_of

    return build(config, callbacks, finders_of(config))


def pruning_of(config: Config) -> "list[PrunesTrial]":
    """What ends a trial of a study early; empty where the run is none."""
    sweep = config.sweep
    if sweep is None or sweep.trial is None or sweep.pruner == "none":
        return []
    assert config.objective is not None
    from app.record.trials import may_be_reported
    from app.stop.pruning import PrunesTrial

    if not may_be_reported(config.objective):
        return []  # as the study has said
    return [
        PrunesTrial(
            run_dir=config.run_dir,
            trial=sweep.trial,
            objective=config.objective,
            pruner=sweep.pruner.value,
            prune_after_trials=sweep.prune_after_trials,
            prune_after_epochs=sweep.prune_after_epochs,
        )
    ]
