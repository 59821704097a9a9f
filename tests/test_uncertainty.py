"""Standard errors of the maps against the scatter they are to describe."""

from dataclasses import replace

import numpy as np
import pytest

from napari_xanes_tomo.counts import own_beam
from napari_xanes_tomo.detector import Detector
from napari_xanes_tomo.map_plan import plan_maps
from napari_xanes_tomo.maps import Slab, halo_rows, map_slab
from napari_xanes_tomo.model import Alignment, ArrayFrames
from napari_xanes_tomo.recipe import MapsParameters
from napari_xanes_tomo.uncertainty import coarse_step, decimate, expected_variance, upsampler

from .test_maps import DEMO, SHAPE, SIX, THETA, VOXEL_NM, inside_ball, measured, plan, spectrum

QUANTA = 2000.0  # of the bare beam
GAIN = 0.5  # counts per quantum
READ = 3.0


def noisy(items, rng, quanta=QUANTA):
    """Give every frame the noise of a camera, and forty flats a set (their noise is the same at all angles)."""
    out = []
    for item in items:
        frames = item.scan.frames.data
        scale = GAIN * quanta / 1700.0
        counts = GAIN * rng.poisson(frames * scale / GAIN) + READ * rng.standard_normal(frames.shape)
        flats = tuple(
            replace(
                f,
                frames=ArrayFrames(
                    (
                        GAIN * rng.poisson(np.repeat(f.frames.data, 20, axis=0) * scale / GAIN)
                        + READ * rng.standard_normal((40, *SHAPE))
                    ).astype(np.float32)
                ),
                exposure_s=np.full(40, f.exposure_s[0]),
                status=("ok",) * 40,
            )
            for f in item.scan.flats
        )
        scan = replace(item.scan, frames=ArrayFrames(counts.astype(np.float32)), flats=flats)
        beam = replace(own_beam(scan), detector=Detector(GAIN, READ**2))
        out.append(replace(item, scan=scan, beam=beam))
    return out


# Absorbance of a pixel and its variance, for counts of sample and flat, shots.
@pytest.mark.parametrize(("sample", "beam", "shots"), [(900.0, 1000.0, 10), (120.0, 1000.0, 2), (3000.0, 4000.0, 1)])
def test_variance_of_the_absorbance(sample: float, beam: float, shots: int) -> None:
    rng = np.random.default_rng(5)
    n = 40000
    i = GAIN * rng.poisson(sample / GAIN, n) + READ * rng.standard_normal(n)
    f = np.mean(GAIN * rng.poisson(beam / GAIN, (shots, n)) + READ * rng.standard_normal((shots, n)), axis=0)
    measured_variance = float(np.var(np.log(f) - np.log(i)))
    camera = Detector(GAIN, READ**2)
    # Half a second of exposure, and stray light that was taken away before.
    rate, doubt = np.full((1, 1, 1), 2 * beam, np.float32), 4 * camera.variance(beam) / shots
    a = np.full((1, 1, 1), np.log(beam / sample), np.float32)
    found = expected_variance(a, np.full(1, 0.5), rate, np.full((1, 1, 1), doubt, np.float32), np.array([0.0]), camera)
    glare = expected_variance(a, np.full(1, 0.5), rate, np.full((1, 1, 1), doubt, np.float32), np.array([50.0]), camera)
    assert float(glare[0, 0, 0] - found[0, 0, 0]) == pytest.approx(GAIN * 50 / sample**2, rel=1e-3)
    assert float(found[0, 0, 0]) == pytest.approx(measured_variance, rel=0.04)


@pytest.mark.parametrize(("smoothing", "bin"), [(1.0, 1), (0.0, 1), (0.5, 2)])
def test_sigma_is_the_scatter_over_repeats(smoothing: float, bin: int) -> None:
    """rms over the ball of (scatter of 16 repeats / sigma); the mean sigma is right to a tenth."""
    energies = SIX
    items = measured(energies)
    p = MapsParameters(smoothing_voxel=smoothing, shape_smoothing=1.0)
    found = plan(energies)
    rng = np.random.default_rng(11)
    rows = SHAPE[0] // bin
    made = [
        map_slab(noisy(items, rng), found, Slab(0, rows, halo_rows(p)), VOXEL_NM * bin, p, bin=bin, threads=1)
        for _ in range(16)
    ]
    body = inside_ball()[1::2, 1::2, 1::2] if bin == 2 else inside_ball()
    for name in ("Mn", "Co", "Ni", "density"):
        scatter = np.std([m[name] for m in made], axis=0, ddof=1)[body]
        sigma = np.sqrt(np.mean([m[f"{name}_sigma"] ** 2 for m in made], axis=0))[body]
        assert float(np.sqrt(np.mean((scatter / sigma) ** 2))) == pytest.approx(1.0, abs=0.12), name
    if smoothing == 1.0:  # ratios of noisy voxels have tails without end
        for name in ("Mn_fraction", "Ni_fraction"):
            core = body & np.all([m["mask"] > 0.5 for m in made], axis=0)
            scatter = np.std([m[name][core] for m in made], axis=0, ddof=1)
            sigma = np.sqrt(np.mean([m[f"{name}_sigma"][core] ** 2 for m in made], axis=0))
            assert float(np.sqrt(np.mean((scatter / sigma) ** 2))) == pytest.approx(1.0, abs=0.2), name


def test_sigma_of_the_edge_energy() -> None:
    items = measured(DEMO, levels=spectrum(0.0, 0.9))
    p = MapsParameters()
    found = plan_maps(DEMO, spectrum(0.0, 0.9), np.ones(len(DEMO)), len(DEMO) - 1)
    rng = np.random.default_rng(2)
    made = [
        map_slab(noisy(items, rng, 3e5), found, Slab(8, 20, halo_rows(p)), VOXEL_NM, p, threads=1) for _ in range(12)
    ]
    body = inside_ball(radius=5.0)[8:20]
    for name in ("edge_energy_relative", "edge_jump"):
        scatter = np.std([m[name] for m in made], axis=0, ddof=1)[body]
        sigma = np.sqrt(np.mean([m[f"{name}_sigma"] ** 2 for m in made], axis=0))[body]
        assert float(np.sqrt(np.mean((scatter / sigma) ** 2))) == pytest.approx(1.0, abs=0.2), name


# An energy is moved (y, x, z px, or magnified), or every projection by itself: the maps change by their alignment part.
@pytest.mark.parametrize("what", ["y", "x", "z", "magnification", "jitter"])
def test_alignment_part_is_what_a_wrong_alignment_does(what: str) -> None:
    items = measured(SIX)
    p = MapsParameters()
    found = plan(SIX)
    size = 0.01 if what == "magnification" else 0.15
    slab = Slab(6, 20, halo_rows(p))
    whole = map_slab(items, found, slab, VOXEL_NM, p, threads=1)
    stated = []
    for item in items:
        place = {k: (size if k == what else 0.0) for k in ("y", "x", "z")}
        n = len(item.alignment.shift)
        sigma = np.full((n, 2), size if what == "jitter" else 0.0)
        stated.append(
            replace(
                item, alignment=replace(item.alignment, sigma=sigma), translation_sigma=tuple(place.values()),
                magnification_sigma=size if what == "magnification" else 0.0,
            )
        )  # fmt: skip
    told = map_slab(stated, found, slab, VOXEL_NM, p, threads=1)
    rng = np.random.default_rng(6)
    change = {n: [] for n in ("Mn", "Ni", "density")}
    for _ in range(16):
        wrong = []
        for item in items:
            d = size * rng.standard_normal()
            a: Alignment = item.alignment
            if what == "magnification":
                moved = replace(a, magnification=a.magnification * (1 + d))
            elif what == "jitter":
                moved = replace(a, shift=a.shift + size * rng.standard_normal(a.shift.shape))
            else:
                moved = a.gauge(THETA, *(d if k == what else 0.0 for k in ("y", "x", "z")))
            wrong.append(replace(item, alignment=moved))
        made = map_slab(wrong, found, slab, VOXEL_NM, p, threads=1)
        for n in change:
            change[n].append(made[n] - whole[n])
    near = inside_ball(radius=9.0)[6:20]
    for n, values in change.items():
        expected = np.sqrt(np.mean(told[f"{n}_sigma_alignment"][near] ** 2))
        # Ten draws for six energies: a common displacement is known to a fifth at best.
        assert np.sqrt(np.mean(np.square(values), axis=0)[near].mean()) == pytest.approx(expected, rel=0.35), n
        seen = told["coverage"] > 0
        assert np.all(told[f"{n}_sigma"][seen] >= 0.999 * told[f"{n}_sigma_alignment"][seen])


@pytest.mark.parametrize(("fine", "coarse"), [(256, 64), (40, 20), (41, 21), (7, 7)])
def test_the_coarse_grid_has_the_same_middle(fine: int, coarse: int) -> None:
    step = {256: 4, 40: 2, 41: 2, 7: 1}[fine]
    assert coarse_step(fine) == step
    line = np.arange(fine, dtype=float) - (fine - 1) / 2
    low = decimate(line[None].astype(np.float32), step, coarse)[0]
    back = upsampler(fine, coarse, step) @ low
    inner = slice(2 * step, -2 * step)
    np.testing.assert_allclose(back[inner], line[inner], atol=0.51)
    np.testing.assert_allclose(upsampler(fine, coarse, step).sum(axis=1), 1, rtol=1e-5)
