"""A training loop of your own in plain PyTorch, with a loss of this package beside softmax.

python examples/own_loop.py --epochs 20
"""

import argparse

import numpy as np
import torch
from torch.nn import functional as F
from torchreid import data, models

import torchreid_snloss
from torchreid_snloss.evaluation import rank_features


def train(model, loader, criterion, optimizer, device) -> float:
    model.train()
    total = 0.0
    for batch in loader:  # 16 identities with 4 images each
        images, pids = batch["img"].to(device), batch["pid"].to(device)
        logits, features = model(images)
        loss = F.cross_entropy(logits, pids, label_smoothing=0.1) + 0.1 * criterion(features, pids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def extract(model, loader, device):
    model.eval()
    features, pids, camids = [], [], []
    for batch in loader:
        features.append(F.normalize(model(batch["img"].to(device))).cpu())  # SNLoss compares features of length 1
        pids.append(batch["pid"].numpy())
        camids.append(batch["camid"].numpy())
    return torch.cat(features), np.concatenate(pids), np.concatenate(camids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="reid-data")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    torchreid_snloss.register()  # only needed for the data set 'synthetic' and the sampler 'IdentitySampler'
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    datamanager = data.ImageDataManager(
        root=args.root, sources=args.dataset, height=128, width=64, batch_size_train=64, num_instances=4,
        train_sampler="IdentitySampler", workers=args.workers,
    )  # fmt: skip
    model = models.build_model("osnet_x0_25", datamanager.num_train_pids, loss="triplet", pretrained=False).to(device)
    criterion = torchreid_snloss.SNLoss(num_neighbors=10, scale=10.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0015)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in range(args.epochs):
        loss = train(model, datamanager.train_loader, criterion, optimizer, device)
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}")

    loaders = datamanager.test_loader[args.dataset]
    (query, q_pids, q_camids), (gallery, g_pids, g_camids) = (
        extract(model, loaders[split], device) for split in ("query", "gallery")
    )
    ranking = rank_features(query, gallery, q_pids, g_pids, q_camids, g_camids)
    print(f"mAP: {ranking.mean_ap:.1%}, rank 1: {ranking.cmc[0]:.1%}")
    torch.save({"state_dict": model.state_dict()}, "own_loop.pth.tar")  # for model.load_weights


if __name__ == "__main__":  # a data loader's workers import this file, and must not train
    main()
