"""A main script of one's own, made from torchreid's `scripts/main.py`. Two lines make it train with the losses here:

    # was: from default_config import get_default_config, imagedata_kwargs, ...
    from torchreid_snloss.config import get_default_config, imagedata_kwargs, ...
    # was: a build_engine() of its own
    from torchreid_snloss import build_engine

python examples/own_main.py configs/small.yaml loss.name hap2s
"""

import sys

from torchreid import data, models, optim

from torchreid_snloss import build_engine, register
from torchreid_snloss.config import (
    engine_run_kwargs,
    get_default_config,
    imagedata_kwargs,
    lr_scheduler_kwargs,
    optimizer_kwargs,
)

register()

cfg = get_default_config()
cfg.merge_from_file(sys.argv[1])
cfg.merge_from_list(sys.argv[2:])
cfg.test.visrank = False

datamanager = data.ImageDataManager(**imagedata_kwargs(cfg))
model = models.build_model(cfg.model.name, datamanager.num_train_pids, cfg.loss.name, cfg.model.pretrained)
optimizer = optim.build_optimizer(model, **optimizer_kwargs(cfg))
scheduler = optim.build_lr_scheduler(optimizer, **lr_scheduler_kwargs(cfg))
engine = build_engine(cfg, datamanager, model, optimizer, scheduler)
engine.run(**engine_run_kwargs(cfg))
