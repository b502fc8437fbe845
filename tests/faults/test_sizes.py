"""Sizes that no machine holds are said before they are tried, and those that are none before the first step."""

import os
import socket

import pytest
import torch

from ssl_ib import device
from ssl_ib.cli.train import main
from ssl_ib.device import Bounded, require_memory
from ssl_ib.errors import UserError
from ssl_ib.record import backbone

VIT = ["simclr_digits", "model.backbone=vit_tiny_patch16_224"]

CASES = {
    "no heads": ([*VIT, "model.backbone_args.num_heads=0"], "backbone_args.num_heads: expected sizes from 1 to"),
    "heads below 0": ([*VIT, "model.backbone_args.num_heads=-1"], "backbone_args.num_heads: expected sizes from 1 to"),
    "no patches": ([*VIT, "model.backbone_args.patch_size=0"], "backbone_args.patch_size: expected sizes from 1 to"),
    "no width": ([*VIT, "model.backbone_args.embed_dim=0"], "backbone_args.embed_dim: expected sizes from 1 to"),
    "no blocks": ([*VIT, "model.backbone_args.depth=0"], "backbone_args.depth: expected sizes from 1 to"),
    "blocks": ([*VIT, "model.backbone_args.depth=100000000"], "backbone_args.depth: expected sizes from 1 to 1,024"),
    "other channels": ([*VIT, "model.backbone_args.in_chans=1"], "the views have 3 channels: leave it out"),
    "layers": (["simclr_digits", "model.projector_layers=100000000"], "model.projector_layers: expected"),
    "decoder": (["mrcl_digits", "model.decoder_depth=100000000"], "model.decoder_depth: expected"),
    "features": (["simclr_digits", "model.projector_hidden=4000000000000"], "GB of memory are free"),
    "features beyond counting": (["simclr_digits", "model.projector_hidden=4000000000000000000"], "memory are free"),
    "views": (["simclr_digits", "views.size=100000"], "images with 2 views each would take"),
    "images": (["simclr_digits", "source.size=100000"], "source.size: digits of 100,000 x 100,000 pixels would take"),
}


@pytest.mark.parametrize("arguments, says", CASES.values(), ids=CASES)
def test_a_size(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--dry-run"]) == 2
    assert says in capsys.readouterr().err and not os.listdir(tmp_path)


def test_many_small_tensors_are_bounded_too(monkeypatch):
    monkeypatch.setattr(device, "MOST_TENSORS", 100)
    with Bounded():
        torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(50)])
    with pytest.raises(UserError, match="more than 100 tensors, and it is not built yet"), Bounded():
        torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(51)])


def test_memory_is_that_which_is_free_and_building_draws_the_same(monkeypatch):
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 8)
    torch.manual_seed(0)
    with Bounded():
        bounded = torch.nn.Linear(8, 8)
    assert torch.equal(plain.weight, bounded.weight)
    monkeypatch.setattr(device, "free_memory", lambda device=None: 1e9)
    require_memory(1e9, "this")
    with pytest.raises(UserError, match=r"this would take 1.1 GB, and 1.0 GB of memory are free"):
        require_memory(1.1e9, "this")
    with pytest.raises(UserError, match="would take 4.0 GB, and 1.0 GB"), Bounded():
        torch.empty(1_000_000_000)


def test_the_state_of_the_optimiser_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "free_memory", lambda device=None: 1.5e6)
    assert main(["simclr_digits", "batch_size=8", "--dry-run"]) == 2
    assert "model: the gradients and the optimiser's state would take" in capsys.readouterr().err


def test_weights_that_cannot_be_downloaded_are_said_at_once(tmp_path, monkeypatch, capsys):
    def refuse(*address, **more):
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbone.socket, "create_connection", refuse)
    monkeypatch.setattr(backbone, "getproxies", dict)
    monkeypatch.setattr(backbone, "try_to_load_from_cache", lambda *given: None)
    assert main([*VIT, "model.backbone_args.pretrained=true", "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "are not on this machine" in message and "cannot be reached to download them: Name or service" in message


def test_what_timm_builds_and_cannot_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for recipe in ("simclr_digits", "view_generator_supervised_rgb"):
        stages = ["model.backbone=resnet18", "model.backbone_args={layers: [2, 2]}"]
        assert main([recipe, "source=digits", *stages, "--dry-run"]) == 2
        assert "'resnet18' cannot read a view of" in capsys.readouterr().err
    assert main(["svib_cifar10", "source=digits", "views=frequency_split", "--dry-run"]) == 2
    assert "reads views of 3 channels, and this one has 6" in capsys.readouterr().err


def test_a_dead_proxy_is_said_at_once(monkeypatch):
    """The download would try again for a minute."""
    monkeypatch.setattr(backbone, "try_to_load_from_cache", lambda *given: None)
    monkeypatch.setattr(backbone, "proxy_bypass", lambda host: False)
    with socket.socket() as taken:
        # Nobody listens there.
        taken.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{taken.getsockname()[1]}"
        for spelled in (proxy, f"http://{proxy}"):
            monkeypatch.setattr(backbone, "getproxies", lambda spelled=spelled: {"https": spelled})
            with pytest.raises(UserError, match="and the proxy 127.0.0.1 cannot be reached to download them"):
                backbone.check_reachable("vit_tiny_patch16_224")
