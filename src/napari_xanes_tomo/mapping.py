"""The step of the maps: from registered energies to a store of maps, slab by slab, here or on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .edges import ReferenceSpectrum, bracketed_elements
from .execution import WAITING, Execution, Threads
from .findings import Findings
from .given import look_at
from .half_sets import jitter_half_sets, registration_half_sets
from .io.references import read_reference
from .io.store import MapSpec, MapStore, begun_slabs, read_map_attributes
from .map_checks import MapChecks, check_maps, particle_middle
from .map_plan import ARTEFACT, ARTEFACT_SIGMA, FLAG, MapPlan, plan_maps
from .maps import (
    AlignedEnergy,
    Slab,
    grid_of,
    halo_rows,
    map_slab,
    require_energies,
    slab_bytes,
)
from .model import EnergyScan, Progress, Quality, Score, Series, XanesTomoError, no_progress
from .pixels import pixel_width, usual_scan
from .recipe import MapsParameters, Recipe, parameter_key
from .reconstruction import Reconstructor, reconstructor
from .registration_qc import surface_effect
from .run import fingerprint
from .single import placed_item
from .spectra import MEASURES, NOISE_WARNING
from .state import (
    Box,
    State,
)
from .steps import (
    Confinement,
    StepResult,
    alignment_of,
    angle_of,
    beam_of,
)
from .survey import Survey
from .voxel import VoxelSpectrum, voxel_spectrum
from .voxel_size import VoxelChoice, angular_limit_nm, choose_voxel, voxel_choices

__all__ = ["Mapper", "SlabWork", "VoxelTable", "make_slab", "read_recipe_references"]

SLAB_ROWS = 32
NOTHING_INSIDE = (
    "no voxel is above the mask: more than half of the particle's attenuation, seen by half of the angles of every "
    "energy that counts"
)
_TABLE_ROWS = 8  # in the middle of the particle, for the table of voxel sizes


@dataclass(frozen=True)
class VoxelTable:
    """What maps with voxels of several sizes would be worth.

    Attributes
    ----------
    choices : tuple of VoxelChoice
        Empty where the middle rows hold no voxel of the particle.
    px : int
        The size that maps would have, reference pixels.
    mean_spectrum : tuple of (float, float, bool)
        Energy in eV, mean attenuation of the particle in 1/cm, and whether the elements are fitted to it.
    """

    choices: tuple[VoxelChoice, ...]
    px: int
    mean_spectrum: tuple[tuple[float, float, bool], ...]


@dataclass(frozen=True)
class _Job:
    """What is to be mapped, and what was found before the first slab."""

    plan: MapPlan
    items: tuple[AlignedEnergy, ...]
    pixel_nm: float
    checks: MapChecks | None
    choices: tuple[VoxelChoice, ...]
    px: int

    @property
    def voxel_nm(self) -> float:
        return self.px * self.pixel_nm

    @property
    def volumes(self) -> bool:
        """Whether volumes made elsewhere are mapped."""
        return self.items[0].variance is not None

    @property
    def noise(self) -> float:
        """Noise / edge jump of the maps, NaN where no voxel of the particle was seen."""
        return next((c.noise_over_jump for c in self.choices if c.px == self.px), float("nan"))

    def scores(self, p: MapsParameters) -> tuple[Score, ...]:
        known = any(c.px == self.px for c in self.choices)
        noise = (Score("noise / edge jump", self.noise, "", p.noise_limit),) if known else ()
        return noise + (() if self.checks is None else self.checks.scores)

    def metadata(self, p: MapsParameters) -> dict[str, Any]:
        """Return what the store and the report say about how the maps were made."""
        plan, checks = self.plan, self.checks
        limit = None
        if not self.volumes:
            theta = np.asarray(self.items[0].scan.theta_deg)
            limit = angular_limit_nm(self.pixel_nm, theta, _width_px(self.choices))
        return {
            "reference_ev": plan.reference_ev,
            "energies_left_out_ev": list(plan.left_out_ev),
            "scanned_edge_in_elements": checks is not None
            and isinstance(checks.followed, dict)
            and bool(checks.followed),
            **({} if checks is None else checks.numbers),
            "attenuation": _TABLES[p.attenuation],
            "white_line_factors": {e: plan.white_lines.get(e, (p.white_line(e),))[0] for e in plan.elements},
            "white_line_factors_from_spectrum": {e: sigma for e, (_, sigma) in plan.white_lines.items()},
            "voxel_px": self.px,
            "voxel_choices": [asdict(c) for c in self.choices],
            "angular_limit_nm": limit,
            "edge_half_ev": plan.edge_half_ev,
            "edge_jump_per_cm": plan.edge_jump,
            "energy_calibrated": p.energy_offset_ev is not None,
            "edge_measures": list(plan.measured),
            "references": {} if plan.mixture is None else {r.name: r.source for r in plan.references},
            "handedness": "not verified",
        }

    def notes(self, p: MapsParameters, reconstructed_by: str) -> list[str]:
        """Return what a user should know about the maps, in words."""
        plan = self.plan
        notes = [*plan.notes, *(() if self.checks is None else self.checks.notes)]
        if p.reconstruction != "fbp" and not self.volumes:
            notes.append(
                f"reconstructed by {reconstructed_by}: the maps of sigma and the point spread that is stated are those "
                "of filtered back-projection"
            )
        one = self.noise * plan.noise_over_jump
        if plan.measured and not one <= NOISE_WARNING:
            notes.append(
                f"noise / edge jump of one energy is {one:.2g}, above {NOISE_WARNING:g}: {', '.join(plan.measured)} "
                "are biased and err more than their sigma; edge_energy_relative is not, or take larger voxels"
            )
        for e, (factor, sigma) in {**plan.white_lines_seen, **plan.white_lines}.items():
            seen = f"{e}: the mean spectrum shows a white-line factor of {factor:.2f} +- {sigma:.2f}, "
            if e in plan.white_lines:
                notes.append(f"{seen}which was taken; declare one (white_line_factors: [{e}=...]) if it is known")
            else:
                notes.append(
                    f"{seen}but 1 was used, and all amounts suffer; declare it "
                    f"(white_line_factors: [{e}={factor:.2f}]) if you agree"
                )
        return notes


class Mapper(Findings):
    """Findings that become maps; see `Run`.

    Parameters
    ----------
    memory_bytes : int
        What the maps step may take for its slabs.
    execution : Execution, optional
        Where slabs are made; the threads of this machine unless given.
    """

    _looked: tuple[str, Survey] | None = None

    def __init__(
        self,
        series: Series,
        out: str | Path,
        recipe: Recipe | None = None,
        *,
        memory_bytes: int = 4 * 2**30,
        execution: Execution | None = None,
        source: str | Path | None = None,
    ) -> None:
        super().__init__(series, out, recipe, source=source)
        self.memory_bytes = memory_bytes
        self.execution: Execution = Threads() if execution is None else execution

    def aligned(
        self, state: State | None = None, parameters: MapsParameters | None = None
    ) -> tuple[list[AlignedEnergy], list[int]]:
        """Return the registered energies, ready to be placed on the common grid, and their numbers."""
        state = self.state if state is None else state
        p = self.recipe.maps if parameters is None else parameters
        items, numbers = [], []
        grid = None if state.reference is None else self.series.scans[state.reference].frames.frame_shape
        for e in range(len(self.series.scans)):
            unit = state[("registration", e)]
            if unit.candidate is None or unit.status in ("stale", "failed"):
                continue
            found = self.registered(e)
            scan = self.scan(e)
            turned = angle_of(found)
            if turned and p.reconstruction == "fbp":  # others need angles that all energies share
                scan = replace(scan, theta_deg=np.asarray(scan.theta_deg, dtype=float) + turned)
            flats = self._chosen(state, "flats", e)
            air = np.nan_to_num(flats.arrays["air"])
            ty, tx, tz = (float(v) for v in found.numbers["translation_sigma"])
            items.append(
                AlignedEnergy(
                    scan, alignment_of(found, scan), air, self.mask_of(e, state), beam_of(flats, self._scans),
                    float(found.numbers["magnification_sigma"]), (ty, tx, tz),
                    fill_lost=p.fill_lost and not (scan.gridded or self.single),
                    grid=None if scan.gridded else grid,
                )
            )  # fmt: skip
            numbers.append(e)
        if p.common_blur and not self.single:
            spread = self.point_spread()[0][numbers]
            wide = np.nanmax(spread) - spread if np.isfinite(spread).any() else np.zeros(len(items))
            items = [replace(i, widen_px2=float(w)) for i, w in zip(items, np.nan_to_num(wide), strict=True)]
        if self.single and items and state.reference is not None:
            items = [placed_item(i, self.series.scans[state.reference].pixel_size_nm) for i in items]
        if items and items[0].scan.gridded:
            look = self._placed_look(state, items, numbers, p)
            items = [
                replace(i, variance=(float(look.variance[e, 0]), float(look.variance[e, 1])))
                for i, e in zip(items, numbers, strict=True)
            ]
        return items, numbers

    def _placed_look(
        self, state: State, items: Sequence[AlignedEnergy], numbers: Sequence[int], p: MapsParameters
    ) -> Survey:
        """Return the look at energies on the common grid, with the smoothings of the maps."""
        s = p.smoothing_voxel
        placed = {e: i.scan for e, i in zip(numbers, items, strict=True)} if self.single else None
        return self._look(state, no_progress, (s, s * p.shape_smoothing), placed)

    def _look(
        self,
        state: State,
        progress: Progress,
        smoothings: tuple[float, ...] = (1.0,),
        placed: Mapping[int, EnergyScan] | None = None,
    ) -> Survey:
        """Return the look at all energies on the common grid, aligned elsewhere or `placed`; the last one is kept."""
        scans = [(placed or {}).get(e, self.scan(e)) for e in range(len(self.series.scans))]
        left = {*state.manual.energies, *(e for e in range(len(scans)) if placed is not None and e not in placed)}
        key = parameter_key(smoothings, [fingerprint(s) for s in scans], sorted(left),
                            self.recipe.registration.reference_ev)  # fmt: skip
        if self._looked is None or self._looked[0] != key:
            wanted = self.recipe.registration.reference_ev
            found = look_at(scans, wanted, smoothings, leave_out=left, progress=progress)
            self._looked = (key, found)
        return self._looked[1]

    def map_plan(
        self, state: State | None = None, parameters: MapsParameters | None = None
    ) -> tuple[MapPlan, list[AlignedEnergy], float]:
        """Return the plan of the maps, the energies that take part, and the size of a reference pixel in nm."""
        p = self.recipe.maps if parameters is None else parameters
        if self.recipe.absorbance.contrast == "phase":
            raise XanesTomoError(
                "maps: expected absorption contrast, got a recipe with `contrast: phase`; phase frames are aligned and "
                "reconstructed, but hold no densities and no spectra"
            )
        state = self.state if state is None else state
        items, numbers = self.aligned(state, p)
        mass, noise = [], []
        level = float("nan")
        for e in numbers:
            found = self.registered(e)
            mass.append(float(found.numbers["mass"]))
            noise.append(float(found.numbers["variance"]) / float(found.numbers["magnification"]) ** 2)
            if e == state.reference:
                level = float(found.numbers["template_level"])
        if self.single and items and state.reference in numbers:
            look = self._placed_look(state, items, numbers, p)
            mass, noise = look.mass[numbers].tolist(), look.variance[numbers, 0].tolist()
            assert state.reference is not None
            level = float(look.mass[state.reference]) * self.series.scans[state.reference].pixel_size_nm * 1e-7
        require_energies(items)
        if state.reference is None or state.reference not in numbers:
            raise XanesTomoError("maps: expected the reference energy to be registered; see its status")
        k = numbers.index(state.reference)
        voxel_nm = self.series.scans[state.reference].pixel_size_nm
        spectrum = np.array(mass) / mass[k] * level * 1e7 / voxel_nm
        energies = self.series.energies_ev[numbers]
        areal = items[k].scan.given == "images"
        references, unread = read_recipe_references(p)
        # A particle of another size shows its mass on another area: what it would absorb at the reference's size.
        density = self.particle_size()[numbers] ** 2
        spectrum, weight = spectrum * density, np.array(noise) / noise[k] * density**2
        plan = plan_maps(energies, spectrum, weight, k, p, areal=areal, references=references).weighted(density)
        lost = [f"{v:g}" for e, v in enumerate(self.series.energies_ev) if e not in numbers]
        absent = dict(plan.absent) | unread
        for element in bracketed_elements(self.series.energies_ev) if lost else ():
            if p.elements is None and element not in (*plan.elements, *absent):
                absent[element] = f"without {', '.join(lost)} eV, which could not be used, nothing brackets its K edge"
        return replace(plan, absent=absent), items, voxel_nm

    def voxel_table(self, parameters: MapsParameters | None = None) -> VoxelTable:
        """Say what voxels of several sizes would be worth, from some rows in the middle; nothing is kept.

        Parameters
        ----------
        parameters : MapsParameters, optional
            The recipe's unless given.

        Raises
        ------
        XanesTomoError
            The energies are not registered, or cannot be mapped.
        """
        p = self.recipe.maps if parameters is None else parameters
        job = self._map_job(self.state, p)
        return VoxelTable(job.choices, job.px, _mean_spectrum(job.plan, job.items))

    def voxel_spectrum(self, at: tuple[int, int, int], *, progress: Progress = no_progress) -> VoxelSpectrum:
        """Return the spectrum of one voxel of the maps on disk, at every energy, and what is fitted to it.

        It is made as the maps were, whatever the recipe asks for by now; where that is not known its ``note`` says so.

        Parameters
        ----------
        at : (int, int, int)
            y, z, x of the stored maps.
        progress : Progress
            Called for every energy; what it raises is passed on.

        Raises
        ------
        XanesTomoError
            There are no maps, or no such voxel.
        """
        facts = read_map_attributes(self.output.maps)[0]
        state = self.state
        p, note = self._made_with(str(facts.get("key", "")), state)
        plan, items, pixel_nm = self.map_plan(state, p)
        factor = self.particle_size()[self.aligned(state, p)[1]] ** 2
        px = int(facts["voxel_px"])
        y, z, x = (int(v + first) for v, first in zip(at, facts["origin_voxel"], strict=True))
        found = voxel_spectrum(items, plan, (y, z, x), px * pixel_nm, p, bin=px, factor=factor, progress=progress)
        return replace(found, note=note)

    def _made_with(self, key: str, state: State) -> tuple[MapsParameters, str]:
        """Return what the maps of `key` were made with, and what of it is no longer there."""
        made = [c for c in self.candidates("maps", None) if c.payload["numbers"].get("store_key") == key]
        if not made or "maps" not in made[-1].payload.get("parameters", {}):
            return self.recipe.maps, "The journal does not say what these maps were made with: fitted with the recipe."
        note = ""
        if made[-1].input_key != state[("maps", None)].input_key:
            note = "Alignment or exclusions are no longer those of these maps: make the maps again to compare."
        return MapsParameters.model_validate(made[-1].payload["parameters"]["maps"]), note

    def _reconstructor(self) -> Reconstructor:
        p = self.recipe.maps
        return reconstructor(p.reconstruction, filter=p.filter, iterations=p.iterations)

    def _make_maps(self, state: State, progress: Progress) -> StepResult:
        p, unit = self.recipe.maps, state[("maps", None)]
        of = f"{unit.parameter_key} {unit.input_key}"
        job = self._map_job(state, p, progress, begun_slabs(self.output.maps, of))
        plan, items = job.plan, job.items
        grid = grid_of(items, 1)
        y0, y1, c0, c1 = _map_window(self._boxes_on_grid(state, grid), *grid)
        height, width = (max(1, n // job.px) for n in grid)
        y0, y1, c0 = y0 // job.px, min(height, -(-y1 // job.px)), min(c0 // job.px, (width - 1) // 2)
        c0, c1 = (0, width) if job.volumes else (c0, width - c0)
        specs = [
            MapSpec(
                name,
                plan.unit(name),
                _describe(name, plan.areal),
                0.0 if name in ("mask", "coverage") else p.smoothing_voxel,
                plan.about(name, p, self.recipe.registration.blur_px, job.px),
            )
            for name in plan.names
        ]
        store = MapStore(
            self.output.maps,
            (y1 - y0, len(items[0].scan) if job.volumes else c1 - c0, c1 - c0),
            job.voxel_nm,
            specs,
            slab_rows=SLAB_ROWS,
            key=parameter_key(unit.parameter_key, unit.input_key, *plan.reference_keys),
        )
        store.create(of)
        self._fill(store, job, (y0, c0, c1), progress)
        metadata = job.metadata(p) | {"reconstruction": self._reconstructor().name, "origin_voxel": [y0, c0, c0]}
        if p.common_blur:
            metadata["blurred_by_px2"] = [[float(i.scan.energy_ev), round(i.widen_px2, 4)] for i in items]
        metadata["scale_change"] = state.manual.scale_change or p.scale_change
        metadata["particle_size_by_ev"] = [
            [float(ev), round(float(s), 6)] for ev, s in zip(self.series.energies_ev, self.particle_size(), strict=True)
        ]
        metadata["half_sets_by_step"], no_half_sets = self._half_sets(state, job, progress)
        absent = dict(plan.absent)
        if store.empty("mask"):
            absent |= dict.fromkeys(plan.inside, NOTHING_INSIDE)
        kept = store.finish(absent=absent, metadata=metadata)
        absent = dict(read_map_attributes(self.output.maps)[0]["absent"])  # of maps that were finished before, theirs
        notes = [f"{name}: {why}" for name, why in absent.items()] + job.notes(p, self._reconstructor().name)
        notes += no_half_sets
        notes += self._not_blurred(items)
        if kept is not None:
            notes.append(f"the former maps are kept in {kept.name}")
        numbers = {"absent": absent, "elements": list(plan.elements), "store_key": store.key, **metadata}
        numbers["mean_spectrum_per_cm"] = _mean_spectrum(plan, items)
        effect = surface_effect(plan).edge_ev
        numbers["edge_ev_per_px"] = [
            [float(i.scan.energy_ev), float(v)] for i, v in zip(items, effect, strict=True) if np.isfinite(v)
        ]
        numbers["noise_over_jump_of_one_energy"] = job.noise * plan.noise_over_jump
        return StepResult({}, numbers, Quality(job.scores(p), tuple(notes)))

    def _not_blurred(self, items: Sequence[AlignedEnergy]) -> list[str]:
        """Say which energies could not be blurred to the common point spread, for theirs is not known."""
        if not self.recipe.maps.common_blur or self.single:
            return []
        mapped = {float(i.scan.energy_ev) for i in items}
        spread = self.point_spread()[0]
        unknown = [
            f"{ev:g}"
            for ev, value in zip(self.series.energies_ev, spread, strict=True)
            if float(ev) in mapped and not np.isfinite(value)
        ]
        if not unknown:
            return []
        return [f"maps.common_blur: the point spread could not be measured at {', '.join(unknown)} eV: not blurred"]

    def _map_job(
        self, state: State, p: MapsParameters, progress: Progress = no_progress, done: tuple[int, int] = (0, 1)
    ) -> _Job:
        """Return what is to be mapped: the plan after the checks, and the size of the voxels.

        `progress` is told what is `done` already.
        """
        plan, items, pixel_nm = self.map_plan(state, p)
        checks = None
        progress("maps", *done)
        middle = particle_middle(items, plan)
        if items[0].variance is None:
            plan, checks = check_maps(items, plan, pixel_nm, p, edge_ev=surface_effect(plan).edge_ev, middle=middle)
        progress("maps", *done)
        choices = voxel_choices(items, plan.without_single(), pixel_nm, p, rows=_TABLE_ROWS, middle=middle)
        progress("maps", *done)
        return _Job(plan, tuple(items), pixel_nm, checks, tuple(choices), _voxel_px(items, choices, p))

    def _confinement(self, energy: int, state: State) -> Confinement:
        """Return what the user drew: boxes (scaled to this energy by the calibration) and the mask."""
        drawn, scan = self.boxes_scan, self.series.scans[energy]
        size = drawn.pixel_size_nm / pixel_width(drawn, usual_scan(self.series.scans))
        scale = size / scan.pixel_size_nm if scan.pixel_size_nm > 0 else 1.0
        return Confinement(state.manual.boxes, scale, self.series.frame_shape, self.mask_of(energy, state))

    def _boxes_on_grid(self, state: State, grid: tuple[int, int]) -> tuple[Box, ...]:
        """Return the boxes in pixels of the reference, whose pixels may be other than those they were drawn in."""
        if state.reference is None or self.series.frame_shape == grid:
            return state.manual.boxes
        within = self._confinement(state.reference, state)
        return tuple(
            (int(y0), int(np.ceil(y1)), int(x0), int(np.ceil(x1))) for y0, y1, x0, x1 in within.reached(grid, 0.0)
        )

    def _half_sets(self, state: State, job: _Job, progress: Progress) -> tuple[list[dict[str, Any]], list[str]]:
        """Return Fourier shells before and after each step, and why there are none of a step.

        `progress` stays at the finished maps; it is called again and again, so that a cancelled run stops here, too.
        """

        def still(what: str, done: int, total: int) -> None:
            progress("maps", 1, 1)

        items = job.items
        if not self.recipe.maps.half_sets or job.volumes or items[0].scan.given or state.reference is None:
            return [], []
        numbers = self.aligned(state)[1]
        k = numbers.index(state.reference)
        before = [
            replace(item, alignment=alignment_of(self._jitter(state, e), item.scan))
            for e, item in zip(numbers, items, strict=True)
        ]
        within = self._confinement(numbers[k], state)
        made: list[dict[str, Any]] = []
        why: list[str] = []
        for step in ("jitter correction", "energy registration"):
            try:
                if step == "jitter correction":
                    found = jitter_half_sets(
                        items[k], self.recipe, job.pixel_nm, within=within, number=numbers[k], progress=still
                    )
                else:
                    found = registration_half_sets(
                        before, items, job.plan, job.pixel_nm, filter=self.recipe.maps.filter, progress=still
                    )
            except XanesTomoError as error:
                found = str(error)
            if isinstance(found, str):
                why.append(f"no half sets before and after the {step}: {found}")
            else:
                made.append(found.numbers)
        return made, why

    def _fill(self, store: MapStore, job: _Job, window: tuple[int, int, int], progress: Progress) -> None:
        """Make every slab that the store does not hold yet."""
        p = self.recipe.maps
        pending, halo = store.pending(), halo_rows(p)
        done = len(store.slabs) - len(pending)
        progress("maps", done, len(store.slabs))
        width = grid_of(job.items, job.px)[1]
        per_slab = slab_bytes(job.plan, SLAB_ROWS + 2 * halo, width, len(job.items[0].scan), job.px)
        workers = self.execution.workers(len(pending), per_slab, self.memory_bytes)
        shared = SlabWork(job.items, job.plan, job.voxel_nm, p, store, halo, window, job.px)
        with closing(self.execution.run(make_slab, shared, pending, workers)) as finished:
            for made in finished:
                done += made is not WAITING
                progress("maps", done, len(store.slabs))


_DESCRIPTIONS = {
    "morphology": "weighted mean of all aligned energies: the shape, with the least noise",
    "density": "sum of the mapped elements",
    "fraction": "atomic fraction among the mapped elements",
    "edge_energy_relative": "shift of the spectrum against the particle's mean, linear regression",
    "edge_energy": "edge_energy_relative + E(0.5) of the mean spectrum",
    "edge_jump": "step of the scanned edge",
    **{name: text for name, (_, text) in MEASURES.items()},
    "valence": "mean valence of the references, by their fractions",
    ARTEFACT: "what energies found to lie beside the others make of edge_energy_relative; it is not taken out",
    FLAG: f"1 where {ARTEFACT} exceeds {ARTEFACT_SIGMA:g} sigma: valence contrast that misregistration explains",
    "mask": "1 inside the particle where every energy saw the voxel",
    "coverage": "part of all (energy, angle) pairs that saw the voxel",
}


_TABLES = {"elam": "Elam, Ravel & Sieber 2002, by xraydb", "chantler": "Chantler 2000, by xraydb"}


def _mean_spectrum(plan: MapPlan, items: Sequence[AlignedEnergy]) -> tuple[tuple[float, float, bool], ...]:
    left_out, energies = set(plan.left_out_ev), [float(i.scan.energy_ev) for i in items]
    return tuple((e, float(mu), e not in left_out) for e, mu in zip(energies, plan.spectrum, strict=True))


def _voxel_px(items: Sequence[AlignedEnergy], choices: Sequence[VoxelChoice], p: MapsParameters) -> int:
    return 1 if items[0].variance is not None else choose_voxel(choices, p)


def _width_px(choices: Sequence[VoxelChoice]) -> float:
    """Width of the object in its middle rows, px: of a disk as large."""
    return 2 * float(np.sqrt(choices[0].voxels / _TABLE_ROWS / np.pi)) if choices else 0.0


def _describe(name: str, areal: bool = False) -> str:
    """Return one line about a map, or about one per area."""
    for end, what in (("_sigma_alignment", "part of the standard error that comes from the alignment"),
                      ("_sigma", "standard error: noise of the counts and alignment")):  # fmt: skip
        if name.endswith(end):
            return f"{name.removesuffix(end)}: {what}"
    if name.startswith("lcf_"):
        return f"fraction of the reference {name.removeprefix('lcf_')}: linear combination, none negative, of sum 1"
    what = "amount per area" if areal else "density"
    return _DESCRIPTIONS.get(name.split("_")[-1] if "fraction" in name else name, f"{what} of {name}")


@dataclass(frozen=True)
class SlabWork:
    """What every slab needs: small, picklable, no pixels in it."""

    energies: tuple[AlignedEnergy, ...]
    plan: MapPlan
    voxel_nm: float
    parameters: MapsParameters
    store: MapStore
    halo: int
    window: tuple[int, int, int]
    bin: int = 1


def make_slab(work: SlabWork, rows: tuple[int, int], threads: int) -> int:
    """Make and store one slab; `rows` count from the top of the maps. Runs here or on a worker of a cluster."""
    top, c0, c1 = work.window
    slab = Slab(rows[0] + top, rows[1] + top, work.halo)
    maps = map_slab(work.energies, work.plan, slab, work.voxel_nm, work.parameters, bin=work.bin, threads=threads)
    z = slice(None) if work.energies[0].variance is not None else slice(c0, c1)  # volumes keep their own depth
    work.store.write(rows[0], {name: m[:, z, c0:c1] for name, m in maps.items()})
    return rows[0]


def _map_window(boxes: Sequence[Box], height: int, width: int) -> tuple[int, int, int, int]:
    """Rows, and columns about the axis, that the maps cover: all, unless the user drew boxes."""
    if not boxes:
        return 0, height, 0, width
    y0, y1 = min(b[0] for b in boxes), max(b[1] for b in boxes)
    half = max(abs(v - width / 2) for b in boxes for v in b[2:])
    # A particle beside the axis is seen at any column up to its distance from it.
    c0 = max(0, int(np.floor(width / 2 - half)))
    return y0, y1, c0, width - c0


def read_recipe_references(p: MapsParameters) -> tuple[tuple[ReferenceSpectrum, ...], dict[str, str]]:
    """Read the reference spectra of a recipe; where one cannot be read, none count: {map: reason}."""
    found = []
    for item in p.reference_files:
        try:
            spectrum = read_reference(item.file, item.group)
        except XanesTomoError as error:
            names = [f"lcf_{r.name}" for r in p.reference_files]
            valence = ["valence"] if all(r.valence is not None for r in p.reference_files) else []
            return (), dict.fromkeys((*names, *valence), str(error))
        found.append(replace(spectrum, name=item.name, valence=item.valence))
    return tuple(found), {}
