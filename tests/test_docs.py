"""What the pages say to type is allowed, and what they link to is there."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

from app.cli.typed import together
from app.config import check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS = ("…", "theirs", "timm.", "transformers.", "extend=", "tuned=", "launch=", "branch_of=",
             "deepspeed", "=mine", "experiment=first", "NAME=VALUE")  # fmt: skip
"""In commands that need what is not here: classes, files, a project, a sweep's jobs."""


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """The entry point and the overrides of each command that stands alone on the page."""
    text = page.read_text().replace("\\\n", " ")
    for name, line in re.findall(r"^ {4}python -m app\.(train|tune) (.*)$", text, flags=re.M):
        words = shlex.split(line, comments=True)
        is_plain = not any(word[0] == "-" for word in words)
        if words and is_plain and not any(part in line for part in OF_OTHERS):
            yield name, shlex.join(words)


TYPED = sorted({line for page in PAGES for line in commands(page)})


@pytest.mark.parametrize(("name", "line"), TYPED)
def test_what_a_page_says_to_type_is_allowed(
    name: str, line: str, composed: Callable[..., DictConfig]
) -> None:
    check(composed(*together(shlex.split(line)), config_name=name))


def test_there_are_such_commands() -> None:
    assert len(TYPED) > 25


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", page.read_text()):
        found = page.parent / target
        assert found.exists()
        titles = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.M)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles]
