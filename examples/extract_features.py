"""Extracts features of images with a trained model, and prints the images nearest to the first one.

python examples/extract_features.py --config-file configs/small.yaml \
    --weights log/small/model/model-best.pth.tar images/*.jpg
"""

import argparse

import torch
from torchreid import data, metrics
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms.functional import to_pil_image

from torchreid_snloss import build_model, load_config, load_weights, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the config the model was trained with")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", default="features.pt")
    parser.add_argument("images", nargs="+")
    args = parser.parse_args()

    settings = resolve(load_config(args.config_file, ["model.pretrained", False]))
    model = build_model(settings, num_classes=1).eval()  # the classifier is not used
    load_weights(model, args.weights)
    _, transform = data.transforms.build_transforms(
        settings.height, settings.width, norm_mean=settings.norm_mean, norm_std=settings.norm_std
    )
    images = [transform(to_pil_image(read_image(path, ImageReadMode.RGB))) for path in args.images]
    with torch.no_grad():
        batch = torch.stack(images)
        features = (model(batch) + model(batch.flip(-1))) / 2 if settings.flip else model(batch)
    if settings.normalize_feature:  # as in the test
        features = torch.nn.functional.normalize(features)
    torch.save({"images": args.images, "features": features}, args.output)
    print(f"{tuple(features.shape)} features written to {args.output}")

    distances = metrics.compute_distance_matrix(features[:1], features)[0]
    for index in distances.argsort()[1:6]:
        print(f"{distances[index].sqrt():.3f}  {args.images[index]}")


if __name__ == "__main__":
    main()
