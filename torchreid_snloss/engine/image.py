"""Engines for image re-identification, one a loss."""

from __future__ import annotations

from torchreid_snloss.engine.metric import LossEngine, MetricEngine
from torchreid_snloss.losses import FIDILoss, HAP2SLoss, SNLoss

__all__ = ["ImageFIDIEngine", "ImageHAP2SEngine", "ImageMetricEngine", "ImageSNEngine"]


class ImageSNEngine(LossEngine):
    """Trains with :class:`SNLoss` and softmax. Arguments: :class:`MetricEngine`'s and :class:`SNLoss`'s keywords.

    Example::

        import torchreid_snloss
        from torchreid import data, models, optim

        torchreid_snloss.register()
        datamanager = data.ImageDataManager(
            root='reid-data', sources='synthetic', height=128, width=64,
            batch_size_train=64, num_instances=4, train_sampler='IdentitySampler'
        )
        model = models.build_model('osnet_x0_25', datamanager.num_train_pids, loss='sn', pretrained=False)
        model = model.cuda()  # or use_gpu=False below
        optimizer = optim.build_optimizer(model, optim='adam', lr=0.0015)
        scheduler = optim.build_lr_scheduler(optimizer, lr_scheduler='cosine', max_epoch=20)
        engine = torchreid_snloss.ImageSNEngine(
            datamanager, model, optimizer, scale=10.0, weight_m=1, weight_x=1, scheduler=scheduler
        )
        engine.run(max_epoch=20, save_dir='log/sn', normalize_feature=True)
    """

    loss_class = SNLoss


class ImageHAP2SEngine(LossEngine):
    """Trains with :class:`HAP2SLoss` and softmax; used like :class:`ImageSNEngine`."""

    loss_class = HAP2SLoss


class ImageFIDIEngine(LossEngine):
    """Trains with :class:`FIDILoss` and softmax; used like :class:`ImageSNEngine`."""

    loss_class = FIDILoss


class ImageMetricEngine(MetricEngine):
    """Trains with any criterion and softmax, or with several criteria. Arguments: :class:`MetricEngine`'s.

    Example::

        from pytorch_metric_learning import losses, miners
        from torchreid_snloss.losses import MinedLoss

        engine = torchreid_snloss.ImageMetricEngine(
            datamanager, model, optimizer, scheduler=scheduler,
            criterion=MinedLoss(losses.CircleLoss(), miners.MultiSimilarityMiner()),
        )
        both = torchreid_snloss.ImageMetricEngine(
            datamanager, model, optimizer, scheduler=scheduler,
            criterion={'sn': torchreid_snloss.SNLoss(), 'triplet': torchreid.losses.TripletLoss()},
            weight_m={'sn': 1.0, 'triplet': 0.5},
        )
    """
