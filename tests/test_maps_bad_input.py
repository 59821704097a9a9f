"""Runs whose maps cannot all be made: what is missing is left out with its reason, the rest is made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from napari_xanes_tomo import Recipe, Workflow, open_series, read_maps, write_twin
from napari_xanes_tomo.cli import app
from napari_xanes_tomo.mapping import NOTHING_INSIDE
from napari_xanes_tomo.phantom import TwinParameters

ENERGIES = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8341.0, 8345.0, 8349.0, 8353.0, 8570.0)
FAST = "jitter: {iterations: 4}\nregistration: {iterations: 6}\n"
EDGE = {"edge_energy_relative", "edge_energy", "edge_jump"}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parameters = TwinParameters(
        n=48, n_angles=24, energies_ev=ENERGIES, grains=60, flats_per_set=4, jitter_px=(2.0, 3.0)
    )
    return write_twin(tmp_path_factory.mktemp("maps") / "twin", parameters=parameters)


@pytest.fixture(scope="module")
def done(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    with Workflow(open_series(twin), out, Recipe.from_text(FAST + "maps: {half_sets: false}\n")) as workflow:
        workflow.run()
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "out"))


def amount(out: Path, element: str) -> float:
    maps = read_maps(out / "maps.ome.zarr")
    return float(np.median(np.asarray(maps.data[element])[np.asarray(maps.data["mask"]) > 0.5]))


def test_an_energy_excluded_after_registration(twin: Path, out: Path, done: Path) -> None:
    """Without 8178 eV nothing is known below the Ni edge: no nickel, no edge, but manganese and cobalt as before."""
    with Workflow(open_series(twin), out) as workflow:
        workflow.exclude(4, reason="ice")
    result = CliRunner().invoke(app, ["run", str(twin), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "registration 9/10, maps done" in result.stdout
    assert result.stdout.count("8178 eV: ice") == 1
    maps = read_maps(out / "maps.ome.zarr")
    assert set(maps.absent) == {"Ni", *EDGE}
    assert "without 8178 eV" in maps.absent["Ni"]
    assert "none below it, from 8133 to 8313 eV" in maps.absent["edge_jump"]
    assert "edge_energy_relative, edge_energy, edge_jump: 4 energies lie on the Ni edge" in result.stdout
    assert "about the maps:" in result.stdout
    assert "mean spectrum rises by" in result.stdout
    for element in ("Mn", "Co"):
        assert amount(out, element) == pytest.approx(amount(done, element), rel=0.1), element


def test_references_on_another_range_and_unreadable_ones(twin: Path, out: Path, tmp_path: Path) -> None:
    e = np.arange(7000, 7400, 2.0)
    np.savetxt(tmp_path / "iron.csv", np.stack([e, 0.1 + 1 / (1 + np.exp((7120 - e) / 2))], axis=1), delimiter=",")
    e = np.arange(8100, 8600, 2.0)
    np.savetxt(tmp_path / "ni.csv", np.stack([e, 0.1 + 1 / (1 + np.exp((8345 - e) / 2))], axis=1), delimiter=",")
    with Workflow(open_series(twin), out) as workflow:
        for file, why in (("iron.csv", "reaches from 7000 to 7398 eV"), ("gone.csv", "there is none")):
            recipe = tmp_path / "r.yaml"
            recipe.write_text(
                FAST + f'maps: {{half_sets: false, references: ["A={file} valence=2", "B=ni.csv valence=3"]}}\n'
            )
            workflow.set_recipe(Recipe.from_yaml(recipe))
            workflow.run()
            maps = read_maps(out / "maps.ome.zarr")
            assert set(maps.absent) == {"lcf_A", "lcf_B", "valence"}
            assert all(why in reason for reason in maps.absent.values())
            assert {"Mn", "Co", "Ni", *EDGE} <= set(maps.data)


def test_no_voxel_above_the_mask(twin: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps of a box that holds air alone: amounts are made, what has no meaning there is not."""
    with Workflow(open_series(twin), out) as workflow:
        workflow.set_recipe(Recipe.from_text(FAST + "maps: {half_sets: false, voxel_px: 2}\n"))
        monkeypatch.setattr("napari_xanes_tomo.mapping._map_window", lambda boxes, height, width: (0, 4, 0, width))
        workflow.run()
        numbers = workflow.candidates("maps")[-1].payload["numbers"]
    maps = read_maps(out / "maps.ome.zarr")
    assert {"Mn", "Co", "Ni", "density", "morphology", "mask", "coverage"} <= set(maps.data)
    assert not np.asarray(maps.data["mask"]).any()
    assert {*EDGE, "Mn_fraction", "Co_fraction", "Ni_fraction"} <= set(maps.absent)
    assert set(maps.absent.values()) == {NOTHING_INSIDE}
    assert not set(maps.absent) & set(maps.data)
    assert numbers["absent"] == maps.absent
    assert not any((out / "maps.ome.zarr" / name).exists() for name in maps.absent)


def test_the_table_of_voxels_before_is_that_of_the_run(twin: Path, out: Path) -> None:
    with Workflow(open_series(twin), out) as workflow:
        before = workflow.voxel_table()
        made = workflow.candidates("maps")[-1]
    assert before.px == made.payload["numbers"]["voxel_px"]
    assert len(before.choices) == len(made.payload["numbers"]["voxel_choices"])
    for one, other in zip(before.choices, made.payload["numbers"]["voxel_choices"], strict=True):
        assert one.px == other["px"]
        assert one.voxels == other["voxels"]
        assert one.noise_over_jump == pytest.approx(other["noise_over_jump"], rel=1e-6)
        for name, sigma in one.sigma.items():
            assert sigma == pytest.approx(other["sigma"][name], rel=1e-6), name
            assert one.real[name] == pytest.approx(other["real"][name], rel=1e-4, abs=1e-9), name
    dipole = next(s for s in made.quality.scores if s.name.startswith("edge dipole"))
    assert dipole.red == 0.3, "the limits survive the journal"
