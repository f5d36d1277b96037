"""How a value is refused: the key as typed, the rule, the value received, what to type instead."""


def require(holds: bool, key: str, rule: str, value: object, instead: str) -> None:
    """Raise ValueError unless `holds`: "`key` must `rule`, got `value`; `instead`"."""
    if not holds:
        raise ValueError(f"{key} must {rule}, got {value}; {instead}")
