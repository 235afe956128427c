"""What the spectral engines return: mappings whose keys are attributes too, and their pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from fisher_lab.results.labels import number
from fisher_lab.results.notebook import html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Keyed(dict[str, Any]):
    """A mapping whose keys are attributes too; it is written as the JSON object that it was."""

    SHOWN: tuple[str, ...] = ()
    """The keys that stand for the whole."""

    def __getattr__(self, name: str) -> Any:
        """The value of a key."""
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; there are {', '.join(self)}")

    @override
    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self]

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, _text(self[name])) for name in self.SHOWN if name in self]

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v}' for n, v in self._rows())})"

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self._rows())


def _text(value: Any) -> str:
    if isinstance(value, list):
        some = ", ".join(map(_text, value[:4]))
        return f"[{some}{f', ... {len(value)} in all' if len(value) > 4 else ''}]"
    return number(value, "g") if isinstance(value, float) else str(value)


class BlockSpectrum(Keyed):
    """The spectrum of one block, or of the union of all."""

    SHOWN = ("status", "reason", "n_nonzero", "trace", "largest_eigenvalue", "effective_rank")


class FisherSpectrum(Keyed):
    """The spectra of a model's blocks.

    Attributes:
        metadata: how they were computed.
        per_block: block name -> :class:`BlockSpectrum`.
        union: all blocks together; its key is ``global``.
    """

    @property
    def union(self) -> BlockSpectrum:
        """All blocks together."""
        return self["global"]

    @override
    def _rows(self) -> list[tuple[str, str]]:
        about = self["metadata"]
        rows = [("blocks", f"{len(self['per_block'])} by {about['block_structure']}")]
        rows.append(("samples", f"{about['n_samples']} by {about['sample_unit']}"))
        return rows + self.union._rows()

    def plot(self) -> Figure:
        """The eigenvalues of the blocks by rank."""
        from fisher_lab.results.curve_figures import spectrum_figure

        return spectrum_figure(self)


class Eigenpairs(Keyed):
    """Eigenvalues of Lanczos with their residuals."""

    SHOWN = ("operator", "block", "eigenvalues", "residuals", "converged", "n_products")

    def plot(self) -> Figure:
        """The eigenvalues with their residuals."""
        from fisher_lab.results.curve_figures import eigenvalue_figure

        return eigenvalue_figure(self)


class SpectralDensity(Keyed):
    """A density of eigenvalues on a grid, with its interval."""

    SHOWN = ("operator", "block", "scale", "mass_at_zero", "steps", "exact", "space")

    def plot(self) -> Figure:
        """The density with its band."""
        from fisher_lab.results.curve_figures import run_density_figure

        return run_density_figure(self)


class LanczosAnalysis(Keyed):
    """Eigenpairs, density, trace and effective dimension from one set of products."""

    @override
    def _rows(self) -> list[tuple[str, str]]:
        rows = self["top"]._rows()
        for name in ("trace", "effective_dimension"):
            if name in self:
                found = self[name]
                ends = (number(found[end], "g") for end in ("value", "low", "high"))
                rows.append((name, "{} ({} to {})".format(*ends)))
        return rows

    def plot(self) -> Figure:
        """The density, or the eigenvalues where there is none."""
        return self["density"].plot() if "density" in self else self["top"].plot()
