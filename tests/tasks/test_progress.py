"""Progress bars: only on a terminal, only where asked for, and never in the way."""

import io

import pytest
from rich.console import Console

from fisher_lab.tasks.progress import Progress


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=80), out


def test_on_a_terminal_a_bar_is_shown():
    bar_console, out = console(True)
    items = list(Progress(True, console=bar_console).track([1, 2, 3], "collect"))
    assert items == [1, 2, 3]
    assert "collect" in out.getvalue()
    assert "3/3" in out.getvalue()


@pytest.mark.parametrize(("enabled", "terminal"), [(False, True), (True, False), (False, False)])
def test_otherwise_nothing_is_written(enabled, terminal):
    bar_console, out = console(terminal)
    progress = Progress(enabled, console=bar_console)
    assert list(progress.track(iter("abc"), "collect", total=3)) == ["a", "b", "c"]
    with progress.step("build"):
        pass
    assert out.getvalue() == ""


def test_a_step_without_parts_is_named():
    bar_console, out = console(True)
    with Progress(True, console=bar_console).step("build the model"):
        pass
    assert "build the model" in out.getvalue()


def test_an_error_inside_passes_through():
    bar_console, _ = console(True)
    with pytest.raises(RuntimeError, match="inside"):
        for _ in Progress(True, console=bar_console).track(range(3), "collect"):
            raise RuntimeError("inside")


def test_items_are_taken_one_at_a_time():
    taken = []

    def source():
        for item in range(3):
            taken.append(item)
            yield item

    bar_console, _ = console(False)
    iterator = iter(Progress(True, console=bar_console).track(source(), "collect"))
    next(iterator)
    assert taken == [0]
