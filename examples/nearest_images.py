"""Prints the images that are nearest to one of them, by the features that `torchreid-snloss-features` has written.

python examples/nearest_images.py features.npz --image my-images/alice/cam1_0001.jpg
"""

import argparse

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the file of features")
    parser.add_argument("--image", help="its path, as in the file; default: the first one")
    parser.add_argument("--number", type=int, default=5)
    args = parser.parse_args()

    with np.load(args.file) as file:
        features, paths = file["features"], file["paths"]
    if args.image is not None and args.image not in paths:
        parser.error(f"{args.image!r} is not in {args.file}, where paths are written as {str(paths[0])!r}")
    chosen = 0 if args.image is None else list(paths).index(args.image)
    distances = np.linalg.norm(features - features[chosen], axis=1)
    print(paths[chosen])
    for index in np.argsort(distances, kind="stable")[: args.number + 1]:
        if index != chosen:
            print(f"{distances[index]:.3f}  {paths[index]}")


if __name__ == "__main__":
    main()
