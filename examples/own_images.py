"""Trains on your own images, with a folder for each identity and the camera's number in the file name.

    my-images/alice/cam1_0001.jpg
    my-images/alice/cam2_0007.jpg
    my-images/bob/cam1_0003.jpg

python examples/own_images.py --images my-images --camera 'cam(\\d+)'
"""

import argparse
import functools

from torchreid import data, models, optim, utils

import torchreid_snloss
from torchreid_snloss.data import FolderOptions, ImageFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--camera", default="auto", help="a regular expression with the camera as group, auto or none")
    parser.add_argument("--test-share", type=float, default=0.3, help="share of the identities to test on")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--visrank", action="store_true", help="draw ranked lists after training")
    args = parser.parse_args()

    torchreid_snloss.register()
    options = FolderOptions(camera=args.camera, test_fraction=args.test_share)
    data.register_image_dataset("own_images", functools.partial(ImageFolder, options=options))
    utils.set_random_seed(1)
    datamanager = data.ImageDataManager(
        root=args.images, sources="own_images", height=128, width=64, batch_size_train=args.batch_size, num_instances=4,
        train_sampler="IdentitySampler", workers=args.workers,
    )  # fmt: skip
    model = models.build_model("osnet_x0_25", datamanager.num_train_pids, loss="hap2s", pretrained=False)
    if datamanager.use_gpu:
        model = model.cuda()
    optimizer = optim.build_optimizer(model, optim="adam", lr=0.0015)
    scheduler = optim.build_lr_scheduler(optimizer, lr_scheduler="cosine", max_epoch=args.epochs)
    engine = torchreid_snloss.ImageHAP2SEngine(datamanager, model, optimizer, scheduler=scheduler)
    engine.run(
        save_dir="log/own_images", max_epoch=args.epochs, normalize_feature=True, ranks=[1, 5], visrank=args.visrank
    )


if __name__ == "__main__":  # a data loader's workers import this file, and must not train
    main()
