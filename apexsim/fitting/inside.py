"""What an operator takes inside whole layers, where a device has both: tables of replays, and layers timed whole.

A replay runs one kernel again and again over the same few buffers; inside a layer other kernels come between, and
nothing that a kernel reads is where it left it. A form and its grid come from the replays, which cover far more shapes;
the layers add one smooth correction, on the few coordinates that they can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.forms.hardware import Array, Coefficients
from apexsim.costs.forms.residual import LogGrid
from apexsim.fitting.fit import Knots, fit_residual
from apexsim.fitting.problems import summary
from apexsim.specs.device import HoldOut, ResidualGrid


class InLayers(NamedTuple):
    """Rows of one operator inside layers of several models, and the knots of their correction.

    ``frame`` has the ``model``, the ``seconds`` and the ``weight`` of every row; ``predict`` is the form on them,
    nothing cached; ``coordinates`` are those of the operator's residual, whose axes ``knots`` names, all of them.
    """

    frame: pd.DataFrame
    predict: Callable[[pd.DataFrame, Coefficients], Array]
    coordinates: Callable[[pd.DataFrame], Sequence[Array]]
    knots: Knots

    def refine(self, c: Coefficients, grid: ResidualGrid) -> tuple[ResidualGrid, dict[str, HoldOut]]:
        """The grid with the correction in it; errors on the layers as they are found, and of every model left out.

        ``in_layers`` are the errors before the correction, ``in_layers_MODEL`` those under the layers of the others.
        """
        frame, where = self.frame, self.coordinates(self.frame)
        known = np.log(self.predict(frame, c)) + LogGrid.of(grid).log_factor(*where)
        left = np.log(frame["seconds"].to_numpy()) - known
        scores = {"in_layers": summary(np.abs(np.expm1(-left)))}
        for model in sorted(frame["model"].unique()):
            own = (frame["model"] == model).to_numpy()
            found = LogGrid.of(self._correction(left, where, ~own)).log_factor(*where)
            scores[f"in_layers_{model}"] = summary(np.abs(np.expm1(found - left))[own])
        return combined(grid, self._correction(left, where, np.ones(len(frame), bool))), scores

    def _correction(self, left: Array, where: Sequence[Array], rows: Array) -> ResidualGrid:
        part = [np.broadcast_to(x, left.shape)[rows] for x in where]
        return fit_residual(left[rows], self.frame["weight"].to_numpy()[rows], part, self.knots)


def combined(first: ResidualGrid, second: ResidualGrid) -> ResidualGrid:
    """Both corrections as one, on the knots of either: exact but for its whole percents."""
    axes = {name: tuple(sorted({*knots, *second.axes[name]})) for name, knots in first.axes.items()}
    everywhere = np.meshgrid(*axes.values(), indexing="ij")
    total = sum(LogGrid.of(grid).log_factor(*everywhere) for grid in (first, second))
    percent = np.rint(np.asarray(total) * 100).astype(int)
    width = percent.shape[-1]
    return ResidualGrid(axes=axes, percent=tuple(tuple(row) for row in percent.reshape(-1, width).tolist()))
