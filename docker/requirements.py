"""Print what pyproject.toml requires, without the package itself: `requirements.py EXTRA,EXTRA`."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
required = project["dependencies"]
for extra in filter(None, sys.argv[1].split(",")):
    required += project["optional-dependencies"][extra]
print(*required, sep="\n")
