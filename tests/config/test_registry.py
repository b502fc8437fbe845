"""Names, the schemas that constructors imply, and parts built from recipes."""

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from ssl_ib import Criterion, Loss, RunInfo, UserError
from ssl_ib.config import registry
from ssl_ib.config.hints import Positive, PositiveInt, Ratio
from ssl_ib.config.registry import CRITERIONS, MODELS, REGISTRIES, Registry, build_part, check_part, describe
from ssl_ib.criterions.barlow_twins import BarlowTwins
from ssl_ib.criterions.info_nce import InfoNCE


class Scored(Criterion):
    def forward(self, outputs, batch, progress):
        return Loss(0.0, {})


class Plain(Scored):
    """What a criterion of a user's may look like.

    rate: how much.
    """

    def __init__(
        self,
        info: RunInfo,
        rate: Positive = 0.5,
        steps: PositiveInt = 3,
        share: Ratio = 0.25,
        pair: tuple[float, float] = (0.9, 0.95),
        mode: Literal["mean", "sum"] = "mean",
        flag: bool = False,
        limit: float | None = None,
        options: dict[str, Any] | None = None,
        model_name: str = "any",
    ):
        super().__init__()
        self.info, self.rate, self.steps, self.share, self.pair = info, rate, steps, share, pair
        self.mode, self.flag, self.limit, self.options = mode, flag, limit, options
        # `limit` is used once: it cannot change later.
        self.limited = limit
        del self.limit


class Holder(Scored):
    def __init__(self, inner: Criterion, other: Criterion | None = None, weight: Positive = 1.0):
        super().__init__()
        self.inner, self.other, self.weight = inner, other, weight


class Unhinted(Scored):
    def __init__(self, anything, number=1):
        super().__init__()
        self.anything, self.number = anything, number


class Puzzling(Scored):
    def __init__(self, x: "Nowhere" = 1):  # noqa: F821
        super().__init__()


class Refusing(Scored):
    def __init__(self, mode: Literal["mean", "sum"] = "sum", options: dict[str, Any] | None = None):
        raise UserError("mode=sum needs options.x=1, and no own.mode=sum: use mode=mean")


class Silent(Scored):
    """Takes nothing."""


def make_plain(info: RunInfo, rate: Positive, steps: PositiveInt = 2) -> Plain:
    """A function that builds one."""
    return Plain(info, rate=rate, steps=steps)


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    CRITERIONS.names()
    entries = {
        "plain": Plain,
        "holder": Holder,
        "unhinted": Unhinted,
        "puzzling": Puzzling,
        "silent": Silent,
        "refusing": Refusing,
        "made": make_plain,
    }
    for name, maker in entries.items():
        monkeypatch.setitem(CRITERIONS._entries, name, maker)
    registry._checker.cache_clear()
    yield
    registry._checker.cache_clear()


def check(**spec):
    problems = []
    return check_part("criterion", spec, "criterion", problems), problems


def build(**spec):
    checked, problems = check(**spec)
    assert problems == []
    return build_part("criterion", checked, info="the run")


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_is_taken_once():
    mine = Registry("thing", "ssl_ib.errors")

    @mine.register("a")
    class First:
        pass

    with pytest.raises(UserError) as caught:

        @mine.register("a")
        class Second:
            pass

    text = str(caught.value)
    # Both places, and not one of them twice.
    lines = {part.rstrip(" and") for part in text.split("test_registry.py:")[1:]}
    assert text.startswith("thing 'a' is registered twice: at ") and len(lines) == 2
    assert mine["a"] is First and mine.names() == ["a"]


def test_a_cell_that_is_run_again_defines_its_part_anew():
    mine = Registry("thing", "ssl_ib.errors")
    cell = "class Mine:\n    def __init__(self, size: int = {0}): ...\nregister('a')(Mine)"
    for size in (1, 2):
        exec(cell.format(size), {"register": mine.register, "__name__": "__main__"})
    assert mine.schema("a")["size"].default == 2
    with pytest.raises(UserError, match="registered twice"):
        exec(cell.format(3).replace("Mine", "Other"), {"register": mine.register, "__name__": "__main__"})


def test_a_class_may_have_two_names():
    mine = Registry("thing", "ssl_ib.errors")
    mine.register("b")(mine.register("a")(Plain))
    assert mine.names() == ["a", "b"] and "a" in mine and "c" not in mine


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(UserError, match=r"unknown criterion 'info_nec'; did you mean 'info_nce'") as caught:
        CRITERIONS["info_nec"]
    for name in CRITERIONS.names():
        assert name in str(caught.value)


def test_a_registry_reads_its_package_when_asked(tmp_path, monkeypatch):
    (tmp_path / "lazy_parts_of_a_test.py").write_text("raise RuntimeError('read')")
    monkeypatch.syspath_prepend(tmp_path)
    mine = Registry("thing", "lazy_parts_of_a_test")
    mine.register("a")(Plain)
    # A package that fails does so every time, and not only at the first question.
    for _ in range(2):
        with pytest.raises(RuntimeError, match="read"):
            mine.names()


@pytest.mark.parametrize("kind", REGISTRIES)
def test_what_is_listed_without_imports_is_what_registers(kind):
    registry = REGISTRIES[kind]
    assert registry.listed() == registry.names()
    built_in = {n for n, maker in registry._entries.items() if maker.__module__.startswith(f"{registry.package}.")}
    assert built_in and built_in <= set(Registry(kind, registry.package).listed()) == built_in


def test_a_constructor_s_message_names_its_arguments_as_recipes_do():
    path = "criterion.inner"
    with pytest.raises(UserError) as caught:
        build(name="holder", inner="refusing")
    assert str(caught.value) == f"{path}.mode=sum needs {path}.options.x=1, and no own.mode=sum: use {path}.mode=mean"


def test_every_built_in_part_has_a_schema_and_a_description():
    for kind, parts in REGISTRIES.items():
        assert parts.names()
        for name in set(parts.names()) - {"puzzling"}:
            text = describe(kind, name)
            assert text.startswith(f"{kind} {name}   (")
            for key in parts.schema(name):
                assert f"\n  {key}: " in text


# --- schemas ----------------------------------------------------------------------------------------------------------


def test_the_signature_is_the_schema():
    schema = CRITERIONS.schema("plain")
    assert list(schema) == ["rate", "steps", "share", "pair", "mode", "flag", "limit", "options", "model_name"]
    assert schema["rate"].annotation == Positive and schema["rate"].default == 0.5
    assert CRITERIONS.takes("plain") == {"info"}


def test_a_function_has_one_too():
    schema = CRITERIONS.schema("made")
    assert list(schema) == ["rate", "steps"] and schema["rate"].default is schema["rate"].empty
    assert check(name="made")[1] == ["criterion.rate: required, but not given"]
    part = build(name="made", rate=2.0).part
    assert (part.info, part.rate, part.steps) == ("the run", 2.0, 2)


def test_no_constructor_of_its_own():
    assert CRITERIONS.schema("silent") == {} and CRITERIONS.takes("silent") == set()
    assert isinstance(build(name="silent").part, Silent)
    assert "unknown key" in check(name="silent", a=1)[1][0]


def test_arguments_without_hints_take_anything():
    part = build(name="unhinted", anything={"a": [1, "b"]}).part
    assert part.anything == {"a": [1, "b"]} and part.number == 1


def test_hints_that_cannot_be_read():
    with pytest.raises(UserError, match=r"hints of criterion 'puzzling' \(.*test_registry.py:\d+\).*Nowhere"):
        CRITERIONS.schema("puzzling")


def test_describe():
    lines = describe("criterion", "plain").splitlines()
    assert lines[0].startswith("criterion plain   (") and "test_registry.py:" in lines[0]
    assert lines[1:10] == [
        "  rate: float > 0, default 0.5",
        "  steps: int >= 1, default 3",
        "  share: float in [0, 1), default 0.25",
        "  pair: (float, float), default (0.9, 0.95)",
        "  mode: 'mean' | 'sum', default 'mean'",
        "  flag: bool, default False",
        "  limit: float | none, default None",
        "  options: dict[str, Any] | none, default None",
        "  model_name: str, default 'any'",
    ]
    assert lines[-3:] == ["What a criterion of a user's may look like.", "", "rate: how much."]
    assert not any("info" in line for line in lines[1:])
    nested = describe("criterion", "holder")
    assert "\n  inner: criterion, required\n  other: criterion, default None\n" in nested


# --- checks -----------------------------------------------------------------------------------------------------------


def test_defaults_are_filled_in_the_constructors_order():
    checked, problems = check(name="plain", steps=5)
    assert problems == []
    assert list(checked.items()) == [
        ("name", "plain"),
        ("rate", 0.5),
        ("steps", 5),
        ("share", 0.25),
        ("pair", [0.9, 0.95]),
        ("mode", "mean"),
        ("flag", False),
        ("limit", None),
        ("options", None),
        ("model_name", "any"),
    ]
    assert check_part("criterion", "plain", "criterion", [])["rate"] == 0.5
    # What is complete stays as it is.
    assert check(**checked) == (checked, [])


@pytest.mark.parametrize(
    "key, value, kept",
    [
        ("rate", 2, 2.0),
        ("pair", [1, 2], (1.0, 2.0)),
        ("limit", None, None),
        ("limit", 3, 3.0),
        ("options", {"depth": 2, "x": [1]}, {"depth": 2, "x": [1]}),
    ],
)
def test_values_that_fit(key, value, kept):
    part = build(name="plain", **{key: value}).part
    assert getattr(part, "limited" if key == "limit" else key) == kept


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("rate", True, "a valid number, got True"),
        ("rate", "0.5", "a valid number, got '0.5'"),
        ("rate", 0, "greater than 0, got 0"),
        ("rate", float("nan"), "a finite number, got nan"),
        ("rate", float("inf"), "a finite number, got inf"),
        ("rate", None, "a valid number, got None"),
        ("rate", {"from": 1.0}, "a valid number, got {'from': 1.0}"),
        ("steps", True, "a valid integer, got True"),
        ("steps", "3", "a valid integer, got '3'"),
        ("steps", 1.5, "a valid integer, got 1.5"),
        ("steps", 0, "greater than or equal to 1, got 0"),
        ("share", 1.0, "less than 1, got 1.0"),
        ("share", -0.1, "greater than or equal to 0, got -0.1"),
        ("mode", "median", "'mean' or 'sum', got 'median'"),
        ("flag", 1, "a valid boolean, got 1"),
        ("flag", "no", "a valid boolean, got 'no'"),
        ("options", [1], "an object, got [1]"),
    ],
)
def test_values_that_do_not(key, value, expected):
    _, problems = check(name="plain", **{key: value})
    assert problems == [f"criterion.{key}: expected {expected}"]


def test_a_tuple_has_its_length():
    for value in ([0.9], [0.9, 0.95, 1.0], [0.9, "b"], 0.9):
        assert check(name="plain", pair=value)[1]


def test_every_mistake_is_reported():
    _, problems = check(name="plain", rate=-1.0, steps=1.5, mod="sum", inner={"name": "plain"})
    assert len(problems) == 4
    assert problems[2].startswith("criterion.mod: unknown key; did you mean 'mode'? choices: flag, ")
    assert problems[3].startswith("criterion.inner: unknown key")


@pytest.mark.parametrize("spec", [3, None, ["plain"], {"rate": 1.0}, {"name": 3}])
def test_a_part_is_a_name_or_a_mapping_with_one(spec):
    problems = []
    check_part("criterion", spec, "criterion", problems)
    assert problems == [f"criterion: expected a name or {{name: ..., key: value}}, got {spec!r}"]


def test_supplied_arguments_are_the_runs():
    assert check(name="plain", info=1)[1][0].startswith("criterion.info: unknown key")
    assert build(name="plain").part.info == "the run"
    # Nobody who does not ask is given any.
    assert isinstance(build_part("criterion", check(name="silent")[0], info=1, views=2).part, Silent)


# --- nested parts -----------------------------------------------------------------------------------------------------


def test_nested_parts():
    checked, problems = check(name="holder", inner="barlow_twins", other={"name": "plain", "steps": 7})
    assert problems == []
    assert checked["inner"] == {"name": "barlow_twins", "lambd": 0.0051, "scale": 1.0}
    part = build_part("criterion", checked, info="the run").part
    assert isinstance(part.inner, BarlowTwins) and part.inner.lambd == 0.0051
    assert part.other.steps == 7 and part.other.info == "the run"


def test_a_nested_part_may_be_left_out_where_its_hint_says_so():
    assert build(name="holder", inner="silent", other=None).part.other is None
    assert check(name="holder")[1] == ["criterion.inner: required, but not given"]
    assert check(name="holder", inner=None)[1] == [
        "criterion.inner: expected a name or {name: ..., key: value}, got None"
    ]


def test_mistakes_in_nested_parts_have_their_path():
    _, problems = check(
        name="holder", inner={"name": "holder", "inner": {"name": "plain", "rate": 0}}, other="plian", weight=0
    )
    assert problems[0] == "criterion.inner.inner.rate: expected greater than 0, got 0"
    assert problems[1].startswith("criterion.other: unknown criterion 'plian'; did you mean 'plain'")
    assert problems[2] == "criterion.weight: expected greater than 0, got 0" and len(problems) == 3


def test_the_shipped_nesting():
    checked, problems = check(name="mrcl", contrastive={"name": "info_nce", "temperature": 0.5})
    assert problems == [] and isinstance(build_part("criterion", checked).part.contrastive, InfoNCE)
    assert "contrastive" in MODELS.schema("mrcl") and "info" not in MODELS.schema("mrcl")


# --- schedules --------------------------------------------------------------------------------------------------------

HALVING = {"from": 0.5, "to": 0.25, "shape": "linear"}


def test_any_number_may_be_a_schedule():
    checked, problems = check(
        name="holder", inner={"name": "plain", "rate": HALVING}, weight={"from": 1, "to": 3, "shape": "cosine"}
    )
    assert problems == []
    built = build_part("criterion", checked, info=None)
    (inner, rate, halving), (outer, weight, rising) = built.schedules
    assert (inner, rate, outer, weight) == (built.part.inner, "rate", built.part, "weight")
    # A part is built with the larger end.
    assert inner.rate == 0.5 and outer.weight == 3.0
    assert halving.at(5, 10) == 0.375 and rising.at(10, 10) == 3


def test_a_schedule_on_an_integer_gives_integers():
    built = build(name="plain", steps={"from": 1, "to": 4}, rate={"from": 1, "to": 2})
    values = {name: schedule.at(0.5, 1) for _, name, schedule in built.schedules}
    assert values == {"steps": 2, "rate": 1.5} and isinstance(values["steps"], int)
    # Without a hint there is no telling.
    ((_, _, schedule),) = build(name="unhinted", anything=0, number={"from": 0, "to": 1}).schedules
    assert schedule.at(0.5, 1) == 0.5


def test_both_ends_of_a_schedule_are_checked():
    assert check(name="plain", share={"from": 0.5, "to": 1.0})[1] == ["criterion.share: expected less than 1, got 1.0"]
    # Also the end of smaller magnitude.
    problems = check(name="plain", share={"from": -0.1, "to": 0.9})[1]
    assert problems == ["criterion.share: expected greater than or equal to 0, got -0.1"]
    assert check(name="plain", rate={"from": 1.0, "to": 0.0})[1] == ["criterion.rate: expected greater than 0, got 0.0"]
    assert check(name="plain", steps={"from": 1, "to": 2.5})[1] == [
        "criterion.steps: expected a valid integer, got 2.5"
    ]
    assert check(name="plain", flag={"from": 0, "to": 1})[1]


def test_mistakes_within_a_schedule_are_named_once():
    _, problems = check(name="plain", rate={"from": "a", "to": 1.0}, share={**HALVING, "shape": "round"}, steps=0)
    assert len(problems) == 3
    assert problems[0] == "criterion.rate.from: expected a number, got 'a'"
    assert problems[1].startswith("criterion.share.shape: unknown shape 'round'")
    assert problems[2] == "criterion.steps: expected greater than or equal to 1, got 0"


def test_a_number_that_is_not_kept_cannot_be_scheduled():
    checked, problems = check(name="holder", inner={"name": "plain", "limit": HALVING})
    assert problems == []
    with pytest.raises(UserError, match=r"criterion\.inner\.limit: 'plain' cannot follow a schedule"):
        build_part("criterion", checked, info=None)


def test_hints_with_ranges_of_their_own(monkeypatch):
    class Narrow(Scored):
        def __init__(self, x: Annotated[float, Interval(gt=1, lt=2)] = 1.5):
            super().__init__()

    monkeypatch.setitem(CRITERIONS._entries, "narrow", Narrow)
    assert check(name="narrow")[1] == []
    assert check(name="narrow", x=2.0)[1] == ["criterion.x: expected less than 2, got 2.0"]
