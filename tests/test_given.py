"""Volumes and projections that were aligned elsewhere: known densities come back, what is wrong is said in one line."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from napari_xanes_tomo import Recipe, Workflow, cli, read_maps
from napari_xanes_tomo.edges import mass_attenuation
from napari_xanes_tomo.io.given import BEAM, given_kind, open_given, open_input
from napari_xanes_tomo.io.journal import Journal
from napari_xanes_tomo.io.store import read_energies, read_shifts
from napari_xanes_tomo.model import FrameSource, XanesTomoError
from napari_xanes_tomo.projector import Projector
from napari_xanes_tomo.recipe import GivenParameters, MapsParameters

ENERGIES = np.array([6534.0, 6558, 7704, 7728, 8178, 8250, 8325, 8345, 8350, 8356, 8365, 8380, 8450, 8570])
VOXEL = 40.0  # nm
PLAIN = Recipe(maps=MapsParameters(smoothing_voxel=0, shape_smoothing=0))


def densities(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Mn, Co and Ni of a particle, g/cm3, with a composition that changes across it."""
    y, z, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    radius = np.sqrt((y / shape[0]) ** 2 + (z / shape[1]) ** 2 + (x / shape[2]) ** 2)
    body = 1 / (1 + np.exp(40 * (radius - 0.36)))
    return {
        "Mn": body * (0.6 + 0.2 * x / shape[2]),
        "Co": body * (0.5 - 0.2 * y / shape[0]),
        "Ni": body * (1.6 + 0.3 * z / shape[1]),
    }


def attenuation(rho: dict[str, np.ndarray], energies: np.ndarray = ENERGIES) -> np.ndarray:
    """(energy, y, z, x) linear attenuation, 1/cm, with oxygen as the smooth remainder."""
    table = {e: mass_attenuation(e, energies) for e in rho}
    rest = sum(rho.values()) * 0.5
    smooth = 8.0 * (energies / 8000.0) ** -3.0
    return np.stack([sum(rho[e] * table[e][k] for e in rho) + rest * smooth[k] for k in range(len(energies))])


def sandbox(path: Path, volumes: np.ndarray, energies: np.ndarray = ENERGIES, unit: str | None = None) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_dataset("registration_results/reg_results/registered_xanes3D", data=volumes.astype("f4"))
        file["registration_results/reg_results/eng_list"] = energies / 1e3
        if unit:
            data.attrs["units"] = unit
    return path


SHAPE = (14, 22, 26)
TOLD = GivenParameters(unit="1/voxel", pixel_nm=VOXEL)


@pytest.fixture(scope="module")
def rho() -> dict[str, np.ndarray]:
    return densities(SHAPE)


def test_densities_come_back_from_volumes(rho, tmp_path):
    path = sandbox(tmp_path / "reg.h5", attenuation(rho) * VOXEL * 1e-7)  # per voxel, as TomoPy gives
    series = open_given(path, TOLD)
    assert all(isinstance(s.frames, FrameSource) for s in series.scans)
    with Workflow(series, tmp_path / "out", PLAIN) as workflow:
        state = workflow.run()
        assert {u.status for u in state.units.values()} == {"candidate"}
        voxel = workflow.voxel_spectrum((7, 12, 10))
        with pytest.raises(XanesTomoError, match="expected y, z, x within"):
            workflow.voxel_spectrum((7, 12, 400))
    np.testing.assert_allclose(voxel.value, attenuation(rho)[:, 7, 12, 10], rtol=1e-4)
    assert {e: pytest.approx(r[7, 12, 10], rel=2e-3) for e, r in rho.items()} == voxel.amounts
    fitted = np.isfinite(voxel.elements)
    np.testing.assert_allclose(voxel.elements[fitted], voxel.value[fitted], rtol=1e-3)
    assert (~fitted).sum() == np.sum((ENERGIES > 8318) & (ENERGIES < 8393))
    assert abs(voxel.shift_ev) < 0.02
    maps = read_maps(tmp_path / "out" / "maps.ome.zarr")
    assert maps.voxel_nm == VOXEL
    assert maps.units["Ni"] == "g/cm3"
    inside = np.asarray(maps.data["mask"]) > 0
    assert inside.shape == SHAPE
    assert inside.mean() > 0.1
    for element, truth in rho.items():
        # float32 of the file, and what the smooth remainder leaves: the third power is its true law here.
        np.testing.assert_allclose(np.asarray(maps.data[element])[inside], truth[inside], rtol=2e-3)
    moles = {e: r / {"Mn": 54.938, "Co": 58.933, "Ni": 58.693}[e] for e, r in rho.items()}
    share = (moles["Ni"] / sum(moles.values()))[inside]
    np.testing.assert_allclose(np.asarray(maps.data["Ni_fraction"])[inside], share, atol=1e-3)
    assert np.abs(np.asarray(maps.data["edge_energy_relative"])[inside]).max() < 0.02  # the same spectrum everywhere
    rows = read_energies(tmp_path / "out" / "tables" / "energies.csv")
    assert [r.status for r in rows] == ["ok"] * len(ENERGIES)
    assert read_shifts(tmp_path / "out" / "tables" / "shifts.csv") == []


def test_steps_that_are_not_needed_say_why(rho, tmp_path):
    series = open_given(sandbox(tmp_path / "reg.h5", attenuation(rho), unit="1/cm"), GivenParameters(pixel_nm=VOXEL))
    with Workflow(series, tmp_path / "out", PLAIN) as workflow:
        workflow.run()
        for name in ("flats", "jitter", "registration"):
            candidate = workflow.candidates(name, 3)[0]
            assert candidate.quality.notes[0].startswith("given: volumes made elsewhere")
    before = len(Journal(tmp_path / "out").events)
    with Workflow(series, tmp_path / "out") as workflow:  # goes on, does nothing twice
        workflow.run()
    assert len(Journal(tmp_path / "out").events) == before


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_errors_of_maps_of_noisy_volumes(rho, tmp_path, smoothing):
    shape = (30, 40, 40)
    rho = densities(shape)
    clean = attenuation(rho)
    noise = np.random.default_rng(3).normal(0, 60, clean.shape)  # 1/cm; the jump of Ni is about 400
    path = sandbox(tmp_path / "reg.h5", clean + noise, unit="1/cm")
    recipe = Recipe(maps=MapsParameters(smoothing_voxel=smoothing, shape_smoothing=1))
    with Workflow(open_given(path, GivenParameters(pixel_nm=VOXEL)), tmp_path / "out", recipe) as workflow:
        workflow.run()
    maps = read_maps(tmp_path / "out" / "maps.ome.zarr")
    from scipy.ndimage import gaussian_filter

    y, z, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    core = np.sqrt((y / shape[0]) ** 2 + (z / shape[1]) ** 2 + (x / shape[2]) ** 2) < 0.26
    for element, truth in rho.items():
        expected = gaussian_filter(truth, smoothing) if smoothing else truth
        ratio = (np.asarray(maps.data[element]) - expected)[core] / np.asarray(maps.data[f"{element}_sigma"])[core]
        assert 0.8 < np.sqrt(np.mean(ratio**2)) < 1.25, element
        assert np.mean(np.abs(ratio) > 4) < 0.01
    relative = np.asarray(maps.data["edge_energy_relative"])[core]
    sigma = np.asarray(maps.data["edge_energy_relative_sigma"])[core]
    assert 0.7 < np.sqrt(np.nanmean((relative / sigma) ** 2)) < 1.4


@pytest.mark.parametrize(("dy", "dz", "dx"), [(0.0, 0.0, 0.8), (0.6, -0.5, 0.0), (0.0, 0.0, 0.0)])
def test_the_check_finds_what_is_displaced(rho, tmp_path, dy, dz, dx):
    from scipy.ndimage import shift

    rho = densities((30, 40, 40))
    volumes = attenuation(rho) + np.random.default_rng(1).normal(0, 20, (len(ENERGIES), 30, 40, 40))
    volumes[3] = shift(volumes[3], (dy, dz, dx), order=3)  # the content moves by + (dy, dz, dx)
    path = sandbox(tmp_path / "reg.h5", volumes, unit="1/cm")
    with Workflow(open_given(path, GivenParameters(pixel_nm=VOXEL)), tmp_path / "out", PLAIN) as workflow:
        workflow.run(until="registration")
        found = workflow.result(workflow.candidates("registration", 3)[0])
        other = workflow.result(workflow.candidates("registration", 5)[0])
    measured = np.array(found.numbers["found_shift"])  # y, x, z
    np.testing.assert_allclose(measured, [dy, dx, dz], atol=0.12)
    far = np.linalg.norm([dy, dz, dx]) > 0.5
    assert found.quality.verdict == ("check" if far else "good")
    assert other.quality.verdict == "good"
    assert np.linalg.norm(other.numbers["found_shift"]) < 0.1
    assert found.numbers["translation_sigma"][1] >= abs(measured[1])  # it counts as an error of the maps


@pytest.fixture(scope="module")
def aligned(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Aligned projections of the particle in DataExchange, one file an energy."""
    folder = tmp_path_factory.mktemp("aligned")
    rho = densities((12, 48, 48))
    theta = np.arange(60) * 3.0 - 90
    rng = np.random.default_rng(5)
    for energy, volume in zip(ENERGIES, attenuation(rho), strict=True):
        lines = Projector(48, theta).forward((volume * VOXEL * 1e-7).astype("f4"))
        lines = np.asarray(lines) if lines.shape[0] == 60 else np.asarray(lines).transpose(1, 0, 2)
        lines = lines + rng.normal(0, 2e-4, lines.shape)
        with h5py.File(folder / f"p_{energy:.2f}_eV.h5", "w") as file:
            file["exchange/data"], file["exchange/theta"] = lines.astype("f4"), theta
            file["exchange/energy"] = energy
            file["measurement/instrument/detector/pixel_size_x"] = VOXEL / 1e3
    return folder, rho


def test_densities_come_back_from_projections(aligned, tmp_path):
    folder, rho = aligned
    assert given_kind(folder) == "projections"
    series = open_input(folder)
    scan = series.scans[4]
    with h5py.File(folder / "p_8178.00_eV.h5") as file:
        expected = file["exchange/data"][7, 3:5]
    np.testing.assert_allclose(-np.log(scan.frames.read_rows([7], 3, 5)[0] / BEAM), expected, atol=3e-7)
    recipe = Recipe(maps=MapsParameters(smoothing_voxel=0, shape_smoothing=0, voxel_px=1))
    with Workflow(series, tmp_path / "out", recipe) as workflow:
        workflow.run()
        assert workflow.candidates("registration", 4)[0].quality.verdict == "good"
    maps = read_maps(tmp_path / "out" / "maps.ome.zarr")
    inside = np.asarray(maps.data["mask"]) > 0
    for element, truth in rho.items():
        value = np.asarray(maps.data[element])[inside]
        assert value.mean() == pytest.approx(truth[inside].mean(), rel=0.03)
        assert np.corrcoef(value, truth[inside])[0, 1] > 0.9
    assert len(read_shifts(tmp_path / "out" / "tables" / "shifts.csv")) == 60 * len(ENERGIES)


# ------------------------------------------------------------------------------------------------- 2-D XANES


def images(shape=(48, 56)) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Mn, Co and Ni of a particle per area, mg/cm2, and (energy, y, x) absorbance."""
    y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    body = 1 / (1 + np.exp(0.8 * (np.sqrt(y**2 + x**2) - 0.36 * shape[0])))
    amount = {"Mn": body * (0.3 + 0.002 * x), "Co": body * (0.3 - 0.002 * y), "Ni": body * (0.8 + 0.002 * y)}
    return amount, attenuation({e: a * 1e-3 for e, a in amount.items()})


@pytest.mark.parametrize("format", ["sandbox", "pictures", "stack"])
def test_areal_maps_of_registered_images(tmp_path, format):
    import tifffile

    amount, stack = images()
    noise = np.random.default_rng(2).normal(0, 0.01, stack.shape)
    given = GivenParameters(pixel_nm=VOXEL)
    if format == "sandbox":
        path = tmp_path / "reg2d.h5"
        with h5py.File(path, "w") as file:
            file["registration_results/reg_results/registered_xanes2D"] = (stack + noise).astype("f4")
            file["registration_results/reg_results/eng_list"] = ENERGIES / 1e3
    elif format == "pictures":
        path = tmp_path / "pictures"
        path.mkdir()
        for energy, image in zip(ENERGIES, stack + noise, strict=True):
            tifffile.imwrite(path / f"i_{energy:.2f}_eV.tif", image.astype("f4"))
    else:
        path = tmp_path / "stack.tif"
        tifffile.imwrite(path, (stack + noise).astype("f4"))
        given = GivenParameters(kind="images", pixel_nm=VOXEL, energies_ev=tuple(ENERGIES))
    assert given_kind(path, given) == "images"
    series = open_given(path, given)
    np.testing.assert_allclose(series.scans[3].frames.read(0), (stack + noise)[3], rtol=1e-6)
    with Workflow(series, tmp_path / "out", PLAIN) as workflow:
        workflow.run()
        assert workflow.candidates("registration", 2)[0].quality.verdict == "good"
    maps = read_maps(tmp_path / "out" / "maps.ome.zarr")
    assert (maps.units["Ni"], maps.units["density"], maps.units["edge_jump"]) == ("mg/cm2", "mg/cm2", "")
    y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (48, 56)), indexing="ij")
    core = np.sqrt(y**2 + x**2) < 13
    assert (np.asarray(maps.data["mask"])[:, 0][core] > 0).all()
    for element, truth in amount.items():
        value = np.asarray(maps.data[element])[:, 0]
        assert value.shape == (48, 56)
        ratio = (value - truth)[core] / np.asarray(maps.data[f"{element}_sigma"])[:, 0][core]
        assert abs(np.mean(ratio)) < 0.15
        assert 0.8 < np.sqrt(np.mean(ratio**2)) < 1.25
    relative = np.asarray(maps.data["edge_energy_relative"])[:, 0][core]
    ratio = relative / np.asarray(maps.data["edge_energy_relative_sigma"])[:, 0][core]
    assert 0.7 < np.sqrt(np.mean(ratio**2)) < 1.4


def test_the_check_finds_a_displaced_image(tmp_path):
    from scipy.ndimage import shift

    _, stack = images()
    stack[4] = shift(stack[4], (0.7, -0.4), order=3)
    with h5py.File(tmp_path / "i.h5", "w") as file:
        file["data"], file["energy"] = stack.astype("f4"), ENERGIES
    with Workflow(open_given(tmp_path / "i.h5", GivenParameters(pixel_nm=VOXEL)), tmp_path / "out", PLAIN) as workflow:
        workflow.run(until="registration")
        found = workflow.candidates("registration", 4)[0]
        np.testing.assert_allclose(found.payload["numbers"]["found_shift"][:2], [0.7, -0.4], atol=0.1)
        assert found.quality.verdict == "check"
        assert workflow.candidates("registration", 5)[0].quality.verdict == "good"


def refused(path, given, words, recipe=PLAIN):
    with pytest.raises(XanesTomoError) as caught:
        open_input(path, recipe.model_copy(update={"given": given}))
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


def test_what_is_missing_is_said_in_one_line(rho, tmp_path):
    volumes = attenuation(rho)
    told = GivenParameters(unit="1/cm", pixel_nm=VOXEL)
    refused(sandbox(tmp_path / "a.h5", volumes), GivenParameters(pixel_nm=VOXEL), "given.unit")
    refused(sandbox(tmp_path / "b.h5", volumes), GivenParameters(unit="1/cm"), "given.pixel_nm")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["data"] = volumes
    refused(tmp_path / "c.h5", told, "given.energies_ev")
    refused(tmp_path / "c.h5", told.model_copy(update={"energies_ev": (7000.0, 8000.0)}), "expected 14 energies")
    refused(sandbox(tmp_path / "d.h5", volumes[:1], ENERGIES[:1]), told, "at least two energies")
    import tifffile

    for energy, rows in ((8345, 14), (8570, 13)):
        (tmp_path / "t").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "t" / f"v_{energy}.00_eV.tif", volumes[0, :rows].astype("f4"))
    refused(tmp_path / "t", told, "one shape")
    refused(tmp_path / "t", told.model_copy(update={"kind": "projections"}), "given.theta_deg")
    refused(tmp_path / "c.h5", told, "scan.bin", Recipe.from_text("scan: {bin: 2}"))


def test_values_that_are_no_numbers(rho, tmp_path):
    volumes = attenuation(rho)
    volumes[2, 7, 11, 13] = np.nan
    series = open_given(sandbox(tmp_path / "reg.h5", volumes, unit="1/cm"), GivenParameters(pixel_nm=VOXEL))
    with Workflow(series, tmp_path / "out", PLAIN) as workflow:
        state = workflow.run()  # that energy is left out, the rest is made
        assert state[("flats", 2)].status == "failed"
        assert "7704 eV: reg.h5" in state[("flats", 2)].reason
        assert "1 values that are none" in state[("flats", 2)].reason
    maps = read_maps(tmp_path / "out" / "maps.ome.zarr")
    assert "Ni" in maps.data
    assert "Co" in maps.absent


def test_no_number_far_from_the_middle(rho, tmp_path):
    volumes = attenuation(densities((80, 22, 26)))
    volumes[4, 2, 3, 3] = np.inf
    series = open_given(sandbox(tmp_path / "reg.h5", volumes, unit="1/cm"), GivenParameters(pixel_nm=VOXEL))
    with (
        Workflow(series, tmp_path / "out", PLAIN) as workflow,
        pytest.raises(XanesTomoError, match=r"^reg\.h5, rows 0 to \d+: expected numbers everywhere, got 1 values"),
    ):
        workflow.run()


def test_ome_zarr(rho, tmp_path):
    import zarr

    root = zarr.open_group(tmp_path / "v.ome.zarr", mode="w")
    volumes = attenuation(rho)
    for energy, volume in zip(ENERGIES, volumes, strict=True):
        group = root.create_group(f"v_{energy:.2f}_eV")
        group.create_array("0", data=volume.astype("f4"))
        axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
        scale = [{"type": "scale", "scale": [VOXEL / 1e3] * 3}]
        group.attrs["ome"] = {
            "version": "0.5",
            "multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}],
        }
        group.attrs["unit"] = "1/cm"
    assert given_kind(tmp_path / "v.ome.zarr") == "volumes"
    series = open_given(tmp_path / "v.ome.zarr")
    np.testing.assert_array_equal(series.energies_ev, ENERGIES)
    assert series.scans[0].pixel_size_nm == pytest.approx(VOXEL)
    np.testing.assert_array_equal(series.scans[5].frames.read_rows([4, 5, 9], 2, 6)[2], volumes[5, 2:6, 9].astype("f4"))


def test_raw_frames_are_told_from_what_is_aligned(tmp_path, rho):
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["exchange/data"], file["exchange/data_white"] = np.ones((9, 8, 8), "u2"), np.ones((2, 8, 8), "u2")
        file["exchange/theta"] = np.arange(9.0)
    assert given_kind(tmp_path / "raw.h5") == "raw"
    assert given_kind(sandbox(tmp_path / "reg.h5", attenuation(rho))) == "volumes"
    assert given_kind(tmp_path / "nothing") == "raw"
    (tmp_path / "f").mkdir()
    assert given_kind(tmp_path / "f") == "raw"


def test_the_command(rho, tmp_path):
    path = sandbox(tmp_path / "reg.h5", attenuation(rho))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"given: {{unit: 1/cm, pixel_nm: {VOXEL}}}\n")

    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    result = call("run", path, "--out", tmp_path / "out", "--recipe", recipe)
    assert result.exit_code == 0, result.stderr
    assert "14 energies, volumes (y, z, x) of 14 x 22 x 26 voxels, made elsewhere" in result.stdout
    assert "jitter 14/14 (given)" in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    again = call("run", path, "--out", tmp_path / "out")
    assert again.exit_code == 0, again.stderr
    bad = call("run", path, "--out", tmp_path / "other")
    assert bad.exit_code == 1
    assert len(bad.stderr.strip().splitlines()) == 1
    assert "given.pixel_nm" in bad.stderr
