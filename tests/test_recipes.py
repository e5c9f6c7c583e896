"""Every config that is shipped builds its model and optimizer, on every data set it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from torchreid_snloss import HAP2SLoss, build_model, build_optimizer, load_config, resolve
from torchreid_snloss.build import build_criteria

RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "variants")
DATA_SETS = {"market1501": 751, "dukemtmcreid": 702, "cuhk03": 767, "msmt17": 1041}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_recipe_builds(path: Path) -> None:
    # ImageNet's weights are a download, which nothing else here depends on.
    data_sets = DATA_SETS if path.parent.name == "strong" else {"": 10}
    for number, (name, num_classes) in enumerate(data_sets.items()):
        options = ["model.pretrained", False, "use_gpu", False]
        cfg = load_config(str(path), options + (["data.sources", [name], "data.targets", [name]] if name else []))
        settings = resolve(cfg)
        if number:  # data sets differ in the classifier's width alone
            continue
        model = build_model(settings, num_classes)
        optimizer, scheduler = build_optimizer(settings, model, build_criteria(settings))
        model.train()
        logits, features = model(torch.zeros(2, 3, settings.height, settings.width))
        assert logits.shape == (2, num_classes)
        assert len(features) == 2
        optimizer.step()
        scheduler.step()


def test_the_papers_own_are_in_their_recipes() -> None:
    def of(name: str) -> torch.nn.Module:
        cfg = load_config(str(ROOT / "configs" / name), ["model.pretrained", False, "use_gpu", False])
        return build_model(cfg, 10).eval()

    assert of("sn_resnet50_market1501.yaml").layer4[0].conv2.stride == (1, 1)
    assert of("hap2s_resnet50_market1501.yaml")(torch.zeros(1, 3, 256, 128)).shape == (1, 128)


def test_the_recipe_of_wrt_has_its_settings() -> None:
    cfg = load_config(str(ROOT / "configs/strong/wrt_resnet50.yaml"), ["use_gpu", False])
    (loss,) = build_criteria(resolve(cfg)).values()
    assert isinstance(loss, HAP2SLoss)
    assert (loss.weighting, loss.sigma, loss.margin, loss.normalize) == ("exponential", 1.0, None, False)
