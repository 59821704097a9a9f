from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from napari_xanes_tomo import open_series
from napari_xanes_tomo.absorbance import Normalised, normalise
from napari_xanes_tomo.io.store import read_shifts, rows_alignments
from napari_xanes_tomo.joint import ranking
from napari_xanes_tomo.model import Alignment, Cancelled, EnergyScan, XanesTomoError
from napari_xanes_tomo.phantom import PRESETS
from napari_xanes_tomo.recipe import AbsorbanceParameters, RegistrationParameters
from napari_xanes_tomo.registration import (
    reference_energy,
    register,
)
from napari_xanes_tomo.resample import place
from napari_xanes_tomo.template import Template, make_template, match_angles, object_mass

SIX = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0)
THETA = np.arange(-90.0, 90.0, 6.0)
SHAPE = (52, 60)  # not square


# ------------------------------------------------------------------------------------------- reference and angles


@pytest.mark.parametrize(
    ("energies", "wanted", "expected"),
    [
        (SIX, None, 8570.0),
        (PRESETS["demo"].energies_ev, None, 8570.0),
        ((*SIX, 8400.0), None, 8570.0),
        (SIX[:4], None, 7728.0),  # nothing 150 eV above the last edge: the highest
        ((6534.0, 6558.0, 6600.0), None, 6600.0),
        ((8570.0, 6534.0, 6558.0), None, 8570.0),  # any order
        ((8000.0, 8100.0), None, 8100.0),  # no edge at all
        (SIX, 8178.0, 8178.0),
        (SIX, 8177.3, 8178.0),
    ],
)
def test_reference(energies: tuple[float, ...], wanted: float | None, expected: float) -> None:
    assert energies[reference_energy(energies, wanted)] == expected


@pytest.mark.parametrize("wanted", [8180.0, 1.0])
def test_a_reference_nobody_measured_is_refused(wanted: float) -> None:
    with pytest.raises(XanesTomoError, match=r"reference_ev.*the nearest"):
        reference_energy(SIX, wanted)


@given(
    st.lists(st.integers(-90, 89), min_size=1, max_size=60, unique=True),
    st.lists(st.integers(-90, 89), min_size=2, max_size=60, unique=True),
    st.floats(-0.2, 0.2),
)
def test_matched_angles_are_alike(mine: list[int], other: list[int], off: float) -> None:
    theta, template = np.array(mine, float) + off, np.array(other, float)
    a, b = match_angles(theta, template)
    assert len(a) == len(b)
    assert len(set(a.tolist())) == len(a)
    step = float(np.median(np.diff(np.sort(template))))
    nearest = np.abs(theta[:, None] - template[None, :]).min(axis=1)
    np.testing.assert_allclose(np.abs(theta[a] - template[b]), nearest[a], atol=1e-9)
    assert set(np.flatnonzero(nearest <= 0.3 * step).tolist()) == set(a.tolist())


def test_match_in_any_order() -> None:
    rng = np.random.default_rng(0)
    other = rng.permutation(THETA)
    a, b = match_angles(THETA, other)
    np.testing.assert_array_equal(a, np.arange(len(THETA)))
    np.testing.assert_array_equal(other[b], THETA)
    a, b = match_angles(THETA[5:20], THETA)
    np.testing.assert_array_equal(b, np.arange(5, 20))
    assert len(match_angles(THETA + 3.0, THETA)[0]) == 0


# ------------------------------------------------------------------------------------------- a known displacement

BALLS = (((-3.0, 4.0, -5.0), 9.0, 0.05), ((7.0, -6.0, 6.0), 5.0, 0.08), ((-8.0, -5.0, 8.0), 3.0, 0.1))


def balls(theta: npt.NDArray, a: Alignment, move=(0.0, 0.0, 0.0), contrast=(1.0, 1.0, 1.0), fine: int = 3):
    """Line integrals recorded at p = M R q + shift, the object moved by ``[ty, a, b]``, averaged over pixels."""
    t = np.deg2rad(theta)
    sub = (np.arange(fine) - (fine - 1) / 2) / fine
    y, x = ((np.arange(n)[:, None] + sub - (n - 1) / 2).ravel() for n in SHAPE)
    out = np.zeros((len(t), len(y), len(x)))
    for ((cy, cz, cx), radius, level), c in zip(BALLS, contrast, strict=True):
        u = (cx + move[1]) * np.cos(t) + (cz + move[2]) * np.sin(t)
        qy = (y[None, :] - a.shift[:, :1]) / a.magnification - cy - move[0]
        qx = (x[None, :] - a.shift[:, 1:]) / a.magnification - u[:, None]
        out += 2 * level * c * np.sqrt(np.maximum(radius**2 - qy[:, :, None] ** 2 - qx[:, None, :] ** 2, 0))
    return out.reshape(len(t), SHAPE[0], fine, SHAPE[1], fine).mean(axis=(2, 4)).astype(np.float32)


def motion(n: int, seed: int) -> npt.NDArray:
    return np.random.default_rng(seed).normal((0.3, 0.8), 1.0, (n, 2))


@pytest.fixture(scope="module")
def template() -> Template:
    a = Alignment(motion(len(THETA), 0), np.zeros((len(THETA), 2)))
    noise = 0.01 * np.random.default_rng(0).standard_normal((len(THETA), *SHAPE))
    return make_template((balls(THETA, a) + noise).astype(np.float32), THETA, a)


def test_template_is_the_object_without_motion_and_noise(template: Template) -> None:
    still = balls(THETA, Alignment.identity(len(THETA)))
    assert template.frames.shape == still.shape
    assert np.sqrt(np.mean((template.frames - still) ** 2)) < 0.02 * still.max()
    assert template.bin == 1
    assert template.frame_shape == SHAPE
    assert 0.03 < template.level < 0.1


# What the object and the microscope did; tolerance of M and of the translation in px. A few 1e-4 to 1e-3 in M are the
# bias of 30 angles and 60 px: the template is blurred once more than the frames.
@pytest.mark.parametrize(
    ("magnification", "move", "contrast", "tolerances"),
    [
        (1.0, (0.0, 0.0, 0.0), (1, 1, 1), (1.5e-3, 0.03)),
        (1.0, (2.0, -3.0, 4.0), (1, 1, 1), (1.5e-3, 0.03)),
        (1.1, (0.5, 0.0, 0.0), (1, 1, 1), (1.5e-3, 0.03)),
        (1.3, (-1.0, 2.0, 1.0), (1, 1, 1), (1.5e-3, 0.03)),
        (0.95, (0.0, 1.0, -1.0), (1, 1, 1), (1.5e-3, 0.03)),
        (1.3, (-1.0, 2.0, 1.0), (0.6, 0.6, 0.6), (2e-3, 0.03)),
        (1.3, (-1.0, 2.0, 1.0), (1.25, 1.25, 1.25), (2e-3, 0.03)),
        (1.3, (-1.0, 2.0, 1.0), (1.5, 1.5, 1.5), (2e-3, 0.03)),
        (1.3, (-1.0, 2.0, 1.0), (2, 2, 2), (2e-3, 0.03)),
        (1.1, (1.0, 1.0, -1.0), (1.5, 1.0, 1.2), (2e-3, 0.08)),  # contrast that changes from part to part
    ],
)
@pytest.mark.parametrize("law_error", [0.0, -0.015])
def test_scale_and_translation_are_found(
    template: Template,
    magnification: float,
    move: tuple[float, float, float],
    contrast: tuple[float, float, float],
    tolerances: tuple[float, float],
    law_error: float,
) -> None:
    n = len(THETA)
    jitter = motion(n, 1)
    recorded = balls(THETA, Alignment(jitter, np.zeros((n, 2)), magnification), move, contrast)
    recorded += 0.01 * np.random.default_rng(1).standard_normal(recorded.shape).astype(np.float32)
    # Jitter correction knows the shifts of this energy up to its own undetermined ones.
    own = Alignment(jitter, np.full((n, 2), 0.01))
    # These projections are absorbance as it is: no detector blurred their intensities.
    sharp = RegistrationParameters(blur_px=0)
    found = register(recorded, THETA, own, template, magnification=magnification * (1 + law_error), parameters=sharp)
    assert found.alignment.magnification == pytest.approx(magnification, rel=tolerances[0])
    np.testing.assert_allclose(found.translation, move, atol=tolerances[1])
    # q -> p of the alignment is that of the object: the point at q in the reference is seen at M (q + move) + jitter.
    true = Alignment(jitter, np.zeros((n, 2)), magnification).gauge(THETA, *move)
    np.testing.assert_allclose(found.alignment.shift, true.shift, atol=1.5 * magnification * tolerances[1])
    np.testing.assert_array_equal(found.alignment.sigma, own.sigma)
    assert found.alignment.status == ("ok",) * n
    assert found.correlation > 0.8
    assert 0 < found.magnification_sigma < 2e-3
    assert np.all((found.translation_sigma > 0) & (found.translation_sigma < 0.1))
    assert np.isfinite(found.residual).all()


@pytest.mark.parametrize("magnification", [1.0, 1.3])
def test_a_blur_of_the_recorded_intensities_does_not_change_the_scale(magnification: float) -> None:
    # The same blur in recorded pixels is a smaller one of the object where it is magnified: 4e-3 in M if overlooked.
    def blurred(a: Alignment) -> npt.NDArray:
        fine = 4
        a = replace(a, shift=fine * a.shift, magnification=fine * a.magnification)
        t = np.deg2rad(THETA)
        y, x = (np.arange(fine * n) - (fine * n - 1) / 2 for n in SHAPE)
        lines = np.zeros((len(t), len(y), len(x)))
        for (cy, cz, cx), radius, level in BALLS:
            qy = (y[None, :] - a.shift[:, :1]) / a.magnification - cy
            qx = (x[None, :] - a.shift[:, 1:]) / a.magnification - (cx * np.cos(t) + cz * np.sin(t))[:, None]
            lines += 3 * level * np.sqrt(np.maximum(radius**2 - qy[:, :, None] ** 2 - qx[:, None, :] ** 2, 0))
        seen = gaussian_filter(np.exp(-lines), (0, 0.75 * fine, 0.75 * fine), mode="nearest")
        seen = seen.reshape(len(t), SHAPE[0], fine, SHAPE[1], fine).mean(axis=(2, 4))
        return np.asarray(-np.log(seen), dtype=np.float32)

    n = len(THETA)
    still = Alignment(motion(n, 0), np.zeros((n, 2)))
    jitter = motion(n, 1)
    reference = make_template(blurred(still), THETA, still)
    recorded = blurred(Alignment(jitter, np.zeros((n, 2)), magnification))
    own = Alignment(jitter, np.full((n, 2), 0.01))
    found = register(recorded, THETA, own, reference, magnification=magnification)
    assert found.alignment.magnification == pytest.approx(magnification, rel=1e-3)


@pytest.mark.parametrize("roll", [0.0, 0.05, 0.3, -1.0])
def test_roll_is_found_and_applied(roll: float) -> None:
    n = len(THETA)
    still = balls(THETA, Alignment.identity(n))
    nothing = np.zeros((n, 2))
    recorded = place(still, Alignment(nothing, nothing, 1.0, -roll))  # placed with +roll it is still again
    reference = make_template(still, THETA, Alignment.identity(n))
    own = Alignment(nothing, np.full((n, 2), 0.01))
    sharp = RegistrationParameters(blur_px=0)
    found = register(recorded, THETA, own, reference, magnification=1.0, parameters=sharp)
    assert found.roll_deg == pytest.approx(roll, abs=0.02)
    assert found.alignment.roll_deg == (pytest.approx(roll, abs=0.02) if roll else 0.0)
    np.testing.assert_allclose(found.translation, 0, atol=0.02)


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_an_offset_of_the_angles_is_found(angle: float) -> None:
    theta = np.arange(-90.0, 90.0, 2.0)
    n = len(theta)
    still = Alignment.identity(n)
    own = Alignment(np.zeros((n, 2)), np.full((n, 2), 0.01))
    reference = make_template(balls(theta, still), theta, still)
    sharp = RegistrationParameters(blur_px=0)
    found = register(balls(theta + angle, still), theta, own, reference, magnification=1.0, parameters=sharp)
    assert found.angle_deg == pytest.approx(angle, abs=0.05)
    assert found.quality.verdict == ("check" if angle else "good")


def test_displaced_projections_show_in_the_residual(template: Template) -> None:
    n = len(THETA)
    jitter = motion(n, 1)
    recorded = balls(THETA, Alignment(jitter, np.zeros((n, 2)), 1.1))
    wrong = jitter.copy()
    wrong[11] += (0.6, -0.8)  # the alignment, not the object: the content lies at the other side of where it is sought
    own = Alignment(wrong, np.full((n, 2), 0.01))
    sharp = RegistrationParameters(blur_px=0)
    found = register(recorded, THETA, own, template, magnification=1.1, parameters=sharp)
    np.testing.assert_allclose(found.residual_shift[11], (-0.6, 0.8), atol=0.15)
    assert ranking([found.residual_shift], [found.residual_sigma])[0][:2] == (0, 11)


def test_a_second_template_gives_the_same_place(template: Template) -> None:
    n = len(THETA)
    jitter = motion(n, 4)
    other = make_template(balls(THETA, Alignment.identity(n)), THETA, Alignment.identity(n))
    recorded = balls(THETA, Alignment(jitter, np.zeros((n, 2)), 1.05), (0.5, 1.0, -1.0))
    sharp = RegistrationParameters(blur_px=0)
    own = Alignment(jitter, np.full((n, 2), 0.01))
    found = register(recorded, THETA, own, template, magnification=1.05, second=other, parameters=sharp)
    assert found.second is not None
    assert found.second_sigma is not None
    np.testing.assert_allclose(found.second[2:5], found.place[2:5], atol=0.05)
    assert found.second[0] == pytest.approx(found.place[0], abs=2e-3)
    # What is kept of it is all that is compared.
    kept = other.second(*template.band(sharp))
    again = register(recorded, THETA, own, template, magnification=1.05, second=kept, parameters=sharp)
    np.testing.assert_array_equal(again.second, found.second)
    assert kept.frames.nbytes + kept.depth.nbytes + kept.volume.nbytes == 0


def noisy(seed: int, noise: float, growth: float, a: Alignment, theta: npt.NDArray = THETA) -> npt.NDArray:
    clean = balls(theta, a)
    drawn = np.random.default_rng(seed).standard_normal(clean.shape)
    return (clean + noise * np.exp(growth * clean) * drawn).astype(np.float32)


@pytest.mark.parametrize(("noise", "growth"), [(0.06, 0.5), (0.05, 0.9), (0.05, 0.0)])
def test_noise_of_a_template_and_how_it_grows(noise: float, growth: float) -> None:
    theta = np.arange(-90.0, 90.0, 2.0)
    still = Alignment.identity(len(theta))
    found = make_template(noisy(3, noise, growth, still, theta), theta, still)
    for absorbance in (0.3, 0.8):
        law = found.noise * np.exp(found.noise_growth * absorbance)
        assert law == pytest.approx(noise * np.exp(growth * absorbance), rel=0.1)
    # Noise of a simulated template is as large as what noise does to a real one.
    clean = make_template(balls(theta, still), theta, still)
    there = clean.frames > 0.3
    assert found.noise_frames()[there].std() == pytest.approx((found.frames - clean.frames)[there].std(), rel=0.1)


def test_without_noise_there_is_none() -> None:
    still = Alignment.identity(len(THETA))
    clean = make_template(balls(THETA, still), THETA, still)
    assert clean.noise == 0
    p = RegistrationParameters()
    unit = SHAPE[1] / 256
    assert clean.band(p) == (p.fine_px * unit, p.coarse_px * unit)


def test_much_noise_widens_the_band_and_does_not_move_the_scale() -> None:
    theta = np.arange(-90.0, 90.0, 3.0)
    still, larger = Alignment.identity(len(theta)), replace(Alignment.identity(len(theta)), magnification=1.05)
    p = RegistrationParameters(blur_px=0)
    found = []
    for seed in range(4):
        reference = make_template(noisy(2 * seed, 0.1, 0.6, still, theta), theta, still)
        assert reference.band(p)[0] > p.fine_px * SHAPE[1] / 256
        r = register(
            noisy(2 * seed + 1, 0.1, 0.6, larger, theta), theta, still, reference, magnification=1.05, parameters=p
        )
        found.append([r.alignment.magnification / 1.05 - 1, r.magnification_sigma])
    error, sigma = np.array(found).T
    assert abs(error.mean()) < 3 * np.sqrt(np.mean(sigma**2) / len(error))


def test_blocks_of_a_rigid_object_stay_where_they_are(template: Template) -> None:
    n = len(THETA)
    jitter = motion(n, 4)
    own = Alignment(jitter, np.full((n, 2), 0.01))
    sharp = RegistrationParameters(blur_px=0)
    still = register(balls(THETA, own), THETA, own, template, magnification=1.0, parameters=sharp)
    seen = np.isfinite(still.block_shift)
    assert seen.any()
    assert np.sqrt(np.mean(still.block_shift[seen] ** 2)) < 0.1
    # An object that was squeezed along the axis is no rigid one.
    squeezed = balls(THETA, own)
    h = SHAPE[0]
    y = np.arange(h) - (h - 1) / 2
    for i in range(n):
        for x in range(SHAPE[1]):
            squeezed[i, :, x] = np.interp(y * 1.06, y, squeezed[i, :, x])
    bent = register(squeezed, THETA, own, template, magnification=1.0, parameters=sharp)
    moved = bent.block_shift[np.isfinite(bent.block_shift)]
    assert np.sqrt(np.mean(moved**2)) > 2 * np.sqrt(np.mean(still.block_shift[seen] ** 2))


def test_mass_follows_the_attenuation(template: Template) -> None:
    n = len(THETA)
    masses = []
    for factor in (1.0, 1.7):
        a = Alignment(motion(n, 2), np.zeros((n, 2)), 1.05)
        masses.append(object_mass(balls(THETA, a, contrast=(factor,) * 3), THETA, a, template))
    assert masses[1] / masses[0] == pytest.approx(1.7, rel=1e-4)
    # ... and not the magnification: a thicker image is a wider one.
    same = Alignment(motion(n, 2), np.zeros((n, 2)))
    assert object_mass(balls(THETA, same), THETA, same, template) == pytest.approx(masses[0], rel=0.02)


def test_other_angles_and_gaps(template: Template) -> None:
    theta = np.delete(THETA, [2, 3, 17])[::-1].copy()
    theta[4] += 2.5  # matches nothing
    n = len(theta)
    jitter = motion(n, 3)
    recorded = balls(theta, Alignment(jitter, np.zeros((n, 2)), 1.1), (1.0, 0.5, -0.5))
    found = register(recorded, theta, Alignment(jitter, np.zeros((n, 2))), template, magnification=1.1)
    np.testing.assert_allclose(found.translation, (1.0, 0.5, -0.5), atol=0.05)
    assert np.isnan(found.residual[4])
    assert np.isfinite(np.delete(found.residual, 4)).all()
    assert np.isfinite(found.alignment.shift).all()
    assert len(found.alignment.shift) == n


def test_binned_stacks_give_raw_pixels() -> None:
    # Estimated on frames binned by 2, everything comes out in the pixels of the frames that were recorded.
    n = len(THETA)
    first = Alignment(motion(n, 0), np.zeros((n, 2)))
    coarse = make_template(halved(balls(THETA, first)), THETA, first, bin=2)
    assert coarse.frame_shape == SHAPE
    jitter = motion(n, 1)
    recorded = balls(THETA, Alignment(jitter, np.zeros((n, 2)), 1.1), (1.0, -1.5, 2.0))
    found = register(halved(recorded), THETA, Alignment(jitter, np.zeros((n, 2))), coarse, magnification=1.1)
    np.testing.assert_allclose(found.translation, (1.0, -1.5, 2.0), atol=0.1)
    assert found.alignment.magnification == pytest.approx(1.1, rel=4e-3)


def halved(frames: npt.NDArray) -> npt.NDArray[np.float32]:
    n, h, w = frames.shape
    return frames.reshape(n, h // 2, 2, w // 2, 2).mean(axis=(2, 4)).astype(np.float32)


@pytest.mark.parametrize(("magnification", "move"), [(1.0, (0.0, 0.0, 0.0)), (1.1, (1.0, -1.5, 2.0))])
def test_frames_of_another_binning(template: Template, magnification: float, move: tuple[float, float, float]) -> None:
    # p = M q + shift in the pixels as they were recorded, twice as wide as those of the reference.
    n = len(THETA)
    jitter = motion(n, 1)
    recorded = halved(balls(THETA, Alignment(jitter, np.zeros((n, 2)), magnification), move))
    own = Alignment(jitter / 2, np.full((n, 2), 0.01))
    found = register(
        recorded, THETA, own, template, magnification=0.49 * magnification, bin=1, frame_shape=(26, 30), pixel=2.0,
        parameters=RegistrationParameters(blur_px=0),
    )  # fmt: skip
    assert found.alignment.magnification == pytest.approx(magnification / 2, rel=6e-3)  # of 26 x 30 pixels
    np.testing.assert_allclose(found.translation, move, atol=0.06)
    true = Alignment(jitter / 2, np.zeros((n, 2)), magnification / 2).gauge(THETA, *move)
    np.testing.assert_allclose(found.alignment.shift, true.shift, atol=0.05)
    second = make_template(recorded, THETA, found.alignment, bin=1, frame_shape=(26, 30), like=template)
    assert (second.grid_shape, second.bin, second.frame_shape) == (template.grid_shape, 1, SHAPE)
    assert np.corrcoef(second.frames.ravel(), template.frames.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("centre", [(0.0, 0.0), (4.0, -6.0), (-3.0, 5.0)])
def test_another_centre_of_the_field_changes_neither_scale_nor_place(
    template: Template, centre: tuple[float, float]
) -> None:
    n = len(THETA)
    here, there = motion(n, 1), motion(n, 1) + centre
    result = []
    for shift in (here, there):
        a = Alignment(shift, np.full((n, 2), 0.01))
        recorded = balls(THETA, Alignment(shift, np.zeros((n, 2)), 0.95))
        result.append(register(recorded, THETA, a, template, magnification=0.95))
    still, moved = result
    assert moved.alignment.magnification == pytest.approx(still.alignment.magnification, rel=1e-4)
    np.testing.assert_allclose(moved.translation, still.translation, atol=0.005)


def test_too_few_angles_in_common(template: Template) -> None:
    theta = THETA[:7]
    a = Alignment.identity(7)
    with pytest.raises(XanesTomoError, match=r"8344 eV: expected at least 8 angles in common.*got 7"):
        register(balls(theta, a), theta, a, template, magnification=1.0, what="8344 eV")


def test_another_object_is_refused_or_judged_badly(template: Template) -> None:
    n = len(THETA)
    noise = 0.3 * np.random.default_rng(0).standard_normal((n, *SHAPE)).astype(np.float32)
    try:
        found = register(noise, THETA, Alignment.identity(n), template, magnification=1.0, what="8344 eV")
    except XanesTomoError:
        return
    assert found.quality.verdict == "check"


def test_cancel(template: Template) -> None:
    n = len(THETA)
    a = Alignment.identity(n)

    def stop(what: str, done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        register(balls(THETA, a), THETA, a, template, magnification=1.0, progress=stop)


def test_the_same_twice(template: Template) -> None:
    n = len(THETA)
    a = Alignment(motion(n, 1), np.zeros((n, 2)))
    recorded = balls(THETA, replace(a, magnification=1.1), (1.0, 0.0, 0.0))
    one, other = (register(recorded, THETA, a, template, magnification=1.1) for _ in range(2))
    np.testing.assert_array_equal(one.alignment.shift, other.alignment.shift)
    assert one.alignment.magnification == other.alignment.magnification
    assert one.mass == other.mass


# -------------------------------------------------------------------------------------------------- the tiny twin


@pytest.fixture(scope="module")
def twin(tiny_twin: Path) -> dict[float, tuple[EnergyScan, Normalised, Alignment]]:
    truth = {e: a for e, _, a in rows_alignments(read_shifts(tiny_twin / "truth" / "tables" / "shifts.csv"))}
    return {
        s.energy_ev: (s, normalise(s, AbsorbanceParameters()), truth[s.energy_ev])
        for s in open_series(tiny_twin).scans
        if s.energy_ev in (6534.0, 7704.0, 8351.0, 8570.0)
    }


# M is biased at 64 px, because the detector blurs the intensity and not the absorbance; the more so the more the
# absorption differs from the reference's. Tolerance of M, of the translation in px of the common grid.
@pytest.mark.parametrize(
    ("energy", "tolerance_m", "tolerance_t"), [(6534.0, 8e-3, 0.06), (7704.0, 8e-3, 0.06), (8351.0, 3e-3, 0.06)]
)
def test_registration_of_the_twin(
    twin: dict[float, tuple[EnergyScan, Normalised, Alignment]], energy: float, tolerance_m: float, tolerance_t: float
) -> None:
    reference, ref_data, ref_true = twin[8570.0]
    template = make_template(ref_data.data, reference.theta_deg, replace(ref_true, magnification=1.0))
    scan, data, true = twin[energy]
    # The true jitter, moved by an undetermined shift that registration has to find.
    own = replace(true, magnification=1.0).gauge(scan.theta_deg, -0.8, 0.6, 1.1)
    guess = reference.pixel_size_nm / scan.pixel_size_nm
    assert abs(guess / true.magnification - 1) < 2e-3  # the law is close, with scatter
    found = register(data.data, scan.theta_deg, own, template, magnification=guess)
    assert found.alignment.magnification == pytest.approx(true.magnification, rel=tolerance_m)
    d = (found.alignment.shift - true.shift) / true.magnification
    t = np.deg2rad(scan.theta_deg)
    basis = np.stack([np.cos(t), np.sin(t)], axis=1)
    orbit = np.linalg.lstsq(basis, d[:, 1], rcond=None)[0]
    assert abs(d[:, 0].mean()) < tolerance_t
    assert np.abs(orbit).max() < tolerance_t
    # The rotation centre is the jitter's own: registration must not move it.
    np.testing.assert_allclose(d[:, 1] - basis @ orbit, 0, atol=1e-6)
    assert found.quality.verdict == "good"
