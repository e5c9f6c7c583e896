"""Exports a trained model to ONNX and compares its features with torch's. Needs onnx, onnxscript and onnxruntime.

python examples/export_onnx.py --config-file configs/small.yaml --weights log/small/model/model-best.pth.tar
"""

import argparse

import numpy as np
import onnxruntime
import torch

from torchreid_snloss import build_model, load_config, load_weights, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the config the model was trained with")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", default="model.onnx")
    args = parser.parse_args()

    settings = resolve(load_config(args.config_file, ["model.pretrained", False]))
    model = build_model(settings, num_classes=1).eval()  # the classifier is not used
    load_weights(model, args.weights)

    images = torch.randn(2, 3, settings.height, settings.width)
    torch.onnx.export(
        model, (images,), args.output, input_names=["images"], output_names=["features"],
        dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}}, dynamo=False,
    )  # fmt: skip

    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    more = torch.randn(5, 3, settings.height, settings.width)
    with torch.no_grad():
        expected = model(more).numpy()
    (features,) = session.run(None, {"images": more.numpy()})
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    difference = abs(features - expected).max()
    print(f"{args.output}: {features.shape[1]} features per image, within {difference:.1e} of torch's")


if __name__ == "__main__":
    main()
