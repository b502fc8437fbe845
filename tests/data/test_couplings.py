"""The couplings are the network they stand for, invertible, and know their determinant."""

import pytest
import torch
from torch import nn

from ssl_ib.data.views import couplings
from ssl_ib.data.views.couplings import Couplings
from ssl_ib.data.views.generator import Generator


def trained(flow, blocks=4, hidden=5, clip=0.7, dtype=torch.float64, std=0.8):
    """Couplings far from the identity."""
    torch.manual_seed(0)
    chain = Couplings(flow, blocks, hidden, clip).to(dtype)
    for parameter in chain.parameters():
        nn.init.normal_(parameter, std=std)
    return chain


def plain(chain, x):
    """The formula, in plain torch: images [B, 3, h, w]."""
    x = x.clone()
    for number, block in enumerate(chain.blocks):
        order = [(number + k) % 3 for k in range(3)]
        x1, x2 = x[:, order[:1]], x[:, order[1:]]

        def network(part, x1=x1):
            hidden = torch.einsum("hi,bixy->bhxy", part.first.weight, x1) + part.first.bias[:, None, None]
            return torch.einsum("oh,bhxy->boxy", part.last.weight, hidden.relu()) + part.last.bias[:, None, None]

        scale = 1.0 if block.scale is None else (block.clip * network(block.scale).tanh()).exp()
        x2 = x2 * scale + network(block.shift)
        x = torch.cat([x1, x2], 1)[:, [order.index(channel) for channel in range(3)]]
    return x


@pytest.mark.parametrize("flow", ["vp", "nvp"])
def test_values_and_gradients_are_the_formula_s(flow, monkeypatch):
    monkeypatch.setitem(couplings._PIXELS, "cpu", 7)  # 24 pixels: pieces of 7, and one of 3
    chain = trained(flow)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    inputs = [x, *chain.parameters()]
    ours, wanted = chain(x), plain(chain, x)
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flow", ["vp", "nvp"])
def test_inverse(flow):
    chain = trained(flow, blocks=6, hidden=32, clip=1.0, dtype=torch.float32, std=0.2)
    x = torch.randn(3, 3, 5, 4)
    torch.testing.assert_close(chain.inverse(chain(x)), x, rtol=1e-5, atol=1e-5)
    assert (chain(x) - x).abs().max() > 0.5


@pytest.mark.parametrize("flow", ["vp", "nvp"])
def test_log_determinant(flow):
    chain, x = trained(flow), torch.randn(2, 3, 1, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: plain(chain, x), x)
    for image in range(2):
        _, expected = torch.linalg.slogdet(jacobian[image, ..., image, :, :, :].reshape(6, 6))
        torch.testing.assert_close(chain.log_det(x)[image], expected)
    assert (flow == "vp") == bool((chain.log_det(x) == 0).all())


def test_starts_as_the_identity_and_works_in_float32_under_autocast():
    chain, x = Couplings(), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = chain(x)
    assert torch.equal(y, x) and y.is_contiguous()


def test_generator_of_a_colour_space():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixels = torch.rand(2, 3, 4, 4)
    generator = Generator("ydbdr", mean=mean, std=std)
    red, green, blue = pixels.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    # Db and Dr are 1.505 (B - Y) and -1.902 (R - Y), and all in units of the mean deviation, 0.25, from its own zero.
    expected = torch.stack([luma, 1.505 * (blue - luma), -1.902 * (red - luma)], 1) / 0.25
    made = generator(generator.normalized(pixels))
    shift = (made - expected).mean(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(made - shift, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(generator.inverse(made), pixels, rtol=1e-5, atol=1e-5)


def test_a_generator_becomes_the_one_whose_state_it_loads():
    first = Generator("ydbdr", "vp", blocks=2, hidden=3, clip=0.5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    nn.init.normal_(first.couplings.blocks[1].shift.last.weight)
    second = Generator().requires_grad_(False)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 2, 2)
    assert torch.equal(first(x), second(x)) and torch.equal(first.inverse(x), second.inverse(x))
    assert not any(p.requires_grad for p in second.parameters())
