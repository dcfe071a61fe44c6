"""A training run on the terminal (of the first rank): a live bar with the loss, and a line at every held-out evaluation."""

from __future__ import annotations

from rich.console import Console

from telltale.models.exits import ExitQuality
from telltale.runs.progress import ProgressBar
from telltale.train.loop import Callback, StepState, TrainResult
from telltale.train.pipeline.job import Watcher


class LiveDisplay(Callback):
    """Callback that draws progress while the run lasts; use it once per run."""

    def __init__(self, total_steps: int, *, console: Console | None = None, description: str = "training") -> None:
        self.bar = ProgressBar(description, total_steps, console=console)
        self._open = False

    def on_step_end(self, state: StepState) -> None:
        """Move the bar."""
        if not self._open:
            self.bar.__enter__()
            self._open = True
        self.bar.update(state.step, f"loss {state.loss:.3f}")

    def on_evaluate(self, step: int, quality: ExitQuality) -> None:
        """Print the loss of the first, middle and last exit."""
        layers = len(quality.losses)
        shown = sorted({max(1, layers // 4), layers // 2, layers})
        parts = "  ".join(f"exit {e}: {quality.losses[e - 1]:.3f} nats" for e in shown)
        self.bar.console.print(f"step {step}  held-out  {parts}", highlight=False)

    def on_end(self, result: TrainResult) -> None:
        """Close the bar."""
        self.on_abort()

    def on_abort(self) -> None:
        """Close the bar."""
        if self._open:
            self.bar.__exit__(None, None, None)
            self._open = False


class LiveWatcher(Watcher):
    """Draws progress while the run lasts; use it once per run."""

    def __init__(self, total_steps: int, *, console: Console | None = None) -> None:
        self.bar = ProgressBar("training", total_steps, console=console)
        self._open = False

    def on_step(self, step: int, loss: float | None) -> None:
        """Move the bar; losses come from the last stage at the end of a span."""
        if not self._open:
            self.bar.__enter__()
            self._open = True
        self.bar.update(step, "" if loss is None else f"loss {loss:.3f}")

    def on_evaluate(self, step: int, loss: float) -> None:
        """Print the held-out objective."""
        self.bar.console.print(f"step {step}  held-out  {loss:.3f} nats", highlight=False)

    def close(self) -> None:
        """Close the bar."""
        if self._open:
            self.bar.__exit__(None, None, None)
            self._open = False
