"""HTML in which every text that is not markup is escaped."""

from html import escape

EMPTY = ("img", "source")
"""Elements without an end."""


class Markup(str):
    """A text that is HTML already; any other is escaped where it comes into an element."""

    __slots__ = ()


def element(name: str, *content: object, **attributes: object) -> Markup:
    """An element with its content, in its order.

    Args:
        attributes: `data_v` stands for `data-v`, `class_` for `class`; None where there is none.
    """
    typed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in EMPTY else f"</{name}>"
    return Markup(f"<{name}{typed}>{joined(*content)}{end}")


def joined(*content: object) -> Markup:
    """Markup and escaped texts after each other."""
    return Markup("".join(x if isinstance(x, Markup) else escape(str(x)) for x in content))
