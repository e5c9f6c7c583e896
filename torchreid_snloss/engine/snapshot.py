"""What a step changes besides weights, for a step that is taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

__all__ = ["take_snapshot"]


def take_snapshot(*models: nn.Module) -> Callable[[], None]:
    """Returns a function that gives the buffers of models and their modules' extra states back their values of now."""
    modules = [module for model in models for module in model.modules()]
    # A module may put another tensor in a buffer's place, so the tensor is kept as well as its values.
    buffers = [
        (module, {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None})
        for module in modules
    ]
    has_extra = [module for module in modules if type(module).get_extra_state is not nn.Module.get_extra_state]
    extra = [(module, copy.deepcopy(module.get_extra_state())) for module in has_extra]

    def undo() -> None:
        for module, kept in buffers:
            for name in module._buffers:
                module._buffers[name] = None
            for name, (buffer, values) in kept.items():
                module._buffers[name] = buffer.copy_(values)
        for module, state in extra:
            module.set_extra_state(state)

    return undo
