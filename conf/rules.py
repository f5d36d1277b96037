"""How a value is refused: the key as typed, the rule, the value received, what to type instead.

What one field alone must hold stands in the field: `number(at_least=1, ...)`. `check` reads it, for
every field there is, before the rules in `__post_init__`, which are those between fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from omegaconf import MISSING

from app import pip_install
from app.config import FIELD
from app.errors import Refused

RULE = "rule"
"""Where the metadata of a field hold what refuses a value."""

MANY = 10**12
"""The most of what is counted: steps, epochs, samples."""

LARGEST_RATE = 1e38
"""Of learning rates: about the largest number of float32."""

TEN_YEARS_MIN = 10 * 366 * 24 * 60


@dataclass(frozen=True, kw_only=True)
class Range:
    """Between what a number lies, or each number of a list; null is the field's type's concern."""

    above: float | None
    at_least: float | None
    below: float | None
    at_most: float | None
    instead: str
    rule: str | None

    def refusal(self, key: str, value: Any) -> str | None:
        """What to say of a value; None where it is allowed."""
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for number in values:
            broken = self._broken(number) if isinstance(number, int | float) else None
            if broken is not None:
                many = "numbers" if values is value else ""
                rule = self.rule or " ".join(["be", many, broken]).replace("  ", " ")
                return f"{key} must {rule}, got {value}; {self.instead.format(key=key)}"
        return None

    def _broken(self, number: float) -> str | None:
        for bound, sign, holds in (
            (self.above, ">", self.above is None or number > self.above),
            (self.at_least, ">=", self.at_least is None or number >= self.at_least),
            (self.below, "<", self.below is None or number < self.below),
            (self.at_most, "<=", self.at_most is None or number <= self.at_most),
        ):
            if not holds:
                return f"{sign} {bound}"
        return None


def number(
    *,
    instead: str,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    rule: str | None = None,
) -> Any:
    """A field that holds a number, a list of numbers or null, each within both ends.

    Args:
        instead: what to type, `{key}` standing for the key.
        at_most: `math.inf` where the field takes infinity.
        rule: what must hold, where both ends are said in one.
    """
    assert (above is None) != (at_least is None)
    assert (below is None) != (at_most is None)
    range_ = Range(
        above=above, at_least=at_least, below=below, at_most=at_most, instead=instead, rule=rule
    )
    return field(default=MISSING, metadata={RULE: range_})


def count(*, instead: str, at_least: int = 1, at_most: int = MANY) -> Any:
    """A field that holds a whole number, a list of them or null: 1, 2, 3 and so on."""
    return number(at_least=at_least, at_most=at_most, instead=instead)


@dataclass(frozen=True)
class Text:
    """A text of which something can be made: a name, a path, a pattern.

    Attributes:
        is_folder: whether a run writes into it, or has to be able to.
    """

    instead: str
    is_folder: bool = False

    def refusal(self, key: str, value: Any) -> str | None:
        """What to say of a value; None where it is allowed."""
        if not isinstance(value, str):
            return None
        instead = self.instead.format(key=key)
        if not value.strip():
            return f"{key} must not be empty, got '{value}'; {instead}"
        if not value.isprintable():
            return f"{key} must hold no control characters, got {value!r}; {instead}"
        return None


LONGEST_NAME = 200
"""Bytes of a folder's name: file systems take 255, and files beside it have longer ones."""


class Name(Text):
    """A folder below another one, or a path of such."""

    def refusal(self, key: str, value: Any) -> str | None:
        """What to say of a value; None where it is allowed."""
        refusal = super().refusal(key, value)
        if refusal is not None or not isinstance(value, str):
            return refusal
        instead = self.instead.format(key=key)
        if any(part[:1] in ("", ".") for part in value.split("/")):
            return f"{key} must be that of a folder, which no dot begins, got {value}; {instead}"
        if max(len(part.encode()) for part in value.split("/")) > LONGEST_NAME:
            return f"{key} must be at most {LONGEST_NAME} bytes long, got {value}; {instead}"
        return None


class Template(Text):
    """A file's name with fields to fill in: {epoch}, {step} and metrics, each with its format."""

    def refusal(self, key: str, value: Any) -> str | None:
        """What to say of a value; None where it is allowed."""
        if not isinstance(value, str):
            return None
        instead = self.instead.format(key=key)
        plain = FIELD.sub("0", value)
        if "/" in plain or plain[:1] == "." or plain in ("best", "last", "previous"):
            return f"{key} must be the name of a file beside best.ckpt, got {value}; {instead}"
        if "{" in plain or "}" in plain:
            return f"{key} must have names alone in its braces, got {value}; {instead}"
        for name, how in FIELD.findall(value):
            try:
                format(0 if name in ("epoch", "step") else 0.0, how)
            except ValueError as error:
                return f"{key} must have formats of numbers, got {value}: {error}; {instead}"
        refusal = super().refusal(key, plain)
        return refusal and refusal.replace(f"got {plain}", f"got {value}")


def text(*, instead: str) -> Any:
    """A field that holds a text that is not empty, or null."""
    return field(default=MISSING, metadata={RULE: Text(instead)})


def folder(*, instead: str) -> Any:
    """A field that holds the path of a folder to write into, or null."""
    return field(default=MISSING, metadata={RULE: Text(instead, is_folder=True)})


NAME = Name("type {key}=mine")


def run_name(value: Any) -> str:
    """The name of a run, as part of the path of its folder, before anything makes that.

    Raises Refused where it is none.
    """
    refusal = NAME.refusal("name", str(value))
    if refusal is not None:
        raise Refused(refusal)
    return str(value)


def demo(ours: Any, *others: Any, _root_: Any) -> Any:
    """The value that goes with the models of this project, or another with one of the user's own.

    Asked in a list of defaults, the model is the name of a preset.
    """
    theirs = others[0] if others else ours
    model = _root_.get("model")
    if not isinstance(model, str):
        model = None if model is None else model.get("_target_", "")
        return ours if model is None or str(model).startswith("app.models.") else theirs
    shipped = import_module("app.conf.model.schema").PRESETS
    return ours if shipped.get(model, dict) is not dict else theirs


def require(holds: bool, text: str) -> None:
    """Raise ValueError unless `holds`; its text is "KEY must RULE, got VALUE; what to type"."""
    if not holds:
        raise ValueError(text)


EXTRAS = {"transformer_engine": "fp8", "alembic": "mlflow"}
"""The extra that brings a package, where it has another name."""


def require_package(module: str, choice: str, instead: str) -> None:
    """Raise ValueError unless the optional package of a preset is installed; imports nothing."""
    if find_spec(module) is None:
        raise ValueError(
            f"{choice} needs the package {module}, which is not installed; type "
            f"{pip_install(EXTRAS.get(module, module))}, or {instead}"
        )
