"""The networks for sequences and single frames: what each view goes through, and what is trained."""

import pytest
import torch

from ssl_ib import Batch, RunInfo, UserError
from ssl_ib.models.frame_sequence import FrameSequence

SHAPES = ((10, 3, 32, 32), (3, 32, 32))


def batch(size=4):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(size, *shape, generator=generator) for shape in SHAPES]
    index = torch.arange(size)
    return Batch(views, [None, None], index, index)


def model(share="none", **more):
    torch.manual_seed(0)
    return FrameSequence(RunInfo(SHAPES, 4), share=share, **more).eval()


@pytest.mark.parametrize("share", ["none", "frames"])
def test_each_view_goes_through_its_network(share):
    net, given = model(share, channels=(4, 8), strides=(2, 1), hidden=6, projector_dim=5), batch()
    outputs = net(given)
    assert [tuple(x.shape) for x in outputs["features"]] == [(4, 6), (4, 8)]
    assert [tuple(x.shape) for x in outputs["projection"]] == [(4, 5), (4, 5)]
    frames = [net.sequence.frames(given.views[0][:, t]) for t in range(10)]
    state = net.sequence.lstm(torch.stack(frames, dim=1))[1][0][-1]
    assert torch.allclose(outputs["features"][0], state, atol=1e-5)
    assert torch.equal(net.encode(given.views[0]), outputs["features"][0])
    assert torch.equal(net.encode(given.views[1]), outputs["features"][1])
    assert (net.frame is net.sequence.frames) is (share == "frames")
    assert net.widths == {"features": 6, "projection": 5}


def test_a_frame_may_be_a_sequence_of_one():
    net, given = model("all"), batch()
    features = net(given)["features"]
    assert torch.equal(features[1], net.encode(given.views[1][:, None]))
    assert torch.equal(features[0], model()(given)["features"][0])
    names = {name.split(".")[0] for name, _ in net.named_parameters()}
    assert names == {"sequence", "sequence_projector"}


def test_what_nobody_reads_is_neither_computed_nor_trained():
    net = model()
    net.wanted_views = {"features": (0,)}
    net.select({"features"})
    outputs = net(batch())
    assert outputs["features"][1] is None and outputs["projection"] == [None, None]
    trained = {name.split(".")[0] for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {"sequence"}
    net.wanted_views = {}
    net.select({"projection"})
    outputs = net(batch())
    sum(z.square().sum() for z in outputs["projection"]).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_stride_for_each_of_the_channels():
    with pytest.raises(UserError, match=r"strides=\(2, 2, 2, 2\): expected a stride for each of the channels \(4, 8\)"):
        model(channels=(4, 8))


@pytest.mark.parametrize("shape", [(1, 32, 32), (9, 1, 8, 8), (3, 2, 3, 8, 8)])
def test_refuses_other_views(shape):
    with pytest.raises(UserError, match="frame_sequence' takes views of T frames"):
        FrameSequence(RunInfo((shape,), 4))
