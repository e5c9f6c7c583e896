"""A torchreid training script with its loss swapped: the lines marked `was` are what it had before.

python examples/swap_the_loss.py
"""

import argparse

from torchreid import data, models, optim

import torchreid_snloss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="reid-data")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    torchreid_snloss.register()  # only needed for the data set 'synthetic' and the sampler 'IdentitySampler'

    datamanager = data.ImageDataManager(
        root=args.root,
        sources=args.dataset,
        height=128,
        width=64,
        batch_size_train=64,
        num_instances=4,
        train_sampler="IdentitySampler",
        workers=2,
    )
    model = models.build_model("osnet_x0_25", datamanager.num_train_pids, loss="triplet", pretrained=False)
    optimizer = optim.build_optimizer(model, optim="adam", lr=0.0015)
    scheduler = optim.build_lr_scheduler(optimizer, lr_scheduler="cosine", max_epoch=args.epochs)

    # was: engine = torchreid.engine.ImageTripletEngine(
    #          datamanager, model, optimizer, margin=0.3, weight_t=1, weight_x=1, scheduler=scheduler, use_gpu=False)
    engine = torchreid_snloss.ImageSNEngine(
        datamanager, model, optimizer, scale=10.0, weight_m=0.1, weight_x=1, scheduler=scheduler, use_gpu=False
    )
    engine.run(save_dir="log/swap_the_loss", max_epoch=args.epochs, print_freq=13, normalize_feature=True)


if __name__ == "__main__":  # a data loader's workers import this file, and must not train
    main()
