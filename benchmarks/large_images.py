"""mIoU of the bundled model on enlarged images of VOC subset val, by protocol.

    python -m benchmarks.large_images size320 slide512

Every 25th image (20) is enlarged to a longer side of 2,600 pixels; predicted masks are scaled back
to the labels' size. EFFSEG_DATA is the folder of the data.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from effseg import Predictor
from effseg.metrics.confusion import SegmentationMetrics

LONGER_SIDE = 2600


def main() -> None:
    """Print the mIoU of each protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocols", nargs="+")
    parser.add_argument("--count", type=int, default=20)
    options = parser.parse_args()
    voc = Path(os.environ["EFFSEG_DATA"]) / "VOCdevkit/VOC2012"
    names = (voc / "ImageSets/Segmentation/val.txt").read_text().split()[::25][: options.count]
    for protocol in options.protocols:
        predictor, metrics = Predictor("voc", protocol), SegmentationMetrics(21, 255)
        for name in names:
            image = Image.open(voc / f"JPEGImages/{name}.jpg").convert("RGB")
            scale = LONGER_SIDE / max(image.size)
            large = image.resize([round(side * scale) for side in image.size])
            mask = Image.fromarray(predictor(large).mask.numpy())
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
            target = np.asarray(Image.open(voc / f"SegmentationClass/{name}.png"))
            metrics.update(torch.from_numpy(np.array(mask)), torch.from_numpy(target.copy()))
        print(f"{protocol}: mIoU {metrics.compute()['miou']:.4f}")


if __name__ == "__main__":
    main()
