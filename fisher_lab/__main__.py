"""``python -m fisher_lab``."""

from fisher_lab.cli import entry

if __name__ == "__main__":
    entry()
