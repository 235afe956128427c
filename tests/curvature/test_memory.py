"""Free memory is what the machine and its control groups leave."""

import torch

from fisher_lab.curvature import memory


def write(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


def test_free_memory_minds_the_control_groups(tmp_path, monkeypatch):
    own = tmp_path / "own"
    # v2: the job's group has no limit of its own, the one above it has; cache is given back.
    two = tmp_path / "two"
    own.write_text("0::/jobs/one\n")
    write(two / "jobs" / "one", memory__max="max", memory__current=700)
    write(
        two / "jobs", memory__max=1000, memory__current=800,
        memory__stat="anon 5\ninactive_file 50",
    )  # fmt: skip
    assert memory.cgroup_free(two, own) == [250]
    write(two / "jobs" / "one", memory__max=750)
    assert memory.cgroup_free(two, own) == [50, 250]
    # v1: its path is the host's and not seen in the container, whose own limit is at the mount.
    one = tmp_path / "one"
    own.write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n")
    write(one / "memory", memory__limit_in_bytes=900, memory__usage_in_bytes=1000)
    assert memory.cgroup_free(one, own) == [0]
    write(one / "memory", memory__stat="inactive_file 7\ntotal_inactive_file 400")
    assert memory.cgroup_free(one, own) == [300]
    assert memory.cgroup_free(tmp_path / "none", tmp_path / "none") == []
    monkeypatch.setattr(memory, "cgroup_free", lambda: [123, 10**18])
    assert memory.free_memory(torch.device("cpu")) == 123
    monkeypatch.setattr(memory, "cgroup_free", list)
    assert memory.free_memory(torch.device("cpu")) > 123
