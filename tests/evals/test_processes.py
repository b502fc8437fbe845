"""Two processes evaluate what one does, to the last bit, and an error of one ends both."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import finished, trainer
from PIL import Image
from ranks import answers_of, join

from ssl_ib import UserError, distributed
from ssl_ib.cli import embed, eval, exits
from ssl_ib.data import statistics
from ssl_ib.data.sources.base import InMemory
from ssl_ib.data.views.augment import Augment
from ssl_ib.data.views.splits import ColourSplit
from ssl_ib.errors import EndedElsewhere
from ssl_ib.evals import ledger
from ssl_ib.evals.features import extract
from ssl_ib.evals.knn import knn_classes, knn_scores

#: Batch norms in the encoder and in the head, of which each process has its own statistics on a CPU.
RUN = (
    "model.backbone=resnet10t",
    "model.backbone_args=null",
    "masker=none",
    "batch_size=32",
    "eval={batch_size: 64, train_images: 200, val_images: 140}",
)
#: Images and the batch size: as many batches for each, one more for one of them, and none for one of them.
CUTS = ((8, 2), (7, 3), (1, 4))
IMAGES = InMemory(torch.arange(8 * 12).view(8, 3, 2, 2).to(torch.uint8), torch.arange(8) % 3, ["a", "b", "c"])
MATRIX = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


def evaluated(instance) -> dict:
    """All that a run is asked, and how many images were encoded for it here."""
    count, encode = [0], instance.run.model.encode

    def counted(views):
        count[0] += len(views)
        return encode(views)

    instance.run.model.encode = counted
    found = instance.online.evaluate(instance.progress(), final=True, probes=True)
    return {"evaluation": found, "raw_pixels": instance.online.raw_pixels(), "encoded": count[0]}


def ledgered(instance) -> dict[str, float]:
    """A ledger of four batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "STEPS_A_BATCH", 10)
        return instance.online.ledger(instance.progress())


def features(encode=lambda views: views.flatten(1) @ MATRIX, n: int = 8, size: int = 2):
    return extract(encode, IMAGES, torch.arange(n), size, lambda sample: sample.images.float(), "cpu")


def pieces() -> list[torch.Tensor]:
    """Features of several numbers of images, and what kNN makes of them."""
    found = []
    for n, size in CUTS:
        rows, labels = features(n=n, size=size)
        found += [rows, labels, knn_scores(rows, labels, rows, 2, 3, chunk=size)]
        found.append(knn_classes(rows, labels, rows, [1, 2], 3, chunk=size))
    return found


def measured() -> dict:
    """The statistics of images and of their colours, and how many images were read for them here."""
    images, read, sums = IMAGES, [0], statistics._sums

    def counted(chunk):
        read[0] += len(chunk)
        return sums(chunk)

    class Held:
        def train(self):
            return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_sums", counted)
        patch.setattr(statistics, "_CHUNK", 3)
        pixels = statistics.measure(IMAGES.images, IMAGES.sizes)
    views = ColourSplit(Augment(2), "ydbdr")
    views.measure(Held())
    return {"pixels": pixels, "colours": views.statistics, "read": read[0]}


def command(main, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(list(arguments))
    return code, output.getvalue(), errors.getvalue()


def commands(run: str, images: str, out: str) -> list[tuple[int, str, str]]:
    knn = ("knn", run, "k=[1,5]", "encode_batch=64", "figures=false", "device=cpu", "--out", out)
    return [
        command(eval.main, *knn),
        # All is there already, which both see.
        command(eval.main, *knn),
        command(embed.main, run, images, "--out", f"{out}/f.npy", "--batch-size", "2", "--device", "cpu"),
    ]


def ended(work) -> str:
    """What a process raises."""
    try:
        work()
    except (EndedElsewhere, UserError, ZeroDivisionError) as error:
        return type(error).__name__
    return "nothing"


def work(rank: int, port: int, path: str) -> None:
    join(rank, 2, port)

    def broken(error: Exception):
        def encode(views):
            if rank == 1:
                raise error
            return views

        return lambda: features(encode)

    def nested():
        with distributed.together():
            broken(UserError("not this image"))()

    def writes_first():
        with distributed.together():
            if rank == 0:
                raise UserError("no space")
            features()

    exits.PATIENCE = 0.0  # There is no torchrun to end the others.
    answers = {
        "pieces": pieces(),
        "statistics": measured(),
        "shared": distributed.shared(lambda item: (item, rank), "abc"),
        "message": command(lambda arguments: exits.exit_code("program", nested)),
        "bug": ended(broken(ZeroDivisionError())),
        "at the main one": ended(writes_first),
    }
    instance = trainer(*RUN, "parallel=ddp")
    for sample in [next(instance.loader.epoch(0)) for _ in range(2)]:
        instance.train_step(sample)
    before = {name: value.clone() for name, value in instance.state.state_dict().items()}
    answers |= evaluated(instance)
    answers["ledger"] = ledgered(instance)
    after = instance.state.state_dict()
    answers |= {"state": before, "moved": [name for name in before if not torch.equal(before[name], after[name])]}
    # The commands leave the group at their end, and there is more to do.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "shutdown", lambda: None)
        run = Path(path, "run.txt").read_text()
        answers["commands"] = commands(run, f"{path}/images", f"{path}/shared")
        answers["refused"] = [
            command(eval.main, protocol, run, *given, "--out", f"{path}/none", "device=cpu")
            for protocol, given in (("finetune", ()), ("linear", ("augment=true",)))
        ]
    torch.save(answers, f"{path}/{rank}.pt")
    distributed.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    (path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path / f"images/{number}.png")
    (path / "images" / "2.png").write_bytes(b"no image")
    for name in ("alone", "shared"):
        (path / name).mkdir()
    (path / "run.txt").write_text(str(finished()))
    return path


@pytest.fixture(scope="module")
def answers(folder) -> list[dict]:
    return answers_of(work, 2, folder)


def test_features_and_neighbours(answers):
    expected = pieces()
    for answer in answers:
        assert all(torch.equal(a, b) for a, b in zip(answer["pieces"], expected, strict=True))
        assert answer["shared"] == [("a", 0), ("b", 1), ("c", 1)]


def test_statistics(answers):
    one, found = measured(), [answer["statistics"] for answer in answers]
    assert [each.pop("read") for each in (one, *found)] == [8, 3, 5]
    assert found == [one, one]


def test_a_run_is_evaluated_as_by_one_process(answers):
    instance = trainer(*RUN)
    instance.state.load_state_dict(answers[0]["state"])
    instance.step = 2
    expected = evaluated(instance)
    assert {"knn/top1", "linear/top1", "held_out/loss", "health/uniformity"} <= expected["evaluation"].keys()
    # Both have taken part in the encoding, and have statistics of their own, which come back afterwards.
    counts = [answer["encoded"] for answer in answers]
    assert sum(counts) == expected.pop("encoded") and min(counts) > 400
    name = next(name for name in answers[0]["state"] if name.endswith("running_mean"))
    assert not torch.equal(*(answer["state"][name] for answer in answers))
    for answer in answers:
        assert {key: answer[key] for key in expected} == expected and answer["moved"] == []


def test_the_ledger_is_that_of_one_process(answers):
    # Whose forward pass has as many images.
    instance = trainer(*RUN, "accumulate=2")
    instance.state.load_state_dict(answers[0]["state"])
    instance.step = 2
    numbers = ledgered(instance)
    assert numbers["ledger/images"] == 64 and numbers["ledger/norm"] > 0
    assert [answer["ledger"] for answer in answers] == [numbers, numbers]


def test_an_error_of_one_ends_both_with_one_message(answers):
    assert [answer["message"] for answer in answers] == [(2, "", ""), (2, "", "program: not this image\n")]
    assert [answer["bug"] for answer in answers] == ["EndedElsewhere", "ZeroDivisionError"]
    assert [answer["at the main one"] for answer in answers] == ["UserError", "EndedElsewhere"]


def test_the_commands_do_what_one_process_does(answers, folder):
    main, other = (answer["commands"] for answer in answers)
    alone = commands(str(finished()), str(folder / "images"), str(folder / "alone"))
    assert [code for code, _, _ in main + other] == [0] * 6

    def lines(name):
        found = [json.loads(line) for line in (folder / name / "evals.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in found]

    assert lines("shared") == lines("alone") and len(lines("alone")) == 2
    for name in ("f.npy", "f.npy.csv", "f.npy.unreadable.txt"):
        assert (folder / "shared" / name).read_bytes() == (folder / "alone" / name).read_bytes()
    assert sorted(path.name for path in (folder / "shared").iterdir()) == sorted(
        path.name for path in (folder / "alone").iterdir()
    )
    # The main process alone speaks.
    assert main[0][1].count("top1") == alone[0][1].count("top1") == 2 and not any(said for _, said, _ in other[:2])


def test_a_training_is_refused(answers, folder):
    said = zip(*(answer["refused"] for answer in answers), strict=True)
    for protocol, by_each in zip(("finetune", "linear"), said, strict=True):
        why = "with these settings is a training, which processes do not share: run it in one process"
        assert by_each == ((2, "", f"ssl-ib-eval: {protocol} {why}\n"), (2, "", ""))
    assert not (folder / "none").exists()
