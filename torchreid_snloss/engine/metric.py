"""The engine that trains with any metric losses and a softmax loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchreid import metrics

from torchreid_snloss import device as devices
from torchreid_snloss import distributed
from torchreid_snloss.backbones import convert_sync_batchnorm
from torchreid_snloss.engine.amp import Amp, autocast, check_precision, grad_scaler
from torchreid_snloss.engine.caching import cached_forward
from torchreid_snloss.engine.compiling import is_compiled
from torchreid_snloss.engine.image_ids import ImageIds
from torchreid_snloss.engine.loop import TrainingLoop
from torchreid_snloss.engine.parallel import ModelOutputs, Parallel, at_least_float32, average_gradients
from torchreid_snloss.engine.snapshot import take_snapshot
from torchreid_snloss.engine.term_monitor import TermMonitor
from torchreid_snloss.engine.update import Update
from torchreid_snloss.losses import Criterion, GlobalBatchLoss, Memory, MetricLoss, check_integer, check_number

__all__ = ["MetricEngine", "check_weights"]


class MetricEngine(TrainingLoop):
    """torchreid's engine with any losses on the features and a softmax loss on the logits.

    `run`, `train`, `test` and the evaluation are torchreid's own, in a `TrainingLoop`. The progress line and
    TensorBoard show `loss_m` (or `loss_<name>` for each of several criteria), `loss_x`, `acc` and the `statistics` of
    this package's losses.

    With several processes (`torchreid_snloss.distributed`), the data manager's batch is the global batch: each process
    trains on its part, and compares its anchors with the features of all processes. Loss and gradients equal those of
    one process with the whole batch, except for batch norm, which without `sync_batchnorm` normalises over the images
    of its own process only.

    Args:
        datamanager: torchreid's `ImageDataManager`. Its batches should hold several images of an identity
            (`train_sampler='IdentitySampler'` or torchreid's `'RandomIdentitySampler'`).
        model: a model that returns `(logits, features)` in training, as torchreid's do when built with
            `loss='triplet'` (or `'sn'`, `'hap2s'`, `'fidi'` after `register`). Either may be a tuple or list of tensors
            (PCB, HACNN): the loss is the mean over them.
        optimizer: an optimizer over the model's parameters.
        criterion: the metric loss, called `criterion(features, pids)` with (batch, dimension) and (batch,), which
            returns a scalar: this package's, torchreid's, pytorch-metric-learning's, or a function; or a dictionary of
            several, by name, which is empty for softmax alone. If a criterion has parameters, the optimizer must
            contain them.
        weight_m: weight of the metric term, >= 0; a term of weight 0 is left out. For several criteria, weights by
            their names.
        weight_x: weight of the softmax term, >= 0; at 0 it is left out. The weights must not all be 0.
        scheduler: a learning rate scheduler, stepped once an epoch; None keeps the learning rate.
        use_gpu: whether to use the GPU where there is one.
        label_smooth: whether to smooth the labels of the softmax term by 0.1.
        amp: the precision that the model is trained in: `"off"` is float32, `"bf16"` and `"fp16"` are mixed precision.
            The losses and the test stay in float32. With `"fp16"` the loss is multiplied by the value that the progress
            line shows as `scale`. A step whose gradient overflows is skipped and halves the scale; it counts as not
            finite only at a scale of 1.
        micro_batch: the maximum number of images that the model processes at a time, per process, for batches that do
            not fit into memory; 0: all. The gradient is that of the whole batch, except for batch norm (see
            `cached_forward`).
        memory_size: how many features of earlier batches serve as additional references; 0: none.
        memory_start_epoch: the epoch, from 0, in which the memory starts.
        sync_batchnorm: whether to normalise by the statistics of all processes' images; on GPUs.
        channels_last: see `TrainingLoop`.
        compile: see `TrainingLoop`.

    Raises:
        TypeError, ValueError: for a negative weight, weights that are all 0, a model that returns no features, a model
            on the CPU while `use_gpu` is True and there is a GPU, an `amp` that is unknown or not available, a size
            that is not an integer >= 0, a batch that is too small for the number of processes, a memory with a
            criterion that is not this package's, and parameters of a criterion that the optimizer does not contain.
    """

    trains_on_several_processes: ClassVar[bool] = True
    skips_steps: ClassVar[bool] = True

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
        criteria, self.weights = _by_name(criterion, weight_m, weight_x)
        self.weight_x = weight_x
        self.micro_batch = check_integer("micro_batch", micro_batch, at_least=0)
        self.memory_start_epoch = check_integer("memory_start_epoch", memory_start_epoch, at_least=0)
        self.memory = Memory(memory_size) if check_integer("memory_size", memory_size, at_least=0) else None
        _check_model(model, self.use_gpu)
        device = devices.type_of(self.use_gpu)
        check_precision(model, device, amp, micro_batch, sync_batchnorm)
        self.amp: Amp = amp
        # The conversion creates new modules but keeps the parameters, which the optimizer already contains.
        self.model = convert_sync_batchnorm(model) if sync_batchnorm else model
        self.optimizer = optimizer
        self.register_model("model", self.model, optimizer, scheduler)

        self._image_ids = ImageIds(self.train_loader.dataset)
        self.criteria = GlobalBatchLoss(criteria, self.memory).to(device)
        distributed.broadcast_module(self.criteria)
        _check_trained(self.criteria, optimizer)
        for loss in criteria.values():
            if isinstance(loss, MetricLoss):
                loss.collect_statistics = True
        self.criterion_x = nn.CrossEntropyLoss(label_smoothing=0.1 if label_smooth else 0.0)

        self._outputs = ModelOutputs(self.model)
        self._parallel = Parallel(self._outputs)
        self._update = Update(optimizer)
        self._terms = TermMonitor(criteria)
        self.checkpointer.criteria = self.criteria
        self.checkpointer.optional["memory"] = self.memory
        self.scaler = grad_scaler(amp, device)

    @property
    def scaler(self) -> Any:
        """torch's `GradScaler` for float16, which you may replace before training; None for any other precision."""
        return self._update.scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self._update.scaler = self.checkpointer.optional["scaler"] = scaler

    def step(self, data: dict[str, Any]) -> dict[str, float]:
        """One training step: model, metric terms, softmax term, update of the weights.

        Args:
            data: a batch of torchreid's, with `img` (batch, 3, height, width) and `pid` (batch,).

        Returns:
            the values for the progress line: `loss_m`, `loss_x`, `acc` in percent, the losses' statistics, and with
            float16 `scale`. Empty if the step was skipped.

        Raises:
            TypeError: if the model returns anything but `(logits, features)`, or a criterion anything but a scalar.
            NonFiniteError: for a NaN or infinite term or gradient, if `options.nonfinite` is `"stop"`.
        """
        images, pids = self.parse_data_for_train(data)
        images, pids = (devices.to_device(value, self.use_gpu) for value in (images, pids))
        undo = self._snapshot()
        counts = distributed.gather_counts(len(images))
        outputs, backward_to_weights = self._forward(images, counts)
        logits, features = map(at_least_float32, outputs)

        # Weighted by its share of the batch, so that the mean over processes is the mean over the whole batch.
        share = len(images) * len(counts) / sum(counts)
        loss = torch.zeros((), device=images.device)
        summary: dict[str, Tensor] = {}
        terms, stat_totals = self._metric_terms(data, features, pids, counts)
        for name, value in terms.items():
            summary[f"loss_{name}"] = value
            loss = loss + self.weights[name] * value
        if self.weight_x > 0:
            summary["loss_x"] = self.compute_loss(self.criterion_x, logits, pids) * share
            loss = loss + self.weight_x * summary["loss_x"]
            summary["acc"] = metrics.accuracy(logits, pids)[0] * share
        weighted = {name: self.weights[name] * value for name, value in terms.items()}
        # A compiled model's backward pass can't be repeated.
        softmax = self.weight_x * summary["loss_x"] if self.weight_x > 0 and not is_compiled(self.model) else None
        summary |= self._terms.measure(weighted, softmax, outputs[1], features, self.scaler)

        values = self._update(
            loss, summary, stat_totals, self.check_finite, backward_to_weights, self._finish_gradients
        )
        if values is None:
            undo()
            return {}
        self._learning.overflowed += self._update.overflowed
        self._terms.record(values)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _finish_gradients(self) -> None:
        self._parallel.check_gradients()
        average_gradients(self.criteria)  # which DistributedDataParallel does for the model alone

    def _snapshot(self) -> Callable[[], None]:
        """Returns a function that restores buffers and memories, for a step that turns out not to be finite."""
        if self.options.nonfinite != "skip":
            return lambda: None
        undo_buffers = take_snapshot(self.model, self.criteria)  # batch norm's means; a criterion's own memory
        remembered = None if self.memory is None else self.memory.state_dict()

        def undo() -> None:
            undo_buffers()
            if self.memory is not None and remembered is not None:
                self.memory.load_state_dict(remembered)

        return undo

    def _forward(self, images: Tensor, counts: list[int]) -> tuple[Any, Callable[[], None] | None]:
        """The model's outputs, and with micro-batches a function that backpropagates their gradients to the weights."""
        self._outputs.used = self.weight_x > 0, any(self.weights.values())
        # The number must be the same on every process, since all must take part in each collective operation.
        micro_batches = -(-max(counts) // self.micro_batch) if self.micro_batch else 1
        if micro_batches == 1:
            with autocast(self.amp, images.device.type):
                return self._parallel.module()(images), None
        if micro_batches > min(counts):
            raise ValueError(
                f"{micro_batches} micro-batches of a process, but one process has only {min(counts)} images"
            )
        return cached_forward(self._parallel.module(), self._outputs, images, micro_batches, self.amp)

    def _metric_terms(
        self, data: dict[str, Any], features: Any, pids: Tensor, counts: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The metric losses and their statistics; for a model with several features per image, over all of them."""
        names = [name for name, weight in self.weights.items() if weight > 0]
        if not names:
            return {}, {}
        images = None
        if self.memory is not None:
            images = self._image_ids(data, features)
            self.memory.in_use = self.epoch >= self.memory_start_epoch
            if not self.memory.in_use:  # a run that is resumed with a later start
                self.memory.clear()
        several = [features] if isinstance(features, Tensor) else features
        results = [self.criteria(feature, pids, images, names, counts) for feature in several]
        for name, value in results[0][0].items():
            if not (isinstance(value, Tensor) and value.numel() == 1):
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"the criterion {name!r} must return a scalar tensor, got {what}")
        terms = {name: torch.stack([values[name].reshape(()) for values, _ in results]).mean() for name in names}
        totals = [totals for _, totals in results]
        return terms, {name: torch.stack([part[name] for part in totals]).sum(dim=0) for name in totals[0]}


def _by_name(
    criterion: Criterion | Mapping[str, Criterion], weight_m: float | Mapping[str, float], weight_x: float
) -> tuple[dict[str, Criterion], dict[str, float]]:
    """The criteria and their weights, both by name; a single criterion is named `"m"`."""
    criteria = dict(criterion) if isinstance(criterion, Mapping) else {"m": criterion}
    weights = dict(weight_m) if isinstance(weight_m, Mapping) else {"m": weight_m}
    if not criteria and not isinstance(weight_m, Mapping):
        weights = {}  # softmax alone
    if weights.keys() != criteria.keys():
        raise ValueError(f"weight_m must have the criteria's names {list(criteria)}, got {weight_m}")
    for name, value in criteria.items():
        if not name.isidentifier() or name in ("x", "loss") or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"a criterion can't be named {name!r}: use an identifier that is not taken; 'x' is the softmax loss"
            )
        if not callable(value):
            raise TypeError(f"the criterion {name!r} must be called with features and pids, got {value!r}")
    check_weights(**{f"weight_{name}": weight for name, weight in {**weights, "x": weight_x}.items()})
    return criteria, weights


def check_weights(**weights: float) -> None:
    """Raises TypeError or ValueError unless the weights are numbers, at least 0 and not all 0."""
    for name, value in weights.items():
        check_number(name, value)
    if min(weights.values()) < 0 or sum(weights.values()) == 0:
        given = ", ".join(f"{name}={value}" for name, value in weights.items())
        all_of_them = {1: "", 2: "both "}.get(len(weights), "all ")
        raise ValueError(f"{' and '.join(weights)} must be at least 0 and not {all_of_them}0, got {given}")


def _check_model(model: nn.Module, use_gpu: bool) -> None:
    if use_gpu and not devices.is_on_device(model):
        raise ValueError("the model is on the CPU, but use_gpu is True: call model.cuda() first, or use_gpu=False")
    if getattr(getattr(model, "module", model), "loss", None) == "softmax":
        raise ValueError("the model was built with loss='softmax' and returns no features, build it with 'triplet'")


def _check_trained(criteria: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    untrained = [name for name, p in criteria.named_parameters() if p.requires_grad and id(p) not in held]
    if untrained:
        raise ValueError(f"the criterion has parameters that the optimizer does not have: {untrained}")
