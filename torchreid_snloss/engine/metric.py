"""The training step that all engines share: one metric term, one softmax term."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchreid import metrics

from torchreid_snloss.engine.amp import Amp, autocast, check_amp, grad_scaler
from torchreid_snloss.engine.resumable import Resumable
from torchreid_snloss.losses import MetricLoss, check_number

__all__ = ["LossEngine", "MetricEngine", "check_weights"]

_COLLAPSED = 1e-2  # mean distance between features, in feature lengths


class MetricEngine(Resumable):
    """torchreid's engine with a metric loss on the features and a softmax loss on the logits.

    ``run``, ``train``, ``test`` and the evaluation are torchreid's own, and training is :class:`Resumable`. The
    progress line and TensorBoard show ``loss_m``, ``loss_x``, ``acc`` and the loss's ``statistics``.

    Args:
        datamanager: torchreid's ``ImageDataManager``. Its batches should hold several images an identity
            (``train_sampler='IdentitySampler'`` or torchreid's ``'RandomIdentitySampler'``).
        model: a model that returns ``(logits, features)`` in training, as torchreid's do when built with
            ``loss='triplet'`` (or ``'sn'``, ``'hap2s'``, ``'fidi'`` after :func:`torchreid_snloss.register`). Either
            may be a tuple or list of tensors (PCB, HACNN): the loss is the mean over them.
        optimizer: an optimizer over the model's parameters.
        criterion: the metric loss, called ``criterion(features, pids)`` with (batch, dimension) and (batch,).
        weight_m: weight of the metric term, >= 0; at 0 it is left out.
        weight_x: weight of the softmax term, likewise. Not both may be 0.
        scheduler: a learning rate scheduler, stepped once an epoch; None: the learning rate stays.
        use_gpu: use the GPU where there is one.
        label_smooth: smooth the labels of the softmax term by 0.1.
        amp: what the model is trained in: ``"off"`` float32, ``"bf16"`` or ``"fp16"`` mixed precision. The losses and
            the test stay in float32. With ``"fp16"`` the loss is scaled by what the progress line shows as ``scale``;
            a step whose gradient overflows is left out and halves it, and only at a scale of 1 counts as not finite.
        channels_last: see :class:`Resumable`.
        compile: likewise.

    Raises:
        ValueError: for a negative weight, two weights of 0, a model that gives no features, one that is on the CPU
            while ``use_gpu`` and a GPU say otherwise, or an ``amp`` that is unknown or can't be had.
    """

    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        weight_m: float = 1.0,
        weight_x: float = 1.0,
        scheduler: Any = None,
        use_gpu: bool = True,
        label_smooth: bool = True,
        amp: Amp = "off",
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(datamanager, use_gpu, channels_last=channels_last, compile=compile)
        check_weights(weight_m=weight_m, weight_x=weight_x)
        if self.use_gpu and not any(parameter.is_cuda for parameter in model.parameters()):
            raise ValueError("the model is on the CPU, but use_gpu is True: call model.cuda() first, or use_gpu=False")
        if getattr(getattr(model, "module", model), "loss", None) == "softmax":
            raise ValueError("the model was built with loss='softmax' and gives no features, build it with 'triplet'")
        device = "cuda" if self.use_gpu else "cpu"
        check_amp(amp, device)
        if amp == "bf16" and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            # Its threads take autocast over, but not the dtype, and would compute in float16.
            raise ValueError("amp bf16 does not work with nn.DataParallel on several GPUs; fp16 does")
        self.amp: Amp = amp
        self.scaler = grad_scaler(amp, device)
        self.model = model
        self.optimizer = optimizer
        self.register_model("model", model, optimizer, scheduler)
        self.weight_m = weight_m
        self.weight_x = weight_x
        self.criterion_m = criterion
        if isinstance(criterion, MetricLoss):
            criterion.collect_statistics = True
        self._collapsed = False
        self.criterion_x = nn.CrossEntropyLoss(label_smoothing=0.1 if label_smooth else 0.0)

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """One training step.

        Args:
            data: a batch of torchreid's, with ``img`` (batch, 3, height, width) and ``pid`` (batch,).

        Returns:
            what the progress line shows: ``loss_m``, ``loss_x``, ``acc`` in percent, the loss's statistics, and with
            float16 ``scale``.

        Raises:
            TypeError: if the model gives anything but ``(logits, features)``.
        """
        imgs, pids = self.parse_data_for_train(data)
        if self.use_gpu:
            imgs, pids = imgs.cuda(non_blocking=True), pids.cuda(non_blocking=True)

        # Batch norm's running means take a broken image in before the loss shows it.
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.options.nonfinite == "skip" else []
        with autocast(self.amp, imgs.device.type):
            outputs = self.model(imgs)
        if not (isinstance(outputs, (tuple, list)) and len(outputs) == 2):
            raise TypeError(
                f"in training the model must return (logits, features), got {type(outputs).__name__}; "
                "build a torchreid model with loss='triplet'"
            )
        logits, features = map(_at_least_float32, outputs)

        loss = torch.zeros((), device=imgs.device)
        summary: dict[str, Tensor] = {}
        if self.weight_m > 0:
            summary["loss_m"] = self.compute_loss(self.criterion_m, features, pids)
            loss = loss + self.weight_m * summary["loss_m"]
        if self.weight_x > 0:
            summary["loss_x"] = self.compute_loss(self.criterion_x, logits, pids)
            loss = loss + self.weight_x * summary["loss_x"]
            summary["acc"] = metrics.accuracy(logits, pids)[0]

        statistics = getattr(self.criterion_m, "statistics", {}) if self.weight_m > 0 else {}
        values = self.optimize(loss, {**summary, **statistics})
        if values is None:
            for buffer, before in zip(self.model.buffers(), buffers):
                buffer.copy_(before)
            return {}
        self._warn_of_collapse(values.pop("spread", 1.0))
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def optimize(self, loss: Tensor, summary: dict[str, Tensor]) -> dict[str, float] | None:
        """Changes the weights by the gradient of ``loss``, unless something is not finite.

        Args:
            loss: a scalar.
            summary: scalars to show; the terms of the loss among them.

        Returns:
            the summary as numbers; None if the step was skipped.

        Raises:
            NonFiniteError: for a NaN or infinite term or gradient, where the run's options say ``"stop"``.
        """
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
        else:
            one = torch.ones_like(loss)
            summary["scale"] = self.scaler.scale(one)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self.scaler.update()  # and not step(), which waits for the GPU to see whether there is an overflow
            summary["lowered"] = self.scaler.scale(one) < summary["scale"]
        summary["gradient"] = _gradient_norm(self.optimizer)
        # One trip to the CPU for all values, since each is a wait for the GPU; and before the weights change.
        stacked = torch.stack([value.detach().float().reshape(()) for value in summary.values()])
        values = dict(zip(summary, stacked.tolist()))
        gradient = values.pop("gradient")
        # The scaler is looking for the largest scale that float16 takes; below 1 there is none.
        overflow = values.pop("lowered", 0.0) > 0 and values["scale"] > 1
        terms = {name: value for name, value in values.items() if name in ("loss_m", "loss_x")}
        if not overflow:
            terms["gradient"] = gradient
        if not self.check_finite(terms):
            if self.scaler is not None:
                self.scaler.update(values["scale"])  # a broken image says nothing about it
            return None
        if not overflow:
            self.optimizer.step()
        return values

    def _warn_of_collapse(self, spread: float) -> None:
        if spread < _COLLAPSED and not self._collapsed:
            self._collapsed = True
            print(
                f"** The features collapse to one point: images are {spread:.1e} feature lengths apart. Try a smaller "
                "learning rate, a larger weight_x, or another scale, sigma or beta of the loss"
            )


def _at_least_float32(output: Any) -> Any:
    """A model's output, a tensor or several, for the losses."""
    if isinstance(output, Tensor):
        return output.to(torch.promote_types(output.dtype, torch.float32))
    return [_at_least_float32(tensor) for tensor in output]


def _gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if hasattr(nn.utils, "get_total_norm"):
        norm: Tensor = nn.utils.get_total_norm(gradients)
    else:  # torch < 2.6
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def check_weights(**weights: float) -> None:
    """Raises TypeError or ValueError unless the weights are numbers, at least 0 and not all 0."""
    for name, value in weights.items():
        check_number(name, value)
    if min(weights.values()) < 0 or sum(weights.values()) == 0:
        given = ", ".join(f"{name}={value}" for name, value in weights.items())
        raise ValueError(f"{' and '.join(weights)} must be at least 0 and not both 0, got {given}")


class LossEngine(MetricEngine):
    """A :class:`MetricEngine` that builds its loss, ``loss_class``, from the loss's own keywords.

    A subclass names the loss, and is otherwise empty. Keywords that are not the engine's go to the loss, whose
    constructor holds their defaults and checks them; ``help()`` shows both.
    """

    loss_class: ClassVar[type[MetricLoss]]

    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        weight_m: float = 1.0,
        weight_x: float = 1.0,
        scheduler: Any = None,
        use_gpu: bool = True,
        label_smooth: bool = True,
        amp: Amp = "off",
        channels_last: bool = False,
        compile: bool = False,
        **loss_options: Any,
    ) -> None:
        super().__init__(
            datamanager,
            model,
            optimizer,
            criterion=self.loss_class(**loss_options),
            weight_m=weight_m,
            weight_x=weight_x,
            scheduler=scheduler,
            use_gpu=use_gpu,
            label_smooth=label_smooth,
            amp=amp,
            channels_last=channels_last,
            compile=compile,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "loss_class"):  # a base for others, as one for video
            return
        own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        loss = [
            p.replace(kind=p.KEYWORD_ONLY)
            for name, p in inspect.signature(cls.loss_class).parameters.items()
            if name != "reduction"
        ]
        cls.__signature__ = inspect.Signature([*own[1:], *loss])
