"""Schema, YAML and class say the same: for everything that is discovered under conf/."""

import dataclasses
import inspect
import math
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import MISSING, OmegaConf

from app import conf

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
    if path.stem not in ("none", "custom") and path.parent.name != "experiment"
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
    assert f"/schema/{group}/{name}@_here_" in content.pop("defaults")
    shape = shape_of(preset)
    required = {n for n, field in settings(shape).items() if field.default is MISSING}
    assert set(content) - {"_target_"} <= set(settings(shape))
    assert required <= set(content)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_class_takes_just_what_its_schema_says(preset: Path) -> None:
    shape = shape_of(preset)
    for name, kind in [(shape.__name__, shape), *_nested(shape)]:
        target = getattr(kind, "_target_", None) or yaml.safe_load(preset.read_text()).get(
            "_target_"
        )
        if target is None or target is MISSING or target == MISSING:
            continue
        found = get_object(target)
        parameters = inspect.signature(found).parameters
        if target.startswith("app."):
            own = {n: p for n, p in parameters.items() if n not in GIVEN_BY_BUILD}
            assert set(own) == set(settings(kind)), name
            assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in own.values()), (
                name
            )
            assert found.__name__.replace("_", "").lower() == kind.__name__.lower()
        else:
            assert set(settings(kind)) <= set(parameters), name


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
