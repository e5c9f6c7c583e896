"""The training step that all engines share: one metric term, one softmax term."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchreid import engine, metrics

from torchreid_snloss.losses import MetricLoss, check_number

__all__ = ["LossEngine", "MetricEngine", "check_weights"]


class MetricEngine(engine.Engine):
    """torchreid's engine with a metric loss on the features and a softmax loss on the logits.

    ``run``, ``train``, ``test`` and the evaluation are torchreid's own. The progress line and TensorBoard show
    ``loss_m``, ``loss_x`` and ``acc``.

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

    Raises:
        ValueError: for a negative weight, two weights of 0, a model that gives no features, or one that is on the CPU
            while ``use_gpu`` and a GPU say otherwise.
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
    ) -> None:
        super().__init__(datamanager, use_gpu)
        check_weights(weight_m=weight_m, weight_x=weight_x)
        if self.use_gpu and not any(parameter.is_cuda for parameter in model.parameters()):
            raise ValueError("the model is on the CPU, but use_gpu is True: call model.cuda() first, or use_gpu=False")
        if getattr(getattr(model, "module", model), "loss", None) == "softmax":
            raise ValueError("the model was built with loss='softmax' and gives no features, build it with 'triplet'")
        self.model = model
        self.optimizer = optimizer
        # torchreid's save_model() asks every scheduler for its state, also where there is none.
        self.scheduler = scheduler or torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
        self.register_model("model", model, optimizer, self.scheduler)
        self.weight_m = weight_m
        self.weight_x = weight_x
        self.criterion_m = criterion
        self.criterion_x = nn.CrossEntropyLoss(label_smoothing=0.1 if label_smooth else 0.0)

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """One training step.

        Args:
            data: a batch of torchreid's, with ``img`` (batch, 3, height, width) and ``pid`` (batch,).

        Returns:
            what the progress line shows: ``loss_m``, ``loss_x``, and ``acc`` in percent.

        Raises:
            TypeError: if the model gives anything but ``(logits, features)``.
        """
        imgs, pids = self.parse_data_for_train(data)
        if self.use_gpu:
            imgs, pids = imgs.cuda(non_blocking=True), pids.cuda(non_blocking=True)

        outputs = self.model(imgs)
        if not (isinstance(outputs, (tuple, list)) and len(outputs) == 2):
            raise TypeError(
                f"in training the model must return (logits, features), got {type(outputs).__name__}; "
                "build a torchreid model with loss='triplet'"
            )
        logits, features = outputs

        loss = torch.zeros((), device=imgs.device)
        summary: dict[str, Tensor] = {}
        if self.weight_m > 0:
            summary["loss_m"] = self.compute_loss(self.criterion_m, features, pids)
            loss = loss + self.weight_m * summary["loss_m"]
        if self.weight_x > 0:
            summary["loss_x"] = self.compute_loss(self.criterion_x, logits, pids)
            loss = loss + self.weight_x * summary["loss_x"]
            summary["acc"] = metrics.accuracy(logits, pids)[0]

        self.optimize(loss)

        # One trip to the CPU for the whole summary, since each is a wait for the GPU.
        values = torch.stack([value.detach().float().reshape(()) for value in summary.values()]).tolist()
        return dict(zip(summary, values))

    def optimize(self, loss: Tensor) -> None:
        """Changes the weights by the gradient of ``loss``, a scalar."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        # rank-1 comes as a NumPy scalar, which torch.load refuses since torch 2.6.
        super().save_model(epoch, float(rank1), save_dir, is_best=is_best)


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
