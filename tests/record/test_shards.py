"""Checkpoints of sharded runs: whole or absent, and read by any number of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import answers_of, join
from test_sharding import compare, trainer_of, whole

from ssl_ib import UserError, distributed, sharding
from ssl_ib.record import checkpoint, shards
from ssl_ib.record.weights import read_file
from ssl_ib.trainer import Trainer

RECIPE, HALF = "svib_digits", 3


def steps(trainer: Trainer, last: int) -> None:
    for sample in trainer.loader.epoch(0, trainer.step):
        trainer.train_step(sample)
        if trainer.step == last:
            return


def begun(out: Path, mesh=None) -> Trainer:
    """A trainer that has saved itself after some steps, in `out`."""
    trainer = trainer_of(RECIPE, mesh, out)
    trainer.results = {"untrained": {}}
    steps(trainer, HALF)
    trainer.save("epoch_00001.pt")
    return trainer


def resumed(out: Path, mesh=None) -> Trainer:
    trainer = trainer_of(RECIPE, mesh, out)
    with distributed.together():
        state, warnings = checkpoint.load(out / "checkpoints")
        assert not warnings and state["step"] == HALF
        trainer.restore(state)
    return trainer


def after(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that the trainer has after some more steps."""
    steps(trainer, 2 * HALF)
    found = {f"after {name}": whole(value) for name, value in trainer.state.state_dict().items()}
    for number, kept in trainer.optimizer.state_dict()["state"].items():
        found |= {f"gradient {number} {key}": whole(value) for key, value in kept.items()}
    return found


def work(rank: int, port: int, path: str) -> None:
    folder = Path(path)
    asked = json.loads((folder / "asked.json").read_text())
    join(rank, asked["ranks"], port)
    mesh = sharding.mesh("fsdp", torch.device("cpu"))
    found = {name: after(resumed(Path(out), mesh)) for name, out in asked["resume"].items()}
    if "begin" in asked:
        out = Path(asked["begin"])
        trainer = begun(out, mesh)
        # While the checkpoint is being written.
        found["never stopped"] = after(trainer)
        trainer.settle()
        found["stopped"] = after(resumed(out, mesh))
    torch.save(found, f"{path}/{rank}.pt")
    distributed.shutdown()


def in_processes(folder: Path, ranks: int, **asked) -> list[dict]:
    folder.mkdir()
    (folder / "asked.json").write_text(json.dumps({"ranks": ranks, "resume": {}, **asked}))
    return answers_of(work, ranks, folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A run that one process has begun, and one of two."""
    base = tmp_path_factory.mktemp("runs")
    found = {"one": base / "one", "two": base / "two"}
    for out in found.values():
        out.mkdir()
    begun(found["one"])
    return found | {"base": base}


@pytest.fixture(scope="module")
def two(places) -> list[dict]:
    return in_processes(places["base"] / "a", 2, resume={"of one": str(places["one"])}, begin=str(places["two"]))


def test_two_processes_resume_bit_for_bit(two):
    for answer in two:
        never, stopped = answer["never stopped"], answer["stopped"]
        assert never.keys() == stopped.keys() and len(never) > 100
        assert all(torch.equal(never[name], stopped[name]) for name in never)


def test_what_one_process_saved_two_continue_and_what_two_saved_one_does(places, two):
    for out in (places["one"], places["two"]):
        compare(RECIPE, after(resumed(out)), [{RECIPE: answer["of one"]} for answer in two])


@pytest.mark.slow
def test_three_processes_continue_what_two_saved(places, two):
    three = in_processes(places["base"] / "b", 3, resume={"of two": str(places["two"])})
    compare(RECIPE, two[0]["never stopped"], [{RECIPE: answer["of two"]} for answer in three])


def test_tools_read_it_as_one_file(places, two):
    folder = places["two"] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch_00001", "last"]
    of_two, of_one = read_file(folder / "last"), read_file(places["one"] / "checkpoints" / "last.pt")
    assert of_two["parts"].keys() == of_one["parts"].keys() and of_two["backbones"] == of_one["backbones"]
    for name, value in of_one["parts"].items():
        torch.testing.assert_close(of_two["parts"][name], value, rtol=1e-8, atol=1e-11, equal_nan=True)
    # Of the files, no process has written most.
    sizes = [file.stat().st_size for file in (folder / "last").glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)


def test_no_file_of_it_could_run_code(places, two):
    for file in (places["two"] / "checkpoints" / "last").iterdir():
        assert file.suffix == ".safetensors" or torch.load(file, weights_only=True)


@pytest.mark.parametrize("harm", ["torn", "changed", "missing", "no state"])
def test_a_damaged_one_is_seen_and_the_one_before_is_taken(harm, places, two, tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("last", "previous"):
        shutil.copytree(places["two"] / "checkpoints" / "last", folder / name)
    file = sorted((folder / "last").glob("*.safetensors"))[1]
    content = file.read_bytes()
    if harm == "torn":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "missing":
        file.unlink()
    else:
        (folder / "last" / shards.STATE).unlink()
    state, warnings = checkpoint.load(folder)
    assert state["folder"] == str(folder / "previous") and len(warnings) == 1
    assert warnings[0].startswith(f"{folder / 'last'} cannot be read (") and "falling back" in warnings[0]
    if harm != "no state":
        assert f"{file.name}: missing or damaged" in warnings[0]
        with pytest.raises(UserError, match="missing or damaged"):
            read_file(folder / "last")


def test_a_kill_between_renamings_costs_nothing(places, two, tmp_path):
    saved, folder = places["two"] / "checkpoints" / "last", tmp_path / "checkpoints"
    # One that is half written is no checkpoint.
    shutil.copytree(saved, folder / "last.tmp")
    (folder / "last.tmp" / shards.STATE).rename(folder / "last.tmp" / f"{shards.STATE}.tmp")
    assert checkpoint.saved(folder) == []
    # Whole, but not yet renamed, after the former one was.
    (folder / "last.tmp" / f"{shards.STATE}.tmp").rename(folder / "last.tmp" / shards.STATE)
    shutil.copytree(saved, folder / "previous")
    assert checkpoint.last(folder) == folder / "last.tmp"
    assert shards.whole(checkpoint.load(folder)[0])["step"] == HALF


def test_a_run_may_go_from_one_kind_to_the_other(places, two, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save({"step": 1}, folder)
    shutil.copytree(places["two"] / "checkpoints" / "last", folder / "last.tmp")
    shards.settle(folder)
    assert [path.name for path in checkpoint.saved(folder)] == ["last", "previous.pt"]
    checkpoint.save({"step": 4}, folder)
    assert [path.name for path in checkpoint.saved(folder)] == ["last.pt", "previous"]
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "previous"]


def test_another_model_is_refused(places, two):
    state, _ = checkpoint.load(places["two"] / "checkpoints")
    other = trainer_of("dino_cifar10")
    with pytest.raises(UserError, match="images|fits the parts no more"):
        other.restore(state)
