"""The command line: every mistake is one message and exit code 2, and nothing is touched that is not the run's own."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import (
    PARTS,
    ROOT,
    STEPS,
    TINY,
    assert_same_run,
    checkpoint,
    environment,
    finished,
    losses,
    parts,
    rows,
    train,
    without_files,
)

from ssl_ib import __version__
from ssl_ib.cli.sweep import main as sweep
from ssl_ib.cli.train import main
from ssl_ib.config.config import resolve
from ssl_ib.config.recipe import recipe_names
from ssl_ib.run import build_run

SMALL = [name for name in recipe_names() if name.endswith(("digits", "cifar10", "imagenette96", "rgb", "ydbdr"))]
SMALL += [name for name in recipe_names() if name.startswith("moving_mnist")]
LARGE = [name for name in recipe_names() if name not in SMALL]


def kind(name: str) -> tuple[str, ...]:
    """What a recipe trains: its model, its criterion and the criterion inside that, views and optimiser."""
    config = resolve(name)
    inner = (config.criterion.get("contrastive") or {}).get("name", "")
    return config.model["name"], config.criterion["name"], inner, config.views["name"], config.optim.name


#: The first small recipe of each kind; those of digits come first, as they take the least time.
OF_A_KIND = set({kind(name): name for name in sorted(SMALL, key=lambda n: n.endswith("digits"))}.values())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the files' contents."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(capsys, *arguments: str) -> str:
    """The message of a run that must be refused before it prints anything."""
    assert main(list(arguments)) == 2
    output, error = capsys.readouterr()
    # A recipe's own plugin is named before anything is looked at.
    error = re.sub(r"^.* asks for the plugin .*\n", "", error)
    assert output == "" and error.startswith("ssl-ib-train: ") and "Traceback" not in error
    return error.removeprefix("ssl-ib-train: ").rstrip()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["mrcl_digit"], "unknown recipe 'mrcl_digit'; did you mean 'mrcl_digits'"),
        (["absent.yaml"], "there is no recipe file 'absent.yaml'"),
        ([], "which recipe?"),
        (["epochs=3"], "expected RECIPE first, got 'epochs=3'"),
        ([TINY, "epochs"], "expected KEY=VALUE, such as optim.lr=1e-3, got 'epochs'"),
        ([TINY, "model=siames"], "unknown model 'siames'; did you mean 'siamese'"),
        ([TINY, "--criterion", "info_ncee"], "unknown criterion 'info_ncee'; did you mean 'info_nce' or"),
        ([TINY, "masker.ration=0.5"], "masker.ration: unknown key; did you mean 'ratio'?"),
        ([TINY, "optim.learning_rate=1"], "optim.learning_rate: unknown key"),
        ([TINY, "epochs=many"], "epochs: expected a valid integer, got 'many'"),
        ([TINY, "masker.ratio=1.0"], "masker.ratio: expected less than 1, got 1.0"),
        ([TINY, "masker.ratio=0.9"], "on a grid of 2 x 2 patches keeps 0 of them"),
        ([TINY, "source=folder", "source.path=absent"], "source.path: expected a folder of images, found nothing at"),
        ([TINY, "source=folder", "source.path=."], "source.path: no image in ."),
        ([TINY, "source=folder"], "source.path: required"),
        ([TINY, "batch_size=1439"], "a step takes 1439 images, but the training set has 1438"),
        ([TINY, "views.size=20"], "a view of 20 x 20 pixels cannot be cut into patches of 8"),
        ([TINY, "optim.name=adamww"], "unknown optimiser 'adamww'; did you mean 'adamw'"),
        ([TINY, "criterion=byol"], "criterion 'byol' requires prediction, target"),
        ([TINY, "--plugin", "absent_plugin"], "plugin 'absent_plugin' is neither a path nor an importable module"),
        ([TINY, "--list", "modls"], "--list: unknown kind 'modls'; did you mean 'models'?"),
        (["--describe", "masker:randm"], "unknown masker 'randm'; did you mean 'random'?"),
        (["--describe", "random"], "or a key such as optim, got 'random'; did you mean 'masker:random'?"),
        (["--describe", "mrcl_digits"], "got 'mrcl_digits'; did you mean 'recipe:mrcl_digits'?"),
        (["--describe", "lr"], "got 'lr'; did you mean 'optim.lr' or 'eval.linear.lr'?"),
        (["--describe", "masker"], "--describe: which masker? masker:block, masker:grid"),
        (["--describe", "recipe:mrcl_digit"], "unknown recipe 'mrcl_digit'; did you mean 'mrcl_digits'"),
        ([str(ROOT / "tests")], "is a folder without a config.yaml"),
        ([TINY, "--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ([TINY, "ops.backend=cuda", "device=cpu"], "ops.backend: 'cuda' cannot run here: it runs on a GPU"),
        ([TINY, "ops.backend=chunkd"], "ops.backend: unknown backend of the ops 'chunkd'; did you mean 'chunked'"),
        ([TINY, "--out", TINY], "is a file; a run needs a folder"),
        ([TINY, "--out", f"{TINY}/below"], "cannot make the folder"),
    ],
)
def test_one_mistake(here, capsys, arguments, expected):
    error = refused(capsys, *arguments)
    assert expected in error
    lines = error.splitlines()
    assert len(lines) == 1 or (len(lines) == 2 and lines[0] == "1 problem in the configuration:")
    assert tree(here) == {}


def test_several_mistakes_at_once(here, capsys):
    error = refused(capsys, TINY, "epochs=0", "model.pol=cls", "masker=rnd", "criterion.temperature=-1", "depth=3")
    first, *problems = error.splitlines()
    assert first == "5 problems in the configuration:"
    assert {re.match(r"  - ([\w.]+): ", line)[1] for line in problems} == {
        "epochs",
        "model.pol",
        "masker",
        "criterion.temperature",
        "depth",
    }


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="needs a machine without CUDA")
def test_no_cuda(here, capsys):
    assert "'cuda' was asked for, but torch sees no CUDA device" in refused(capsys, TINY, "--device", "cuda")


def test_not_yaml(here, capsys):
    Path("broken.yaml").write_text("epochs: [1\nmodel: x")
    assert "broken.yaml is not YAML (line 2)" in refused(capsys, "broken.yaml")
    Path("list.yaml").write_text("- epochs")
    assert "expected a mapping of keys to values, got list" in refused(capsys, "list.yaml")


def test_an_unknown_option_is_refused_as_usual(here, capsys):
    with pytest.raises(SystemExit) as stop:
        main([TINY, "--epochs", "3"])
    assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_our_own_bugs_keep_their_traceback(here, monkeypatch):
    def fail(*arguments, **more):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("ssl_ib.api.build_run", fail)
    with pytest.raises(OSError, match="Bad file"):
        main([TINY])


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_version(capsys, command):
    with pytest.raises(SystemExit) as stop:
        (main if command == "train" else sweep)(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"ssl-ib-{command} {__version__}\n"


def test_ctrl_c_while_modules_are_imported(here, ctrl_c):
    # A library that answers an interrupt with an error of its own.
    Path("odd.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT), time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('broken off')\n"
    )
    command = [sys.executable, "-m", "ssl_ib.cli.train", "--list", "--plugin", "odd.py"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "ssl-ib-train: interrupted\n")


def test_a_reader_that_has_seen_enough(here):
    command = f"{sys.executable} -m ssl_ib.cli.train --list recipes | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    assert done.stderr == "" and done.stdout in ("141\n", "0\n")


# --- the run's folder -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty: continue it with --resume" in refused(capsys, TINY, "--out", str(out))
    assert "holds files but no run" in refused(capsys, TINY, "--out", str(out), "--overwrite")
    assert tree(out) == {"notes.txt": b"mine"}


def test_overwrite_removes_what_a_run_wrote(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out) == 0
    first = rows(out)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoints" / "epoch_00009.pt").write_text("of the old run")
    (out / "bad_batch.txt").write_text("1\n")
    for ending in ("safetensors", "json"):  # One of several encoders; the user's own stays.
        (out / f"backbone_2.{ending}").write_text("of the old run")
    (out / "backbone_notes.json").write_text("mine")
    capsys.readouterr()
    before = tree(out)
    # No mistake costs the old run, whenever it is found.
    for mistake in ("optim.name=adamww", "batch_size=1439", "masker.ratio=0.9", "device=gpu"):
        refused(capsys, TINY, "--out", str(out), "--overwrite", mistake)
        assert tree(out) == before
    assert train(out, "--overwrite", "seed=1", "epochs=1") == 0
    assert (out / "notes.txt").read_text() == (out / "backbone_notes.json").read_text() == "mine"
    assert not list(out.glob("backbone_2*"))
    assert not (out / "bad_batch.txt").exists() and not (out / "checkpoints" / "epoch_00009.pt").exists()
    assert len(losses(out)) == STEPS and rows(out)[0] != first[0]
    assert checkpoint(out)["config"]["seed"] == 1 and len(list((out / "tensorboard").iterdir())) == 1


def test_the_folder_is_named_after_the_recipe(here, capsys):
    assert train(Path("runs/tiny"), "epochs=1", "batch_size=700") == 0
    capsys.readouterr()
    assert "runs/tiny is not empty" in refused(capsys, TINY)


def test_config_yaml_repeats_the_run(tmp_path):
    # Everything the command line said is in it, the plugin too.
    options = ("criterion=queued", "model.backbone_args.proj_drop_rate=0.1", "optim.clip=0.5", "--masker", "block")
    first = finished(*options, "epochs=1")
    again = tmp_path / "again"
    assert main([str(first / "config.yaml"), "--out", str(again)]) == 0
    assert losses(again) == losses(first) and len(losses(again)) == STEPS
    assert (again / "config.yaml").read_text() == (first / "config.yaml").read_text()


def test_the_folder_is_all_that_resuming_needs(here, capsys, monkeypatch):
    overrides = ("criterion=recorded", "criterion.inner=info_nce")
    parts().SIGNALS[7] = signal.SIGTERM
    # No override would take this for a recipe.
    out = here / "elsewhere" / "lr=1"
    assert train(out, *overrides) == 143
    assert f"continue with ssl-ib-train {out} --resume" in capsys.readouterr().err
    for name in ("loss_curves", "knn_curve", "reconstructions", "attention"):
        monkeypatch.setattr(f"ssl_ib.record.figures.{name}", lambda *given, **more: None)
    assert "--resume cannot change epochs: 2 -> 3" in refused(capsys, str(out), "--resume", "epochs=3")
    assert main([str(out), "--resume", "log_every=1"]) == 0
    assert "resumed    at step 7" in capsys.readouterr().out and not Path("runs").exists()
    assert_same_run(out, finished(*overrides))
    # Without --resume it is a recipe for a new run, with --overwrite the same run anew.
    Path("runs/tiny/mine").mkdir(parents=True)
    capsys.readouterr()
    assert "runs/tiny is not empty" in refused(capsys, str(out))
    assert main([str(out), "--overwrite", "epochs=1"]) == 0 and len(losses(out)) == STEPS


# --- looking without running ------------------------------------------------------------------------------------------


def test_print_config(here, capsys):
    assert main([TINY, "--print-config", "--masker", "grid", "masker.ratio=0.5", "optim.lr=1e-3"]) == 0
    text = capsys.readouterr().out
    Path("saved.yaml").write_text(text)
    assert resolve("saved.yaml") == resolve(TINY, ["masker={name: grid, ratio: 0.5}", "optim.lr=0.001"])
    assert tree(here).keys() == {"saved.yaml"}


def test_list_and_describe(here, capsys):
    assert main(["--list", "--plugin", PARTS]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"models", "criterions", "maskers", "tasks", "sources", "views", "recipes"} <= listed.keys()
    assert "queued" in listed["criterions"] and "mrcl_digits" in listed["recipes"]
    assert main(["--list", "maskers"]) == main(["--list", "masker"]) == 0
    assert set(capsys.readouterr().out.split()) >= {"block", "grid", "none", "random"}
    assert main(["--describe", "criterion:info_nce"]) == 0
    assert "temperature" in capsys.readouterr().out


def test_listed_recipes_say_what_they_are(capsys):
    assert main(["--list", "recipes"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert [*lines] == recipe_names() and lines["mae_digits"].startswith("MAE on real handwritten digits")


def test_describe_a_recipe(here, capsys):
    assert main(["--describe", "recipe:mi_mae_cifar10"]) == 0
    output = capsys.readouterr().out
    assert "\nMI-MAE on CIFAR-10: a quarter of" in output and "\n  base:  mae_cifar10 < _cifar10\n" in output
    assert "needs: images at cifar10.tar.xz, which is not here: give source.path" in output
    assert "criterion: {name: mi_mae, gate_max_epoch: 5}" in output and "decoder_depth: 1" in output
    Path("cifar10.tar.xz").touch()
    assert main(["--describe", "recipe:mi_mae_cifar10"]) == 0 and "not here" not in capsys.readouterr().out
    Path("mine.yaml").write_text(f"base: mae_digits\nplugins: {PARTS}")
    assert main(["--describe", "recipe:mine.yaml"]) == 0
    assert f"  base:  mae_digits\n  needs: plugin {PARTS}\n" in capsys.readouterr().out


def test_describe_a_section(capsys):
    assert main(["--describe", "eval.linear"]) == 0
    assert "lr_scale: 'raw' | 'linear', default 'raw'" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--resume" in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_fits_together(here, name):
    run = build_run(resolve(name, without_files(name)), dry=True)
    assert run.criterion.requires <= run.model.provides and tree(here) == {}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OF_A_KIND else pytest.mark.slow) for n in [*SMALL, *LARGE]]
)
def test_dry_run_of_a_shipped_recipe(here, capsys, name):
    before = tree(ROOT / "recipes")
    assert main([name, "--dry-run", *without_files(name), "eval.linear.epochs=3"]) == 0
    output = capsys.readouterr().out
    assert "writes nothing" in output and f"dry run of {name} passed: 2 steps" in output.splitlines()[-1]
    assert tree(here) == {} and tree(ROOT / "recipes") == before


def test_a_dry_run_says_what_it_is_cut_down_to(here, capsys):
    assert main([TINY, "--dry-run", "--out", "run", "eval.linear.epochs=3"]) == 0
    output, errors = capsys.readouterr()
    assert "batch at most 8" in output and "evaluation on at most 64 images" in output and "banks at most" in output
    assert "batch      8 a step" in output and "knn/top1" in output
    # The terms of the loss, and which of its numbers are bounds.
    assert "terms      info_nce x 1\n  watched    mi_nats, mi_ceiling, positive_similarity\n" in output
    assert "in nats    mi_nats: lower bound on what the two views share, at most mi_ceiling" in output
    assert errors == "" and tree(here) == {}
    # It finds the mistakes of a real run.
    broken = "criterion={name: broken, inner: info_nce, at: 1}"
    assert main([TINY, "--plugin", PARTS, "--dry-run", broken]) == 2
    assert "no longer finite at step 1" in capsys.readouterr().err and tree(here) == {}
