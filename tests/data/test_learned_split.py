"""Views from the generator of another run: frozen, repeatable, kept by the run that uses them."""

import shutil

import pytest
import torch
from harness import checkpoint, evaluations, finished, losses, train, trainer

import ssl_ib
from ssl_ib import Sample, UserError
from ssl_ib.data.views.generator import Generator
from ssl_ib.data.views.learned_split import LearnedSplit
from ssl_ib.random import image_keys

#: A tiny run of the game. A whole one, because what it leaves is what is read.
GAME = (
    "task={name: labelled_pair, labels_per_class: 3}",
    "model={name: view_generator, space: ydbdr, flow: vp, blocks: 2, hidden: 4, backbone: vit_tiny_patch16_224, "
    "backbone_args: {patch_size: 8, embed_dim: 12, depth: 1, num_heads: 3}, lr_g: 1e-2}",
    "criterion=view_game",
    "masker=none",
    "views={name: plain, size: 16}",
    "epochs=1",
    "batch_size=256",
    "eval.linear.enabled=false",
)


def sample(n=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 20, 20), generator=generator, dtype=torch.uint8)
    return Sample.unlabelled(images)


def keys(given, epoch=0):
    return [image_keys(0, epoch, given.index, stream) for stream in (0, 1)]


@pytest.fixture(scope="module")
def game():
    return finished(*GAME)


def test_views_are_the_generator_s(game):
    state = checkpoint(game)["parts"]
    generator = Generator()
    generator.load_state_dict({k.removeprefix("model.generator."): v for k, v in state.items() if "generator" in k})
    assert generator.arguments["space"] == "ydbdr" and generator.arguments["flow"] == "vp"
    # It learned.
    assert max(p.detach().abs().max() for p in generator.couplings.blocks[0].shift.last.parameters()) > 1e-3
    views, given = LearnedSplit(str(game), size=16), sample()
    views.normalize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    first, second = views.draw(given, keys(given))
    assert (
        views.shapes == ((1, 16, 16), (2, 16, 16)) and first.shape[1:] == (1, 16, 16) and second.shape == (6, 2, 16, 16)
    )
    pixels = views.augment(given.images, keys(given)[0])
    mean, std = (torch.tensor(generator.arguments[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = generator((pixels - mean) / std)
    expected = (expected - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    assert not any(view.requires_grad for view in (first, second)) and not any(
        p.requires_grad for p in views.parameters()
    )


def test_draws_repeat_and_the_plain_view_can_be_shown(game):
    views, given = LearnedSplit(str(game), size=16), sample()
    drawn = [torch.cat(views.draw(given, keys(given, epoch)), 1) for epoch in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    plain = views.center(given)
    assert plain.shape == (6, 3, 16, 16)
    # An invertible map: its views show the image they were made of.
    raw = LearnedSplit(space="rgb", size=16)
    torch.testing.assert_close(views.show(plain, None), raw.center(given), atol=1e-4, rtol=1e-4)
    assert views.show(plain[:, :1], 0).shape == views.show(plain[:, 1:], 1).shape == (6, 3, 16, 16)


def test_each_channel_is_standardised(game):
    views = LearnedSplit(str(game), size=16)
    source = trainer().run.source
    views.measure(source)
    plain = views.center(source.train().gather(torch.arange(len(source.train()))))
    mean, std = plain.mean(dim=(0, 2, 3)), plain.std(dim=(0, 2, 3))
    # Digits are grey, so that the colour differences never change.
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-3, rtol=0)
    assert float(std[0]) == pytest.approx(1.0, abs=1e-2)


def test_a_run_keeps_its_generator_and_goes_on_without_the_other_run(game, tmp_path):
    shutil.copytree(game, tmp_path / "game")
    arguments = (
        f"views={{name: learned_split, run: {tmp_path / 'game'}, size: 16}}",
        "model={name: two_stream, backbone: vit_tiny_patch16_224, backbone_args: {patch_size: 8, embed_dim: 12, "
        "depth: 1, num_heads: 3}, head_dim: 8}",
        "criterion={name: info_nce, negatives: cross}",
        "masker=none",
        "epochs=2",
        "batch_size=256",
        "checkpoint.keep=1",
        "eval.linear.enabled=false",
    )
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert train(whole, *arguments) == 0
    parts = checkpoint(whole)["parts"]
    ours = {k.removeprefix("task.views.generator."): v for k, v in parts.items() if "views.generator" in k}
    theirs = {
        k.removeprefix("model.generator."): v
        for k, v in checkpoint(game)["parts"].items()
        if k.startswith("model.generator")
    }
    assert ours.keys() == theirs.keys() and len(ours) > 4
    assert all(torch.equal(v, theirs[k]) if isinstance(v, torch.Tensor) else v == theirs[k] for k, v in ours.items())
    # Back to the end of the first epoch, and on without the generator's run.
    shutil.copytree(whole, out)
    shutil.rmtree(tmp_path / "game")
    (out / "checkpoints" / "epoch_00001.pt").rename(out / "checkpoints" / "last.pt")
    assert checkpoint(out)["step"] == 5 and losses(whole)[-1][0] == 10
    assert train(out, *arguments, "--resume") == 0
    assert losses(out) == losses(whole)
    again = checkpoint(out)
    assert again["parts"].keys() == parts.keys()
    assert all(torch.equal(v, parts[k]) for k, v in again["parts"].items() if isinstance(v, torch.Tensor))
    assert evaluations(out) == evaluations(whole)
    # The finished run's encoder prepares images without it, too.
    images = trainer().run.source.train().gather(torch.arange(4)).images
    views = LearnedSplit(size=16, space="rgb")
    views.load_state_dict({k.removeprefix("task.views."): v for k, v in parts.items() if k.startswith("task.views.")})
    expected = views.center(Sample.unlabelled(images))
    for place in (out, out / "checkpoints" / "last.pt"):
        for name, channels in (("backbone_1", [0]), ("backbone_2", [1, 2])):
            encoder = ssl_ib.load(place, name=name)
            prepared = encoder.center(images)
            assert torch.equal(prepared, expected[:, channels]) and encoder(prepared).shape == (4, 12)


def test_mistakes(game, tmp_path):
    with pytest.raises(UserError, match=r"either run=DIR.*got run=None and space=None"):
        LearnedSplit()
    with pytest.raises(UserError, match="got run=x and space=rgb"):
        LearnedSplit("x", "rgb")
    with pytest.raises(UserError, match=f"run={tmp_path / 'none'}: there is no such folder"):
        LearnedSplit(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"that folder holds no run \(no config.yaml\)"):
        LearnedSplit(str(tmp_path))
    with pytest.raises(UserError, match="has no generator of views"):
        LearnedSplit(str(finished()))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="no checkpoint yet"):
        LearnedSplit(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        LearnedSplit(str(tmp_path))
