"""The command line: torchreid's ``scripts/main.py``, flag for flag, with this package's losses."""

from __future__ import annotations

import argparse
import os.path
import sys
import time
from collections.abc import Sequence
from typing import TextIO, cast

import torch
from torch import nn
from torchreid import optim
from torchreid import utils as reid_utils
from yacs.config import CfgNode

from torchreid_snloss.build import build_datamanager, build_engine, build_model, load_weights, resume
from torchreid_snloss.checks import check_config, check_datamanager, check_open_layers
from torchreid_snloss.config import (
    ConfigError,
    engine_run_kwargs,
    load_config,
    lr_scheduler_kwargs,
    optimizer_kwargs,
)
from torchreid_snloss.data import IdentitySampler
from torchreid_snloss.register import register

__all__ = ["main"]

_DESCRIPTION = """Train and test a torchreid model. Every torchreid config runs as it is; with `loss.name sn`, `hap2s`
or `fidi` it trains with that loss. The keys are those of torchreid and the loss.* tables in the README."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for something in the config that can't be run with."""
    parser = argparse.ArgumentParser(
        prog="torchreid-snloss", description=_DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config-file", default="", help="path of a YAML config file")
    parser.add_argument("-s", "--sources", nargs="+", help="source datasets, separated by spaces")
    parser.add_argument("-t", "--targets", nargs="+", help="target datasets, separated by spaces")
    parser.add_argument("--transforms", nargs="+", help="data augmentation")
    parser.add_argument("--root", default="", help="path of the data root")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options, as in: loss.name sn train.lr 0.001"
    )
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        for key in ("sources", "targets", "transforms", "root"):
            if getattr(args, key):
                cfg.data[key] = getattr(args, key)
        register()
        check_config(cfg)
        _run(cfg)
    except ConfigError as error:
        print(f"torchreid-snloss: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("torchreid-snloss: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(cfg: CfgNode) -> None:
    reid_utils.set_random_seed(cfg.train.seed)
    log_name = "test.log" if cfg.test.evaluate else "train.log"
    log_path = os.path.join(cfg.data.save_dir, log_name + time.strftime("-%Y-%m-%d-%H-%M-%S"))
    sys.stdout = cast(TextIO, reid_utils.Logger(log_path))
    print(f"Show configuration\n{cfg}\n")
    print(f"Collecting env info ...\n** System info **\n{reid_utils.collect_env_info()}\n")
    torch.backends.cudnn.benchmark = cfg.use_gpu

    datamanager = build_datamanager(cfg)
    check_datamanager(cfg, datamanager)

    print(f"Building model: {cfg.model.name}")
    model = build_model(cfg, datamanager.num_train_pids)
    params, flops = reid_utils.compute_model_complexity(model, (1, 3, cfg.data.height, cfg.data.width))
    print(f"Model complexity: params={params:,} flops={flops:,}")
    if cfg.model.load_weights:
        load_weights(model, cfg.model.load_weights)
    check_open_layers(cfg, model)
    if cfg.use_gpu:
        model = nn.DataParallel(model).cuda()

    optimizer = optim.build_optimizer(model, **optimizer_kwargs(cfg))
    scheduler = optim.build_lr_scheduler(optimizer, **lr_scheduler_kwargs(cfg))
    if cfg.model.resume:
        cfg.train.start_epoch = resume(cfg.model.resume, model, optimizer, scheduler)
    if isinstance(datamanager.train_loader.sampler, IdentitySampler):
        datamanager.train_loader.sampler.set_epoch(cfg.train.start_epoch)

    print(f"Building {cfg.loss.name}-engine for {cfg.data.type}-reid")
    engine = build_engine(cfg, datamanager, model, optimizer, scheduler)
    kwargs = engine_run_kwargs(cfg)
    if cfg.test.evaluate:
        engine.run(**kwargs)
        return
    engine.run(**{**kwargs, "visrank": False})
    if cfg.test.visrank:  # torchreid draws in a test-only run alone
        print("=> Drawing ranked lists")
        engine.run(**{**kwargs, "test_only": True})
