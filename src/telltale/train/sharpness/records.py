"""Readings of the monitor as CSV and for TensorBoard. Both are given to a monitor's ``on_reading``."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import TracebackType

from telltale.errors import CheckpointError, MissingExtraError
from telltale.train.sharpness.monitor import Reading

COLUMNS = [field.name for field in dataclasses.fields(Reading) if field.name != "sd_interval"] + ["sd_low", "sd_high"]
SCALARS = ("ratio", "ratio_error", "lambda_max", "lambda_min", "rate", "loss", "slope", "sd", "cost_share")


class CsvRecords:
    """A row per reading in the file ``path``, appended; a new file begins with the names of the columns.

    Raises :class:`~telltale.errors.CheckpointError` if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, reading: Reading) -> None:
        """Append ``reading``."""
        low, high = reading.sd_interval or (None, None)
        row = dataclasses.asdict(reading) | {"sd_low": low, "sd_high": high}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists() or self.path.stat().st_size == 0
            with self.path.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise CheckpointError(f"could not append to {self.path}: {error}") from error


class TensorBoardRecords:
    """Scalars ``sharpness/...`` by step in the event folder ``log_dir``; close it, or use it in a with block.

    Raises :class:`~telltale.errors.MissingExtraError` without TensorBoard.
    """

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("event files need TensorBoard: pip install 'telltale[monitor]'") from error
        self._writer = SummaryWriter(str(log_dir))

    def __call__(self, reading: Reading) -> None:
        """Write every value that ``reading`` has."""
        for name in SCALARS:
            value = getattr(reading, name)
            if value is not None:
                self._writer.add_scalar(f"sharpness/{name}", value, reading.step)
        self._writer.add_text("sharpness/state", reading.state, reading.step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()

    def __enter__(self) -> TensorBoardRecords:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
