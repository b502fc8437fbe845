"""Defaults < base < recipe < command line; every mistake at once; what is saved gives the same run again."""

import pytest
import yaml

from ssl_ib import ConfigError, UserError
from ssl_ib.config.config import describe_key, differences, resolve, section_keys
from ssl_ib.config.recipe import PARTS, find_recipe, leading_comment, recipe_names, recipes_folder

RECIPE = """
model: {name: siamese, backbone: vit_tiny_patch16_224, backbone_args: {patch_size: 4, depth: 4}, projector_dim: 32}
criterion: {name: info_nce, temperature: 0.2}
views: {name: simclr_cifar, size: 16}
epochs: 7
optim: {lr: 2e-3, warmup_epochs: 2}
"""

MRCL = """
base: plain
model: {name: mrcl, contrastive: {name: siamese, projector_dim: 32}, decoder_dim: 64}
criterion: {name: mrcl, contrastive: {name: info_nce, temperature: 0.3}, w_masked: 2.0}
masker: {name: random, ratio: 0.2}
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe file and returns its path as text."""

    def write(text, name="mine"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return str(path)

    write(RECIPE, "plain")
    return write


@pytest.fixture
def plain(recipe):
    return recipe(RECIPE)


@pytest.fixture
def mrcl(recipe):
    return recipe(MRCL, "mrcl")


def problems(*arguments):
    with pytest.raises(ConfigError) as caught:
        resolve(*arguments)
    return caught.value.problems


# --- what lies over what ----------------------------------------------------------------------------------------------


def test_layers(recipe):
    path = recipe("base: plain\nepochs: 9\nmodel: {projector_dim: 64, backbone_args: {depth: 2}}\noptim: {lr: 3e-3}")
    config = resolve(path, ["optim.lr=4e-3", "seed=5"])
    assert config.batch_size == 256 and config.optim.weight_decay == 0.05  # default
    assert config.criterion["temperature"] == 0.2 and config.optim.warmup_epochs == 2  # base
    assert config.epochs == 9 and config.model["projector_dim"] == 64  # recipe
    assert config.model["backbone_args"] == {"patch_size": 4, "depth": 2}  # merged key by key
    assert config.optim.lr == 4e-3 and config.seed == 5  # command line
    assert config.model["projector_layers"] == 3  # the constructor's default
    assert config.recipe == "mine"


def test_a_part_may_be_a_name_in_either_layer(recipe):
    recipe(RECIPE + "masker: random\n", "named")
    config = resolve(recipe("base: named\nmasker: {ratio: 0.3}\nviews: simclr_cifar"))
    assert config.masker == {"name": "random", "ratio": 0.3}
    # The same name again changes nothing.
    assert config.views["size"] == 16


def test_sections_with_a_name_keep_their_other_keys(plain):
    assert resolve(plain, ["optim.name=lars"]).optim.warmup_epochs == 2
    assert resolve(plain, ["optim={name: lars, lr: 0.1}"]).optim.warmup_epochs == 2
    config = resolve(plain, ["optim.lr=0.5", "optim.name=lars"])
    assert (config.optim.name, config.optim.lr) == ("lars", 0.5)


def test_a_section_that_the_recipe_leaves_out(recipe):
    path = recipe("\n".join(line for line in RECIPE.splitlines() if not line.startswith("optim")))
    assert resolve(path, ["optim.name=lars"]).optim.name == "lars"
    assert resolve(path, ["eval.linear.epochs=3", "masker.name=random"]).eval.linear.epochs == 3


@pytest.mark.parametrize("swap", ["criterion=barlow_twins", "criterion.name=barlow_twins"])
@pytest.mark.parametrize("first", [True, False])
def test_another_part_drops_the_old_ones_arguments(plain, swap, first):
    overrides = [swap, "criterion.lambd=0.01"]
    config = resolve(plain, overrides if first else overrides[::-1])
    assert config.criterion == {"name": "barlow_twins", "lambd": 0.01, "scale": 1.0}


@pytest.mark.parametrize("swap", ["criterion.contrastive=barlow_twins", "criterion.contrastive.name=barlow_twins"])
@pytest.mark.parametrize("first", [True, False])
def test_so_does_a_nested_one(mrcl, swap, first):
    overrides = [swap, "criterion.contrastive.lambd=0.01"]
    config = resolve(mrcl, overrides if first else overrides[::-1])
    assert config.criterion["contrastive"] == {"name": "barlow_twins", "lambd": 0.01, "scale": 1.0}
    assert config.criterion["w_masked"] == 2.0


def test_a_part_in_one_piece(mrcl):
    config = resolve(mrcl, ["criterion.contrastive.scale=0.1", "criterion={contrastive: barlow_twins, w_masked: 3}"])
    assert config.criterion["contrastive"]["scale"] == 0.1 and config.criterion["w_masked"] == 3.0
    config = resolve(mrcl, ["masker={name: block, ratio: 0.5}"])
    assert config.masker == {"name": "block", "ratio": 0.5, "min_share": 0.08, "min_aspect": 0.3}


def test_a_swap_in_a_recipe_drops_them_too(recipe):
    config = resolve(recipe("base: plain\ncriterion: barlow_twins"))
    assert config.criterion == {"name": "barlow_twins", "lambd": 0.0051, "scale": 1.0}


def test_deep_keys(mrcl):
    config = resolve(mrcl, ["model.contrastive.backbone_args.depth=2", "model.contrastive.backbone_args.patch_size=8"])
    assert config.model["contrastive"]["backbone_args"] == {"depth": 2, "patch_size": 8}
    config = resolve(mrcl, ["model.contrastive.backbone_args={depth: 2}"])
    assert config.model["contrastive"]["backbone_args"] == {"depth": 2}
    assert config.model["contrastive"]["projector_dim"] == 32


ARGUMENTS = {"patch_size": 4, "depth": 4}


def test_another_backbone_drops_what_was_for_the_old_one(recipe, mrcl):
    path = recipe("base: plain\nmodel: {positions: sincos, pool: mean}")
    said = []
    model = resolve(path, ["model.backbone=resnet18"], say=said.append).model
    assert (model["backbone"], model["backbone_args"], model["positions"]) == ("resnet18", None, "learned")
    assert (model["pool"], model["projector_dim"]) == ("mean", 32)
    assert said == [
        "model.backbone=resnet18: drops what was for vit_tiny_patch16_224 (give again what is to stay): "
        "backbone_args: {patch_size: 4, depth: 4}, positions: sincos"
    ]
    # Inside another part.
    said.clear()
    text = "base: mrcl\nmodel: {contrastive: {backbone: vit_tiny_patch16_224, backbone_args: {depth: 2}}}"
    model = resolve(recipe(text), ["model.contrastive.backbone=resnet18"], say=said.append).model
    assert model["contrastive"]["backbone_args"] is None and model["contrastive"]["projector_dim"] == 32
    assert len(said) == 1 and said[0].startswith("model.contrastive.backbone=resnet18: drops")


@pytest.mark.parametrize(
    "given",
    [
        ["model.backbone=resnet18", "model.backbone_args.stem=cifar"],
        ["model.backbone_args.stem=cifar", "model.backbone=resnet18"],
        ["model.backbone_args={stem: cifar}", "model.backbone=resnet18"],
        ["model={backbone_args: {stem: cifar}}", "model.backbone=resnet18"],
        ["model={backbone: resnet18, backbone_args: {stem: cifar}}"],
    ],
)
def test_what_is_given_with_a_backbone_is_kept(plain, given):
    said = []
    assert resolve(plain, given, say=said.append).model["backbone_args"] == {"stem": "cifar"}
    assert len(said) == 1 and said[0].endswith("backbone_args: {patch_size: 4, depth: 4}")


def test_the_same_backbone_drops_nothing(plain, recipe):
    said = []
    same = "model.backbone=vit_tiny_patch16_224"
    assert resolve(plain, [same, "model.backbone_args.depth=2"], say=said.append).model["backbone_args"]["depth"] == 2
    assert resolve(plain, [same], say=said.append).model["backbone_args"] == ARGUMENTS
    # Nothing is lost here either: what was dropped is given again, or is the default.
    again = ["model.backbone=vit_small_patch16_224", "model.backbone_args={patch_size: 4, depth: 4}"]
    saved = recipe(resolve(plain).yaml(), "saved")
    assert resolve(saved, again, say=said.append).model["backbone_args"] == ARGUMENTS
    assert said == []


def test_a_recipe_drops_what_its_base_gave_its_backbone(recipe):
    said = []
    path = recipe("base: plain\nmodel: {backbone: resnet18, backbone_args: {drop_path_rate: 0.1}}")
    assert resolve(path, say=said.append).model["backbone_args"] == {"drop_path_rate": 0.1}
    assert [line.partition(":")[0] for line in said] == ["model.backbone=resnet18"]
    # A third one: what is told is what came of it.
    said.clear()
    assert resolve(path, ["model.backbone=resnet50"], say=said.append).model["backbone_args"] is None
    assert said == [
        "model.backbone=resnet50: drops what was for resnet18 (give again what is to stay): "
        "backbone_args: {drop_path_rate: 0.1}"
    ]


def test_an_empty_mapping_empties(plain, recipe):
    assert resolve(plain, ["model.backbone_args={}"]).model["backbone_args"] == {}
    given = ["model.backbone_args={}", "model.backbone_args.depth=2"]
    assert resolve(plain, given).model["backbone_args"] == {"depth": 2}
    assert resolve(recipe("base: plain\nmodel: {backbone_args: {}}")).model["backbone_args"] == {}
    assert resolve(recipe("base: plain")).epochs == 7


def test_the_last_of_two_wins(plain):
    assert resolve(plain, ["seed=1", "seed=2"]).seed == 2


def test_schedules_on_the_command_line(plain):
    config = resolve(plain, ["criterion.temperature={from: 0.5, to: 0.1}", "criterion.temperature.shape=cosine"])
    assert config.criterion["temperature"] == {"from": 0.5, "to": 0.1, "shape": "cosine"}
    over = resolve(plain, ["optim.lr={from: 1, to: 0}", "optim.weight_decay={from: .04, to: .4, shape: cosine}"])
    assert over.optim.lr == {"from": 1, "to": 0, "shape": "linear"}
    # A schedule is replaced, and not merged, by a number or by another one.
    path = ["optim.lr={from: 1, to: 0, shape: cosine}", "optim.lr={from: 2, to: 1}"]
    assert resolve(plain, path).optim.lr == {"from": 2, "to": 1, "shape": "linear"}
    assert resolve(plain, [path[0], "optim.lr=3"]).optim.lr == 3.0


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value", [("1e-3", 1e-3), ("1E3", 1e3), ("+.5e1", 5.0), ("2.e-2", 0.02), ("1.5", 1.5), ("3", 3.0)]
)
def test_numbers(plain, text, value):
    assert resolve(plain, [f"optim.lr={text}"]).optim.lr == value


def test_text_that_looks_like_a_number_survives(plain, recipe):
    config = resolve(plain, ["source=folder", "source.path='1e3'"])
    assert config.source["path"] == "1e3"
    assert resolve(recipe(config.yaml())) == config
    with pytest.raises(ConfigError, match="source.path: expected a valid string, got 1000.0"):
        resolve(plain, ["source=folder", "source.path=1e3"])


def test_anchors_may_be_merged(recipe):
    text = "base: plain\ncriterion: {name: mrcl, <<: &w {w_masked: 4.0, w_unmasked: 1.0}, w_unmasked: 2.0}"
    criterion = resolve(recipe(text)).criterion
    assert (criterion["w_masked"], criterion["w_unmasked"]) == (4.0, 2.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs: 3\nseed: 1\nepochs: 4", r"mine.yaml is not YAML \(line 1\): repeated key epochs"),
        ("optim:\n  lr: 1\n  lr: 2", r"is not YAML \(line 2\): repeated key lr"),
        ("epochs: [3", r"is not YAML \(line \d\)"),
        ("epochs: !!python/object:os.system 3", "is not YAML"),
        ("- a\n- b", "expected a mapping of keys to values, got list"),
        ("", "expected a mapping of keys to values, got NoneType"),
        ("base: nowhere", "unknown recipe 'nowhere'"),
    ],
)
def test_files_that_are_no_recipe(recipe, text, message):
    with pytest.raises(UserError, match=message):
        resolve(recipe(text))


def test_a_binary_file(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match="weights.yaml is not YAML"):
        resolve(str(tmp_path / "weights.yaml"))


# --- finding ----------------------------------------------------------------------------------------------------------


def test_unknown_recipes():
    with pytest.raises(UserError, match="unknown recipe 'mrcl_digit'; did you mean 'mrcl_digits'"):
        find_recipe("mrcl_digit")
    for missing in ("nowhere/x.yaml", "nowhere.yaml", "./nowhere"):
        with pytest.raises(UserError, match="there is no recipe file"):
            find_recipe(missing)


def test_the_folder_of_a_run_is_a_recipe(plain, tmp_path):
    config = resolve(plain, ["epochs=3"])
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="run' is a folder without a config.yaml"):
        find_recipe(str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(config.yaml())
    assert resolve(str(tmp_path / "run")) == config


@pytest.mark.parametrize("name", [path.stem for path in recipes_folder().glob("*.yaml")])
def test_every_shipped_recipe_says_what_it_is(name):
    first, _, rest = leading_comment(find_recipe(name)).partition(". ")
    # One sentence for `--list recipes`.
    assert 10 < len(first) < 180 and first[0].isupper()


def test_bases(recipe):
    recipe("base: plain\nepochs: 3\nbatch_size: 64", "middle")
    config = resolve(recipe("base: middle\nepochs: 4"))
    assert (config.epochs, config.batch_size, config.optim.lr) == (4, 64, 2e-3)
    # A shipped recipe, and one under the shipped one's own name.
    assert resolve(recipe("base: mrcl_digits\nepochs: 1")).model["decoder_dim"] == 64
    assert resolve(recipe("base: mrcl_digits\nepochs: 1", "mrcl_digits")).epochs == 1


def test_a_recipe_cannot_be_its_own_base(recipe):
    first = recipe("base: two", "one")
    recipe("base: three", "two")
    recipe("base: one", "three")
    with pytest.raises(UserError, match="three.yaml: base 'one' leads back to .*one.yaml"):
        resolve(first)
    with pytest.raises(UserError, match="unknown recipe 'alone'"):
        resolve(recipe("base: alone", "alone"))


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_at_once(plain):
    found = problems(
        plain,
        [
            "epochs=1.5",
            "optim.lr=fast",
            "optim.warmup=3",
            "criterion.temprature=0.1",
            "model=siamees",
            "views.size=0",
            "eval.linear.epoch=3",
            "seeds=3",
            "precision=fp16",
            "nonsense",
            "masker.ratio=[1",
        ],
    )
    expected = [
        "expected KEY=VALUE, such as optim.lr=1e-3, got 'nonsense'",
        "masker.ratio: expected a YAML value, got '[1'",
        "model: unknown model 'siamees'; did you mean 'siamese'?",
        "criterion.temprature: unknown key; did you mean 'temperature'?",
        "views.size: expected greater than or equal to 1, got 0",
        "epochs: expected a valid integer, got 1.5",
        "precision: expected 'fp32' or 'bf16', got 'fp16'",
        "optim.lr: expected a number of at least 0, or a schedule {from: .., to: .., shape: ..}, got 'fast'",
        "optim.warmup: unknown key; did you mean 'warmup_epochs'?",
        "eval.linear.epoch: unknown key; did you mean 'epochs'?",
        "seeds: unknown key; did you mean 'seed'?",
    ]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lr=-1", "optim.lr: expected a number of at least 0"),
        ("optim.lr=.inf", "optim.lr: expected a number of at least 0"),
        ("optim.lr=.nan", "optim.lr: expected a number of at least 0"),
        ("optim.lr=true", "optim.lr: expected a number of at least 0"),
        ("optim.lr={from: -1, to: 1}", "optim.lr: expected a schedule of numbers of at least 0"),
        ("optim.lr={from: 1, to: 0, shape: round}", "optim.lr: expected a valid schedule: schedule.shape: unknown"),
        ("optim=3", "optim: expected an object"),
        ("optim.clip=0", "optim.clip: expected greater than 0"),
        ("seed=-1", "seed: expected greater than or equal to 0"),
        ("seed=4294967296", "seed: expected less than 4294967296"),
        ("seed='3'", "seed: expected a valid integer, got '3'"),
        ("compile=1", "compile: expected true, false or graphs, got 1"),
        ("parallel=dpp", "parallel: expected 'none', 'ddp', 'fsdp' or 'hybrid', got 'dpp'"),
        ("device.x=1", "device: expected a valid string"),
        ("epochs.x=1", "epochs.x: epochs is 7, which has no keys"),
        ("views.size.x=1", "views.size.x: views.size is 16, which has no keys"),
        ("views.scale.0=1", "views.scale"),
        ("criterion=", "criterion: expected"),
        ("criterion.name=3", "criterion: expected a name or {name: ..., key: value}, got 3"),
        ("=3", "expected KEY=VALUE"),
        ("recipe=3", "recipe: expected a valid string"),
        ("plugins=mine", "plugins: expected"),
    ],
)
def test_single_mistakes(plain, override, message):
    found = problems(plain, [override])
    assert len(found) == 1 and found[0].startswith(message)


@pytest.mark.parametrize(
    "override, meant",
    [
        ("lr=0.1", "'optim.lr' or 'eval.linear.lr'"),
        ("epoch=3", "'epochs'"),
        ("batch-size=32", "'batch_size'"),
        ("warmup=3", "'optim.warmup_epochs'"),
        ("criterion.temperatur=1", "'criterion.contrastive.temperature'"),
        ("model.backbone=resnet18", "'model.contrastive.backbone'"),
        ("patch_size=8", "'model.contrastive.backbone_args.patch_size'"),
        ("masker.ration=0.3", "'ratio'"),
        ("optim.warmup=3", "'warmup_epochs'"),
    ],
)
def test_the_key_that_was_meant(override, meant):
    (line,) = problems("mrcl_digits", [override])
    assert f"{override.partition('=')[0]}: unknown key; did you mean {meant}?" in line


def test_nothing_like_it():
    assert "unknown key; choices: accumulate, batch_size" in problems("mrcl_digits", ["gpu=1"])[0]


def test_every_key_has_a_description():
    for key in ["config", *section_keys()]:
        text = describe_key(key)
        assert text.startswith(key) and len(text.splitlines()) > 2
    assert "  lr: float >= 0, or a schedule" in describe_key("optim") and "warms up" in describe_key("optim")
    assert "  linear: a section: --describe eval.linear" in describe_key("eval")
    assert describe_key("seed").startswith("seed: int in [0, 4294967296), default 0\n")


def test_a_part_that_is_missing(recipe):
    assert problems(recipe("views: simclr_cifar")) == [
        "model: required, but not given",
        "criterion: required, but not given",
    ]
    found = problems(recipe(RECIPE), ["criterion=mrcl", "criterion.contrastive.lambd=1"])
    assert found == ["criterion.contrastive: expected a name or {name: ..., key: value}, got {'lambd': 1}"]


def test_the_message_counts(plain):
    with pytest.raises(ConfigError, match="^1 problem in the configuration:\n  - seeds: "):
        resolve(plain, ["seeds=3"])
    with pytest.raises(ConfigError, match="^2 problems in the configuration:\n  - "):
        resolve(plain, ["seeds=3", "epoch=3"])


# --- what is resolved -------------------------------------------------------------------------------------------------


def test_frozen(plain):
    config = resolve(plain)
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 3
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 3.0


def test_resolving_twice_shares_nothing(plain):
    first = resolve(plain, ["masker=random", "optim.args={eps: 1e-6}"])
    first.masker["ratio"] = first.optim.args["eps"] = 0.5
    second = resolve(plain, ["masker=random"])
    assert second.masker["ratio"] == 0.75 and second.optim.args == {}


@pytest.mark.parametrize("name", recipe_names())
def test_the_saved_configuration_is_the_run(name, tmp_path):
    config = resolve(name)
    saved = tmp_path / "config.yaml"
    saved.write_text(config.yaml())
    again = resolve(str(saved))
    assert again == config and again.yaml() == config.yaml() and again.recipe == name
    # It is complete: nothing is left to defaults that might change.
    shown = yaml.safe_load(config.yaml())
    assert set(shown) == set(type(config).model_fields)
    assert all("name" in shown[kind] for kind in PARTS)


def test_bases_are_not_offered():
    assert recipe_names() and not any(name.startswith("_") for name in recipe_names())
    assert any(path.stem.startswith("_") for path in recipes_folder().glob("*.yaml"))


def test_a_swapped_and_scheduled_run_is_saved_too(mrcl, tmp_path):
    overrides = ["criterion.contrastive=barlow_twins", "optim.lr={from: 1e-3, to: 1e-5, shape: exponential}"]
    overrides += ["criterion.w_masked={from: 1, to: 0, delay: 2}", "optim.clip=3", "masker=none", "optim.args.eps=1e-6"]
    config = resolve(mrcl, overrides, plugins=["/somewhere/plugin.py"])
    (tmp_path / "config.yaml").write_text(config.yaml())
    again = resolve(str(tmp_path / "config.yaml"))
    assert again == config and again.plugins == ("/somewhere/plugin.py",)
    assert again.optim.args == {"eps": 1e-6}


def test_plugins_are_remembered(recipe):
    path = recipe(RECIPE + "plugins: [mine.py]\n")
    assert resolve(path).plugins == ("mine.py",)
    # Those loaded stand in the place of those named: they are the same, by their full paths.
    assert resolve(path, plugins=["/here/mine.py", "other"]).plugins == ("/here/mine.py", "other")


def test_differences(plain):
    old = resolve(plain).plain()
    assert differences(old, old) == []
    new = resolve(plain, ["optim.lr=1", "criterion=barlow_twins", "epochs=8"]).plain()
    assert differences(old, new) == [
        "criterion.name: 'info_nce' -> 'barlow_twins'",
        "criterion.temperature: 0.2 -> None",
        "criterion.negatives: 'both' -> None",
        "criterion.symmetric: True -> None",
        "criterion.lambd: None -> 0.0051",
        "criterion.scale: None -> 1.0",
        "epochs: 7 -> 8",
        "optim.lr: 0.002 -> 1.0",
    ]


def test_loggers():
    assert resolve("mrcl_digits").logger == ("tensorboard",)
    assert resolve("mrcl_digits", ["logger=[wandb, tensorboard]"]).plain()["logger"] == ["wandb", "tensorboard"]
    assert resolve("mrcl_digits", ["logger=[]"]).logger == ()
    for value, problem in (("wandb", "a list of tensorboard and wandb"), ("[board]", "'tensorboard' or 'wandb'")):
        with pytest.raises(ConfigError, match=f"logger.*expected {problem}"):
            resolve("mrcl_digits", [f"logger={value}"])
