"""What one measurement of the Sharpness Dimension holds, as JSON and as a self-contained page."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.errors import CheckpointError
from telltale.runs.files import write_atomically
from telltale.runs.html_report import Report, plotly_module
from telltale.signals.receipt import Receipt
from telltale.signals.sharpness_dimension import FEWEST, Breakdown
from telltale.signals.spectrum import Spectrum

DIMENSION_FILE = "sharpness_dimension.json"
"""What ``telltale sharpness measure`` leaves in a run directory."""
LEGEND = {"orientation": "h", "y": 1.12}
"""Above the plot: beside it, it lies on a second axis."""
SECOND_AXIS = {"overlaying": "y", "side": "right", "showgrid": False, "tickmode": "auto"}
RESIDUALS = ("asymmetry", "difference", "slope")
_TENSORS = ("nodes", "weights", "residuals")


@dataclass(frozen=True)
class Sharpness:
    """The Sharpness Dimension of one point, with everything that is needed to judge it."""

    sd: float
    interval: tuple[float, float] | None
    """Jackknife interval of ``sd`` at ``level``, over minibatches; None for fewer than 4 of them."""
    level: float
    codimension: float
    """Number of exponents - sd: the contracting directions that do not count."""
    breakdown: Breakdown
    conditioning: float
    """|z_cut|: an error of 1 in the sum of exponents moves ``sd`` by its reciprocal."""
    spectrum: Spectrum
    jacobian: str
    """The one-step map that was measured: "gd", or the optimizer's."""
    aggregate: str
    rate: float
    threshold: float
    """Eigenvalue in ``spectrum`` above which a step overshoots."""
    exponents: Tensor
    """ln sigma of every atom, float64, in the spectrum's order."""
    controls: dict[str, float]
    no_curvature: bool
    """H = 0 (a linear or constant loss, a dead network): sd = N is then no measure of sharpness."""
    excluded: dict[str, str]
    """Parameters that were left out, with the reason; N counts the others."""
    receipts: list[Receipt] = dataclasses.field(default_factory=list)
    """Residuals of each minibatch's products; see :mod:`telltale.signals.receipt`."""

    @property
    def size(self) -> int:
        """N."""
        return self.spectrum.size

    @property
    def minibatches(self) -> int:
        """Minibatch Hessians that were measured."""
        return len(set(self.spectrum.batch))

    @property
    def interval_text(self) -> str:
        """The interval in words and figures, with the number of minibatches, or why there is none."""
        if self.interval is None:
            return f"no interval: {self.minibatches} of the {FEWEST} minibatches that one takes at least"
        low, high = self.interval
        return f"[{low:,.1f}, {high:,.1f}], {self.level:.0%} over {self.minibatches} minibatches"

    @property
    def residual(self) -> float | None:
        """The largest residual of all receipts; None for a result of an earlier version, which has none."""
        return max((receipt.worst for receipt in self.receipts), default=None)

    @property
    def edge_ratio(self) -> float:
        """The largest node over ``threshold``: 1 is the edge of stability. A lower bound, as nodes lie inside the spectrum."""
        return self.spectrum.extremes()[1][0] / self.threshold

    def members(self) -> list[tuple[Tensor, Tensor]]:
        """Exponents (atoms,) and masses (atoms,) of each minibatch: the mean over the runs that share it."""
        nodes, batch = self.spectrum.nodes, self.spectrum.batch
        each = self.exponents.numel() // sum(part.numel() for part in nodes)
        parts = self.exponents.split([part.numel() * each for part in nodes])
        found = []
        for index in dict.fromkeys(batch):
            runs = [run for run, owner in enumerate(batch) if owner == index]
            mass = torch.cat([self.spectrum.weights[run] for run in runs]) * (self.size / len(runs))
            found.append((torch.cat([parts[run] for run in runs]), mass.repeat_interleave(each)))
        return found

    def save(self, path: str | Path) -> None:
        """Write the measurement as JSON, whole or not at all."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["breakdown"] = vars(self.breakdown)
        values["receipts"] = [vars(receipt) for receipt in self.receipts]
        values["exponents"] = self.exponents.tolist()
        values["spectrum"] = {
            name: [part.tolist() for part in value] if name in _TENSORS else value
            for name, value in vars(self.spectrum).items()
        }
        write_atomically(path, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Sharpness:
        """Read what :meth:`save` wrote; raises :class:`~telltale.errors.CheckpointError` for anything else."""
        try:
            values = json.loads(Path(path).read_text())
            atoms = values["spectrum"]
            for name in _TENSORS:
                atoms[name] = [torch.tensor(part, dtype=torch.float64) for part in atoms[name]]
            values["spectrum"] = Spectrum(**atoms)
            values["breakdown"] = Breakdown(**values["breakdown"])
            values["exponents"] = torch.tensor(values["exponents"], dtype=torch.float64)
            values["interval"] = None if values["interval"] is None else tuple(values["interval"])
            values["receipts"] = [Receipt(**one) for one in values.get("receipts", ())]
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no saved measurement: {error}") from error

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page: dimension with interval, where it comes from, the spectrum, the controls."""
        report = Report(
            f"Sharpness Dimension {self.sd:,.1f} of {self.size:,}",
            subtitle=f"Jacobian {self.jacobian}, rate {self.rate:g}, aggregate {self.aggregate}, "
            f"{self.spectrum.matvecs} products over {self.minibatches} minibatches",
        )
        report.cards(
            [
                (f"{self.sd:,.1f}", "Sharpness Dimension"),
                self._interval_card(),
                (f"{self.codimension:,.1f}", "codimension"),
                (f"{self.edge_ratio:.3g}", "of the edge of stability, minibatch Hessians"),
                (f"{self.conditioning:.3g}", "|z| at the cut: an error of 1 in the sum moves the dimension by 1/|z|"),
            ]
        )
        self.describe(report)
        return report.save(path)

    def _interval_card(self) -> tuple[str, str]:
        if self.interval is None:
            return "none", self.interval_text
        low, high = self.interval
        return f"{low:,.1f} – {high:,.1f}", f"{self.level:.0%} interval over {self.minibatches} minibatches"

    def describe(self, report: Report) -> None:
        """Add where the dimension comes from, the spectrum and the controls to ``report``."""
        if self.no_curvature:
            report.text("No curvature: H = 0, so every direction is null and the dimension is N.")
        report.heading("Where it comes from")
        rows = [(name, f"{value:,.5g}") for name, value in vars(self.breakdown).items()]
        report.table(("directions", "number"), rows)
        report.heading("Spectrum")
        for figure, caption in spectrum_figures(self):
            report.figure(figure, caption=caption)
        if self.receipts:
            report.heading("Receipts")
            report.table(
                ("minibatch", *RESIDUALS),
                [
                    (str(index), *(_residual(getattr(receipt, name)) for name in RESIDUALS))
                    for index, receipt in enumerate(self.receipts)
                ],
                caption="Relative residuals of the Hessian's products: `asymmetry`, `difference` from the change of the gradient, "
                "and of the gradient from the `slope` of the loss. "
                f"A residual above {self.receipts[0].tolerance:.2g} would have been refused.",
            )
        report.heading("Controls")
        report.table(("control", "value"), [(name, f"{value:,.6g}") for name, value in self.controls.items()])
        report.text(
            "Read the dimension against these: batch size, null space and train loss order networks much as it does. It "
            "does not predict generalisation alone."
        )


def _residual(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def spectrum_figures(found: Sharpness) -> list[tuple[Any, str]]:
    """The density of the eigenvalues, their atoms and the exponents of one step, as Plotly figures with captions."""
    return [
        (_density(found), "Smoothed spectral density, for the eye; on a log scale, since most directions are flat."),
        (_atoms(found), "Mass of each atom; together N."),
        (
            _exponents(found),
            "Exponents of one step from the largest down. Their sum from the left (dashed) turns negative at the dimension.",
        ),
    ]


def _density(found: Sharpness) -> Any:
    plotly = plotly_module()
    (low, _), (high, _) = found.spectrum.extremes()
    reach = max(high - low, 1e-12)
    grid = torch.linspace(low - 0.05 * reach, high + 0.05 * reach, 600, dtype=torch.float64)
    density = found.spectrum.density(grid, reach / 150).clamp_min(1e-12)
    figure = plotly.Figure(plotly.Scatter(x=grid.tolist(), y=density.tolist(), fill="tozeroy", line_color="#0b6e99"))
    return _on_eigenvalues(figure, found, "density")


def _atoms(found: Sharpness) -> Any:
    """A stem for each: bars would be as thin as the smallest gap between two atoms, which is nothing."""
    plotly = plotly_module()
    nodes, mass = found.spectrum.atoms()
    shown = mass > 0
    foot = float(mass[shown].min()) / 2
    places: list[float | None] = []
    heights: list[float | None] = []
    for place, height in zip(nodes[shown].tolist(), mass[shown].tolist(), strict=True):
        places += [place, place, None]
        heights += [foot, height, None]
    figure = plotly.Figure(plotly.Scatter(x=places, y=heights, mode="lines", line={"color": "#0b6e99", "width": 1}))
    return _on_eigenvalues(figure, found, "directions")


def _on_eigenvalues(figure: Any, found: Sharpness, label: str) -> Any:
    """Axes and, where the spectrum comes near it, the eigenvalue at which a step overshoots."""
    (low, _), (high, _) = found.spectrum.extremes()
    if found.threshold <= high + (high - low) / 2:
        figure.add_vline(x=found.threshold, line_dash="dot", line_color="#c8442b", annotation_text="edge")
    name = "eigenvalue" if found.jacobian == "gd" else "eigenvalue of rate * curvature, as the optimizer steps"
    figure.update_layout(
        xaxis_title=name, yaxis_title=label, yaxis_type="log", template="plotly_white", height=340, showlegend=False
    )
    return figure


def _exponents(found: Sharpness) -> Any:
    """Sorted exponents and their sum over the number of directions, of the mixture of all minibatches."""
    plotly = plotly_module()
    _, mass = found.spectrum.atoms()
    mass = mass.repeat_interleave(found.exponents.numel() // mass.numel())
    shown = torch.isfinite(found.exponents) & (mass > 0)
    order = found.exponents[shown].argsort(descending=True)
    values, mass = found.exponents[shown][order], mass[shown][order]
    directions = torch.cat([mass.new_zeros(1), mass.cumsum(0)]).tolist()
    sums = torch.cat([mass.new_zeros(1), (values * mass).cumsum(0)]).tolist()
    figure = plotly.Figure(
        plotly.Scatter(
            x=directions, y=[*values.tolist(), float(values[-1])], line={"shape": "hv", "color": "#0b6e99"}, name="ln σ"
        )
    )
    figure.add_scatter(x=directions, y=sums, yaxis="y2", name="sum", line={"color": "#b08968", "dash": "dash"})
    figure.add_vline(x=found.sd, line_dash="dot", line_color="#c8442b", annotation_text="SD")
    figure.update_layout(
        xaxis_title="directions",
        yaxis_title="ln σ",
        yaxis2=SECOND_AXIS | {"title": "sum", "zeroline": True, "zerolinecolor": "#b08968"},
        template="plotly_white",
        height=360,
        legend=LEGEND,
    )
    return figure
