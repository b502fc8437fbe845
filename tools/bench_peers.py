"""What tools/bench_train.py times our recipes against: lightly's methods, and the clock that all of them share.

A peer trains the same timm encoder, with the same head or decoder, batch, images, precision, compile setting, optimiser
and threads as one of our recipes: on its own transforms (in the main process, where ours are drawn as well), or on our
views, which leaves encoder, head, loss and optimiser to compare.
"""

from __future__ import annotations

import copy
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_ib.errors import UserError
from ssl_ib.run import plain_attention
from ssl_ib.trainer import Trainer


class Clock:
    """Seconds spent in named phases since the last `take`.

    phases: whether they are timed, by all clocks; on a GPU each of their borders waits for the device.
    """

    phases = True

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self.phases:
            yield
            return
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, its time counted under `name`."""

        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def time_blocks(self, model: nn.Module) -> None:
        """From now on counts the time in the model's transformer blocks, forward and backward, under "blocks".

        A block's backward begins when its output's gradient is there and ends when its input's is, and with it those
        of its parameters: autograd runs one operation at a time, the latest of the forward first.
        """

        def begin(*_) -> None:
            self.seconds["blocks"] -= self.now()

        def end(*_) -> None:
            self.seconds["blocks"] += self.now()

        for block in (module for module in model.modules() if isinstance(module, Block)):
            block.register_forward_pre_hook(begin)
            block.register_forward_hook(end)
            block.register_full_backward_pre_hook(begin)
            block.register_full_backward_hook(end)

    def take(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


class Peer(ABC):
    """A method of lightly's, stepped as its examples do.

    trainer: of our recipe, which gives images and settings; clock: what counts its phases (`draw` clears it).
    rows:    what the encoder gets of an image: one a view.
    """

    views = 1

    def __init__(self, trainer: Trainer, batches: Iterator, clock: Clock, own_transforms: bool):
        run = trainer.run
        self.name = "lightly as it comes" if own_transforms else "lightly, our views and attention"
        self.trainer, self.batches, self.drawing, self.own = trainer, batches, clock, own_transforms
        self.batch_size, self.device, self.rows = run.batch_size, run.device, self.views * run.batch_size
        self.config, self.size = run.config, run.views.shapes[0][-1]
        self.model = self.build(*run.model.export()).to(self.device)
        if not own_transforms and self.device.type == "cpu" and run.config.precision == "bf16":
            plain_attention(self.model)
        self.compiled = bool(run.config.compile)
        if self.compiled:
            self.model.compile(mode="reduce-overhead" if run.config.compile == "graphs" else None)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        self.transform, self.clock = self.transforms(), Clock(self.device)
        self.amp = run.config.precision == "bf16"

    @abstractmethod
    def build(self, name: str, arguments: dict[str, Any]) -> nn.Module:
        """The model around timm's encoder of that name and those arguments."""

    @abstractmethod
    def transforms(self) -> Callable:
        """lightly's own transforms: an image -> one tensor a view."""

    @abstractmethod
    def score(self, views: list[Tensor]) -> Tensor:
        """The loss of a batch's views."""

    def step(self) -> dict[str, float]:
        clock = self.clock
        start = clock.now()
        self.optimizer.zero_grad()
        with clock.phase("data"):
            sample = next(self.batches)
        with clock.phase("views"):
            views = self._own_views(sample) if self.own else self._our_views(sample)
        if self.config.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with clock.phase("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.score(views)
        with clock.phase("backward"):
            loss.backward()
        with clock.phase("optimiser"):
            self.optimizer.step()
        loss.item()
        return {"total": clock.now() - start, **clock.take()}

    def _own_views(self, sample) -> list[Tensor]:
        from torchvision.transforms.functional import to_pil_image

        views = [self.transform(to_pil_image(image)) for image in sample.images.cpu()]
        return [torch.stack([view[v] for view in views]).to(self.device) for v in range(self.views)]

    def _our_views(self, sample) -> list[Tensor]:
        task = self.trainer.run.task
        # lightly draws its own masks, in its forward.
        masker, task.masker = task.masker, None
        batch = task.prepare(sample, self.trainer.progress())
        task.masker = masker
        self.drawing.take()
        return batch.views


class SimCLR(Peer):
    """lightly's SimCLR on the recipe's encoder and head sizes."""

    views = 2

    def build(self, name: str, arguments: dict[str, Any]) -> nn.Module:
        import timm
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        head = self.config.model
        encoder = timm.create_model(name, **arguments)
        projector = SimCLRProjectionHead(
            encoder.num_features, head["projector_hidden"], head["projector_dim"], num_layers=head["projector_layers"]
        )
        self.loss = NTXentLoss(temperature=self.config.criterion["temperature"])
        return nn.Sequential(encoder, projector)

    def transforms(self) -> Callable:
        from lightly.transforms import SimCLRTransform

        return SimCLRTransform(input_size=self.size, gaussian_blur=0.0)

    def score(self, views: list[Tensor]) -> Tensor:
        return self.loss(*[self.model(view) for view in views])


class MaskedAutoencoder(nn.Module):
    """lightly's parts of an MAE, put together as its example does: images -> predicted and true hidden patches."""

    def __init__(self, vit: nn.Module, settings: dict[str, Any], ratio: float, norm_pix: bool):
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        self.utils, self.ratio, self.norm_pix = utils, ratio, norm_pix
        self.side = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        with warnings.catch_warnings():
            # lightly 1.6 announces a successor of its decoder, which does the same.
            warnings.simplefilter("ignore")
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                patch_size=self.side,
                embed_dim=vit.embed_dim,
                decoder_embed_dim=settings["decoder_dim"],
                decoder_depth=settings["decoder_depth"],
                decoder_num_heads=settings["decoder_heads"],
            )
        # The encoder drops what is hidden and has no use for a mask token.
        self.backbone.mask_token.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        utils, size = self.utils, (len(images), self.backbone.sequence_length)
        shown, hidden = utils.random_token_mask(size, mask_ratio=self.ratio, device=images.device)
        visible = self.decoder.embed(self.backbone.encode(images, idx_keep=shown))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        decoded = self.decoder.decode(utils.set_at_index(tokens, shown, visible.type_as(tokens)))
        # Only what is hidden is predicted; the class token is number 0 of the sequence, and no patch.
        pred = self.decoder.predict(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(utils.patchify(images, self.side), hidden - 1)
        return pred, utils.normalize_mean_var(target) if self.norm_pix else target


class MAE(Peer):
    """lightly's MAE on the recipe's encoder, decoder sizes and mask ratio."""

    def build(self, name: str, arguments: dict[str, Any]) -> nn.Module:
        import timm

        ratio, norm_pix = self.config.masker["ratio"], self.config.criterion["norm_pix"]
        return MaskedAutoencoder(timm.create_model(name, **arguments), self.config.model, ratio, norm_pix)

    def transforms(self) -> Callable:
        from lightly.transforms import MAETransform

        return MAETransform(input_size=self.size)

    def score(self, views: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(*self.model(views[0]))


class StudentTeacher(nn.Module):
    """lightly's parts of DINO, put together as its example does: views -> teacher's and student's outputs."""

    def __init__(self, encoder: nn.Module, settings: dict[str, Any], num_global: int):
        from lightly.models import utils
        from lightly.models.modules import DINOProjectionHead

        super().__init__()
        self.utils, self.num_global = utils, num_global
        sizes = encoder.num_features, settings["head_hidden"], settings["head_dim"], settings["prototypes"]
        heads = [DINOProjectionHead(*sizes, batch_norm=settings["head_norm"]) for _ in range(2)]
        self.student = nn.Sequential(encoder, heads[0])
        # Weight normalisation does not let itself be copied.
        heads[1].load_state_dict(heads[0].state_dict())
        self.teacher = nn.Sequential(copy.deepcopy(encoder), heads[1]).requires_grad_(False)

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self.utils.update_momentum(self.student, self.teacher, m=0.99)
        with torch.no_grad():
            taught = [self.teacher(view) for view in views[: self.num_global]]
        return taught, [self.student(view) for view in views]


class DINO(Peer):
    """lightly's DINO on the recipe's encoder, head sizes and crops."""

    def __init__(self, trainer: Trainer, *rest):
        self.views = len(trainer.run.views.shapes)
        super().__init__(trainer, *rest)

    def build(self, name: str, arguments: dict[str, Any]) -> nn.Module:
        import timm
        from lightly.loss import DINOLoss

        settings = self.config.model
        self.loss = DINOLoss(settings["prototypes"]).to(self.device)
        encoder = timm.create_model(name, **arguments, dynamic_img_size=True)
        return StudentTeacher(encoder, settings, self.config.views["num_global"])

    def transforms(self) -> Callable:
        from lightly.transforms import DINOTransform

        views = self.config.views
        return DINOTransform(
            global_crop_size=views["size"],
            global_crop_scale=tuple(views["scale"]),
            local_crop_size=views["local_size"],
            local_crop_scale=tuple(views["local_scale"]),
            n_local_views=views["num_local"],
            gaussian_blur=tuple(views["blur_p"]),
        )

    def score(self, views: list[Tensor]) -> Tensor:
        return self.loss(*self.model(views))


#: By the recipe's criterion.
PEERS = {"info_nce": SimCLR, "mae": MAE, "dino": DINO}


def peers(trainer: Trainer, batches: Iterator, clock: Clock, transforms: tuple[bool, ...]) -> list[Peer]:
    """lightly's counterpart of a recipe, on its transforms (True) and on ours. Raises UserError where there is none."""
    criterion = trainer.run.config.criterion["name"]
    if criterion not in PEERS:
        raise UserError(f"--lightly: no counterpart of criterion {criterion!r}; there is one of {', '.join(PEERS)}")
    return [PEERS[criterion](trainer, batches, clock, own) for own in transforms]
