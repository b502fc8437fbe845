"""MAE's decoder: its layout of positions, its size, and what it makes of kept tokens."""

import math

import pytest
import torch

from ssl_ib import UserError
from ssl_ib.models.decoder import PatchDecoder
from ssl_ib.models.positions import sincos_positions


def mae_positions(width, rows, columns):
    """MAE's layout, one number at a time: the first half from the column, the second from the row; sines first."""
    table = torch.zeros(rows * columns, width, dtype=torch.float64)
    quarter = width // 4
    for r in range(rows):
        for c in range(columns):
            for half, place in enumerate((c, r)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    table[r * columns + c, half * width // 2 + i] = math.sin(angle)
                    table[r * columns + c, half * width // 2 + quarter + i] = math.cos(angle)
    return table


@pytest.mark.parametrize("width, grid", [(8, (3, 5)), (16, (4, 4)), (4, (1, 7))])
def test_positions(width, grid):
    positions = sincos_positions(width, grid)
    assert positions.dtype == torch.float32 and positions.shape == (grid[0] * grid[1], width)
    torch.testing.assert_close(positions.double(), mae_positions(width, *grid), rtol=0, atol=1e-6)


def decoder(prefix=1, grid=(2, 3), depth=2, width=16):
    torch.manual_seed(0)
    return PatchDecoder(12, grid, patch_dim=27, width=width, depth=depth, heads=2, prefix=prefix)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("kept", [1, 4, 6])
def test_shapes(prefix, kept):
    net = decoder(prefix)
    keep = torch.stack([torch.randperm(6)[:kept] for _ in range(5)])
    assert net(torch.randn(5, prefix + kept, 12), keep).shape == (5, 6, 27)


def test_kept_tokens_are_put_in_their_places():
    net = decoder(prefix=1).eval()
    tokens, keep = torch.randn(2, 3, 12), torch.tensor([[4, 1], [0, 5]])
    x = net.embed(tokens)
    full = torch.empty(2, 7, 16)
    for row in range(2):
        full[row, 0] = x[row, 0]
        for patch in range(6):
            places = keep[row].tolist()
            full[row, 1 + patch] = x[row, 1 + places.index(patch)] if patch in places else net.mask_token
    full = full + torch.cat([torch.zeros(1, 16), sincos_positions(16, (2, 3))])
    expected = net.predict(net.norm(net.blocks(full)))[:, 1:]
    torch.testing.assert_close(net(tokens, keep), expected)


def test_all_patches_in_any_order_are_the_whole_sequence():
    net = decoder(prefix=2).eval()
    tokens = torch.randn(3, 8, 12)
    order = torch.stack([torch.randperm(6) for _ in range(3)])
    shuffled = torch.cat([tokens[:, :2], tokens[:, 2:].gather(1, order[..., None].expand(-1, -1, 12))], dim=1)
    torch.testing.assert_close(net(shuffled, order), net(tokens, None))


def test_the_default_has_26_million_parameters():
    """MRCL's sizes with and without the decoder differ by 26M, 113M - 87M: MAE's, 512 wide and 8 deep, on ViT-B/16."""
    with torch.device("meta"):
        net = PatchDecoder(768, (14, 14), 16 * 16 * 3, 512, 8, 16, 1)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 26.0


def test_initial_values():
    net = decoder(width=64)
    assert net.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert not module.bias.any() and 0.9 * bound < module.weight.abs().max() <= bound
    # Positions are fixed: no parameter, and nothing to save.
    assert "positions" not in net.state_dict() and not net.positions.requires_grad


def test_gradients_reach_everything():
    net = decoder()
    tokens = torch.randn(2, 3, 12, requires_grad=True)
    net(tokens, torch.tensor([[4, 1], [0, 5]])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert tokens.grad.abs().sum(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("width, heads", [(18, 2), (20, 3), (2, 1)])
def test_widths_that_do_not_divide(width, heads):
    with pytest.raises(
        UserError, match=f"decoder_dim must be divisible by 4 and by decoder_heads={heads}, got {width}"
    ):
        PatchDecoder(12, (2, 3), 27, width, 1, heads, 1)
