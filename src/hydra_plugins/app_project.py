"""What Hydra finds of this project: it adds the presets of the project that a command is typed in.

Every command imports this file; only those of this package read the project.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class Project(SearchPathPlugin):
    """Puts the folder of `[tool.effective-training] conf` before our own: of two presets with one
    name the project's is taken."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder."""
        if any(element.path == "pkg://app.conf" for element in search_path.get_path()):
            from app.cli.presets import project_conf

            folder = project_conf()
            if folder is not None:
                search_path.prepend("project", f"file://{folder}", "main")
