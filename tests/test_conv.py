"""HyperConv2d against the convolution with the decoded weight."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from birkhoff.nn import HyperConv2d

KERNELS = [((1, 1), (1, 1)), ((1, 1), (2, 3)), ((4, 4), (4, 4)), ((2, 5), (2, 5))]


def make_layer(
    kernel: tuple[int, int] = (4, 4), stride: tuple[int, int] = (4, 4), bits: int = 4
) -> HyperConv2d:
    torch.manual_seed(1)
    return HyperConv2d.from_conv2d(nn.Conv2d(20, 40, kernel, stride).eval(), bits=bits)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    batch=st.sampled_from([(), (1,), (3,), (0,)]),
    height=st.integers(5, 17),
    width=st.integers(5, 17),
    channels_last=st.booleans(),
    bits=st.sampled_from([3, 8]),
)
def test_gives_what_the_convolution_with_the_decoded_weight_gives(
    kernel: Any, batch: Any, height: int, width: int, channels_last: bool, bits: int
) -> None:
    layer = make_layer(kernel[0], kernel[1], bits)
    layer.precision = "highest"
    x = torch.randn(*batch, 20, height, width)
    if channels_last and batch:
        x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        y = layer(x)
        expected = nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y.is_contiguous() == expected.is_contiguous() or y.numel() == 0


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 2, 2, dilation=2),
        nn.Conv2d(8, 8, (2, 2), (2, 1)),
        nn.Conv2d(8, 8, 2, padding="same"),
    ],
)
def test_other_convolutions_are_refused(conv: nn.Conv2d) -> None:
    assert not HyperConv2d.fits(conv)
    with pytest.raises(ValueError, match="1x1"):
        HyperConv2d.from_conv2d(conv)


@pytest.mark.parametrize("shape", [(1, 19, 8, 8), (20, 8), (1, 1, 20, 8, 8), (1, 20, 3, 8)])
def test_inputs_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of shape"):
        make_layer()(torch.zeros(shape))


def test_has_the_attributes_of_a_convolution() -> None:
    conv = nn.Conv2d(20, 40, 4, 4)
    layer = make_layer()
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(layer, name) == getattr(conv, name)
    assert layer.weight.shape == conv.weight.shape
    assert "kernel_size=(4, 4)" in repr(layer)
