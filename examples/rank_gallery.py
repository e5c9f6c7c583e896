"""Ranks the gallery of a test set, which may be small, by the features that `torchreid-snloss-features` has written.

python examples/rank_gallery.py features.npz --lists 3
"""

import argparse

import numpy as np

from torchreid_snloss.evaluation import nearest_gallery, rank_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the file of features of one data set")
    parser.add_argument("--lists", type=int, default=3, help="number of ranked lists to print")
    parser.add_argument("--topk", type=int, default=5, help="number of images in a list")
    args = parser.parse_args()

    with np.load(args.file) as file:
        paths, pids = file["paths"], file["pids"]
        query, gallery = (np.flatnonzero(file["splits"] == split) for split in ("query", "gallery"))
        given = [file[name][rows] for name in ("features", "pids", "camids") for rows in (query, gallery)]

    ranking = rank_features(*given)
    print(f"{len(query)} queries, {len(gallery)} gallery images: mAP {ranking.mean_ap:.1%}")
    for rank in (1, 5, 10):
        if rank <= len(ranking.cmc):  # a small gallery has a short curve
            print(f"Rank-{rank}: {ranking.cmc[rank - 1]:.1%}")

    indices, distances = nearest_gallery(*given, topk=args.topk)  # squared distances
    for number in range(min(args.lists, len(query))):
        print(f"\n{paths[query[number]]}")
        for index, distance in zip(indices[number], distances[number]):
            if index >= 0:  # a list ends with -1 if the gallery has no more images
                match = "match" if pids[gallery[index]] == pids[query[number]] else "     "
                print(f"{distance**0.5:.3f}  {match}  {paths[gallery[index]]}")


if __name__ == "__main__":
    main()
