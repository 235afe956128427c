"""``fisher-lab check``: what K-FAC makes of a model of the user's own, and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from fisher_lab.config.schema import Config
from fisher_lab.curvature.kfac.check import RELATIVE_DAMPING, check
from fisher_lab.tasks import preflight
from fisher_lab.workload import build
from fisher_lab.workload.inputs import prepare

SCAN = "[0.1,1,10]"


def report(config: Config, overrides: Sequence[str]) -> str:
    """Check the model of a configuration on its first batch; returns what was found, in lines.

    Args:
        config: the validated configuration.
        overrides: those that give it, for the command to run next.

    Raises:
        ConfigError: text or model cannot be had as configured.
        fisher_lab.curvature.errors.CurvatureError: no layer is supported, or the gradients differ.
    """
    preflight.preflight(config)
    inputs = prepare(config)
    model, _ = build.trained(inputs, build.no_progress, None)
    device = build.device_of(config)
    size = {"batch_size": config.data.batch_size, "seq_len": config.data.seq_len}
    batch = inputs.objective.batch("train", 0, seed=config.seed, **size)
    batch = {key: value.to(device) for key, value in batch.items()}
    found = check(model.to(device).eval(), batch, inputs.objective.loss_fn)
    damping = ["kfac.damping_mode=relative", f"kfac.damping={RELATIVE_DAMPING:g}"]
    words = ["fisher-lab", *overrides, *damping, f"task.damping_scan={SCAN}"]
    return f"{found}\nnext: {shlex.join(words)}"
