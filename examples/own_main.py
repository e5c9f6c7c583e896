"""A main script based on torchreid's `scripts/main.py`, with two changes, marked below.

python examples/own_main.py configs/small.yaml loss.name hap2s test.visrank False
"""

import sys

import torch
from torch import nn
from torchreid import utils

# Change 1. Was: from default_config import get_default_config, optimizer_kwargs, ...
from torchreid_snloss.config import get_default_config
from torchreid_snloss.settings import engine_run_kwargs

# Change 2. Was: a build_datamanager() and a build_engine() in this file, and torchreid's build_model() and so on
from torchreid_snloss import build_datamanager, build_engine, build_model, build_optimizer  # isort: skip
from torchreid_snloss.build import build_criteria


def main() -> None:
    cfg = get_default_config()
    cfg.use_gpu = torch.cuda.is_available()
    cfg.merge_from_file(sys.argv[1])
    cfg.merge_from_list(sys.argv[2:])
    utils.set_random_seed(cfg.train.seed)

    datamanager = build_datamanager(cfg)
    model = build_model(cfg, datamanager.num_train_pids)
    if cfg.use_gpu:
        model = nn.DataParallel(model).cuda()
    criteria = build_criteria(cfg)
    optimizer, scheduler = build_optimizer(cfg, model, criteria)
    engine = build_engine(cfg, datamanager, model, optimizer, scheduler, criteria)
    engine.run(**engine_run_kwargs(cfg))


if __name__ == "__main__":  # a data loader's workers import this file, and must not train
    main()
