"""Schema, YAML and class say the same: for everything that is discovered under conf/."""

import dataclasses
import enum
import inspect
import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
import pytest
import yaml
from hydra.utils import get_object
from omegaconf import MISSING, OmegaConf

from app import conf
from app.process.targets import BESIDE

ROOT = Path(conf.__file__).parent
SHAPES = [
    pytest.param(shape, id=f"{group}.{shape.__name__}")
    for group in conf.GROUPS
    for shape in vars(import_module(f"app.conf.{group}.schema")).values()
    if dataclasses.is_dataclass(shape) and shape.__module__ == f"app.conf.{group}.schema"
]
PRESETS = [
    pytest.param(path, id=f"{path.parent.name}={path.stem}")
    for path in sorted(ROOT.glob("*/*.yaml"))
    if path.stem not in ("none", "custom") and path.parent.name not in ("experiment", "debug")
]


def shape_of(preset: Path) -> Any:
    return import_module(f"app.conf.{preset.parent.name}.schema").PRESETS[preset.stem]


def settings(shape: Any) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(shape) if not f.name.startswith("_")}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schema_holds_no_numbers_and_documents_every_field(shape: Any) -> None:
    assert shape.__doc__
    source = inspect.getsource(inspect.getmodule(shape))
    for name, field in settings(shape).items():
        assert field.default is MISSING or field.default is None, name
        if field.default is MISSING:
            owner = next(
                kind for kind in shape.__mro__ if name in vars(kind).get("__annotations__", {})
            )
            lines = inspect.getsource(owner).splitlines()
            at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}:"))
            text = next(line for line in lines[at + 1 :] if line[:5] not in ("     ", "    )"))
            assert text.startswith('    """'), f"{owner.__name__}.{name} in {source[:40]}"


NUMBERS = (int, float, list[int], list[float])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_number_has_a_range_with_two_ends(shape: Any) -> None:
    hints = get_type_hints(shape)
    for name, field in settings(shape).items():
        if any(hints[name] in (kind, kind | None) for kind in NUMBERS):
            rule = field.metadata["rule"]
            assert rule.refusal(name, math.nan), name
            assert rule.refusal(name, -math.inf), name
            assert rule.refusal(name, math.inf) or rule.at_most == math.inf, name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_its_schema_first_and_every_setting_of_it(preset: Path) -> None:
    content = yaml.safe_load(preset.read_text())
    group, name = preset.parent.name, preset.stem
    defaults = content.pop("defaults")
    assert f"/schema/{group}/{name}@_here_" in defaults
    for part in defaults:
        if str(part).startswith("parts/") and part.endswith("@_here_"):
            path = preset.parent / part.replace("@_here_", ".yaml")
            content = yaml.safe_load(path.read_text()) | content
    shape = shape_of(preset)
    required = {n for n, field in settings(shape).items() if field.default is MISSING}
    assert set(content) - {"_target_"} <= set(settings(shape))
    assert required <= set(content)


def given(kind: Any, group: str, found: Any) -> set[str]:
    """The settings that reach the class: not those that the run reads itself."""
    of_the_run = set(BESIDE.get(group, ())) - {*inspect.signature(found).parameters}
    return set(settings(kind)) - of_the_run


@pytest.mark.parametrize("preset", PRESETS)
def test_a_class_takes_just_what_its_schema_says(preset: Path) -> None:
    for name, kind in _targeted(preset):
        found = get_object(kind._target_)
        parameters = inspect.signature(found).parameters
        if kind._target_.startswith("app."):
            own = {n: p for n, p in parameters.items() if n not in GIVEN_BY_BUILD}
            assert set(own) == given(kind, preset.parent.name, found), name
            assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in own.values()), (
                name
            )
            assert found.__name__.replace("_", "").lower() == kind.__name__.lower()
        else:
            assert given(kind, preset.parent.name, found) <= set(parameters), name


RESOLVED = {
    "micro_batch_size": type(None),
    "devices": str,
    "EarlyStopping.monitor": type(None),
    "EarlyStopping.mode": type(None),
    "Plateau.monitor": type(None),
    "Plateau.mode": type(None),
}
"""What a schema allows and the run has replaced before its class is made."""


def kinds(hint: Any) -> frozenset[Any]:
    """The types in an annotation; a choice of words is a text, and any sequence a list."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return frozenset().union(*map(kinds, arguments))
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return frozenset({str})
    if origin in (list, Sequence):
        return frozenset({("list", *map(kinds, arguments))})
    return frozenset({origin or hint})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_class_takes_the_types_that_its_schema_says(preset: Path) -> None:
    for name, kind in _targeted(preset):
        found = get_object(kind._target_)
        hints = get_type_hints(found.__init__ if inspect.isclass(found) else found)
        for key, ours in get_type_hints(kind).items():
            if key in given(kind, preset.parent.name, found) and Any not in (
                ours,
                hints.get(key, Any),
            ):
                replaced = {RESOLVED.get(key), RESOLVED.get(f"{kind.__name__}.{key}")}
                allowed, taken = kinds(ours) - replaced, kinds(hints[key])
                assert allowed == taken if kind._target_[:4] == "app." else allowed <= taken, (
                    f"{name}.{key}"
                )


def test_every_argument_of_lightnings_trainer_is_a_key_or_says_what_to_type() -> None:
    from app.conf.trainer.schema import Trainer

    theirs = inspect.signature(pl.Trainer).parameters.keys()
    keys, instead = settings(Trainer).keys(), Trainer._instead_.keys()
    assert theirs - {"self"} == (keys & theirs) | instead
    assert keys - theirs == {"max_minutes", "threads"}  # which Lightning has not
    assert not keys & instead


def test_a_schema_of_a_number_against_a_class_of_a_text_is_seen() -> None:
    assert kinds(float | None) != kinds(str | None)
    assert kinds(list[int]) != kinds(Sequence[float])
    assert kinds(list[int]) == kinds(Sequence[int])


GIVEN_BY_BUILD = {"strategy", "precision", "matmul", "run_dir", "callbacks", "loggers",
                  "checkpoint_io", "enable_progress_bar"}  # fmt: skip


def _nested(shape: Any) -> list[tuple[str, Any]]:
    node = OmegaConf.structured(shape)
    declared = {name: node._get_node(name)._metadata.ref_type for name in settings(shape)}
    return [
        (f"{shape.__name__}.{name}", kind)
        for name, kind in declared.items()
        if dataclasses.is_dataclass(kind)
    ]


def _targeted(preset: Path) -> Iterator[tuple[str, Any]]:
    """The schemas of a preset that name a class, itself or in its fields."""
    shape = shape_of(preset)
    for name, kind in [(shape.__name__, shape), *_nested(shape)]:
        if getattr(kind, "_target_", MISSING) != MISSING:
            yield name, kind
