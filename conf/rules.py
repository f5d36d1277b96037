"""How a value is refused: the key as typed, the rule, the value received, what to type instead."""

from importlib.util import find_spec


def require(holds: bool, key: str, rule: str, value: object, instead: str) -> None:
    """Raise ValueError unless `holds`: "`key` must `rule`, got `value`; `instead`"."""
    if not holds:
        raise ValueError(f"{key} must {rule}, got {value}; {instead}")


EXTRAS = {"transformer_engine": "fp8"}
"""The extra that brings a package, where it has another name."""


def require_package(module: str, choice: str, instead: str) -> None:
    """Raise ValueError unless the optional package of a preset is installed; imports nothing."""
    if find_spec(module) is None:
        raise ValueError(
            f"{choice} needs the package {module}, which is not installed; type pip install "
            f"'app[{EXTRAS.get(module, module)}]', or {instead}"
        )
