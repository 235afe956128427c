"""Write ``docs/configuration.md`` from the schema."""

from __future__ import annotations

from pathlib import Path

from fisher_lab.config import help
from fisher_lab.runs import atomic

if __name__ == "__main__":
    atomic.write_text(
        Path(__file__).resolve().parents[1] / "docs" / "configuration.md", help.markdown()
    )
