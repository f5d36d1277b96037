"""What Hydra finds of this project: where it looks for presets, beside those of `app.conf`.

Every command imports this file; only those of this package look there.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class Presets(SearchPathPlugin):
    """Puts the folder of `[tool.effective-training] conf` before our own, so that of two presets
    with one name the project's is taken; the sweeps of `multirun_examples` are found last."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add both."""
        if any(element.path == "pkg://app.conf" for element in search_path.get_path()):
            from app.cli.presets import project_conf

            folder = project_conf()
            if folder is not None:
                search_path.prepend("project", f"file://{folder}", "main")
            search_path.append("app", "pkg://app.multirun_examples")
