"""Chemistry of a voxel: the maps with their errors from the components that `map_plan` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from .edges import (
    atomic_mass,
)
from .map_plan import ARTEFACT, ARTEFACT_SIGMA, EDGE, FLAG, SIGMA, SIGMA_ALIGNMENT, SINGLE, MapPlan
from .mixtures import LEAST_LEVEL, non_negative
from .recipe import MapsParameters
from .spectra import (
    MEASURES,
)
from .uncertainty import Covariance, Unseen

__all__ = ["finish_slab"]

F32 = npt.NDArray[np.float32]


def finish_slab(
    plan: MapPlan,
    volumes: Mapping[str, F32],
    coverage: F32,
    least: F32,
    keep: slice,
    parameters: MapsParameters,
    errors: Covariance | None = None,
    *,
    spectra: Callable[[int], F32] | None = None,
    wrong: Mapping[str, F32] | None = None,
    unseen: Unseen | None = None,
) -> dict[str, F32]:
    """Turn component volumes (rows with halo, z, x) into maps of the rows `keep`.

    `volumes` are those of ``plan.linear`` in the units of the plan's components, and `errors` in those squared. Maps
    hold NaN where a ratio has no meaning (no nickel, no density); ``mask`` is 1 inside the particle where at least half
    of the angles of every energy needed saw the voxel. Without `errors` the standard errors are NaN. `spectra` gives
    the smoothed energies ``plan.single`` of a kept row, (energy, z, x), where the plan has any.
    `wrong` is what displaced energies have added to the volumes of ``shift`` and ``level``, and `unseen` what the
    volumes lack where energies did not see a voxel. There the mean spectrum, scaled to the voxel, stands in for them if
    most of the shape was seen, and the standard errors grow by what it changes.
    """
    from scipy.ndimage import gaussian_filter

    s = parameters.smoothing_voxel
    soft = {n: gaussian_filter(x, s) if s > 0 else x for n, x in volumes.items()}
    v = {n: x[keep] for n, x in soft.items()}
    added: dict[int, dict[str, F32]] = {}
    if unseen is not None:
        rows = ((k, unseen.row(k, v["shape"][k])) for k in range(len(v["shape"])))
        added = {k: more for k, more in rows if more is not None}
    seen = v
    if unseen is not None and added:
        v = {n: x.copy() for n, x in v.items()}
        for k, more in added.items():
            told = unseen.told(k)
            for n, x in v.items():
                x[k] += more[n] * told
    if parameters.non_negative and plan.elements:
        v |= _non_negative(plan, v)
    maps: dict[str, F32] = {}
    body = v["shape"] > 0.5 * plan.shape_level
    sharper: F32 = np.ones_like(v["shape"])
    maps["morphology"] = v["shape"]
    if s > 0:
        # The blur mixes cracks and air into what lies beside them. The shape, known from all energies with little
        # noise, says how much: composition is taken from the smoothed components, the amount from the fine shape.
        fine = gaussian_filter(volumes["shape"], parameters.shape_smoothing * s)[keep]
        with np.errstate(divide="ignore", invalid="ignore"):
            sharper = np.where(v["shape"] > 0.2 * plan.shape_level, fine / seen["shape"], 1.0).astype(np.float32)
            maps["morphology"] = fine
            for k, more in added.items():
                maps["morphology"][k] = np.where(seen["shape"][k] != v["shape"][k], fine[k] + more["shape"], fine[k])
    maps |= _composed(plan, v, sharper, body, parameters)
    maps["mask"] = (body & (least >= 0.5)).astype(np.float32)
    maps["coverage"] = coverage
    for name in plan.names:
        if name not in maps:
            maps[name] = np.full(body.shape, np.nan, np.float32)
    if ARTEFACT in plan.names and plan.edge is not None:
        made = {n: 0.0 if wrong is None else (gaussian_filter(wrong[n], s) if s > 0 else wrong[n])[keep] for n in EDGE}
        right = {n: np.asarray(v[n] - made[n], np.float32) for n in EDGE}
        clean = plan.edge.shift(right["shift"], right["level"], above=LEAST_LEVEL / 2)
        maps[ARTEFACT] = (maps["edge_energy_relative"] - clean).astype(np.float32)
    if errors is not None:
        whole = soft["shape"]
        for k in range(len(body)):
            gradient = _gradient(whole, (keep.start or 0) + k, errors.y[k])
            linear = [pair for pair in plan.pairs if not pair[0].startswith(SINGLE)]
            row = errors.row(k, gradient, linear)
            here = {n: x[k] for n, x in v.items()}
            lacking: dict[str, F32] = {}
            if k in added:
                at = np.any([added[k][n] != 0 for n in seen], axis=0)
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    part = {n: x[k][at] for n, x in seen.items()}
                    all_of_it = {n: x + added[k][n][at] for n, x in part.items()}
                    with_it = _composed(plan, all_of_it, sharper[k][at], body[k][at], parameters)
                    without = _composed(plan, part, sharper[k][at], body[k][at], parameters)
                for name, value in without.items():
                    lacking[name] = np.zeros(at.shape, np.float32)
                    lacking[name][at] = with_it[name] - value
                lacking["morphology"] = added[k]["shape"]
            _row_errors(plan, here, sharper[k], row, maps, k, lacking)
    if plan.measured and spectra is not None:
        for k in range(len(body)):
            inside = body[k] & (v["level"][k] > LEAST_LEVEL)
            if inside.any():
                slope = None if errors is None else _gradient(soft["shape"], (keep.start or 0) + k, errors.y[k])
                lines = spectra(k)[:, inside]
                lost = None
                if k in added and unseen is not None:
                    lost = np.stack([(added[k][f"{SINGLE}{e}"] * unseen.told(k))[inside] for e in plan.single])
                _row_measures(plan, lines, inside, errors, slope, maps, k, parameters, lost)
    if ARTEFACT in plan.names:
        noise = np.nan_to_num(maps["edge_energy_relative" + SIGMA])
        size = np.abs(maps[ARTEFACT])
        maps[FLAG] = (np.isfinite(size) & (size > ARTEFACT_SIGMA * noise) & (size > 0)).astype(np.float32)
    return {name: np.ascontiguousarray(maps[name]) for name in plan.names}


def _composed(
    plan: MapPlan, v: Mapping[str, F32], sharper: F32, body: npt.NDArray[np.bool_], parameters: MapsParameters
) -> dict[str, F32]:
    """Return the maps that are made voxel by voxel from the smoothed components `v`, arrays of any one shape."""
    maps: dict[str, F32] = {}
    if plan.elements:
        for e in plan.elements:
            maps[e] = v[e] * sharper
        maps["density"] = np.sum([maps[e] for e in plan.elements], axis=0, dtype=np.float32)
        if len(plan.elements) > 1:
            moles = {e: maps[e] / np.float32(atomic_mass(e)) for e in plan.elements}
            total = np.sum(list(moles.values()), axis=0, dtype=np.float32)
            with np.errstate(divide="ignore", invalid="ignore"):
                for e in plan.elements:
                    maps[f"{e}_fraction"] = np.where(body & (total > 0), moles[e] / total, np.nan).astype(np.float32)
    if plan.edge is not None:
        relative = np.asarray(plan.edge.shift(v["shift"], v["level"], above=LEAST_LEVEL), np.float32)
        maps["edge_energy_relative"] = relative
        offset = parameters.energy_offset_ev or 0.0
        if np.isfinite(plan.edge_half_ev):
            maps["edge_energy"] = relative + np.float32(plan.edge_half_ev + offset)
        maps["edge_jump"] = (v["level"] * plan.edge_jump).astype(np.float32)
    if plan.mixture is not None:
        amounts = np.stack([v[n] for n in plan.amounts])
        shares = np.full(amounts.shape, np.nan, np.float32)
        shares[:, body] = plan.mixture.fractions(amounts[:, body])
        maps |= dict(zip(plan.amounts, shares, strict=True))
        if plan.mixture.valences is not None:
            maps["valence"] = np.tensordot(np.array(plan.mixture.valences), shares, axes=(0, 0)).astype(np.float32)
    return maps


def _non_negative(plan: MapPlan, v: Mapping[str, F32]) -> dict[str, F32]:
    """Return the amounts of the elements, none negative, that fit the spectra behind `v` best."""
    weights = np.stack([plan.components[e] for e in plan.elements])
    noise = plan.noise if len(plan.noise) == weights.shape[1] else np.ones(weights.shape[1])
    information = np.linalg.inv(weights @ (noise[:, None] * weights.T))
    out = {e: v[e].copy() for e in plan.elements}
    for k in range(len(v["shape"])):
        amounts = np.stack([v[e][k] for e in plan.elements])
        below = np.any(amounts < 0, axis=0)
        if below.any():
            for e, values in zip(plan.elements, non_negative(amounts[:, below], information), strict=True):
                out[e][k][below] = values
    return out


def _gradient(volume: F32, k: int, y: float) -> tuple[F32, F32, F32, F32]:
    """Return the derivatives of row `k` (at `y` from the middle) along y, z, x and with its magnification.

    A magnified projection keeps its line integrals, so that the slices also gain in value: the last is r . grad + 1.
    """
    below, above = max(0, k - 1), min(len(volume) - 1, k + 1)
    g = (volume[above] - volume[below]) / np.float32(max(1, above - below))
    z, x = (np.gradient(volume[k], axis=i) if n > 1 else np.zeros_like(g) for i, n in enumerate(volume.shape[1:]))
    a, b = ((np.arange(n) - (n - 1) / 2).astype(np.float32) for n in volume.shape[1:])
    return g, z, x, np.asarray(volume[k] + np.float32(y) * g + a[:, None] * z + b[None, :] * x, np.float32)


def _row_errors(
    plan: MapPlan,
    v: Mapping[str, F32],
    sharper: F32,
    parts: Mapping[tuple[str, str], tuple[F32, F32]],
    maps: Mapping[str, F32],
    k: int,
    lacking: Mapping[str, F32],
) -> None:
    """Fill row `k` of the maps' standard errors; `v` are the smoothed components, `parts` their covariances.

    `lacking` is what the maps lack where energies did not see a voxel. An error is NaN where nothing is known of it.
    """

    def put(name: str, noise: F32, alignment: F32) -> None:
        value = maps[name][k]
        total = noise + alignment
        if name in lacking:
            total = total + lacking[name] ** 2
        for end, square in ((SIGMA, total), (SIGMA_ALIGNMENT, np.maximum(alignment, 0))):
            known = np.isfinite(value) & (total > 0)
            maps[name + end][k] = _rounded(np.where(known, np.sqrt(np.abs(square)), np.nan))

    def combined(weights: Mapping[str, F32]) -> list[F32]:
        """Variance of the sum of weights times components, noise and alignment."""
        return [
            np.sum([weights[a] * weights[b] * parts[a, b][i] for a in weights for b in weights], axis=0)
            for i in range(2)
        ]

    put("morphology", *parts["shape", "shape"])
    if plan.elements:
        # The amount comes from the fine shape, whose own noise counts as well.
        shape = np.maximum(v["shape"], np.float32(0.2 * plan.shape_level))
        amount = parts["shape", "shape"][0] / shape**2 if not np.all(sharper == 1) else np.zeros_like(shape)
        for e in plan.elements:
            noise, alignment = combined({e: sharper})
            put(e, noise + amount * v[e] ** 2, alignment)
        noise, alignment = combined({"density": sharper})
        put("density", noise + amount * np.sum([v[e] for e in plan.elements], axis=0) ** 2, alignment)
        if len(plan.elements) > 1:
            mass = {e: np.float32(atomic_mass(e)) for e in plan.elements}
            total = np.sum([v[e] / mass[e] for e in plan.elements], axis=0)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                for e in plan.elements:
                    share = v[e] / mass[e] / total
                    unit = {a: np.float32(a == e) for a in plan.elements}
                    put(f"{e}_fraction", *combined({a: (unit[a] - share) / mass[a] / total for a in plan.elements}))
    if plan.edge is not None:
        there = v["level"] > LEAST_LEVEL
        ratio, slope = (np.zeros(there.shape, np.float32) for _ in range(2))
        ratio[there] = v["shift"][there] / v["level"][there]
        slope[there] = plan.edge.slope(ratio[there]) / v["level"][there]
        noise, alignment = combined({"shift": slope, "level": -slope * ratio})
        for name in ("edge_energy_relative", "edge_energy"):
            if name in maps:
                put(name, noise, alignment)
        put("edge_jump", *combined({"level": np.full(ratio.shape, plan.edge_jump, np.float32)}))
    if plan.mixture is not None:
        names = plan.amounts
        total = np.sum([v[n] for n in names], axis=0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            share = {n: np.asarray(v[n] / total, np.float32) for n in names}
            for n in names:
                put(n, *combined({a: np.asarray((np.float32(a == n) - share[n]) / total, np.float32) for a in names}))
            if plan.mixture.valences is not None:
                mean = np.sum([z * share[n] for n, z in zip(names, plan.mixture.valences, strict=True)], axis=0)
                each = zip(names, plan.mixture.valences, strict=True)
                put("valence", *combined({n: np.asarray((z - mean) / total, np.float32) for n, z in each}))


def _row_measures(
    plan: MapPlan,
    spectra: F32,
    inside: npt.NDArray[np.bool_],
    errors: Covariance | None,
    gradient: tuple[F32, F32, F32, F32] | None,
    maps: Mapping[str, F32],
    k: int,
    parameters: MapsParameters,
    lost: F32 | None,
) -> None:
    """Fill row `k` of the maps that are not linear, from the spectra (energy, voxel) of the voxels `inside`.

    `lost` is what the spectra lack where energies did not see a voxel; it is added.
    """
    assert plan.measures is not None
    noise = aligned = None
    if errors is not None and gradient is not None:
        noise, aligned = np.empty_like(spectra), np.empty_like(spectra)
        for i, e in enumerate(plan.single):
            pair = (f"{SINGLE}{e}", f"{SINGLE}{e}")
            part = errors.row(k, gradient, [pair])[pair]
            noise[i], aligned[i] = part[0][inside], part[1][inside]
    whole = spectra if lost is None else spectra + lost
    found = plan.measures.measure(plan.measured, whole, variance=noise, aligned=aligned)
    without = found if lost is None else plan.measures.measure(plan.measured, spectra)
    offset = parameters.energy_offset_ev or 0.0
    for name, measure in found.items():
        maps[name][k][inside] = measure.value + (offset if MEASURES[name][0] == "eV" else 0.0)
        if measure.sigma_aligned is not None:
            sigma = np.sqrt(measure.sigma**2 + measure.sigma_aligned**2 + (without[name].value - measure.value) ** 2)
            maps[name + SIGMA][k][inside] = _rounded(sigma)
            maps[name + SIGMA_ALIGNMENT][k][inside] = _rounded(measure.sigma_aligned)


def _rounded(values: npt.NDArray[np.floating]) -> F32:
    """Keep 10 bits of the mantissa: a standard error known to a thousandth, which takes a third of the disk."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
