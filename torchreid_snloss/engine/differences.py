"""What differs between the run that wrote a checkpoint and the one that resumes or tests it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchreid_snloss.checkpoint import CheckpointError
from torchreid_snloss.data.fingerprint import difference
from torchreid_snloss.values import shown

__all__ = ["NEUTRAL_KEYS", "RunDifferences", "feature_differences", "feature_settings", "plain"]

NEUTRAL_KEYS = (
    *("data.root", "data.save_dir", "data.workers", "data.cache", "train.print_freq", "train.save_freq", "train.keep"),
    *("test.eval_freq", "test.start_eval", "test.visrank", "test.visrank_topk", "test.features"),
)
"""Keys that change neither what is trained nor its results, but for random numbers."""

# With them those by which a run starts, and those of its tests.
_FREE = {
    *NEUTRAL_KEYS,
    *("data.folder.path", "data.modules"),
    *("use_gpu", "train.record", "train.start_epoch", "model.load_weights", "model.pretrained", "model.resume"),
    *("test.batch_size", "test.evaluate", "data.load_train_targets", "sampler.train_sampler_t"),
}
# What a checkpoint can't be resumed with in another way.
_FIXED = ("model.name", "model.embedding", "model.neck", "train.optim", "train.staged_lr", "train.new_layers")
# Those that decide the features of a trained model.
_FEATURES = (
    *("model.name", "model.last_stride", "model.embedding", "model.neck"),
    *("data.type", "data.height", "data.width", "data.norm_mean", "data.norm_std"),
)
_VIDEO_FEATURES = ("video.seq_len", "video.sample_method", "video.pooling_method")
_TEST_OPTIONS = ("test.flip", "test.normalize_feature")
# Those that decide who of a data set is trained on.
_SPLIT = ("data.split_id", "data.folder.", "cuhk03.")
_WITH_SPLIT_ID = {"cuhk01", "cuhk03", "folder", "grid", "ilids", "ilidsvid", "prid", "prid2011", "viper"}
# Those that decide which images an epoch's batches hold, and which images are trained on.
_ORDER = ("train.batch_size", "train.seed", "sampler.")
_IMAGES = ("data.", "train.seed", "cuhk03.", "market1501.")
# Those that decide the options of the optimizer and the schedule.
_OPTIMIZER = (
    *("train.lr", "train.weight_decay", "train.base_lr_mult", "train.max_epoch", "train.stepsize", "train.gamma"),
    *("train.warmup", "sgd.", "adam.", "rmsprop."),
)
_USED_IF = {  # keys that mean nothing unless another one is set
    "train.new_layers": "train.staged_lr",
    "train.base_lr_mult": "train.staged_lr",
    "train.open_layers": "train.fixbase_epoch",
    "train.warmup_factor": "train.warmup_epochs",
    "loss.memory.start_epoch": "loss.memory.size",
}
_USED_BY = {  # sections, and keys, that only some choices use
    "train.stepsize": ("train.lr_scheduler", ("single_step", "multi_step", "exponential")),
    "train.gamma": ("train.lr_scheduler", ("single_step", "multi_step", "exponential")),
    "sgd.momentum": ("train.optim", ("sgd", "rmsprop")),
    "sgd.": ("train.optim", ("sgd",)),
    "rmsprop.": ("train.optim", ("rmsprop",)),
    "adam.": ("train.optim", ("adam", "amsgrad", "radam")),
    "video.": ("data.type", ("video",)),
    "data.k_tfm": ("data.type", ("image",)),
    "train.own_step": ("loss.name", ("softmax", "triplet")),
    "sampler.num_instances": ("sampler.train_sampler", ("IdentitySampler", "RandomIdentitySampler")),
    "sampler.num_cams": ("sampler.train_sampler", ("RandomDomainSampler",)),
    "sampler.num_datasets": ("sampler.train_sampler", ("RandomDatasetSampler",)),
}
_USED_WITH = {  # keys that only one data set uses
    "cuhk03.labeled_images": "cuhk03",
    "cuhk03.classic_split": "cuhk03",
    "market1501.": "market1501",
    "data.folder.": "folder",
}


def plain(value: Any) -> Any:
    """A value of the config as a checkpoint can hold it, which is loaded without running code."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def feature_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that the features of a trained model follow from, apart from the options of a test."""
    keys = _FEATURES + (_VIDEO_FEATURES if settings.get("data.type") == "video" else ())
    found = {key: settings[key] for key in keys if key in settings}
    if found.get("video.sample_method") == "all":  # all frames of a tracklet count
        found.pop("video.seq_len", None)
    return found


def feature_differences(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line about each setting by which a trained model gives other features than in the tests of its training.

    Args:
        checkpoint: The settings of the training, by their keys.
        now: The settings of the test.
    """
    before, own = (
        {**feature_settings(values), **{key: values[key] for key in _TEST_OPTIONS if key in values}}
        for values in (checkpoint, now)
    )
    if all(str(values.get("model.name")).startswith("timm/") for values in (before, own)):
        del own["model.name"]  # its tag says which pretrained weights; those of another architecture do not fit
    return [
        f"{key}: {shown(before[key])} when the checkpoint was trained, {shown(value)} now"
        for key, value in plain(own).items()
        if key in before and value != before[key]
    ]


def split_differences(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line about each setting by which a test of the data that was trained on may have people of the training.

    Args:
        checkpoint: The settings of the training, by their keys.
        now: The settings of the test.
    """
    shared = {*now["data.targets"]} & {*(checkpoint.get("data.sources") or ())}
    if not shared or any(checkpoint.get(key) != now[key] for key in ("data.root", "data.folder.path")):
        return []
    keys = [
        key
        for key in now
        if key in checkpoint and key.startswith(_SPLIT) and plain(now[key]) != checkpoint[key]
        if key != "data.split_id" or shared & _WITH_SPLIT_ID
        if all(name in shared for section, name in _USED_WITH.items() if key.startswith(section))
    ]
    if checkpoint.get("data.combineall"):  # whatever a test says, which trains nobody
        keys.append("data.combineall")
    return [
        f"{key}: {shown(checkpoint[key])} when the checkpoint was trained, {shown(plain(now[key]))} now; so people may "
        "be tested on who were trained on"
        for key in keys
    ]


class RunDifferences:
    """Compares a run with the one that wrote a checkpoint.

    Args:
        checkpoint: The content of the checkpoint.
        now: `settings` of the run that resumes it, by their keys, or None; `batches`: what its batches are drawn from;
            `criterion`: the state of its losses, or None.
        path: The checkpoint, for messages.

    Attributes:
        other_order: Whether the batches of an epoch are other ones.
        silent: Whether the run only tests, so that nothing of the checkpoint's batches is used.

    Raises:
        CheckpointError: If a setting differs with which the checkpoint can't be resumed, or the training images or
            their labels do.
    """

    def __init__(self, checkpoint: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
        before, settings = _plain_values(checkpoint.get("settings")), now["settings"]
        self._settings: dict[str, str] | None = None
        self._batches: list[str] = []
        self.other_order = False
        self.silent = settings is not None and bool(settings.get("test.evaluate"))
        if self.silent:  # nothing of that is used
            return
        if before and settings is not None:
            with_state = bool(now["criterion"] or checkpoint.get("criterion"))
            self._settings = _changed_settings(before, settings, with_state, path)
            self.other_order = any(key.startswith(_ORDER) for key in self._settings)
        self._compare_batches(_plain_values(checkpoint.get("batches")), now["batches"], path)

    def _compare_batches(self, before: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
        images, own = _fingerprint(before.get("images")), now.get("images")
        if own and not images:
            self._batches.append("the checkpoint does not say which images and labels it was trained with")
        if own and images:
            if what := difference(images, own):
                settings = self._settings or {}
                reasons = [
                    line.removesuffix(", which is used") for key, line in settings.items() if key.startswith(_IMAGES)
                ]
                because = f" ({'; '.join(reasons)})" if reasons else ""
                raise CheckpointError(
                    f"{str(path)!r} was trained on other images or labels: {what}{because}; "
                    "start from its weights with model.load_weights"
                )
            if images.get("order") != own["order"]:
                self._batches.append("the training images are in another order, so the batches are other ones")
        changed = [key for key in now if key != "images" and key in before and before[key] != now[key]]
        self.other_order |= bool(changed or (own and images and images.get("order") != own["order"]))
        if self._settings is None:
            self._batches += [
                f"{key}: {shown(before[key])} in the checkpoint, {shown(now[key])} in this run, which is used"
                for key in changed
            ]

    def lines(self, of_schedule: list[str]) -> list[str]:
        """A line about each thing that differs.

        Args:
            of_schedule: Those about the optimizer and its schedule, which are used unless settings say the same.
        """
        if self.silent:
            return []
        settings = self._settings or {}
        said = any(key.startswith(_OPTIMIZER) for key in settings)
        return [*settings.values(), *([] if said else of_schedule), *self._batches]


def _plain_values(part: Any) -> Mapping[str, Any]:
    """Those values of a checkpoint's part that can be compared with a setting; none if it is no mapping."""
    return {key: value for key, value in part.items() if _is_plain(value)} if isinstance(part, Mapping) else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _fingerprint(value: Any) -> Mapping[str, Any]:
    """A fingerprint of training images; empty if a checkpoint holds anything else."""
    if not isinstance(value, Mapping) or not isinstance(value.get("images"), int):
        return {}
    labels = value.get("labels")
    whole = isinstance(labels, Mapping) and all(isinstance(digest, str) for digest in labels.values())
    return value if whole else {}


def _changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], criterion_has_state: bool, path: Any
) -> dict[str, str]:
    """A line about each setting that differs from the checkpoint's, by its key."""
    changed = {key: plain(value) for key, value in now.items() if key in before and plain(value) != before[key]}
    staged = before.get("train.staged_lr") and now.get("train.staged_lr")
    for key in _FIXED:
        if key in changed and (key != "train.new_layers" or staged):
            raise _refusal(path, key, before[key], changed[key])
    for key in ("loss.name", "loss.custom.target"):
        if key in changed and criterion_has_state:
            raise _refusal(path, key, before[key], changed[key])
    return {
        key: f"{key}: {shown(before[key])} in the checkpoint, {shown(value)} in the config, which is used"
        for key, value in changed.items()
        if key not in _FREE and _in_use(key, before, now)
    }


def _refusal(path: Any, key: str, before: Any, now: Any) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} can't be resumed with {key} {shown(now)}: it was trained with {shown(before)}; "
        "start from its weights with model.load_weights"
    )


def _in_use(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if key in _USED_IF and not any(values.get(_USED_IF[key]) for values in (before, now)):
        return False
    for section, (choice, names) in _USED_BY.items():
        if key.startswith(section):
            return now.get(choice) in names
    for section, name in _USED_WITH.items():
        if key.startswith(section):
            sets = [*(now.get("data.sources") or ()), *(now.get("data.targets") or ())]
            return name in sets and now.get("data.type") != "video"
    if key.startswith("loss.") and key.count(".") > 1:
        losses = {*str(before.get("loss.name")).split("+"), *str(now.get("loss.name")).split("+"), "softmax", "memory"}
        return key.split(".")[1] in losses
    return True
