"""What a worker pays for before it begins: every cell of a sweep, and every rank, pays it."""

import subprocess
import sys


def test_a_worker_imports_no_library_that_few_cells_need():
    dear = ("matplotlib", "pandas", "statsmodels", "wandb", "torch.distributed.tensor", "sympy")
    script = (
        "import sys; import fisher_lab.sweeps.worker, fisher_lab.tasks.analyze; "
        f"print([name for name in {dear} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
