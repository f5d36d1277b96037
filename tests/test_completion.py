"""TAB completes what is ours, in each shell, and leaves what is others' as it was."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
BASH = """
_others() {{ COMPREPLY=(theirs.py); }}
{before}
breaks=$COMP_WORDBREAKS
source {script}
source {script}
[[ $COMP_WORDBREAKS == "$breaks" ]] || echo changed
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
compopt() {{ :; }}
_app_complete
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p python
"""
ZSH = """
autoload -Uz compinit && compinit -u -D
_others() {{ print theirs.py }}
{before}
source {script}
source {script}
compadd() {{ print -l -- "${{@[5,-1]}}" }}
line={line}; words=("${{(@s: :)line}}"); CURRENT=${{#words}}
_app_complete
"""
FISH = """
complete -c python -n 'not __app_is_meant' -a theirs.py
source {script}
source {script}
complete -C {line}
"""


def completed(shell: str, typed: str, before: str = "") -> list[str]:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    line = shlex.quote(typed)
    template = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    text = template.format(script=SRC / f"app/cli/completion.{shell}", line=line, before=before)
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    bin_of = str(Path(sys.executable).parent)
    environment = {**os.environ, "PYTHONPATH": str(SRC), "PATH": f"{bin_of}:{os.environ['PATH']}"}
    done = subprocess.run(
        [found, *flags, "-c", text], capture_output=True, text=True, env=environment, timeout=60
    )
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


BEFORE = {"bash": "complete -F _others python", "zsh": "compdef _others python", "fish": ""}


@pytest.mark.parametrize("shell", BEFORE)
def test_presets_are_completed(shell: str) -> None:
    found = completed(shell, "python -m app.train averaging=")
    given = "" if shell == "bash" else "averaging="
    assert {f"{given}{name}" for name in ("ema", "none", "swa", "uniform")} <= {*found}
    assert "changed" not in found


@pytest.mark.parametrize("shell", BEFORE)
@pytest.mark.parametrize("typed", ["python the", "python -m other "])
def test_other_programs_are_completed_as_before(shell: str, typed: str) -> None:
    found = completed(shell, typed, BEFORE[shell])
    assert "theirs.py" in found
    assert not any("averaging" in one for one in found)
