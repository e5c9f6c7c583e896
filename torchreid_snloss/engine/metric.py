"""The training step that all engines share: one metric term, one softmax term."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchreid import metrics

from torchreid_snloss import distributed
from torchreid_snloss.data.shards import shard_training
from torchreid_snloss.engine.amp import Amp, autocast, check_amp, grad_scaler
from torchreid_snloss.engine.caching import cached_forward
from torchreid_snloss.engine.resumable import Resumable
from torchreid_snloss.losses import (
    Criterion,
    GlobalBatchLoss,
    Memory,
    MetricLoss,
    check_integer,
    check_number,
    quotients,
)

__all__ = ["LossEngine", "MetricEngine", "check_weights"]

_COLLAPSED = 1e-2  # mean distance between features, in feature lengths


class MetricEngine(Resumable):
    """torchreid's engine with any losses on the features and a softmax loss on the logits.

    ``run``, ``train``, ``test`` and the evaluation are torchreid's own, and training is :class:`Resumable`. The
    progress line and TensorBoard show ``loss_m`` (or a name each, of several), ``loss_x``, ``acc`` and the
    ``statistics`` of this package's losses.

    On several processes (:mod:`torchreid_snloss.distributed`) a batch of the data manager's is the batch of all: each
    process trains on its part, and its anchors are compared with the features of all. Loss and gradients are those of
    one process with the whole batch, but for batch norm, which sees a process's own images without ``sync_batchnorm``.

    Args:
        datamanager: torchreid's ``ImageDataManager``. Its batches should hold several images an identity
            (``train_sampler='IdentitySampler'`` or torchreid's ``'RandomIdentitySampler'``).
        model: a model that returns ``(logits, features)`` in training, as torchreid's do when built with
            ``loss='triplet'`` (or ``'sn'``, ``'hap2s'``, ``'fidi'`` after :func:`torchreid_snloss.register`). Either
            may be a tuple or list of tensors (PCB, HACNN): the loss is the mean over them.
        optimizer: an optimizer over the model's parameters.
        criterion: the metric loss, called ``criterion(features, pids)`` with (batch, dimension) and (batch,), which
            gives a scalar: this package's, torchreid's, pytorch-metric-learning's, a function. Or several, by names.
            Parameters of its own must be in the optimizer.
        weight_m: weight of the metric term, >= 0; at 0 it is left out. Of several criteria, weights by their names.
        weight_x: weight of the softmax term, >= 0; at 0 it is left out. Not both may be 0.
        scheduler: a learning rate scheduler, stepped once an epoch; None: the learning rate stays.
        use_gpu: use the GPU where there is one.
        label_smooth: smooth the labels of the softmax term by 0.1.
        amp: what the model is trained in: ``"off"`` float32, ``"bf16"`` or ``"fp16"`` mixed precision. The losses and
            the test stay in float32. With ``"fp16"`` the loss is scaled by what the progress line shows as ``scale``;
            a step whose gradient overflows is left out and halves it, and only at a scale of 1 counts as not finite.
        micro_batch: the most images of a process that the model takes at a time, with the gradient of the whole batch
            (exact but for batch norm, see :func:`cached_forward`), for batches larger than the memory holds; 0: all.
        memory_size: features of earlier batches that the loss has as further references; 0: none.
        memory_start_epoch: the epoch, from 0, in which the memory starts.
        sync_batchnorm: normalise by the statistics of all processes' images; on GPUs.
        channels_last: see :class:`Resumable`.
        compile: likewise.

    Raises:
        TypeError, ValueError: for a negative weight, two weights of 0, a model that gives no features, one that is on
            the CPU while ``use_gpu`` and a GPU say otherwise, an ``amp`` that is unknown or can't be had, a size that
            is no integer of at least 0, a batch that is too small for the processes, a memory with a criterion of
            another kind, parameters of a criterion that nothing trains.
    """

    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion | Mapping[str, Criterion],
        weight_m: float | Mapping[str, float] = 1.0,
        weight_x: float = 1.0,
        scheduler: Any = None,
        use_gpu: bool = True,
        label_smooth: bool = True,
        amp: Amp = "off",
        micro_batch: int = 0,
        memory_size: int = 0,
        memory_start_epoch: int = 0,
        sync_batchnorm: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(datamanager, use_gpu, channels_last=channels_last, compile=compile)
        criteria = dict(criterion) if isinstance(criterion, Mapping) else {"m": criterion}
        weights = dict(weight_m) if isinstance(weight_m, Mapping) else {"m": weight_m}
        if weights.keys() != criteria.keys() or not criteria:
            raise ValueError(f"weight_m must have the criteria's names {list(criteria)}, got {weight_m}")
        for name, value in criteria.items():
            if not name.isidentifier() or name == "x" or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"a criterion can't be named {name!r}: a word that is not taken, and not 'x', the softmax's"
                )
            if not callable(value):
                raise TypeError(f"the criterion {name!r} must be called with features and pids, got {value!r}")
        check_weights(**{f"weight_{name}": weight for name, weight in {**weights, "x": weight_x}.items()})
        self.micro_batch = check_integer("micro_batch", micro_batch, at_least=0)
        self.memory_start_epoch = check_integer("memory_start_epoch", memory_start_epoch, at_least=0)
        memory = Memory(memory_size) if check_integer("memory_size", memory_size, at_least=0) else None
        if distributed.world_size() > 1:
            self.train_loader = shard_training(self.train_loader)
        if self.use_gpu and not any(parameter.is_cuda for parameter in model.parameters()):
            raise ValueError("the model is on the CPU, but use_gpu is True: call model.cuda() first, or use_gpu=False")
        if getattr(getattr(model, "module", model), "loss", None) == "softmax":
            raise ValueError("the model was built with loss='softmax' and gives no features, build it with 'triplet'")
        device = "cuda" if self.use_gpu else "cpu"
        if sync_batchnorm and device == "cpu":
            raise ValueError("sync_batchnorm takes GPUs, torch has it for no CPU")
        check_amp(amp, device)
        if amp == "bf16" and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            # Its threads take autocast over, but not the dtype, and would compute in float16.
            raise ValueError("amp bf16 does not work with nn.DataParallel on several GPUs; fp16 does")
        self.amp: Amp = amp
        if micro_batch and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError("micro_batch does not work with nn.DataParallel on several GPUs; start it with torchrun")
        self.scaler = grad_scaler(amp, device)
        # The modules are new, the parameters in them, which the optimizer has, are not.
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if sync_batchnorm else model
        self.optimizer = optimizer
        self.register_model("model", self.model, optimizer, scheduler)
        self.weights = weights
        self.weight_x = weight_x
        self._outputs = _Outputs(self.model)
        self.memory = memory
        self.criteria = GlobalBatchLoss(criteria, memory).to(device)
        distributed.broadcast_module(self.criteria)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        untrained = [name for name, p in self.criteria.named_parameters() if p.requires_grad and id(p) not in held]
        if untrained:
            raise ValueError(f"the criterion has parameters that the optimizer does not: {untrained}")
        self._parallel: tuple[DistributedDataParallel, list[bool]] | None = None
        for loss in criteria.values():
            if isinstance(loss, MetricLoss):
                loss.collect_statistics = True
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
        counts = distributed.gather_counts(len(imgs))
        self._outputs.used = self.weight_x > 0, any(self.weights.values())
        # As many on every process, since each takes part in what all do.
        micro_batches = -(-max(counts) // self.micro_batch) if self.micro_batch else 1
        if micro_batches > 1:
            if micro_batches > min(counts):
                raise ValueError(f"{micro_batches} micro-batches of a process, but one has {min(counts)} images alone")
            outputs, propagate = cached_forward(self._trained(), self._outputs, imgs, micro_batches, self.amp)
        else:
            with autocast(self.amp, imgs.device.type):
                outputs, propagate = self._trained()(imgs), None
        logits, features = map(_at_least_float32, outputs)

        # The mean over processes is the whole batch's, where each has its share of it.
        share = len(imgs) * len(counts) / sum(counts)
        loss = torch.zeros((), device=imgs.device)
        summary: dict[str, Tensor] = {}
        remembered = None if self.memory is None else self.memory.state_dict()
        for name, value in self._metric_terms(data, features, pids, counts).items():
            summary[f"loss_{name}"] = value
            loss = loss + self.weights[name] * value
        if self.weight_x > 0:
            summary["loss_x"] = self.compute_loss(self.criterion_x, logits, pids) * share
            loss = loss + self.weight_x * summary["loss_x"]
            summary["acc"] = metrics.accuracy(logits, pids)[0] * share

        values = self.optimize(loss, summary, propagate)
        if values is None:
            for buffer, before in zip(self.model.buffers(), buffers):
                buffer.copy_(before)
            if self.memory is not None and remembered is not None:
                self.memory.load_state_dict(remembered)  # without the broken batch
            return {}
        for name in [f"{name}spread" for name in ("", *(f"{name}_" for name in self.weights))]:
            self._warn_of_collapse(values.pop(name, 1.0))
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _trained(self) -> nn.Module:
        """The model, or what averages its gradients over the processes, made anew when layers open or close."""
        if distributed.world_size() == 1:
            return self._outputs
        used = self._outputs.used
        trained = [*used, *(parameter.requires_grad for parameter in self.model.parameters())]
        if self._parallel is None or self._parallel[1] != trained:
            # Buffers are averaged where they are used, which is not in training.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            wrapped = DistributedDataParallel(self._outputs, find_unused_parameters=not all(used), **options)
            self._parallel = wrapped, trained
        return self._parallel[0]

    def _check_gradients(self) -> None:
        """Where one is missing, DistributedDataParallel leaves others as they are, and says so a step later."""
        if self._parallel is None or not all(self._outputs.used):
            return
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            raise ValueError(f"nothing in the loss depends on {missing}; on several processes freeze such parameters")

    def _metric_terms(self, data: dict[str, Any], features: Any, pids: Tensor, counts: list[int]) -> dict[str, Tensor]:
        """The metric losses; of a model with several features an image, their mean over these."""
        names = [name for name, weight in self.weights.items() if weight > 0]
        images = None
        if self.memory is not None and names:
            if not isinstance(features, Tensor):
                raise TypeError("a memory takes a model with one feature an image, this one has several")
            if "impath" not in data:
                raise TypeError("a memory takes image batches with the images' paths, 'impath'")
            images = torch.tensor([_number_of(path) for path in data["impath"]], device=features.device)
            self.memory.in_use = self.epoch >= self.memory_start_epoch
        several = [features] if isinstance(features, Tensor) else features
        terms = [self.criteria(feature, pids, images, names, counts) for feature in several] if names else []
        for name, value in terms[0].items() if terms else ():
            if not (isinstance(value, Tensor) and value.numel() == 1):
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"the criterion {name!r} must give a scalar tensor, got {what}")
        return {name: torch.stack([term[name].reshape(()) for term in terms]).mean() for name in names}

    def optimize(
        self, loss: Tensor, summary: dict[str, Tensor], propagate: Callable[[], None] | None = None
    ) -> dict[str, float] | None:
        """Changes the weights by the gradient of ``loss``, unless something is not finite.

        Args:
            loss: a scalar; on several processes their mean counts.
            summary: scalars to show; the terms of the loss among them.
            propagate: called after the loss's backward pass, takes the gradient on to the weights; None: it is there.

        Returns:
            the summary, on several processes the mean of theirs, and the metric loss's statistics, as numbers; None if
            the step was skipped.

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
        if propagate is not None:
            propagate()
        self._check_gradients()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            self.scaler.update()  # and not step(), which waits for the GPU to see whether there is an overflow
            summary["lowered"] = self.scaler.scale(one) < summary["scale"]
        summary["gradient"] = _gradient_norm(self.optimizer)
        # One trip to the CPU for all values, since each is a wait for the GPU; and before the weights change.
        values = self._numbers(summary, self._sums())
        gradient = values.pop("gradient")
        # The scaler is looking for the largest scale that float16 takes; below 1 there is none.
        overflow = values.pop("lowered", 0.0) > 0 and values["scale"] > 1
        terms = {name: value for name, value in values.items() if name.startswith("loss_")}
        if not overflow:
            terms["gradient"] = gradient
        if not self.check_finite(terms):
            if self.scaler is not None:
                self.scaler.update(values["scale"])  # a broken image says nothing about it
            return None
        if not overflow:
            self.optimizer.step()
        return values

    def _sums(self) -> dict[str, Tensor]:
        """Of all losses, with a loss's name before each where there are several."""
        several = len(self.criteria.losses) > 1
        return {
            f"{name}_{key}" if several else key: value
            for name, loss in self.criteria.losses.items()
            if self.weights[name] > 0
            for key, value in getattr(loss, "sums", {}).items()
        }

    def _numbers(self, summary: dict[str, Tensor], sums: dict[str, Tensor]) -> dict[str, float]:
        scalars = [value.detach().float().reshape(1) for value in summary.values()]
        together = distributed.all_reduce_sum(torch.cat([*scalars, *sums.values()]))
        means, totals = together[: len(summary)] / distributed.world_size(), together[len(summary) :].view(-1, 2)
        statistics = quotients(dict(zip(sums, totals)))
        return dict(zip([*summary, *statistics], torch.cat([means, *(x[None] for x in statistics.values())]).tolist()))

    def _warn_of_collapse(self, spread: float) -> None:
        if spread < _COLLAPSED and not self._collapsed:
            self._collapsed = True
            print(
                f"** The features collapse to one point: images are {spread:.1e} feature lengths apart. Try a smaller "
                "learning rate, a larger weight_x, or another scale, sigma or beta of the loss"
            )


class _Outputs(nn.Module):
    """A model's ``(logits, features)``, of which one that the loss leaves out has no graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.used = (True, True)

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        outputs = self.model(images)
        if not (isinstance(outputs, (tuple, list)) and len(outputs) == 2):
            raise TypeError(
                f"in training the model must return (logits, features), got {type(outputs).__name__}; "
                "build a torchreid model with loss='triplet'"
            )
        return tuple(output if used else _detached(output) for output, used in zip(outputs, self.used))


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else [tensor.detach() for tensor in output]


def _number_of(path: str) -> int:
    """The same for a path in every process and run."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


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
        all_of_them = "both" if len(weights) == 2 else "all"
        raise ValueError(f"{' and '.join(weights)} must be at least 0 and not {all_of_them} 0, got {given}")


_OWN_OPTIONS = {
    name: parameter
    for name, parameter in inspect.signature(MetricEngine).parameters.items()
    if name not in ("datamanager", "model", "optimizer", "criterion")
}


class LossEngine(MetricEngine):
    """A :class:`MetricEngine` that builds its loss, ``loss_class``, from the loss's own keywords.

    A subclass names the loss, and is otherwise empty. Keywords that are not the engine's go to the loss, whose
    constructor holds their defaults and checks them; ``help()`` shows both.
    """

    loss_class: ClassVar[type[MetricLoss]]

    def __init__(self, datamanager: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        own = {name: options.pop(name) for name in _OWN_OPTIONS if name in options}
        super().__init__(datamanager, model, optimizer, criterion=self.loss_class(**options), **own)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "loss_class"):  # a base for others, as one for video
            return
        places = [p for p in inspect.signature(LossEngine.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY}
        loss = {name: p for name, p in inspect.signature(cls.loss_class).parameters.items() if name != "reduction"}
        options = [p.replace(kind=p.KEYWORD_ONLY) for p in {**_OWN_OPTIONS, **own, **loss}.values()]
        cls.__signature__ = inspect.Signature([*places[1:], *options])
