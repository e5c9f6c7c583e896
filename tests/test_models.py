"""Every model of torchreid's factory takes a training step with a metric loss."""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_datamanager, make_engine
from torchreid import models

from torchreid_snloss import ImageSNEngine, register

register()

QUICK = {"osnet_x0_25", "mobilenetv2_x1_0", "shufflenet_v2_x0_5", "resnet18", "hacnn", "pcb_p4", "mudeep"}


def factory() -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        models.show_avai_models()
    names: list[str] = ast.literal_eval(printed.getvalue())
    return names


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in factory()]
)
def test_one_step(name: str, reid_data: Path) -> None:
    height, width = (160, 64) if name == "hacnn" else (256, 128)
    datamanager = make_datamanager(reid_data, height=height, width=width, batch_size_train=4, num_instances=2)
    model = models.build_model(name, datamanager.num_train_pids, loss="sn", pretrained=False, use_gpu=False)
    before = {key: value.clone() for key, value in model.named_parameters()}
    engine = make_engine(ImageSNEngine, datamanager, model, scale=5.0)
    summary = engine.forward_backward(next(iter(datamanager.train_loader)))
    assert {"loss_m", "loss_x", "acc"} <= set(summary)
    assert all(torch.isfinite(torch.tensor(value)) for value in summary.values())
    changed: Any = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(changed) > 0.5 * len(before)
