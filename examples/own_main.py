"""A main script made from torchreid's `scripts/main.py`, with two changes, marked below.

python examples/own_main.py configs/small.yaml loss.name hap2s test.visrank False
"""

import sys

import torch
from torch import nn
from torchreid import models, optim, utils

# Change 1. Was: from default_config import get_default_config, optimizer_kwargs, ...
from torchreid_snloss.config import engine_run_kwargs, get_default_config, lr_scheduler_kwargs, optimizer_kwargs

# Change 2. Was: a build_datamanager() and a build_engine() in this file
from torchreid_snloss import build_datamanager, build_engine  # isort: skip

cfg = get_default_config()
cfg.use_gpu = torch.cuda.is_available()
cfg.merge_from_file(sys.argv[1])
cfg.merge_from_list(sys.argv[2:])
utils.set_random_seed(cfg.train.seed)

datamanager = build_datamanager(cfg)
model = models.build_model(cfg.model.name, datamanager.num_train_pids, cfg.loss.name, cfg.model.pretrained)
if cfg.use_gpu:
    model = nn.DataParallel(model).cuda()
optimizer = optim.build_optimizer(model, **optimizer_kwargs(cfg))
scheduler = optim.build_lr_scheduler(optimizer, **lr_scheduler_kwargs(cfg))
engine = build_engine(cfg, datamanager, model, optimizer, scheduler)
engine.run(**engine_run_kwargs(cfg))
