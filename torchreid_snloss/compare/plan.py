"""The runs of a comparison, each with checked settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchreid_snloss.compare.runs import Run
from torchreid_snloss.compare.search import search_space
from torchreid_snloss.compare.variants import CONTROL, Variant
from torchreid_snloss.config import ConfigError, get_default_config, merge_options
from torchreid_snloss.config.ranges import shown
from torchreid_snloss.config.rules import TORCHREIDS_LOSSES, number_of_folds
from torchreid_snloss.settings import Settings, resolve

__all__ = ["CHANGES", "Plan", "TunedValues", "check_base"]

CHANGES = ("label_noise", "outliers", "train_fraction")
"""The keys of the section `data` that change the training set, and have flags of their own."""

TunedValues = Mapping[tuple[str, int], Mapping[str, Any]]
"""The values that a tuning has found, by the name of the variant and the number of the split."""

_TEST_SETS = (  # the beginnings of keys that say which images are in them
    *("data.combineall", "data.folder.", "data.modules", "data.split_id", "data.type"),
    *("cuhk03.", "market1501."),
)
_ALL_IDENTITIES = {"data.val_fraction": 0.0}  # none held out any more
_EVALUATIONS = 5  # the most evaluations during training if the config sets no test.eval_freq


@dataclass(frozen=True, eq=False)
class Plan:
    """What a comparison is to run.

    Attributes:
        base: The config that all variants share.
        variants: The rows.
        seeds: The number of runs of each variant, or of each variant on each split.
        roots: The data roots, each with another split of the same data; empty for the config's root alone.
        changes: The changes to the training set: keys in the section `data` and their values.
        trials: The number of trials of a tuning; 0 for none.
        folds: The number of runs of each trial, each of which holds out other identities.
    """

    base: Any
    variants: Sequence[Variant]
    seeds: int
    roots: Sequence[str]
    changes: Mapping[str, float]
    trials: int
    folds: int

    @property
    def splits(self) -> list[int]:
        """The numbers of the splits."""
        return list(range(1, len(self.roots) + 1)) or [0]

    @property
    def condition(self) -> Path:
        """The folder of everything that is trained on the same training set."""
        name = "+".join(f"{key.replace('_', '-')}-{value:g}" for key, value in self.changes.items()) or "plain"
        return Path(self.base.data.save_dir) / "compare" / name

    @property
    def folder(self) -> Path:
        """The folder of the runs and the results."""
        return self.condition / f"tuned-{self.trials}" if self.trials else self.condition

    def runs(self, tuned: TunedValues | None = None) -> list[Run]:
        """The runs, those of a variant next to each other.

        Args:
            tuned: The values that a tuning has found; then no identities are held out any more, and rows without any
                have no runs.

        Raises:
            ConfigError: If a run could not start.
        """
        runs = []
        found = {variant.name for variant in self.variants} if tuned is None else {name for name, _ in tuned}
        for variant in self.variants:
            if variant.name not in found:
                continue
            for split in self.splits:
                values = {} if tuned is None else {**tuned[variant.name, split], **_ALL_IDENTITIES}
                for seed in range(1, self.seeds + 1):
                    folder = _folder_of(self.folder, variant, split) / f"seed-{seed}"
                    settings = self.settings(variant, split, {**values, "train.seed": seed}, folder)
                    runs.append(Run(variant.name, settings, split))
        return runs

    def trial(self, variant: Variant, split: int, number: int, values: Mapping[str, Any], fold: int = 0) -> Run:
        """A run of a trial of a tuning, which is tested on the held-out identities alone.

        Args:
            variant: The variant.
            split: The number of the split.
            number: The number of the trial, from 0.
            values: What the trial tries, by key.
            fold: Which share of the identities it holds out, from 0.
        """
        folder = self.tuning_folder(variant, split) / f"trial-{number}"
        if self.folds > 1:
            folder /= f"fold-{fold}"
        own = {"data.val_fold": fold, "test.held_out_only": True}
        return Run(variant.name, self.settings(variant, split, {**values, **own}, folder), split)

    def tuning_folder(self, variant: Variant, split: int) -> Path:
        """The folder of a variant's trials, which a tuning with more trials continues."""
        return _folder_of(self.condition / "tuning", variant, split)

    def settings(self, variant: Variant, split: int, values: Mapping[str, Any], folder: Path) -> Settings:
        """The settings of a run of the comparison.

        Raises:
            ConfigError: If it could not start; the message names a variant that is not only a loss.
        """
        own: dict[str, Any] = {
            "train.record": True,
            "train.keep": 1,
            "test.visrank": False,
            **{f"data.{key}": value for key, value in self.changes.items()},
        }
        base = self.base
        if variant.options.get("loss.name", base.loss.name) in TORCHREIDS_LOSSES:
            own["train.own_step"] = True  # the same step for all rows
        if base.test.eval_freq < 1:
            own["test.eval_freq"] = -(-base.train.max_epoch // _EVALUATIONS)
        return self._resolved(variant, split, {**own, **values, "data.save_dir": str(folder)})

    def config_of(self, variant: Variant, split: int, values: Mapping[str, Any]) -> str:
        """The config of a variant with the values that a tuning has found, as YAML, for runs of one's own."""
        folder = str(Path(self.base.data.save_dir) / variant.name)
        return self._resolved(variant, split, {**values, **_ALL_IDENTITIES, "data.save_dir": folder}).cfg_text

    def _resolved(self, variant: Variant, split: int, values: Mapping[str, Any]) -> Settings:
        base = self.base
        shared: dict[str, Any] = {}
        if base.test.normalize_feature is None:  # one test for all rows, whatever each loss would choose for itself
            shared["test.normalize_feature"] = True
        own = dict(variant.options)
        if variant.name == CONTROL and base.sampler.train_sampler != "RandomSampler":
            own["sampler.train_sampler"] = base.sampler.train_sampler
        root = {"data.root": self.roots[split - 1]} if split else {}
        merged = {**shared, **own, **root, **values}
        try:
            cfg = base.clone()
            merge_options(cfg, merged.items(), lambda line: None)  # each run prints to its own log
            return resolve(cfg)
        except ConfigError as error:
            if variant.options.keys() == {"loss.name"}:
                raise
            raise ConfigError(f"{variant.name}: {error}") from error


def check_base(plan: Plan) -> None:
    """Checks what all runs share.

    Raises:
        ConfigError: For keys that the comparison sets itself, and for variants that clash.
    """
    base, default = plan.base, get_default_config()
    for key in CHANGES:
        if base.data[key] != default.data[key]:
            raise ConfigError(f"data.{key} is set by --{key.replace('_', '-')}, leave it out of config and options")
    if base.test.evaluate or base.model.resume or base.train.start_epoch or base.test.held_out_only:
        raise ConfigError(
            "a comparison trains from the beginning, resumes by itself and tests on the test sets: leave "
            "test.evaluate, model.resume, train.start_epoch and test.held_out_only out"
        )
    taken = {"model.resume", *(f"data.{key}" for key in ("save_dir", "root", "targets", *CHANGES))}
    taken |= {f"train.{key}" for key in ("seed", "start_epoch", "record", "keep", "own_step")}
    taken |= {f"test.{key}" for key in ("evaluate", "held_out_only", "eval_freq", "visrank")}
    if plan.trials:
        taken |= {"data.val_fraction", "data.val_fold"}  # whose identities judge the trials
    for variant in plan.variants:
        of_the_test = {key for key in variant.options if key.startswith(_TEST_SETS)}
        if keys := sorted(of_the_test | (taken & {*variant.options, *(variant.search or ())})):
            raise ConfigError(f"{variant.name}: {keys[0]} is the same for all variants, leave it out")
        if variant.search is not None:  # which is not read without --tune
            search_space(variant, plan.settings(variant, plan.splits[0], {}, plan.folder))
    if plan.trials and base.data.val_fraction <= 0:
        raise ConfigError(
            "--tune judges its trials by training identities that are held out: set data.val_fraction, such as "
            f"data.val_fraction 0.25, got {base.data.val_fraction}"
        )
    _check_folds(plan)
    for root in plan.roots:
        if not Path(root).is_dir():
            raise ConfigError(f"--roots: there is no folder {shown(root)}")
    if len({Path(root).resolve() for root in plan.roots}) < len(plan.roots):
        raise ConfigError(f"--roots must name each root once, got {shown(list(plan.roots))}")


def _check_folds(plan: Plan) -> None:
    fraction = plan.base.data.val_fraction
    if plan.folds > 1 and not plan.trials:
        raise ConfigError(f"--folds {plan.folds} needs --tune, whose trials are judged by the mean over the folds")
    if plan.trials and plan.base.data.val_fold:
        raise ConfigError("--tune sets data.val_fold itself, as --folds says: leave it out of config and options")
    if plan.folds > 1 and plan.folds > (most := number_of_folds(fraction)):
        raise ConfigError(
            f"--folds {plan.folds} needs {plan.folds} disjoint shares of the training identities, but with "
            f"data.val_fraction {fraction} there are only {most}: lower one of them"
        )


def _folder_of(folder: Path, variant: Variant, split: int) -> Path:
    return folder / variant.name / f"split-{split}" if split else folder / variant.name
