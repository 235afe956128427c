"""What ``--help`` prints: examples, flags, groups and the composed configuration.

Hydra can print this from a template, but then asks for the options of every group twice, which
copies all registered configurations each time and takes longer than a help page may.
"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from .document import groups

_HEAD = """\
fisher_lab: K-FAC, Fisher spectra and their records, on real transformers.

python -m fisher_lab                                    the analysis of the default model
python -m fisher_lab task=plan                          what it would cost, without running it
python -m fisher_lab kfac/policy=all kfac.damping=1e-5  an option of a group, a key
python -m fisher_lab -m kfac.damping=1e-5,1e-4          a sweep
python -m fisher_lab --cfg job                          the configuration, without running it

== Flags ==
-m, --multirun        run every combination of the given values
-c, --cfg job         show the composed configuration
-cd, --config-dir D   find further options of groups under D
--info                show what the configuration is composed of
--hydra-help          all flags of Hydra
"""

_FOOT = "docs/configuration.md describes every key."


def text(cfg: DictConfig, *, resolve: bool = False) -> str:
    """The help page.

    Args:
        cfg: the composed configuration, with Hydra's own node, which is not shown.
        resolve: show what interpolations stand for.
    """
    options = "\n".join(f"{group}: {', '.join(names)}" for group, names in groups(own=True).items())
    shown = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    keys = OmegaConf.to_yaml(shown, resolve=resolve)
    parts = (_HEAD, "== Groups (group=option) ==", options, "\n== Keys (key=value) ==", keys, _FOOT)
    return "\n".join(parts)
