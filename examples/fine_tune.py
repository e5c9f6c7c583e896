"""Fine-tunes weights from torchreid's model zoo with another loss, and a smaller learning rate for the backbone.

The zoo's weights are files on Google Drive, each with an id. A file that has already been downloaded is used as it is.

python examples/fine_tune.py --weights osnet_x1_0_market1501.pth --id 1vduhq5DpN2q1g4fYEZfPI17MJeh9qyrA
"""

import argparse
from pathlib import Path

import gdown

from torchreid_snloss import build_datamanager, build_engine, build_model, build_optimizer, load_config, load_weights
from torchreid_snloss.build import build_criteria
from torchreid_snloss.settings import engine_run_kwargs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the file")
    parser.add_argument("--id", help="of the file on Google Drive, from torchreid's model zoo, if it is not there")
    parser.add_argument("--config-file", default="")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="KEY VALUE")
    args = parser.parse_args()

    if not args.weights.exists():
        if args.id is None:
            raise SystemExit(f"there is no file {args.weights}, and no --id to download it by")
        gdown.download(id=args.id, output=str(args.weights))

    cfg = load_config(
        args.config_file,
        ["model.name", "osnet_x1_0", "model.pretrained", False, "loss.name", "hap2s", "data.save_dir", "log/fine_tune",
         "train.staged_lr", True, "train.new_layers", ["classifier"], "train.base_lr_mult", 0.1, *args.options],
    )  # fmt: skip
    datamanager = build_datamanager(cfg)
    model = build_model(cfg, datamanager.num_train_pids)
    load_weights(model, str(args.weights))  # skips the classifier, which is for other identities
    if cfg.use_gpu:
        model = model.cuda()
    criteria = build_criteria(cfg)
    optimizer, scheduler = build_optimizer(cfg, model, criteria)
    build_engine(cfg, datamanager, model, optimizer, scheduler, criteria).run(**engine_run_kwargs(cfg))


if __name__ == "__main__":  # a data loader's workers import this file, and must not train
    main()
