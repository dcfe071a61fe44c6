"""A training run on the terminal (of the first rank): a live bar with the loss, and a line at every held-out evaluation."""

from __future__ import annotations

from rich.console import Console

from telltale.models.exits import ExitQuality
from telltale.runs.progress import ProgressBar
from telltale.train.loop import Callback, StepState, TrainResult
from telltale.train.pipeline.job import Watcher


class _LiveBar:
    """A bar that opens with the first step and closes once; one per run."""

    def __init__(self, total_steps: int, *, console: Console | None = None, description: str = "training") -> None:
        self.bar = ProgressBar(description, total_steps, console=console)
        self._open = False

    def close(self) -> None:
        """Close the bar."""
        if self._open:
            self.bar.__exit__(None, None, None)
            self._open = False

    def _move(self, step: int, note: str) -> None:
        if not self._open:
            self.bar.__enter__()
            self._open = True
        self.bar.update(step, note)

    def _held_out(self, step: int, losses: str) -> None:
        self.bar.console.print(f"step {step}  held-out  {losses}", highlight=False)


class LiveDisplay(_LiveBar, Callback):
    """Callback that draws progress while the run lasts; use it once per run."""

    def on_step_end(self, state: StepState) -> None:
        """Move the bar."""
        self._move(state.step, f"loss {state.loss:.3f}")

    def on_evaluate(self, step: int, quality: ExitQuality) -> None:
        """Print the loss of the first, middle and last exit."""
        layers = len(quality.losses)
        shown = sorted({max(1, layers // 4), layers // 2, layers})
        self._held_out(step, "  ".join(f"exit {e}: {quality.losses[e - 1]:.3f} nats" for e in shown))

    def on_end(self, result: TrainResult) -> None:
        """Close the bar."""
        self.close()

    def on_abort(self) -> None:
        """Close the bar."""
        self.close()


class LiveWatcher(_LiveBar, Watcher):
    """Draws progress while the run lasts; use it once per run."""

    def on_step(self, step: int, loss: float | None) -> None:
        """Move the bar; losses come from the last stage at the end of a span."""
        self._move(step, "" if loss is None else f"loss {loss:.3f}")

    def on_evaluate(self, step: int, loss: float) -> None:
        """Print the held-out objective."""
        self._held_out(step, f"{loss:.3f} nats")
