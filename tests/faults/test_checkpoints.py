"""A checkpoint that is not finite, or not this run's, is never gone on from; what the record has lost is said."""

import json
import shutil

import pytest
import torch
from faults.processes import SLOW
from harness import PARTS, TINY, assert_same_run, checkpoint, finished, parts, rows, train, trainer

from ssl_ib import UserError
from ssl_ib.config.config import resolve
from ssl_ib.config.plugins import load_plugins
from ssl_ib.record.folder import examine

RECORDED = ("criterion=recorded", "criterion.inner=info_nce")


def halfway(out) -> None:
    """A run that was stopped at step 7, with checkpoints of this step and the one before."""
    parts().SIGNALS[7] = 15
    assert train(out, *RECORDED, SLOW[1]) == 143


def change(file, edit) -> None:
    """Saves a checkpoint as `edit` leaves it; other names of the file keep what they had."""
    state = torch.load(file, weights_only=True)
    edited = edit(state)
    file.unlink()
    torch.save(state if edited is None else edited, file)


def spoil(state):
    next(value for value in state["parts"].values() if value.is_floating_point())[0] = float("nan")


#: What lies in the place of `last.pt`, and what is said of it.
STRANGERS = {
    "a list": (lambda state: [1, 2], "it is no checkpoint of a run"),
    "weights alone": (lambda state: state["parts"], "it is no checkpoint of a run"),
    "no record": (lambda state: state.update(rows="3"), "it is no checkpoint of a run"),
    "no moments": (lambda state: state["optimizer"].update(state={0: 1.5}), "it is no checkpoint of a run"),
    "tensors for settings": (lambda state: state["config"].update(seed=torch.zeros(2)), "it is no checkpoint of a run"),
    "no results": (lambda state: state["results"].clear(), "it has no first evaluation"),
    "another seed": (lambda state: state["config"].update(seed=5), "it is another run's: seed: 5 -> 0 here"),
    "another rate": (
        lambda state: state["config"]["optim"].update(lr=1.0),
        "it is another run's: optim.lr: 1.0 -> 0.002",
    ),
    "NaN": (spoil, "it holds NaN: "),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped") / "run"
    halfway(out)
    return out


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_passed_over(tmp_path, capsys, stopped, stranger):
    edit, expected = STRANGERS[stranger]
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    change(out / "checkpoints" / "last.pt", edit)
    config = resolve(TINY, RECORDED, load_plugins([PARTS]))
    state = examine(out, config, resume=True, overwrite=False)
    error = capsys.readouterr().err
    assert state["step"] == 6 and expected in error and error.count("\n") == 1
    change(out / "checkpoints" / "previous.pt", edit)
    with pytest.raises(UserError, match="no checkpoint can be used"):
        examine(out, config, resume=True, overwrite=False)


def test_a_passed_over_checkpoint_costs_a_step_and_no_loss(tmp_path, stopped):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    change(out / "checkpoints" / "last.pt", spoil)
    assert train(out, *RECORDED, "--resume") == 0
    assert_same_run(out, finished(*RECORDED))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(tmp_path, value):
    instance = trainer(out=tmp_path / "run")
    (tmp_path / "run").mkdir()
    instance._set_schedules()
    first = instance.save()
    good = first.read_bytes()
    with torch.no_grad():
        next(instance.run.model.parameters()).view(-1)[0] = value
    with pytest.raises(UserError, match=r"no longer finite at step 0: model\..*the last good checkpoint is .*last.pt"):
        instance.save()
    assert first.read_bytes() == good and [path.name for path in first.parent.iterdir()] == ["last.pt"]


def test_a_buffer_may_begin_infinite_but_not_be_nan(tmp_path):
    """The statistic of a gate does. A lone number may be NaN: what SVIB's prototypes know before their first batch."""
    instance = trainer(out=tmp_path / "run")
    (tmp_path / "run").mkdir()
    instance.run.criterion.register_buffer("unknown", torch.tensor(float("nan")))
    instance.run.criterion.register_buffer("bounds", torch.full((2,), float("inf")))
    instance.save()
    instance.run.criterion.bounds[1] = float("nan")
    with pytest.raises(UserError, match="no longer finite at step 0: criterion.bounds"):
        instance.save()


def test_lost_rows_are_said(tmp_path, stopped, caplog):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    metrics.write_text("".join(kept))
    instance = trainer(*RECORDED, out=out)
    instance.restore(checkpoint(out))
    instance.log.close()
    assert f"has lost 3 of the {len(lines)} rows that it had at step 7" in caplog.text
    assert "of step 4" in caplog.text and rows(out) == [json.loads(line) for line in kept]
