"""An optimizer whose parameters are divided between K-FAC and AdamW."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from fisher_lab.config.fields import null, one_of
from fisher_lab.config.kfac import require
from fisher_lab.curvature.collectives import Communicator
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.own_pass import OwnRefresh
from fisher_lab.curvature.kfac.parts import base_of
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.wrappers import unwrap
from fisher_lab.optim import groups
from fisher_lab.optim.groups import Group

log = logging.getLogger(__name__)


class DividedOptimizer(torch.optim.Optimizer):
    """The parameter groups of a `KFACOptimizer`, and which parameters are in them.

    Attributes:
        model: the model.
        kfac: the engine, which knows the layers.
        ranks: those that have factors of their own.
    """

    model: nn.Module
    kfac: KFACNaturalGradient
    ranks: Communicator
    _rest_lr: float
    _decided: set[str]
    """Parameters whose method a forward pass has shown."""
    _behind: set[str]
    """Those that were trained when the factors were made."""
    _warned: set[str]

    # What a recorder of passes and a saved state ask of the optimizer itself.

    @property
    def done(self) -> int:
        """Steps so far."""
        return self.param_groups[0]["steps"]

    @property
    def refresh_due(self) -> bool:
        """Whether the next step needs new factors."""
        raise NotImplementedError

    def refresh(self, batch: Any, loss: LossFunction | None = None) -> bool:
        """Computes new factors if they are due; returns whether there are new ones."""
        raise NotImplementedError

    def refresh_from(self, own: OwnRefresh) -> None:
        """Takes factors of passes that the caller has recorded and differentiated; collective."""
        raise NotImplementedError

    def says_for_the_first_time(self, what: str) -> bool:
        """Whether a warning has not been given yet; it counts as given then."""
        raise NotImplementedError

    def take_over(self, *, decided: bool) -> None:
        """Goes on from groups and factors that have been restored."""
        raise NotImplementedError

    def _named(self) -> dict[str, nn.Parameter]:
        return dict(unwrap(self.model).named_parameters())

    def _trained(self) -> set[str]:
        return {name for name, p in self._named().items() if p.requires_grad}

    @property
    def _names(self) -> dict[str, nn.Parameter]:
        """K-FAC's parameters by name."""
        return {name: p for name, (_, p) in self._with_groups("kfac").items()}

    def _with_groups(self, method: str) -> dict[str, tuple[Group, nn.Parameter]]:
        """The parameters of a method by name, with their groups."""
        return {
            name: (group, parameter)
            for group in self.param_groups
            if group["method"] == method
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _promised(self) -> set[str]:
        """The parameters in layers that modules promise; candidates are not among them."""
        found = self.kfac.layers_of(self.model)
        layers = [one for one in found.layers.values() if one.name not in found.candidates]
        return {base_of(name) for one in layers for name in one.names}

    def _shown(self) -> set[str]:
        """The parameters that the last refresh has factors of, at least of a part."""
        missed, named = self.kfac.coverage.by_parameter, self._named()
        there = self._behind & set(named)
        return {n for n in there if missed.get(n, (0, ""))[0] < named[n].numel()}

    @override
    def add_param_group(self, param_group: Group) -> None:
        """Takes parameters of the model in: those of K-FAC's layers and the others in a group each.

        Args:
            param_group: ``params``, and what is not to be as for the constructor: ``lr`` (of both
                groups; AdamW's is ``rest_lr`` where that is given), ``momentum``,
                ``weight_decay``, ``betas``, ``eps``, and ``method``, ``kfac`` or ``adamw``, which
                a forward pass shows otherwise.

        Raises:
            SettingError: a parameter is not the model's.
            ValueError: a parameter is in a group already.
        """
        if "param_names" in param_group and "set" in param_group:
            super().add_param_group(param_group)
            return
        given, named = dict(param_group), self._named()
        names, method = groups.names_of(given.pop("params"), named), given.pop("method", None)
        require("method", method, one_of(*groups.METHODS) | null, str)
        twice = sorted({n for g in self.param_groups for n in g["param_names"]} & set(names))
        if twice:
            raise ValueError(f"some parameters appear in more than one group: {twice[0]}")
        covered = self._promised() | self._shown() if method is None else set()
        covered = set(names) if method == "kfac" else covered
        rest_lr, lr = given.pop("rest_lr", None), given.pop("lr", None)
        given.pop("param_names", None)
        number = 1 + max(group["set"] for group in self.param_groups)
        now = {key: self.param_groups[0][key] for key in ("steps", "multiplier")}
        rates = lr, (lr if rest_lr is None else rest_lr)
        for one, rate, default in zip(
            groups.METHODS, rates, (self.defaults["lr"], self._rest_lr), strict=True
        ):
            own = [n for n in names if (n in covered) == (one == "kfac")]
            if own:
                about = {"name": groups.label(one, number), **given, **now, "method": one}
                about |= {"lr": default if rate is None else rate, "set": number}
                super().add_param_group(
                    {**about, "params": [named[n] for n in own], "param_names": own}
                )
        if method is not None:
            self._decided |= set(names)

    def divide(self, covered: Iterable[str]) -> None:
        """Says which parameters are K-FAC's; the others are AdamW's.

        Args:
            covered: names in ``named_parameters()``.
        """
        named = self._named()
        moved = groups.move(self.param_groups, covered, named, self._rest_lr)
        for name in moved:
            self.state.pop(named[name], None)
        if moved:
            shown = ", ".join(sorted(moved)[:9])
            log.info("%d parameters change between kfac and adamw: %s", len(moved), shown)

    def _join(self) -> None:
        """Takes in what has been unfrozen; a refresh shows whose it is."""
        known = {name for group in self.param_groups for name in group["param_names"]}
        named = self._named()
        new = [name for name in named if named[name].requires_grad and name not in known]
        if new:
            log.info("%d parameters are trained from now on: %s", len(new), ", ".join(new[:9]))
            first = self.param_groups[0]
            first["param_names"] += new
            first["params"] += [named[name] for name in new]

    def _decide(self) -> None:
        """Divides what has been trained for the first time by what has factors; collective.

        Ranks with factors of their own may have seen different layers, and step together.
        """
        new = self._trained() - self._decided
        if not new:
            return
        shown = self._shown() if self.kfac.kfac_factors else set()
        every = self.ranks.all_gather_objects(sorted(shown))
        if any(every):
            self.divide((set(self._names) - new) | (set().union(*every) & new))
            self._decided |= new
