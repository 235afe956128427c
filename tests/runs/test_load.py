"""The load beside a run: what other processes took, without what the run took itself."""

from __future__ import annotations

import os
import time
from collections import namedtuple

import psutil
import pytest

from fisher_lab.runs.load import Load

Times = namedtuple("Times", "user system idle iowait guest")
Own = namedtuple("Own", "user system children_user children_system elapsed")


def test_others_are_all_but_this_process_and_its_children(monkeypatch):
    """Ten seconds in which the machine worked 12, of which the process 4 and its children 3."""
    machine = iter([Times(100.0, 50.0, 9.0, 9.0, 70.0), Times(108.0, 54.0, 99.0, 30.0, 77.0)])
    own = iter([Own(1.0, 1.0, 0.0, 0.0, 0.0), Own(4.0, 2.0, 2.0, 1.0, 0.0)])
    clock = iter([1000.0, 1010.0])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(machine))
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "getloadavg", lambda: (1.234, 0.0, 0.0))
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    about = Load().about()
    assert about == {"others": 0.5, "average": 1.23, "clock_mhz": [None, None]}


def test_a_machine_says_something_of_itself():
    about = Load().about()
    assert about["others"] >= 0
    assert about["average"] == pytest.approx(os.getloadavg()[0], abs=1)
