"""What a twin is made of, and the presets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from napari_xanes_tomo.model import XanesTomoError

__all__ = ["BAD_KINDS", "PRESETS", "TwinParameters", "recorded", "twin_parameters"]

SIX_EV = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0)
_EDGE_SCAN_EV = (8336.0, 8340.0, 8343.0, 8346.0, 8349.0, 8354.0, 8365.0)
BAD_KINDS = ("beam loss", "black", "saturated", "duplicate", "displaced", "motion-blurred", "flat")


@dataclass(frozen=True)
class TwinParameters:
    """What a twin is made of. Lengths in parts of the field of view at the reference energy, or px of a 256 px frame.

    Attributes
    ----------
    n, n_angles, energies_ev, seed
        Frames of n x n pixels, projections over half a turn, energies (eV); another particle, motion and noise.
    grains, width, composition, gradient, grain_scatter, valence_range_ev, valence_composition_coupling
        The particle. ``gradient=0, grain_scatter=0`` makes the composition uniform; a coupling of +-1 ties the
        valence to the nickel share.
    white_line_mn, white_line_co
        Height of the absorption just above these edges relative to the tables, from the edge to 60 eV above it.
    quanta, counts_per_quantum, read_noise_counts, psf_px, illumination_drift, flats_per_set
        Beam and camera; `quanta` per pixel of a flat.
    stray_counts, stray_fraction
        Light that did not come straight: a constant, and a part of the frame's own mean, everywhere.
    dark_band
        Part of the rows, at the bottom, that the beam does not reach.
    focus_blur_px
        Every energy's point spread is widened by up to this, in quadrature.
    magnification_scatter, magnification_linear, magnification_quadratic
        Departures from the pixel-size law: random, relative per keV and per keV^2 from the reference energy.
    refocus_jump, refocus_ev
        A relative jump of the magnification at one energy; 0 draws the energy.
    shrinkage
        Relative shrinkage of the object from the first energy to the last; its mass stays.
    angle_offset_deg, angle_offset_ev
        True minus recorded angle at one energy; 0 draws the energy.
    other_binning, other_binning_ev
        Width of a recorded pixel at one energy, in pixels of the others (2 or 0.5, say); 1 is off. The same field.
    angle_step_error, half_angle_offset_deg
        Relative error of the angular step, and what is added to the angles of the second half, at every energy.
    jitter_px, jitter_peak_px
        Range of the rms of the motion, and its largest value, px of a 256 px frame.
    slip_px, slip_from, slip_energies_ev
        An offset in a random direction from this projection on, px of a 256 px frame; no energies named: at all.
    post
        Width of a titanium post at its tip, below the particle; it leaves the field at the bottom.
    capillary_radius, capillary_wall, capillary_offset
        A glass capillary (outer radius, thickness of the wall, distance of its axis from the rotation axis).
    neighbours
        Oxide particles beside the particle; some of them rotate into the field and out of it.
    bad_fraction, bad_kinds
        Part of the projections of every energy that went wrong, and how; see `BAD_KINDS`.
    """

    n: int = 256
    n_angles: int = 180
    energies_ev: tuple[float, ...] = tuple(sorted((*SIX_EV, 8298.0, 8328.0, *_EDGE_SCAN_EV, 8400.0)))
    seed: int = 0
    grains: int = 200
    width: float = 0.6
    composition: tuple[float, float, float] = (0.3, 0.2, 0.5)  # atomic fractions of Mn, Co, Ni
    gradient: float = 0.10  # relative change of an element's share from the middle to the surface
    grain_scatter: float = 0.15  # standard deviation of an element's share from grain to grain, relative
    valence_range_ev: float = 2.0
    valence_composition_coupling: float = 0.0
    quanta: float = 9000.0  # per pixel of a flat
    counts_per_quantum: float = 0.137  # measured on real frames: variance = 14 + 0.137 * counts
    read_noise_counts: float = 3.7
    psf_px: float = 0.6
    illumination_drift: float = 0.035
    magnification_scatter: float = 3e-4
    jitter_px: tuple[float, float] = (2.0, 6.0)  # range of the rms, px of a 256 px frame
    jitter_peak_px: float = 20.0
    flats_per_set: int = 10
    # What follows is off unless asked for, and then recorded beside the truth.
    white_line_mn: float = 1.0
    white_line_co: float = 1.0
    stray_counts: float = 0.0
    stray_fraction: float = 0.0
    dark_band: float = 0.0
    focus_blur_px: float = 0.0
    magnification_linear: float = 0.0
    magnification_quadratic: float = 0.0
    refocus_jump: float = 0.0
    refocus_ev: float = 0.0
    shrinkage: float = 0.0
    angle_offset_deg: float = 0.0
    angle_offset_ev: float = 0.0
    other_binning: float = 1.0
    other_binning_ev: float = 0.0
    angle_step_error: float = 0.0
    half_angle_offset_deg: float = 0.0
    slip_px: float = 0.0
    slip_from: int = 0
    slip_energies_ev: tuple[float, ...] = ()
    post: float = 0.0
    capillary_radius: float = 0.0
    capillary_wall: float = 0.08
    capillary_offset: float = 0.0
    neighbours: int = 0
    bad_fraction: float = 0.0
    bad_kinds: tuple[str, ...] = BAD_KINDS

    @property
    def binning(self) -> int:
        """Camera binning that shows the same field in n columns (2 for 1024)."""
        return 2048 // self.n

    def pixel(self, energy: int) -> float:
        """Width of a recorded pixel of an energy, in those of the reference energy's size."""
        return self.other_binning if self.energies_ev[energy] == self.other_binning_ev else 1.0

    def binning_of(self, energy: int) -> int:
        """Camera binning of an energy."""
        return round(self.binning * self.pixel(energy))


_DEMO = TwinParameters()
PRESETS: dict[str, TwinParameters] = {
    "demo": _DEMO,
    "tiny": TwinParameters(n=64, n_angles=36, energies_ev=tuple(sorted((*SIX_EV, 8344.0, 8351.0)))),
    # Glass beside the particle whose edge crosses the field, what a real camera adds, a particle that shrinks.
    "demo-real": replace(
        _DEMO,
        capillary_radius=1.2,
        capillary_wall=0.08,
        capillary_offset=0.85,
        dark_band=19 / 1024,
        stray_counts=10.0,
        stray_fraction=0.018,
        focus_blur_px=0.6,
        shrinkage=1e-3,
    ),
    "hard": replace(
        _DEMO,
        energies_ev=(6534.0, 7728.0, 8346.0, 8570.0),
        quanta=1500.0,
        jitter_px=(30.0, 30.0),
        jitter_peak_px=30.0,
        post=0.12,
        slip_px=25.0,
        slip_from=135,
        bad_fraction=0.04,
    ),
}
_ALWAYS_RECORDED = 20  # the fields up to `flats_per_set`; the others only where they are not at their default


def recorded(p: TwinParameters) -> dict[str, Any]:
    """Return what identifies a twin, as plain JSON types."""
    defaults = asdict(TwinParameters())
    return {
        name: list(value) if isinstance(value, tuple) else value
        for i, (name, value) in enumerate(asdict(p).items())
        if i < _ALWAYS_RECORDED or value != defaults[name]
    }


def twin_parameters(preset: str = "demo", options: Mapping[str, Any] | None = None) -> TwinParameters:
    """Return a preset with some of its parameters changed.

    Parameters
    ----------
    preset : str
        A key of `PRESETS`.
    options : mapping
        ``{name of a parameter: value}``; see `TwinParameters`.

    Raises
    ------
    XanesTomoError
        The preset, a name or a value is not one there can be.
    """
    if preset not in PRESETS:
        raise XanesTomoError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    given = dict(options or {})
    known = {f.name: getattr(PRESETS["demo"], f.name) for f in fields(TwinParameters)}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise XanesTomoError(f"option {name}: there is no such parameter of a twin; did you mean {near[0]}?")
        given[name] = _like(name, value, known[name])
    p = replace(PRESETS[preset], **given)
    _check(p)
    return p


def _like(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`."""

    def number(v: Any) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool)

    if isinstance(default, tuple):
        items = value if isinstance(value, list | tuple) else (value,)
        text = bool(default) and isinstance(default[0], str)
        sized = name in ("energies_ev", "slip_energies_ev", "bad_kinds") or len(items) == len(default)
        if sized and all(isinstance(v, str) if text else number(v) for v in items):
            return tuple(items) if text else tuple(float(v) for v in items)
        raise XanesTomoError(
            f"option {name}: expected {'words' if text else 'numbers'} like {default or (8570.0,)}, got {value!r}"
        )
    if not number(value) or (isinstance(default, int) and value != int(value)):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise XanesTomoError(f"option {name}: expected {kind}, got {value!r}")
    return int(value) if isinstance(default, int) else float(value)


def _check(p: TwinParameters) -> None:
    wrong = [
        (not 16 <= p.n <= 2048, f"n: expected 16 to 2048 pixels, got {p.n}"),
        (p.n_angles < 8, f"n_angles: expected at least 8, got {p.n_angles}"),
        (not p.energies_ev, "energies_ev: expected at least one energy, got none"),
        (list(p.energies_ev) != sorted(set(p.energies_ev)), "energies_ev: expected ascending energies, each once"),
        (p.flats_per_set < 1, f"flats_per_set: expected at least 1, got {p.flats_per_set}"),
        (min(p.composition) < 0, "composition: expected the shares of Mn, Co and Ni"),
        (not 0 <= p.bad_fraction <= 0.5, f"bad_fraction: expected 0 to 0.5, got {p.bad_fraction:g}"),
        (not 0 <= p.dark_band < 0.5, f"dark_band: expected 0 to 0.5, got {p.dark_band:g}"),
        (p.quanta <= 0, f"quanta: expected a positive number, got {p.quanta:g}"),
        (min(p.stray_counts, p.stray_fraction, p.focus_blur_px) < 0, "stray light and blur: expected no less than 0"),
        (not set(p.bad_kinds) <= set(BAD_KINDS) or not p.bad_kinds, f"bad_kinds: expected some of {BAD_KINDS}"),
        (not set(p.slip_energies_ev) <= set(p.energies_ev), "slip_energies_ev: expected energies of the scan"),
        (p.refocus_ev not in (0, *p.energies_ev), "refocus_ev: expected an energy of the scan, or 0"),
        (p.angle_offset_ev not in (0, *p.energies_ev), "angle_offset_ev: expected an energy of the scan, or 0"),
        (p.other_binning_ev not in (0, *p.energies_ev[:-1]), "other_binning_ev: expected an energy but the last, or 0"),
        (
            p.other_binning <= 0
            or any(abs(v - round(v)) > 1e-9 or v < 1 for v in (p.n / p.other_binning, p.binning * p.other_binning)),
            f"other_binning: expected a factor that leaves whole pixels, got {p.other_binning:g}",
        ),
        (p.capillary_radius and not 0 < p.capillary_wall <= p.capillary_radius, "capillary_wall: thicker than it is"),
    ]
    for bad, message in wrong:
        if bad:
            raise XanesTomoError(f"option {message}")
