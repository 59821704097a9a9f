"""The recipe: what goes in comes out, and everything else is refused with one helpful line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.recipe import (
    AbsorbanceParameters,
    JitterParameters,
    MapsParameters,
    Recipe,
    RegistrationParameters,
    ScanParameters,
    parameter_key,
)

STEPS = (ScanParameters, AbsorbanceParameters, JitterParameters, RegistrationParameters, MapsParameters)

recipes = st.builds(
    Recipe,
    scan=st.builds(
        ScanParameters, flip_rows=st.booleans(), theta_sign=st.sampled_from([1, -1]), bin=st.integers(1, 16)
    ),
    absorbance=st.builds(AbsorbanceParameters, remove_air=st.booleans(), air_margin_px=st.floats(0, 200)),
    jitter=st.builds(
        JitterParameters,
        refine=st.booleans(),
        iterations=st.integers(0, 100),
        max_shift_px=st.floats(0, 1000, exclude_min=True),
    ),
    registration=st.builds(
        RegistrationParameters, reference_ev=st.none() | st.floats(1, 1e5), iterations=st.integers(1, 100)
    ),
    maps=st.builds(
        MapsParameters,
        elements=st.none() | st.lists(st.sampled_from(["Mn", "Co", "Ni", "Fe"]), max_size=3).map(tuple),
        filter=st.sampled_from(["ramp", "shepp-logan", "cosine", "hann"]),
        energy_offset_ev=st.none() | st.floats(-50, 50),
    ),
)


# --- round trip ---------------------------------------------------------------------------------------------


@given(recipes)
@example(Recipe())
def test_yaml_round_trip(recipe: Recipe) -> None:
    again = Recipe.from_text(recipe.to_yaml())
    assert again == recipe
    assert parameter_key(again) == parameter_key(recipe)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}", "version: 1"])
def test_nothing_said_means_the_defaults(text: str) -> None:
    assert Recipe.from_text(text) == Recipe()


def test_a_part_of_a_recipe_leaves_the_rest_at_its_default() -> None:
    recipe = Recipe.from_text("jitter: {iterations: 3}")
    assert recipe.jitter.iterations == 3
    assert recipe.jitter.max_shift_px == Recipe().jitter.max_shift_px
    assert recipe.maps == Recipe().maps


def test_from_yaml_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("maps: {elements: [Mn, Ni]}\n", encoding="utf-8")
    assert Recipe.from_yaml(path).maps.elements == ("Mn", "Ni")
    assert Recipe.from_yaml(str(path)) == Recipe.from_yaml(path)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.jitter.iterations = 3  # type: ignore[misc]


# --- refused, with the reason in one line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("jiter: {}", r"unknown key 'jiter'; the nearest known key is 'jitter'"),
        ("jitter: {iteration: 3}", r"unknown key 'jitter.iteration'; the nearest known key is 'iterations'"),
        ("maps: {smoothing_voxels: 1}", r"'maps.smoothing_voxels'; the nearest known key is 'smoothing_voxel'"),
        ("scan: {bin: 0}", r"scan.bin: .*greater than or equal to 1, got 0"),
        ("scan: {bin: 17}", r"scan.bin: .*less than or equal to 16, got 17"),
        ("scan: {theta_sign: 0}", r"scan.theta_sign: "),
        ("scan: {bin: two}", r"scan.bin: .*integer.*got 'two'"),
        ("jitter: {max_shift_px: 0}", r"jitter.max_shift_px: .*greater than 0"),
        ("jitter: {max_shift_px: .nan}", r"jitter.max_shift_px: "),
        ("jitter: {max_shift_px: .inf}", r"jitter.max_shift_px: "),
        ("registration: {reference_ev: -1}", r"registration.reference_ev: "),
        ("maps: {filter: gaussian}", r"maps.filter: .*got 'gaussian'"),
        ("jitter: 3", r"jitter: "),
        ("jitter:", r"jitter: "),
        ("version: 2", r"version: "),
        ("- a\n- b", r"expected `key: value` lines, got a list"),
        ("just words", r"expected `key: value` lines, got a str"),
        ("3", r"expected `key: value` lines, got a int"),
        ("a: [1", r"expected YAML"),
        ("a: 1\n\tb: 2", r"expected YAML"),
        ("2026-13-45: 1", r"expected YAML|unknown key"),
        ("1: 2", r"recipe: "),
        ("? [a, b]\n: 1", r"recipe: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, says: str) -> None:
    with pytest.raises(XanesTomoError, match=says) as caught:
        Recipe.from_text(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "jitter: !!python/object/new:dict {}",
        "a: !!python/name:os.system",
        "a: !include other.yaml",
    ],
)
def test_python_tags_are_refused(text: str) -> None:
    with pytest.raises(XanesTomoError, match="could not determine a constructor"):
        Recipe.from_text(text)


@pytest.mark.timeout(20)
def test_a_yaml_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(XanesTomoError) as caught:
        Recipe.from_text("\n".join(lines))
    assert len(str(caught.value)) < 5000


@pytest.mark.timeout(20)
def test_a_bomb_as_a_value_is_refused_without_writing_it_out() -> None:
    lines = ["x: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"y{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 6)]
    lines.append("maps: {elements: *a5}")
    tracemalloc.start()
    with pytest.raises(XanesTomoError):
        Recipe.from_text("\n".join(lines))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e5  # written out: 4.7e5, and nine times as much with every further level


@pytest.mark.timeout(20)
def test_deep_nesting_is_refused() -> None:
    with pytest.raises(XanesTomoError, match="recipe: "):
        Recipe.from_text("jitter: " + "[" * 5000 + "]" * 5000)


@pytest.mark.timeout(20)
def test_a_value_that_contains_itself_is_refused() -> None:
    with pytest.raises(XanesTomoError, match="recipe: "):
        Recipe.from_text("jitter: &a {iterations: *a}")


@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_one_error(text: str) -> None:
    try:
        Recipe.from_text(text)
    except XanesTomoError as caught:
        error = caught
    else:
        return
    assert str(error).startswith("recipe: ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(XanesTomoError, match=r"recipe none\.yaml: cannot be read"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(XanesTomoError, match=r"recipe binary\.yaml: cannot be read"):
        Recipe.from_yaml(tmp_path / "binary.yaml")
    with pytest.raises(XanesTomoError, match="cannot be read"):
        Recipe.from_yaml(tmp_path)


# --- what a form and a journal rely on ----------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_every_parameter_is_described_and_bounded(step: type[BaseModel]) -> None:
    for name, field in step.model_fields.items():
        assert field.description, f"{step.__name__}.{name} has no description"
        extra = field.json_schema_extra
        for suffix in ("_px", "_ev", "_nm", "_deg"):
            if name.endswith(suffix):
                assert isinstance(extra, dict), f"{step.__name__}.{name} has no unit"
                assert str(extra["unit"]).lower().split("/")[-1 if "_per_" in name else 0] == suffix[1:]


@given(recipes, recipes)
def test_equal_keys_mean_equal_parameters(a: Recipe, b: Recipe) -> None:
    assert (parameter_key(a) == parameter_key(b)) == (a.to_yaml() == b.to_yaml())


def test_parameter_key_depends_on_every_part_and_its_order() -> None:
    parts: list[tuple[Any, ...]] = [(), (1,), ("1",), (1, 2), (2, 1), ((1, 2),), (JitterParameters(),), (None,)]
    keys = [parameter_key(*p) for p in parts]
    assert len(set(keys)) == len(keys)
    assert all(len(k) == 16 and int(k, 16) >= 0 for k in keys)
    assert parameter_key([1, 2]) == parameter_key((1, 2))


def test_parameter_key_is_the_same_in_every_process() -> None:
    assert parameter_key("step", 1, 2.5) == "872ba1c704e33622"


def test_yaml_of_a_recipe_is_plain() -> None:
    text = Recipe().to_yaml()
    assert "!!" not in text
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)
    assert np.isfinite(Recipe().scan.pixel_law_slope_nm_per_ev)


def test_the_exported_schema_is_current(repository: Path) -> None:
    # xanes-tomo recipe --schema > docs/recipe.schema.json
    stored = (repository / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert stored == Recipe.schema_text()


def test_what_is_done_about_a_missed_threshold_is_no_other_work() -> None:
    assert Recipe(on_fail="stop").same_work(Recipe())
    assert not Recipe(on_fail="stop", jitter=JitterParameters(refine=False)).same_work(Recipe())


# --- measures and references --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("NiO=NiO.xdi", ("NiO", "NiO.xdi", None, None)),
        ("NiO = my files/NiO.xdi valence=2", ("NiO", "my files/NiO.xdi", None, 2.0)),
        ("LNO=set.prj#LiNiO2 aged valence=3.5", ("LNO", "set.prj", "LiNiO2 aged", 3.5)),
        ("a=b.csv valence=-1", ("a", "b.csv", None, -1.0)),
    ],
)
def test_references_are_taken_apart(entry: str, expected: tuple[Any, ...]) -> None:
    assert tuple(MapsParameters(references=(entry,)).reference_files[0]) == expected


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"references": ("NiO.xdi",)}, "expected entries such as"),
        ({"references": ("=NiO.xdi",)}, "expected entries such as"),
        ({"references": ("a b=NiO.xdi",)}, "expected entries such as"),
        ({"references": ("a=x.csv", "a=y.csv")}, "different names"),
        ({"edge_measures": ("edge_energy_halv",)}, "did you mean edge_energy_half"),
        ({"pre_edge_from_ev": -10.0}, "expected pre_edge_from_ev below pre_edge_to_ev"),
        ({"post_edge_to_ev": 50.0}, "expected post_edge_from_ev below post_edge_to_ev"),
    ],
)
def test_wrong_measures_and_references_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        MapsParameters(**given)


def test_references_beside_the_recipe_are_found(tmp_path: Path) -> None:
    (tmp_path / "NiO.xdi").write_text("")
    path = tmp_path / "r.yaml"
    path.write_text("maps: {references: [NiO=NiO.xdi valence=2, other=elsewhere.csv]}", encoding="utf-8")
    first, second = Recipe.from_yaml(path).maps.reference_files
    assert Path(first.file) == tmp_path / "NiO.xdi"
    assert first.valence == 2
    assert second.file == "elsewhere.csv"
