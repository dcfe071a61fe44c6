"""Several measured points of one run as one: nearer to the definition's supremum over the attractor than a single one."""

from __future__ import annotations

from collections.abc import Sequence

from telltale.errors import DataError
from telltale.signals.attractor import attractor_dimension
from telltale.train.sharpness.result import Sharpness


def over_checkpoints(points: Sequence[Sharpness], *, over: str = "sup") -> float:
    """SD of the points together: of each rank the largest exponent among them ("sup") or the average ("mean").

    Take points between which training has settled, on the same minibatches, such as the last of a monitor's ``dimensions``.
    "sup" is at least the SD of each. Aggregate and Jacobian are those of the points.

    Raises :class:`~telltale.errors.DataError` for no points, and for points that differ in model, minibatches, Jacobian or
    aggregate.
    """
    kinds = {(point.size, point.jacobian, point.aggregate) for point in points}
    if len(kinds) != 1:
        raise DataError(
            f"the points are of {len(kinds)} kinds (size, Jacobian, aggregate); expected points of one kind."
        )
    return attractor_dimension([point.members() for point in points], over=over, aggregate=points[0].aggregate)
