"""Brings the schema's defaults, the sweeps and ``--config-dir`` of fisher_lab to Hydra."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class FisherLabSearchPath(SearchPathPlugin):
    """Registers them where fisher_lab's own ``conf/`` is in use, and in no other application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra once for each search path that it makes."""
        from fisher_lab.config import paths

        ours = paths.conf()
        for element in search_path.get_path():
            folder = Path(element.path.removeprefix("file://")).resolve()
            if element.provider == "main" and folder == ours:
                from fisher_lab.config import sweep_files

                sweep_files.register()
        for folder in paths.further_folders():
            search_path.append("command-line", f"file://{folder}")
