"""An energy whose frames have other pixels than the others': told apart, registered, mapped; or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo import Recipe, open_series, open_stack, read_maps
from napari_xanes_tomo._napari.layers import AlignedStack
from napari_xanes_tomo.findings import scale_laws
from napari_xanes_tomo.io.stack import FrameStack
from napari_xanes_tomo.io.store import read_energies, read_shifts, rows_alignments
from napari_xanes_tomo.model import ArrayFrames, EnergyScan, Series
from napari_xanes_tomo.phantom import TwinParameters, write_twin
from napari_xanes_tomo.pixels import pixel_width, pixel_widths, seen_as, with_known_pixels
from napari_xanes_tomo.steps import Confinement
from napari_xanes_tomo.workflow import Workflow

ENERGIES = (8178.0, 8400.0, 8570.0)
SMALL = TwinParameters(n=64, n_angles=36, energies_ev=ENERGIES, flats_per_set=4, jitter_px=(2.0, 4.0), grains=80)
NAN = float("nan")


def scan(
    energy_ev: float, shape: tuple[int, int], binning: int = 2, size: float = 30.0, header: float = NAN, given: str = ""
) -> EnergyScan:
    n = 3
    return EnergyScan(
        energy_ev, np.arange(n, dtype=float), ArrayFrames(np.zeros((n, *shape), np.uint16)), np.ones(n), ("ok",) * n,
        (), np.zeros(n, dtype=np.int64), binning, size, np.full(n, NAN), header_pixel_size_nm=header, given=given,
    )  # fmt: skip


USUAL = (scan(8178.0, (64, 96), size=30.0, header=23.0), scan(8570.0, (64, 96), size=31.0, header=23.0))


@pytest.mark.parametrize(
    ("odd", "width", "size"),
    [
        (scan(7704.0, (32, 48), 4, 56.0, 23.0), 2.0, 56.0),
        (scan(7704.0, (21, 32), 6, 84.0, 23.0), 3.0, 84.0),
        (scan(7704.0, (128, 192), 1, 14.0, 23.0), 0.5, 14.0),
        # The binning is not told: the files' own pixel size tells it, and is the size where there is no law.
        (scan(7704.0, (32, 48), 2, 28.0, 46.0), 2.0, 56.0),
        (scan(7704.0, (32, 48), 2, 43.0, 43.0), 2.0, 43.0),
        (scan(7704.0, (256, 384), 2, 28.0, 5.9), 0.25, 7.0),
    ],
)
def test_how_wide_a_pixel_is(odd: EnergyScan, width: float, size: float) -> None:
    found = with_known_pixels(Series("s", (odd, *USUAL)))
    assert [pixel_width(s, found.scans[1]) for s in found.scans] == [width, 1.0, 1.0]
    assert found.scans[0].pixel_size_nm == pytest.approx(size)
    assert [s.pixel_size_nm for s in found.scans[1:]] == [30.0, 31.0]
    assert [p.code for p in found.problems] == ["other-binning"]
    assert found.frame_shape == (64, 96)
    assert with_known_pixels(found) == found
    # The change of the optics alone: the binning is taken out of the laws.
    expected = 31.0 * width / size
    assert scale_laws(found, 2)["calibration"][0] == pytest.approx(expected)
    assert scale_laws(found, 2)["header"][0] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (scan(7704.0, (32, 96), 4), "not the same field"),
        (scan(7704.0, (40, 60), 3), "not the same field"),
        (scan(7704.0, (32, 48), 2), "cannot be told"),
        (scan(7704.0, (32, 48), 2, header=23.0), "cannot be told"),
        (scan(7704.0, (32, 48), 1), "cannot be told"),
        (scan(7704.0, (32, 48), 4, given="projections"), "one pixel size"),
    ],
)
def test_what_cannot_be_told_is_left_out_alone(odd: EnergyScan, why: str) -> None:
    found = with_known_pixels(Series("s", (odd, *USUAL)))
    assert not found.scans[0].usable.any()
    assert why in found.scans[0].status[0]
    assert found.scans[1:] == USUAL
    assert [(p.severity, p.energy_ev) for p in found.problems] == [("error", 7704.0)]
    assert with_known_pixels(found) == found


def test_images_of_another_size_are_left_out() -> None:
    found = with_known_pixels(Series("s", (scan(7704.0, (32, 48), 4), *USUAL)), images=True)
    assert [s.usable.any() for s in found.scans] == [False, True, True]


def test_frames_in_other_pixels() -> None:
    a = np.arange(24, dtype=float).reshape(4, 6)
    coarse = seen_as(a, (2, 3), 2.0)
    np.testing.assert_allclose(coarse, a.reshape(2, 2, 3, 2).mean(axis=(1, 3)))
    np.testing.assert_allclose(seen_as(coarse, (4, 6), 0.5)[::2, ::2], coarse)
    marked = np.zeros((4, 6), dtype=bool)
    marked[1, 4] = True
    assert np.argwhere(seen_as(marked, (2, 3), 2.0)).tolist() == [[0, 2]]
    assert seen_as(marked, (8, 12), 0.5).sum() == 4
    assert seen_as(marked, (4, 6), 1.0) is marked
    assert seen_as(marked, (2, 4), 1.0).shape == (2, 4)


def test_frames_and_boxes_of_another_binning() -> None:
    shape = (16, 16)
    content = np.zeros((3, *shape), dtype=np.uint16)
    content[:, 4:8, 8:12] = 1000
    coarse = ArrayFrames(seen_as(content[0], (8, 8), 2.0)[None].repeat(3, 0))
    odd = replace(scan(8178.0, (8, 8), 4, 60.0), frames=coarse)
    usual = (replace(scan(e, shape, 2, 30.0), frames=ArrayFrames(content)) for e in (8400.0, 8570.0))
    series = Series("s", (odd, *usual))
    stack = FrameStack(series)
    assert stack.shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(stack.read(0, 1), content[0])
    # A box about the middle is about the middle of frames half as large, too.
    box = Confinement(((4, 12, 6, 12),), 0.5, shape)
    assert box.reached((8, 8), 0.0) == [(2.0, 6.0, 3.0, 6.0)]
    assert Confinement(((4, 12, 6, 12),), 1.0, shape).reached(shape, 0.0) == [(4.0, 12.0, 6.0, 12.0)]


def errors(twin: Path, out: Path) -> dict[float, tuple[float, float, float]]:
    """Rms registration error y, x in px of the reference and error of M, by the energy; gauge of all taken out."""
    truth = {e: a for e, _, a in rows_alignments(read_shifts(twin / "truth" / "tables" / "shifts.csv"))}
    found = rows_alignments(read_shifts(out / "tables" / "shifts.csv"))
    off = [(a.shift - truth[e].shift) / truth[e].magnification for e, _, a in found]
    theta = np.deg2rad(found[0][1])
    basis = np.tile(np.stack([np.cos(theta), np.sin(theta)], axis=1), (len(found), 1))
    y, x = (np.concatenate([d[:, k] for d in off]) for k in (0, 1))
    y, x = y - y.mean(), x - basis @ np.linalg.lstsq(basis, x, rcond=None)[0]
    n = len(theta)
    return {
        e: (*(float(np.sqrt(np.mean(v[k * n : (k + 1) * n] ** 2))) for v in (y, x)),
            a.magnification / truth[e].magnification - 1)
        for k, (e, _, a) in enumerate(found)
    }  # fmt: skip


@pytest.mark.parametrize("width", [2.0, 0.5])
def test_registered_and_mapped_like_the_others(width: float, tmp_path: Path) -> None:
    coarse = width > 1
    p = replace(SMALL, other_binning=width, other_binning_ev=8400.0)
    twin, out = write_twin(tmp_path / "twin", parameters=p), tmp_path / "out"
    series = open_series(twin)
    odd, last = len(series.scans) - 2, len(series.scans) - 1
    widths = np.where(series.energies_ev == 8400.0, width, 1.0)
    assert pixel_widths(series, last).tolist() == widths.tolist()
    stack = open_stack(series)
    assert stack.shape == (len(series.scans), 36, 64, 64)
    own = np.asarray(series.scans[odd].frames.read(3))
    assert np.asarray(stack[odd, 3]).mean() == pytest.approx(own.mean(), rel=1e-3)
    quick = open_series(twin, verify=False)
    assert [s.frames.frame_shape for s in quick.scans] == [s.frames.frame_shape for s in series.scans]
    recipe = Recipe.model_validate({"maps": {"half_sets": False, "voxel_px": 1}})
    with Workflow(series, out, recipe) as w:
        w.run(until="maps" if coarse else "registration")
        assert w.state.reference == last
        m = w.registered(odd).numbers["magnification"]
        air = {e: w.result(w.candidates("flats", e)[-1]).arrays["air"] for e in (odd, last)}
        read = AlignedStack(FrameStack(series)).reader({e: (w.alignment(e), a) for e, a in air.items()}, grid=last)
        assert np.corrcoef(read(odd, 5).ravel(), read(last, 5).ravel())[0, 1] > 0.99
        report, law = w.scale_report(), scale_laws(w.series, last)["calibration"]
        assert not [w for words in w.registration_flags().values() for w in words if "label" in w or "sample" in w]
    assert report is not None
    assert m * width == pytest.approx(law[odd], rel=2e-3)
    assert law[odd] == pytest.approx(8570 / 8400, rel=0.01)
    for energy, (y, x, scale) in errors(twin, out).items():
        assert max(y, x) < 0.03, energy
        # What another contrast does to the rim of so small a particle is more than the energies of one contrast err by.
        assert abs(scale) < (1e-3 if energy >= 8400 else 3e-3), energy
    rows = {r.energy_ev: r for r in read_energies(out / "tables" / "energies.csv")}
    assert rows[8400.0].pixel_size_nm == pytest.approx(width / law[odd] * rows[8570.0].pixel_size_nm, rel=1e-6)
    if coarse:
        maps, true = read_maps(out / "maps.ome.zarr"), read_maps(twin / "truth" / "maps.ome.zarr")
        found, wanted = (np.asarray(m.data["Ni"]) for m in (maps, true))
        body = wanted > 0.6 * np.percentile(wanted[wanted > 0], 75)
        assert found.shape == wanted.shape
        assert float(found[body].mean() / wanted[body].mean()) == pytest.approx(1.0, abs=0.1)
