"""Every option of K-FAC, once: name, meaning, default, range and unit.

The command line's section ``kfac`` is this class, the engine takes it, and ``--help``,
``docs/configuration.md`` and the docstring of :class:`fisher_lab.KFACNaturalGradient` are printed
from it. ``docs/math.md`` has the definitions. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fisher_lab.config.errors import SettingError, show
from fisher_lab.config.fields import (
    Allowed,
    Problems,
    above,
    at_least,
    fraction,
    null,
    one_of,
    setting,
    whole,
)

POLICIES = ("all", "auto", "hybrid", "small_only")
STORAGE_DTYPES = ("auto", "fp64", "fp32", "bf16", "fp16")
COMPUTE_DTYPES = ("float64", "float32", "auto")
DAMPING_MODES = ("absolute", "relative", "pi")
DAMPING = 1e-4
"""Of A and of G, where nothing else is said."""


@dataclass
class KFACSettings:
    """The K-FAC engine (``docs/math.md``, sections 1 to 7)."""

    policy: str = setting(
        "all",
        "Which layers take the Woodbury path on the G side (`docs/math.md`, section 4).",
        one_of(*POLICIES),
    )
    damping: float | None = setting(
        DAMPING,
        "Tikhonov damping added to the eigenvalues of A and of G; with `damping_mode=pi` that of "
        "their product; null: as `damping_A` and `damping_G` say.",
        above(0) | null,
    )
    damping_A: float | None = setting(
        None, "Damping of the A side alone; null: `damping`.", above(0) | null
    )
    damping_G: float | None = setting(
        None, "Damping of the G side alone; null: `damping`.", above(0) | null
    )
    damping_mode: str = setting(
        "absolute",
        "What a damping is a multiple of: `absolute`: of 1; `relative`: of the mean eigenvalue of "
        "each side; `pi`: the damping of the product is split by the sides' mean eigenvalues "
        "(Martens and Grosse 2015; `docs/math.md`, section 2).",
        one_of(*DAMPING_MODES),
    )
    max_condition_number: float | None = setting(
        1e6,
        "Damped eigenvalues are raised to the largest one over this number; null: no floor.",
        at_least(1) | null,
    )
    use_woodbury: bool = setting(True, "false: every layer dense, as with the policy `small_only`.")
    big_threshold: int = setting(
        4096, "`hybrid` sends a layer to Woodbury from this many outputs on.", whole(1)
    )
    auto_rho: float = setting(
        1.0, "`auto` takes Woodbury while tokens <= auto_rho * outputs.", at_least(0)
    )
    auto_t_max: int = setting(8192, "`auto` never takes Woodbury above this many tokens.", whole(1))
    eps: float = setting(
        1e-6,
        "First jitter of a Cholesky factorisation that failed, relative to the mean diagonal.",
        above(0),
    )
    true_fisher_head: bool = setting(
        False, "The exact Fisher factor of the softmax head (`docs/math.md`, section 5)."
    )
    fisher: str = setting(
        "empirical",
        "Labels from the data, sampled from the model, or their expectation.",
        one_of("empirical", "mc", "true"),
    )
    sharing: str = setting(
        "expand",
        "The rows of a layer: its tokens, or one an example, its mean input and its summed "
        "gradient (`docs/math.md`, section 1).",
        one_of("expand", "reduce"),
    )
    experts: str = setting(
        "each",
        "The matrices of a stack (experts): factors for each, or one pair over the tokens of all.",
        one_of("each", "pooled"),
    )
    n_samples: int = setting(1, "Label draws per token for `fisher=mc`.", whole(1))
    true_max_classes: int = setting(
        64, "`fisher=true` is exact for the inner layers up to this many classes.", whole(1)
    )
    fisher_scale: str = setting(
        "natural",
        "`exact` puts the factor T/N of the mean loss into the natural gradient.",
        one_of("natural", "exact"),
    )
    tied: str = setting(
        "head",
        "Whose factors precondition a weight that head and embedding share.",
        one_of("head", "embedding", "sum"),
    )
    ekfac: bool = setting(False, "Correct the eigenvalues in the Kronecker eigenbasis (EKFAC).")
    ekfac_unit: str = setting(
        "token",
        "Whose gradients EKFAC's eigenvalues are second moments of: each token's, or the sum over "
        "a sequence's tokens (`docs/math.md`, section 6).",
        one_of("token", "sequence"),
    )
    eigenvalue_correction: bool = setting(
        True, "Damped and floored eigenvalues; false: raw damped ones."
    )
    update_freq: int = setting(1, "Steps between two refreshes of the factors.", whole(1))
    ema_decay: float = setting(
        0.99,
        "Decay per refresh of the legacy diagonal Fisher; never touches K-FAC factors.",
        fraction(),
    )
    store_device: str = setting(
        "auto", "Where the Woodbury factors are kept.", one_of("auto", "cuda", "cpu")
    )
    store_limit_mb: float = setting(
        500.0,
        "`store_device=auto` keeps a layer's factors on the GPU below this many MB (1e6 bytes).",
        at_least(0),
    )
    woodbury_dtype: str = setting(
        "auto",
        "How token gradients are stored; auto: their own dtype. 16 bits where they are fewer than "
        "the outputs, else their own too.",
        one_of(*STORAGE_DTYPES),
    )
    core_dtype: str = setting(
        "float64",
        "Dtype of the accumulation and the decompositions; auto: float64, but float32 where it is "
        "measured to be over 8 times as fast.",
        one_of(*COMPUTE_DTYPES),
    )
    apply_dtype: str = setting(
        "float64", "Dtype in which the decompositions are applied.", one_of(*COMPUTE_DTYPES)
    )
    push_through: bool = setting(
        True, "The form without cancellation for the factors' own gradient (section 3)."
    )
    max_columns: int = setting(
        8192, "More tokens than this are reduced on the Woodbury path.", whole(1)
    )
    max_dense_dim: int = setting(
        16384, "No square matrix of a larger side is ever formed.", whole(1)
    )
    column_reduction: str = setting(
        "subsample",
        "How columns past `max_columns` are reduced.",
        one_of("subsample", "lowrank"),
    )
    include: list[str] = setting([], "Only layers that match one of these patterns; empty: all.")
    exclude: list[str] = setting([], "Layers that match one of these patterns are left out.")
    norm_layers: bool = setting(True, "Cover the scales and shifts of normalisation layers.")
    uncovered: str = setting(
        "passthrough",
        "What happens to the gradient of parameters that K-FAC does not cover: returned as it is, "
        "or divided by the damped diagonal Fisher of per-sequence gradients.",
        one_of("passthrough", "diagonal"),
    )
    reduce: str = setting(
        "gram",
        "How several processes join their factors; all equal on one process.",
        one_of("none", "gather", "gram"),
    )

    def check(self) -> Problems:
        """What the dampings ask of each other."""
        sides = self.damping_A, self.damping_G
        if self.damping is None and None in sides:
            yield "damping", "a number, or null with both damping_A and damping_G"
        if self.damping_mode == "pi" and self.damping is not None and sides != (None, None):
            yield "damping_mode", "absolute or relative with damping_A or damping_G beside damping"

    @property
    def lam_A(self) -> float:
        """Damping of the A sides, in the unit of ``damping_mode``."""
        return self._side(self.damping_A)

    @property
    def lam_G(self) -> float:
        """Damping of the G sides, in the unit of ``damping_mode``."""
        return self._side(self.damping_G)

    def _side(self, own: float | None) -> float:
        """A side's own damping, or the common one; half of the product's with ``pi``."""
        a, g, common = self.damping_A, self.damping_G, self.damping
        if self.damping_mode == "pi":
            return math.sqrt((a or 0.0) * (g or 0.0) if common is None else common)
        found = common if own is None else own
        assert found is not None  # as check() asks for
        return found

    @property
    def kappa_max(self) -> float | None:
        """The largest condition number that the floor allows; None for no floor."""
        return self.max_condition_number if self.eigenvalue_correction else None

    @property
    def policy_in_use(self) -> str:
        """The policy, or ``small_only`` without Woodbury."""
        return self.policy if self.use_woodbury else "small_only"


ARGUMENTS = {
    "policy": "kfac_policy",
    "use_woodbury": "kfac_use_woodbury",
    "big_threshold": "kfac_big_threshold",
    "auto_rho": "kfac_auto_rho",
    "auto_t_max": "kfac_auto_t_max",
    "true_fisher_head": "kfac_true_fisher_head",
    "eps": "kfac_eps",
    "store_device": "woodbury_store_device",
    "eigenvalue_correction": "use_eigenvalue_correction",
    "reduce": "kfac_distributed_reduce",
}
"""Fields whose keyword of the engine's constructor is not the key of the configuration."""

IN_PYTHON = {
    "damping": at_least(0) | null,
    "damping_A": at_least(0) | null,
    "damping_G": at_least(0) | null,
}
"""Fields that may be 0 in Python, where positive powers of the factors are applied too: what the
command line runs inverts them."""

BY_POSITION = (
    "damping", "damping_A", "damping_G", "max_condition_number", "kfac_use_woodbury", "kfac_policy",
    "kfac_big_threshold", "kfac_auto_rho", "kfac_auto_t_max", "kfac_true_fisher_head", "kfac_eps",
    "woodbury_store_device", "woodbury_dtype", "use_eigenvalue_correction", "update_freq",
    "ema_decay", "use_gpu_eigh", "show_progress", "kfac_distributed_reduce",
)  # fmt: skip
"""The order in which the engine's constructor took its arguments before it took an object."""


def named(values: Sequence[object], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of the engine's constructor; values by position get their names.

    Raises:
        TypeError: there are too many values, or one is given twice.
    """
    if not values:
        return dict(options)
    warnings.warn(
        "arguments of KFACNaturalGradient by position: name them (damping=...); in the next "
        "release only the settings come by position",
        DeprecationWarning,
        stacklevel=3,
    )
    if len(values) > len(BY_POSITION):
        raise TypeError(f"{len(values)} arguments by position; allowed: {len(BY_POSITION)}")
    given = dict(zip(BY_POSITION, values, strict=False))
    twice = sorted(set(given) & set(options))
    if twice:
        raise TypeError(f"got multiple values for argument {twice[0]!r}")
    return {**given, **options}


def settings_of(settings: KFACSettings | None, options: Mapping[str, Any]) -> KFACSettings:
    """Returns checked settings from what the engine's constructor was given.

    Args:
        settings: where to start from; None for the defaults.
        options: keyword of the constructor -> value; wins over ``settings``.

    Raises:
        SettingError: a value is out of range or misspelt.
        TypeError: an unknown keyword.
    """
    start = settings or KFACSettings()
    values = {}
    for item in dataclasses.fields(KFACSettings):
        argument = ARGUMENTS.get(item.name, item.name)
        value = options.get(argument, getattr(start, item.name))
        allowed = IN_PYTHON.get(item.name, item.metadata["allowed"])
        require(argument, value, allowed, _kind(item))
        values[item.name] = list(value) if isinstance(value, list | tuple) else value
    unknown = set(options) - {ARGUMENTS.get(name, name) for name in values}
    if unknown:
        raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
    made = KFACSettings(**values)
    for name, allowed in made.check():
        raise SettingError(
            f"{name}: {getattr(made, name)!r}; allowed: {allowed}".replace("null", "None")
        )
    return made


def require(name: str, value: object, allowed: Allowed | None, kind: type = float) -> None:
    """Checks a value that comes from Python.

    Args:
        name: of the argument, for the message.
        value: the value.
        allowed: what it may be; None where the type says it all.
        kind: its type; a ``float`` may be given as a whole number, a ``list`` as a tuple.

    Raises:
        SettingError: it is of another type, or not allowed. One line.
    """
    kinds = {float: (int, float), list: (list, tuple)}.get(kind, (kind,))
    good = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if value is None or (good and allowed is not None):
        good = allowed is not None and allowed.test(value)
    if not good:
        text = {bool: "True or False", list: "a list"}.get(kind, f"of type {kind.__name__}")
        text = allowed.text.replace("null", "None") if allowed else text
        raise SettingError(f"{name}: {value!r}; allowed: {text}")


def _kind(item: dataclasses.Field[Any]) -> type:
    """The type of a field's values; ``float | None`` is ``float``."""
    if item.default is dataclasses.MISSING:
        return list
    return float if item.default is None else type(item.default)


Engine = TypeVar("Engine", bound=type)


def documented(engine: Engine) -> Engine:
    """Prints the options into the signature of an engine's class and for ``{options}`` in its text.

    Args:
        engine: its constructor takes :class:`KFACSettings`, arguments of its own, and the options
            as further keywords.
    """
    given = inspect.signature(engine).parameters.values()
    own = [p for p in given if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    lines = []
    for item in dataclasses.fields(KFACSettings):
        argument = ARGUMENTS.get(item.name, item.name)
        default = getattr(KFACSettings(), item.name)
        kind = inspect.Parameter.KEYWORD_ONLY
        own.append(inspect.Parameter(argument, kind, default=default, annotation=item.type))
        allowed = item.metadata["allowed"]
        must = f"; {allowed.text}" if allowed is not None else ""
        text = f"{argument}: {item.metadata['meaning']} (default {show(default)}{must})"
        text = text.replace("null", "None")
        lines.append(textwrap.fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12))
    engine.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    if engine.__doc__ is not None:  # python -OO has none
        engine.__doc__ = engine.__doc__.replace("{options}", "\n".join(lines).lstrip())
    return engine
