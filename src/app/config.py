"""The checked configuration: every key, value and combination of it allowed. Needs no torch."""

import copy
import difflib
import hashlib
import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from app.cli.explained import no_effect, replaced, unknown_key
from app.cli.presets import groups
from app.cli.typed import OF_THE_COMMAND
from app.errors import Refused
from app.monitored import followed

if TYPE_CHECKING:
    from conf.schema import Train as Typed
else:
    Typed = object

OF_ONE_CLASS = ("optimizer", "scheduler", "accumulate", "clip", "averaging", "sharing", "memory",
                "compile", "tuner")  # fmt: skip
"""Groups that can be off while a file sets keys of them, of which nothing can be built."""


ALWAYS_ON = ("model", "trainer", "strategy", "precision")

SINGLE = "app.strategy.single"
DDP = "app.strategy.ddp"
"""The strategies, by `_target_`, in which a rank holds a whole model."""

OF_LIGHTNING = {
    "GradientAccumulationScheduler": "accumulate=schedule",
    "EMAWeightAveraging": "averaging=ema",
    "WeightAveraging": "averaging=uniform",
    "StochasticWeightAveraging": "averaging=swa",
    "LearningRateFinder": "tuner=lr_find",
    "BatchSizeFinder": "tuner=batch_size",
}
"""Lightning's own techniques, and which of ours to use instead: ours would count, save and continue
a run as if they were not there."""

LIGHTNINGS = ("lightning", "pytorch_lightning")
"""Its two packages."""

SECRET = re.compile(r"logger\..*?([^.]*_)?(key|token|password|secret)")
"""Keys that hold what logs in."""

FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")
"""What is filled into the name of a checkpoint: what it is called, and its format."""

TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class Config(Typed):
    """A checked configuration: its groups and keys are attributes, typed by the schemas of `conf`.

    Attributes:
        composed: as Hydra composed it; others are made from it.
        plain: resolved, in plain containers: what is instantiated, compared or written.
        objects: by group, what a program has made itself, in place of what would be instantiated.
    """

    def __init__(self, *, composed: DictConfig, typed: Any, plain: dict[str, Any]) -> None:
        self.composed = composed
        self.plain = plain
        self._objects: dict[str, Any] | bytes = {}
        self._typed = typed

    @property
    def objects(self) -> dict[str, Any]:
        """See above. Raises Refused where this process cannot have one."""
        if isinstance(self._objects, bytes):
            try:
                self._objects = dict(pickle.loads(self._objects))
            except Exception as error:  # of a class of the user's: anything
                raise Refused(only_there(error)) from error
        return self._objects

    def holding(self, objects: Mapping[str, Any]) -> "Config":
        """This, with objects that a program has made itself."""
        self._objects = dict(objects)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """With copies of the objects: tensors in the arguments of a process would be shared."""
        try:
            return {**vars(self), "_objects": pickle.dumps(self.objects)}
        except Exception as error:
            raise Refused(only_there(error)) from error

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "_typed":  # not yet set: it is being unpickled
                raise AttributeError(name)
            return getattr(self._typed, name)

    @property
    def train_limit(self) -> int | float | None:
        """Micro-batches of a training epoch (int), or their share (float); None = all."""
        trainer = self.plain["trainer"]
        limit: int | float | None = trainer["overfit_batches"] or trainer["limit_train_batches"]
        return limit

    def changed(self, overrides: Mapping[str, Any]) -> "Config":
        """The configuration with other values of dotted keys, as if they had been typed."""
        if not overrides:
            return self
        return check(with_overrides(self.composed, overrides)).holding(self.objects)

    def unchecked(self, overrides: Mapping[str, Any]) -> "Config":
        """The configuration of a run with other values, which its own command has checked."""
        return of_a_run(with_overrides(self.composed, overrides)).holding(self.objects)

    def but(self, **changes: Any) -> "Config":
        """Not checked, for a throwaway run: with groups off, with other values in them, or, where
        the values name a class, with another one in their place."""
        typed, plain = copy.copy(self._typed), dict(self.plain)
        for name, values in changes.items():
            if not isinstance(values, Mapping) or "_target_" in values:
                setattr(typed, name, values)
                plain[name] = values
                continue
            setattr(typed, name, copy.copy(getattr(typed, name)))
            plain[name] = {**plain[name], **values}
            for key, value in values.items():
                setattr(getattr(typed, name), key, value)
        but = Config(composed=self.composed, typed=typed, plain=plain)
        return but.holding(self.objects)


def only_there(error: Exception) -> str:
    """What to say of an object that does not come through to the other processes of its run."""
    return (
        "model and data must be objects that other processes can have too, got one that cannot be "
        f"pickled ({type(error).__name__}: {' '.join(str(error).split())}); put its class into a "
        "file, and give that class, or an object of it; or type strategy=single trainer.devices=1"
    )


def check(cfg: DictConfig) -> Config:
    """What was composed, resolved and typed, every value and combination of it allowed.

    Imports neither torch nor Lightning.

    Raises:
        Refused: with the key as typed, the rule, the value, and what to type instead.
    """
    for group in (name for name in (*OF_ONE_CLASS, *ALWAYS_ON) if name in cfg):
        _refuse_without_class(group, cfg)
    _refuse_unread(cfg)
    refuse_values(cfg)
    chosen = followed(with_named_logger(cfg))
    try:
        typed = OmegaConf.to_object(chosen)  # runs the rules of every schema
    except ValueError as error:
        if type(error) is not ValueError:  # one of OmegaConf's own, explained by the command line
            raise
        raise Refused(str(error)) from None
    except ArithmeticError as error:
        raise Refused(f"a number is too large to count with: {error}; type a smaller one") from None
    return Config(composed=cfg, typed=typed, plain=plain(chosen))


def with_named_logger(cfg: DictConfig) -> DictConfig:
    """A configuration in which a class that stands alone in `logger` stands beside metrics.csv."""
    logger = cfg.get("logger")
    if logger is None or "_target_" not in logger or OmegaConf.is_missing(logger, "_target_"):
        return cfg
    custom = OmegaConf.to_container(logger)
    assert isinstance(custom, dict)
    found = copy.deepcopy(cfg)
    found.logger = {"csv": custom.pop("csv", None), "custom": custom}
    return found


def of_a_run(cfg: DictConfig) -> Config:
    """The configuration that a run was trained with: its own command has checked it."""
    return Config(composed=cfg, typed=cfg, plain=plain(cfg))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration, resolved, as plain containers."""
    config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


FACTOR = "accumulate.factor"
"""The key with which a finder keeps the effective batch: it switches accumulation on."""


def with_overrides(cfg: DictConfig, overrides: Mapping[str, Any]) -> DictConfig:
    """A copy of a composed configuration with other values of dotted keys."""
    found = copy.deepcopy(cfg)  # with its type, whose rules are checked
    for key, value in overrides.items():
        if key == FACTOR and found.accumulate is None:
            schemas = ConfigStore.instance().repo["schema"]["accumulate"]
            found.accumulate = copy.deepcopy(schemas["constant.yaml"].node)
            found.accumulate.weight_by = None
        OmegaConf.update(found, key, value, force_add=True)
    return found


def folders(cfg: DictConfig) -> dict[str, str]:
    """What a run writes into, by the keys that hold it."""
    found = {}
    for path, node in _nodes(cfg, ""):
        shape = OmegaConf.get_type(node)
        for field in fields(shape) if is_dataclass(shape) else ():
            if getattr(field.metadata.get("rule"), "is_folder", False) and node[field.name]:
                found[f"{path}{field.name}"] = str(node[field.name])
    return found


def _refuse_without_class(group: str, cfg: DictConfig) -> None:
    """Raise Refused where a group says neither a class nor a schema, or the schema of another."""
    if OmegaConf.is_missing(cfg, group):
        return
    if cfg[group] is None:
        if group in ALWAYS_ON:
            raise Refused(f"{group} must not be null; choose {group}={'|'.join(_presets(group))}")
        return
    chosen, shape = cfg[group], OmegaConf.get_type(cfg, group)
    if is_dataclass(shape) and shape.__module__.split(".")[-2] == group:
        return
    if shape is dict and "_target_" in list(chosen):  # also where it is still to be typed
        return
    if shape is dict and chosen and group in OF_ONE_CLASS:
        raise Refused(no_effect(f"{group}.{next(iter(chosen))}", group))
    raise Refused(
        f"{group} must have a schema of its own, which its preset names first; begin the file with "
        f"defaults: [/schema/{group}/{_presets(group)[0]}@_here_]"
    )


def _presets(group: str) -> list[str]:
    return [name for name in groups()[group][0] if name not in ("none", "custom")]


def _refuse_unread(cfg: DictConfig) -> None:
    """Raise Refused where a key was added, with `+`, that nothing reads."""
    for path, node in _nodes(cfg, ""):
        shape = OmegaConf.get_type(node)
        if not is_dataclass(shape) or getattr(shape, "_takes_settings_", False):
            continue
        known = [field.name for field in fields(shape)]
        for name in (str(name) for name in node if name not in known):
            key, value = f"{path}{name}", node[name]
            if getattr(shape, "_takes_others_", False):
                if not (value is None or (isinstance(value, DictConfig) and "_target_" in value)):
                    if difflib.get_close_matches(name, known, n=1, cutoff=0.5):
                        raise Refused(unknown_key(key, known))
                    raise Refused(f"{key} needs a class; type +{key}._target_=package.module.Class")
            elif path or not (_is_group(name, value, known) or _is_read(name, cfg)):
                told = replaced(key, shape)
                raise Refused(told or unknown_key(key, [k for k in known if k[0] != "_"]))


def _nodes(node: DictConfig, path: str) -> Iterator[tuple[str, DictConfig]]:
    """All mappings of a configuration, each with what begins the keys in it."""
    yield path, node
    for name in node:
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):  # type: ignore[arg-type]
            continue
        if isinstance(node[name], DictConfig):
            yield from _nodes(node[name], f"{path}{name!s}.")


def _is_group(name: str, value: Any, known: Sequence[str]) -> bool:
    """Whether a key beside the groups is a group of the user's."""
    if HydraConfig.initialized():
        return name in HydraConfig.get().runtime.choices
    is_near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)  # more is not known here
    return isinstance(value, DictConfig) and not is_near


def _is_read(name: str, cfg: DictConfig) -> bool:
    """Whether another value is made from a key."""
    texts = _scalars(OmegaConf.to_container(cfg), "")
    reference = re.compile(rf"\$\{{\.*{re.escape(name)}[.\[}}]")
    return any(isinstance(text, str) and reference.search(text) for _, text in texts)


def refuse_values(cfg: DictConfig) -> None:
    """Raise Refused at the first value that its field alone does not allow."""
    for path, node in _nodes(cfg, ""):
        shape = OmegaConf.get_type(node)
        if "_target_" in node and not OmegaConf.is_missing(node, "_target_"):
            target = node["_target_"]
            if not (isinstance(target, str) and TARGET.fullmatch(target)):
                raise Refused(
                    f"{path}_target_ must be package.module.Class, got {target!r}; type "
                    f"{path}_target_=package.module.Class"
                )
        for field in fields(shape) if is_dataclass(shape) else ():
            key = f"{path}{field.name}"
            if field.name not in list(node):
                raise Refused(f"{key} is read, and ~{key} takes it away; type {key}=VALUE instead")
            if not OmegaConf.is_missing(node, field.name):
                _refuse_value(key, field, node)
    for key, value in _scalars(OmegaConf.to_container(cfg), ""):
        if isinstance(value, float) and math.isnan(value):
            raise Refused(f"{key} must be a number, got nan; leave it out, or type a number")
        if value is not None and SECRET.fullmatch(key):
            raise Refused(
                f"{key} must not be in a configuration, which files of the run hold, and was "
                f"given; type {key}=null, and put it into the environment variable that its class "
                "reads"
            )


def _refuse_value(key: str, field: "Field[Any]", node: DictConfig) -> None:
    rule = field.metadata.get("rule")
    if rule is not None:
        refusal = rule.refusal(key, node[field.name])
        if refusal is not None:
            raise Refused(refusal)
    elif field.name[0] == "_" and field.name != "_target_" and node[field.name] != field.default:
        raise Refused(
            f"{key} must be {field.default}, got {node[field.name]}: it says how the class is "
            "built; leave it out"
        )


def _scalars(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """What is at the ends of plain containers, by their keys."""
    if isinstance(node, dict):
        for name, item in node.items():
            yield from _scalars(item, f"{key}.{name}" if key else str(name))
    elif isinstance(node, Sequence | ListConfig) and not isinstance(node, str):
        for index, item in enumerate(node):
            yield from _scalars(item, f"{key}[{index}]")
    else:
        yield key, node


def is_single(strategy: Any) -> bool:
    """Whether a strategy, composed or typed, is one process on one device."""
    named = strategy["_target_"] if isinstance(strategy, dict) else strategy._target_
    return bool(named == SINGLE)


def is_slurm(launch: object) -> bool:
    """Whether the preset of `launch`, composed or typed, hands runs to SLURM."""
    schema = OmegaConf.get_type(launch) if isinstance(launch, DictConfig) else type(launch)
    return getattr(schema, "is_submitted", False)


def max_requeues(launch: Any) -> int | None:
    """How often SLURM may run a run's job again; None where this is not said."""
    return int(launch.max_requeues) if is_slurm(launch) else None


def what_decides(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values that decide what a run trains, wherever its folder is."""
    return flat({k: value for k, value in movable(config).items() if k not in OF_THE_COMMAND})


def movable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration that says of no path where the folder of its run is."""
    found: dict[str, Any] = _replaced(config, config["run_dir"], "${run_dir}")
    return found


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    return value.replace(old, new) if isinstance(value, str) else value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def config_hash(config: Mapping[str, Any]) -> str:
    """Of what decides a run: equal where two commands train the same."""
    text = json.dumps(what_decides(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changed_by_debug(cfg: DictConfig) -> list[str]:
    """A line for each key that `debug=` has changed: the same command is composed without it."""
    if cfg.debug is None or not (HydraConfig.initialized() and GlobalHydra().is_initialized()):
        return []
    hydra = HydraConfig.get()
    typed = [word for word in hydra.overrides.task if word.lstrip("+").partition("=")[0] != "debug"]
    without = compose(hydra.job.config_name, [*typed, "debug=none"])
    before = flat(_raw(without))
    changed = (key for key, value in flat(_raw(cfg)).items() if before.get(key) != value)
    return [
        f"debug={cfg.debug} changes {key} {_shown(OmegaConf.select(without, key))} -> "
        f"{_shown(OmegaConf.select(cfg, key))}"
        for key in changed
        if key != "debug"
    ]


def _raw(cfg: DictConfig) -> dict[str, Any]:
    """A configuration in plain containers, not resolved."""
    found: Any = OmegaConf.to_container(cfg, enum_to_str=True)
    return dict(found)


def _shown(value: Any) -> str:
    """A value as it is typed."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


UNSHOWN = ("logger", "callbacks", "trainer", "tuner", "link", "init_rename")


def describe(config: dict[str, Any]) -> list[tuple[str, str]]:
    """A row per group that is on: its name, and its class with its settings."""
    rows = []
    for group, chosen in config.items():
        if not isinstance(chosen, dict) or group in UNSHOWN:
            continue
        settings = {
            key: value
            for key, value in chosen.items()
            if not key.startswith("_") and value is not None and key != "groups"
        }
        if chosen.get("groups"):
            settings["groups"] = ",".join(_rule_name(rule) for rule in chosen["groups"])
        kind = str(chosen.get("_target_", "")).rpartition(".")[2]
        values = " ".join(f"{key}={value}" for key, value in settings.items())
        rows.append((group, f"{kind} {values}".strip()))
    return rows


def _rule_name(rule: dict[str, Any]) -> str:
    """Of a rule of parameter groups: its own, or what it matches."""
    match = rule["match"]
    return str(rule.get("name") or (match if isinstance(match, str) else " ".join(match)))
