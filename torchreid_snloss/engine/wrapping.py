"""torchreid's own engines, with this package's training loop."""

from __future__ import annotations

from typing import Any

from torchreid_snloss.engine.loop import TrainingLoop

__all__ = ["with_training_loop"]


def with_training_loop(cls: type[Any]) -> type[TrainingLoop]:
    """Adds `TrainingLoop` as the first base of a torchreid engine class; returns a subclass of it unchanged."""
    if issubclass(cls, TrainingLoop):
        return cls

    def compute_loss(self: Any, criterion: Any, outputs: Any, targets: Any) -> Any:
        loss = cls.compute_loss(self, criterion, outputs, targets)
        self.check_finite({type(criterion).__name__: float(loss.detach())})
        return loss

    attributes = {"__doc__": cls.__doc__, "compute_loss": compute_loss}
    made: type[TrainingLoop] = type(cls.__name__, (TrainingLoop, cls), attributes)
    return made
