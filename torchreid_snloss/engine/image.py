"""Engines for image re-identification, one for each loss."""

from __future__ import annotations

from torchreid_snloss.engine.loss_engine import LossEngine
from torchreid_snloss.engine.metric import MetricEngine
from torchreid_snloss.losses import FIDILoss, HAP2SLoss, SNLoss

__all__ = ["ImageFIDIEngine", "ImageHAP2SEngine", "ImageMetricEngine", "ImageSNEngine"]


class ImageSNEngine(LossEngine):
    """Trains with `SNLoss` and softmax. It takes the arguments of `MetricEngine` and the keywords of `SNLoss`.

    Example:
        ```python
        import torchreid_snloss
        from torchreid import data, models, optim

        torchreid_snloss.register()
        if __name__ == "__main__":  # the loader's workers import this file
            datamanager = data.ImageDataManager(
                root='reid-data', sources='synthetic', height=128, width=64,
                batch_size_train=64, num_instances=4, train_sampler='IdentitySampler'
            )
            model = models.build_model('osnet_x0_25', datamanager.num_train_pids, loss='sn', pretrained=False)
            model = model.cuda()  # or use_gpu=False below
            optimizer = optim.build_optimizer(model, optim='adam', lr=0.0015)
            scheduler = optim.build_lr_scheduler(optimizer, lr_scheduler='cosine', max_epoch=20)
            engine = torchreid_snloss.ImageSNEngine(
                datamanager, model, optimizer, scale=10.0, weight_m=0.1, weight_x=1, scheduler=scheduler
            )
            engine.run(max_epoch=20, save_dir='log/sn', normalize_feature=True)
        ```
    """

    loss_class = SNLoss


class ImageHAP2SEngine(LossEngine):
    """Trains with `HAP2SLoss` and softmax, and is used like `ImageSNEngine`."""

    loss_class = HAP2SLoss


class ImageFIDIEngine(LossEngine):
    """Trains with `FIDILoss` and softmax, and is used like `ImageSNEngine`."""

    loss_class = FIDILoss


class ImageMetricEngine(MetricEngine):
    """Trains with any criterion and softmax, or with several criteria. It takes the arguments of `MetricEngine`.

    Example:
        ```python
        from pytorch_metric_learning import losses, miners
        from torchreid_snloss.losses import MinedLoss

        engine = torchreid_snloss.ImageMetricEngine(
            datamanager, model, optimizer, scheduler=scheduler,
            criterion=MinedLoss(losses.CircleLoss(), miners.MultiSimilarityMiner()),
        )
        both = torchreid_snloss.ImageMetricEngine(
            datamanager, model, optimizer, scheduler=scheduler,
            criterion={'sn': torchreid_snloss.SNLoss(), 'triplet': torchreid.losses.TripletLoss()},
            weight_m={'sn': 0.1, 'triplet': 1.0},
        )
        ```
    """
