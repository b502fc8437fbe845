"""The grid: how values are cut, named and ordered, and that every mistake is found before anything runs."""

from functools import partial

import pytest
from harness import PARTS, TINY

from ssl_ib.config.config import configure as resolved
from ssl_ib.errors import ConfigError
from ssl_ib.sweep import points


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1e-3,2e-3", ["1e-3", "2e-3"]),
        ("a", ["a"]),
        (" a , b ", ["a", "b"]),
        ("[0.9,0.95],[0.9, 0.99]", ["[0.9,0.95]", "[0.9, 0.99]"]),
        ("{name: block, ratio: 0.5},none", ["{name: block, ratio: 0.5}", "none"]),
        ("{a: [1,{b: 2,c: 3}],d: 4},5", ["{a: [1,{b: 2,c: 3}],d: 4}", "5"]),
        ("'a,b',\"c,]d\",it's,x", ["'a,b'", '"c,]d"', "it's", "x"]),
        ('"a\\",b",c', ['"a\\",b"', "c"]),
        ("1,,2,", ["1", "", "2", ""]),
    ],
)
def test_split_at_top_level_commas(text, expected):
    assert points.split(text, ",") == expected


@pytest.mark.parametrize("text", ["[1,2", "1]", "{a: 1]", "'a,b", '"a'])
def test_brackets_and_quotes_that_do_not_match(text):
    with pytest.raises(ValueError, match="clos"):
        points.split(text, ",")


def test_values_are_yaml():
    problems = []
    axis = points.parse_vary("optim.clip=1e-3,null,true,2,1.0,'1e-3',{b: 1.5}", problems)
    assert problems == [] and axis.name == "optim.clip"
    assert [c.value for c in axis.choices] == [0.001, None, True, 2, 1.0, "1e-3", {"b": 1.5}]
    assert [c.label for c in axis.choices] == ["0.001", "null", "true", "2", "1", "'1e-3'", "{b: 1.5}"]
    assert axis.choices[0].overrides == ("optim.clip=1e-3",) and axis.choices[6].overrides == ("optim.clip={b: 1.5}",)


def test_several_keys_share_a_value():
    problems = []
    (axis,) = points.parse_axes(["criterion.w_masked+criterion.w_unmasked=0.1,10"], [], [], problems)
    assert problems == [] and [c.label for c in axis.choices] == ["0.1", "10"]
    assert axis.choices[1].overrides == ("criterion.w_masked=10", "criterion.w_unmasked=10")
    points.parse_axes(["a.b+a.c=1", "a.c=2"], [], ["a.b=3"], problems)
    assert [p.split(":")[0] for p in problems] == ["--vary a.c", "a.b"]
    points.parse_vary("a.b+=1", problems), points.parse_vary("a+seed=1", problems)
    assert "expected KEY=V1" in problems[2] and "seeds are repetitions" in problems[3]


def test_a_case():
    problems = []
    case = points.parse_case("no mask:  simclr_digits masker={name: none}  optim.lr=1", problems)
    assert problems == [] and case.label == "no mask" and case.recipe == "simclr_digits"
    assert case.overrides == ("masker={name: none}", "optim.lr=1")
    assert points.parse_case("as it is:", problems).overrides == () and problems == []


def test_names_are_safe_and_differ():
    texts = ["0.001", "1e-05", "-1", "block", "a/b", "a:b", "a b", "../x", "[0.9, 0.95]", "[0.9, 0.99]", "é", "", "x=y"]
    texts += ["y" * 80, "y" * 81]
    names = [points.safe(text) for text in texts]
    assert names[:4] == texts[:4]
    assert len(set(names)) == len(texts)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and len(name) < 80 for name in names)


def test_a_point_of_many_axes_has_a_short_name():
    axes = [points.Axis(f"key{i}", (points.Choice("v" * 30, 1, ()),)) for i in range(20)]
    other = [*axes[:-1], points.Axis("key19", (points.Choice("v" * 29, 1, ()),))]
    first, second = (
        points.folder_name([axis.name for axis in a], [axis.choices[0].label for axis in a]) for a in (axes, other)
    )
    assert len(first) < 255 and first != second


def grid(vary=(), cases=(), overrides=(), seeds=None, configure=None, recipe=TINY):
    problems = []
    axes = points.parse_axes(vary, cases, overrides, problems)
    assert problems == []
    return points.grid(recipe, overrides, axes, seeds, configure or partial(resolved, plugins=[PARTS]))


def test_seeds_are_outermost_and_the_last_axis_is_fastest():
    runs = grid(["optim.lr=1e-3,2e-3", "masker.ratio=0.25,0.5"], ["a:", "b: epochs=3"], ["batch_size=32"], [5, 3])
    assert [run.seed for run in runs] == [5] * 8 + [3] * 8
    assert [run.point for run in runs[:8]] == [run.point for run in runs[8:]]
    assert [run.point.labels for run in runs[:5]] == [
        ("a", "0.001", "0.25"),
        ("a", "0.001", "0.5"),
        ("a", "0.002", "0.25"),
        ("a", "0.002", "0.5"),
        ("b", "0.001", "0.25"),
    ]
    last = runs[-1]
    assert last.overrides == ("batch_size=32", "epochs=3", "optim.lr=2e-3", "masker.ratio=0.5", "seed=3")
    assert (last.config.batch_size, last.config.epochs, last.config.optim.lr, last.config.seed) == (32, 3, 2e-3, 3)
    assert str(last.folder) == "case_b,optim.lr_0.002,masker.ratio_0.5/seed_3"


def test_without_seeds_it_is_the_recipes_own():
    (run,) = grid(overrides=["seed=7"])
    assert run.seed == 7 and str(run.folder) == "base/seed_7"


def test_a_case_may_start_from_another_recipe():
    runs = grid(cases=["tiny:", "digits: simclr_digits epochs=3"])
    assert [run.recipe for run in runs] == [TINY, "simclr_digits"]
    assert runs[1].config.recipe == "simclr_digits" and runs[1].config.epochs == 3


def test_every_problem_is_told_once_with_where_it_is():
    with pytest.raises(ConfigError) as caught:
        grid(
            ["optim.lr=1e-3,fast", "masker.ratio=0.2,1.5,0.4"],
            ["here:", "there: simclr_digit", "odd: depth=3"],
            ["epoch=3"],
            [0, 1],
        )
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == len(set(caught.value.problems))
    assert "unknown recipe 'simclr_digit'" in problems and problems.count("simclr_digit'") == 1
    assert "(at case_there,optim.lr_0.001,masker.ratio_0.2 and 5 more)" in problems
    assert "depth: unknown key" in problems and "epoch: unknown key" in problems
    assert "got 'fast'" in problems and "masker.ratio: expected" in problems


def test_a_key_that_some_cases_lack():
    cases = ["MRCL: mrcl_digits epochs=3", "SimCLR: simclr_digits", "none: masker=none"]
    with pytest.raises(ConfigError) as caught:
        grid(cases=cases, overrides=["masker.ratio=0.25"], seeds=[0, 1])
    assert caught.value.problems == [
        "masker.ratio=0.25 is given to every case, but the cases SimCLR, none have no such key: write it in the cases "
        'that have it, as in --case "MRCL: mrcl_digits epochs=3 masker.ratio=0.25"'
    ]
    with pytest.raises(ConfigError) as caught:
        grid(["criterion.contrastive.temperature=0.1,0.2"], cases[:2])
    (problem,) = caught.value.problems
    assert problem.startswith("--vary criterion.contrastive.temperature: the case SimCLR has no such key: write each")
    # What none of them has is a mistake in the key.
    with pytest.raises(ConfigError) as caught:
        grid(cases=cases, overrides=["masker.ration=0.25"])
    assert all("masker.ration: unknown key" in problem for problem in caught.value.problems)


def test_points_that_are_the_same_configuration():
    with pytest.raises(ConfigError, match="case_a and case_b are the same configuration"):
        grid(cases=["a: optim.lr=1e-3", "b: optim={lr: 0.001}"], seeds=[0, 1])


@pytest.mark.parametrize(
    "vary, cases, overrides, expected",
    [
        (["optim.lr"], [], [], "--vary: expected KEY=V1,V2,..., such as optim.lr=1e-3,2e-3, got 'optim.lr'"),
        (["optim.lr=1,,2"], [], [], "--vary optim.lr: an empty value in '1,,2'"),
        (["optim.lr="], [], [], "--vary optim.lr: an empty value in ''"),
        (["optim.lr=1e-3,2e-3,0.001"], [], [], "--vary optim.lr: the value 0.001 is given twice"),
        (["optim.lr=[1,2"], [], [], "--vary optim.lr: '[' is not closed in '[1,2'"),
        (["optim.lr=*x,1"], [], [], "--vary optim.lr: expected YAML values, got '*x'"),
        (["seed=0,1"], [], [], "--vary seed: seeds are repetitions"),
        (["optim.lr=1", "optim.lr=2"], [], [], "--vary optim.lr: is given twice"),
        (["optim.lr=1"], [], ["optim.lr=2"], "optim.lr: is both varied and given one value"),
        (["optim.lr=1"], ["a: optim.lr=2"], [], "optim.lr: is both varied and set by the case a"),
        ([], ["a: epochs=1", "a: epochs=2"], [], "--case a: the name is given twice"),
        ([], ["epochs=1"], [], '--case: expected "NAME: [RECIPE] KEY=VALUE ...", got'),
        ([], ["a: epochs=1 b"], [], "--case a: expected KEY=VALUE, got 'b'"),
        ([], ["a: epochs=1 epochs=2"], [], "--case a: epochs is given twice"),
        ([], ["a: seed=1"], [], "--case a: seeds are repetitions"),
        ([], ["a: masker={name: x"], [], "--case a: '{' is not closed"),
    ],
)
def test_mistakes_on_the_command_line(vary, cases, overrides, expected):
    problems = []
    points.parse_axes(vary, cases, overrides, problems)
    assert len(problems) == 1 and problems[0].startswith(expected)


@pytest.mark.parametrize("text", ["", "a", "0,,1", "-1", "0.5"])
def test_seeds_that_are_none(text):
    problems = []
    points.parse_seeds(text, problems)
    assert len(problems) == 1 and "whole numbers of at least 0" in problems[0]


def test_a_seed_twice():
    problems = []
    assert points.parse_seeds("0, 1,0", problems) == [0, 1, 0] and problems == ["--seeds: 0 is given twice"]


def test_a_part_varied_as_a_whole_and_a_key_of_it():
    problems = []
    points.parse_axes(["optim={lr: 5e-3},{lr: 2e-3}"], [], ["optim.lr=1e-3"], problems)
    assert problems == ["optim.lr: is part of optim, which is varied as a whole"]
    problems.clear()
    # Another part by its name alone, with a key of its own: that is how one swaps parts.
    points.parse_axes(["masker=random,block"], [], ["masker.ratio=0.5"], problems)
    assert problems == []
