"""Finders: from a configuration to the values it should have.

`find.find` is what a run calls; `search` and `lr_rules` need neither torch nor a configuration.
"""

__all__ = ["find", "lr_rules", "search"]
