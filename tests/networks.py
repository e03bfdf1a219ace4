"""Small networks with random weights."""

import torch

import effseg

TINY = "tu-test_resnet.r160_in1k"


def segmenter(encoder=TINY, channels=8, **arguments):
    torch.manual_seed(0)
    return effseg.EffSeg(encoder, **_widths(channels), **arguments).eval()


def joint_network(encoder=TINY, channels=8, **arguments):
    torch.manual_seed(0)
    arguments = {"detection_layers": 1, **_widths(channels), **arguments}
    return effseg.EffSegDet(encoder, **arguments).eval()


def _widths(channels):
    return {
        "encoder_weights": None,
        "decoder_channels": channels,
        "decoder_layers": 1,
        "head_channels": channels,
        "head_layers": 1,
    }
