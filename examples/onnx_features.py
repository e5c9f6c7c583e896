"""Extracts features with a model that `torchreid-snloss-export` has written. It needs no torch.

python examples/onnx_features.py model.onnx my-images/alice/cam1_0001.jpg my-images/alice/cam2_0007.jpg
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--output", default="features.npy")
    args = parser.parse_args()

    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    height, width = int(about["data.height"]), int(about["data.width"])
    mean, std = (np.array(json.loads(about[key]), dtype=np.float32) for key in ("data.norm_mean", "data.norm_std"))

    batch = []
    for path in args.images:
        image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float32) / 255
        batch.append(((pixels - mean) / std).transpose(2, 0, 1))
    (features,) = session.run(None, {"images": np.stack(batch)})
    np.save(args.output, features)
    print(f"{features.shape} features of {about['model.name']} are in {args.output}")


if __name__ == "__main__":
    main()
