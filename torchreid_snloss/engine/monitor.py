"""What a run should be warned of while it trains."""

from __future__ import annotations

__all__ = ["CollapseMonitor"]

_COLLAPSED = 1e-2  # mean distance between features, in feature lengths


class CollapseMonitor:
    """Warns once when the features come together in one point, from which training seldom recovers."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, spread: float) -> None:
        """Takes in a step.

        Args:
            spread: mean distance between features, in mean feature lengths.
        """
        if spread < _COLLAPSED and not self._warned:
            self._warned = True
            print(
                f"** The features collapse to one point: images are {spread:.1e} feature lengths apart. Try a smaller "
                "learning rate, a larger weight_x, or another scale, sigma or beta of the loss"
            )
