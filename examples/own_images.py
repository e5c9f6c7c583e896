"""Trains on your own images, with a folder for each identity and the camera's number in the file name.

    my-images/alice/cam1_0001.jpg
    my-images/alice/cam2_0007.jpg
    my-images/bob/cam1_0003.jpg

python examples/own_images.py --images my-images --camera 'cam(\\d+)'
"""

import argparse
import functools
import re
from pathlib import Path

from torchreid import data, models, optim, utils

import torchreid_snloss


class OwnImages(data.ImageDataset):
    """Each folder is an identity. The last ones are the test set, where the first image of each camera is a query."""

    def __init__(self, images, camera, test_share, root="", **kwargs):
        folders = sorted(path for path in images.iterdir() if path.is_dir())
        tested = set(folders[len(folders) - round(test_share * len(folders)) :])
        train, query, gallery = [], [], []
        for pid, folder in enumerate(folders):  # training identities are 0, 1, 2 and so on
            cameras = set()
            for path in sorted(folder.iterdir()):
                found = re.search(camera, path.name)
                if found is None:
                    raise SystemExit(f"no camera in the name of {path}: --camera {camera!r} does not match")
                camid = int(found[1])
                if folder not in tested:
                    train.append((str(path), pid, camid))
                else:
                    (gallery if camid in cameras else query).append((str(path), pid, camid))
                    cameras.add(camid)
        # The match of a query may itself be a query, from another camera, so the queries belong to the gallery too.
        super().__init__(train, query, query + gallery, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--camera", default=r"cam(\d+)", help="a regular expression with the camera's number as group")
    parser.add_argument("--test-share", type=float, default=0.3, help="share of the identities to test on")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--visrank", action="store_true", help="draw ranked lists after training")
    args = parser.parse_args()
    if re.compile(args.camera).groups < 1:
        raise SystemExit(f"--camera {args.camera!r} has no group in parentheses, as 'cam(\\d+)' has")

    torchreid_snloss.register()
    own_images = functools.partial(OwnImages, args.images, args.camera, args.test_share)
    data.register_image_dataset("own_images", own_images)
    utils.set_random_seed(1)
    datamanager = data.ImageDataManager(
        sources="own_images", height=128, width=64, batch_size_train=args.batch_size, num_instances=4,
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
