"""Layers that follow the run: aligned projections, the difference to the reference, residuals, flats."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.air import fit_air
from napari_xanes_tomo.detector import mask_from_runs
from napari_xanes_tomo.flats import Beam
from napari_xanes_tomo.io.stack import lazy_frames
from napari_xanes_tomo.model import Alignment, FloatArray, Series
from napari_xanes_tomo.pixels import pixel_width, seen_as, usual_scan
from napari_xanes_tomo.steps import StepResult, alignment_of, beam_of, renormalise
from napari_xanes_tomo.workflow import Workflow

from .layers import Against, AlignedStack, FlatStack, geometry, spread_limits
from .session import Session

__all__ = [
    "AirPreview",
    "AlignedPreview",
    "BlockPreview",
    "FlatPreview",
    "MaskPreview",
    "Preview",
    "QuickPreview",
    "ResidualPreview",
]

Found = dict[int, tuple[Alignment, FloatArray]]


class Preview:
    """One layer beside the scan; it never becomes the layer that is worked on."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._layer: Any = lambda: None

    @property
    def layer(self) -> Any:
        """The layer; None while there is none."""
        layer, viewer = self._layer(), self._session.viewer
        if layer is None or viewer is None or not any(x is layer for x in viewer.layers):
            return None
        return layer

    def _put(self, data: Any, options: dict[str, Any]) -> None:
        viewer, layer = self._session.viewer, self.layer
        if layer is not None:
            layer.data = data
            if "name" in options:
                layer.name = options["name"]
            return
        active = viewer.layers.selection.active
        layer = viewer.add_image(data, **options)
        viewer.layers.selection.active = active  # the scan stays the one that is worked on
        self._layer = weakref.ref(layer)

    def hide(self) -> None:
        """Remove the layer."""
        viewer, layer = self._session.viewer, self.layer
        if layer is not None:
            viewer.layers.remove(layer)


class AlignedPreview(Preview):
    """Every projection as it lies after a step; follows the journal.

    Parameters
    ----------
    session : Session
    step : {"jitter", "registration"}
        After the registration all energies lie on the common grid, and their absorbance is matched to the reference.
    against : {"difference", "chess board", "other"}, optional
        Show the comparison with the reference energy instead, or that energy alone.
    """

    def __init__(self, session: Session, step: str, *, against: Against | None = None) -> None:
        super().__init__(session)
        self._step = step
        self._against = against
        self._stack: AlignedStack | None = None
        self._keys: tuple[Any, ...] = ()

    def _found(self) -> tuple[tuple[Any, ...], Found, dict[int, float]]:
        state, workflow = self._session.state, self._session.workflow
        if state is None or workflow is None:
            return (), {}, {}
        units = {
            e: (state[(self._step, e)].candidate, state[("flats", e)].candidate)
            for e in range(len(workflow.series.scans))
            if state[(self._step, e)].status in ("candidate", "accepted")
        }
        ready = {e: (a, b) for e, (a, b) in units.items() if a is not None and b is not None}
        by_hand = str(state.manual.nudges) + str(state.manual.centers) + str(state.manual.frames)
        by_hand += str(state.manual.mask)
        keys = (id(workflow), tuple((e, a.id, b.id) for e, (a, b) in ready.items()), by_hand)
        if keys == self._keys and self.layer is not None:
            return keys, {}, {}
        found: Found = {}
        mass: dict[int, float] = {}
        for e, (a, b) in ready.items():
            air = workflow.result(b).arrays["air"]
            result = workflow.result(a) if self._step != "jitter" else workflow.displacements(e)
            found[e] = (alignment_of(result, workflow.scan(e)), air)
            mass[e] = float(result.numbers.get("mass", np.nan))
        reference = mass.get(-1 if state.reference is None else state.reference, np.nan)
        gain = {e: reference / m for e, m in mass.items() if np.isfinite(reference / m)} if reference > 0 else {}
        return keys, found, gain

    def show(self) -> bool:
        """Make or update the layer; return whether there is anything to show."""
        viewer, scan, source = self._session.viewer, self._session.scan, self._session.layer
        if viewer is None or scan is None or source is None:
            return False
        keys, found, gain = self._found()
        if keys == self._keys and self.layer is not None:
            return True
        state = self._session.state
        reference = None if state is None else state.reference
        if not found or (self._against and reference not in found):
            self.hide()
            return False
        if self._stack is None or self._stack.series is not scan.series:
            self._stack = AlignedStack(scan.stack)
        how = self._against
        beams, masks = self._divided_by(found)
        read = self._stack.reader(
            found, beams=beams, masks=masks, gain=gain, grid=None if self._step == "jitter" else reference,
            against=reference if how else None, how=how or "difference",
        )  # fmt: skip
        data = lazy_frames(read, scan.stack.shape, np.float32)
        self._keys = keys
        energy = self._session.frame[0] if self._session.frame[0] in found else next(iter(found))
        if how == "difference" and energy == reference:
            energy = next((e for e in found if e != reference), energy)
        usable = np.flatnonzero(scan.series.scans[energy].usable)
        limits = spread_limits([read(energy, int(usable[len(usable) // 2]))], 0.5, 99.9)
        options = {"name": self._name(reference), "colormap": "gray", **geometry(scan.series)}
        if how == "difference":
            top = max(abs(limits[0]), abs(limits[1]))
            limits, options["colormap"] = (-top, top), "PiYG"
        self._put(data, {**options, "contrast_limits": limits})
        return True

    def _divided_by(
        self, energies: Iterable[int]
    ) -> tuple[dict[int, Beam | None], dict[int, npt.NDArray[np.bool_] | None]]:
        """Return the flats that were chosen at every energy, and the masks by hand."""
        state, workflow = self._session.state, self._session.workflow
        if state is None or workflow is None:
            return {}, {}
        masks = {e: workflow.mask_of(e, state) for e in energies}
        scans = dict(enumerate(workflow.series.scans))
        beams: dict[int, Beam | None] = {}
        for e in energies:
            candidate = state[("flats", e)].candidate
            if candidate is not None:
                beams[e] = beam_of(workflow.result(candidate), scans)
        return beams, masks

    def _name(self, reference: int | None) -> str:
        if self._step == "jitter":
            return "aligned, jitter corrected"
        scan = self._session.scan
        known = scan is not None and reference is not None
        ev = f"{scan.series.scans[reference].energy_ev:g} eV" if known else "reference"  # type: ignore[union-attr,index]
        names = {None: "aligned, common grid of", "difference": "difference to", "chess board": "chess board with"}
        return f"{names.get(self._against, 'reference')} {ev}"

    def hide(self) -> None:
        """Remove the layer."""
        super().hide()
        self._keys = ()


def _over_frames(series: Series, energy: int, bin: int, place: dict[str, Any]) -> dict[str, Any]:
    """Return scale and translation of a layer whose pixels are `bin` of those of an energy, over that of all frames."""
    pitch = bin * pixel_width(series.scans[energy], usual_scan(series.scans))
    return {
        "scale": (*place["scale"][:2], pitch, pitch),
        "translate": (*place["translate"][:2], (pitch - 1) / 2, (pitch - 1) / 2),
    }


class ResidualPreview(Preview):
    """Data minus reprojection of the energies it was computed for, at the binning of the estimation."""

    KEPT = 4

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._made: dict[int, tuple[Any, npt.NDArray[np.float32], npt.NDArray[np.intp]]] = {}
        self._series: Any = None

    def has(self, energy: int, key: Any) -> bool:
        """Whether the residual of an energy is there, made from the result named by `key`."""
        return self.layer is not None and energy in self._made and self._made[energy][0] == key

    def add(self, energy: int, key: Any, rest: npt.NDArray[np.float32], index: npt.NDArray[np.intp], bin: int) -> None:
        """Show ``(n, y, x)`` residuals of the projections `index` of an energy."""
        scan = self._session.scan
        if scan is None:
            return
        if self._series is not scan.series:
            self._series, self._made = scan.series, {}
        self._made.pop(energy, None)
        # Frames of another binning make another layer.
        self._made = {e: m for e, m in self._made.items() if m[1].shape[1:] == rest.shape[1:]}
        while len(self._made) >= self.KEPT:
            self._made.pop(next(iter(self._made)))
        self._made[energy] = (key, rest, index)
        n_energies, n_angles = scan.stack.shape[:2]
        data = lazy_frames(_reader(dict(self._made)), (n_energies, n_angles, *rest.shape[1:]), np.float32)
        place = geometry(scan.series)
        place |= _over_frames(scan.series, energy, bin, place)
        top = max(abs(v) for v in spread_limits([rest], 1, 99))
        listed = ", ".join(f"{scan.series.scans[e].energy_ev:g}" for e in sorted(self._made))
        options = {"name": f"residual (data - reprojection) at {listed} eV", "colormap": "PiYG"}
        self._put(data, {**options, "contrast_limits": (-top, top), **place})


class BlockPreview(Preview):
    """Displacement of parts of the object at one energy, beyond the alignment, on the common grid.

    Arrows, and below them their length as a heat map: px, nm, or what it does to the edge energy at a surface.
    """

    LONG = 12.0  # columns of 256 that the longest arrow is drawn
    UNITS = ("px", "nm", "eV")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._heat = Preview(session)

    @property
    def heat(self) -> Any:
        """The layer of the heat map; None while there is none."""
        return self._heat.layer

    def hide(self) -> None:
        """Remove both layers."""
        super().hide()
        self._heat.hide()

    def put(self, energy: int, result: StepResult, unit: str = "px", ev_per_px: float = 0.0) -> str:
        """Show the arrows and their length in a unit of `UNITS`; return their size in words, or why there are none.

        `ev_per_px` is what one px of this energy does to the edge energy at a surface; 0 where it is not known.
        """
        scan, viewer = self._session.scan, self._session.viewer
        if scan is None or viewer is None:
            return ""
        name = f"parts of the object at {scan.series.scans[energy].energy_ev:g} eV"
        self.hide()
        shift, place = result.arrays.get("block_shift"), result.arrays.get("block_place")
        if shift is None or place is None:
            return f"{name}: not measured. The reference has none, nor have results of earlier versions."
        known = np.isfinite(shift).all(axis=2) & np.isfinite(place).all(axis=2)
        if not known.any():
            return f"{name}: no part of it holds enough to be measured."
        height, width = scan.series.frame_shape
        longest = float(np.hypot(*shift[known].T).max())
        times = self.LONG * width / 256 / max(longest, 1e-9)
        sizes = {"px": 1.0, "nm": float(scan.series.scans[energy].pixel_size_nm), "eV": abs(ev_per_px)}
        self._put_heat(
            f"{name}, {unit}", np.where(known, sizes[unit] * np.hypot(*np.moveaxis(shift, 2, 0)), np.nan), place
        )
        drawn = shift[known] * pixel_width(scan.series.scans[energy], usual_scan(scan.series.scans))
        vectors = np.stack([place[known] + ((height - 1) / 2, (width - 1) / 2), times * drawn], axis=1)
        layer = viewer.add_vectors(
            vectors, name=name, edge_width=max(0.5, width / 256), edge_color="#e0904f", vector_style="arrow"
        )
        viewer.layers.selection.active = self._session.layer  # the scan stays the one that is worked on
        self._layer = weakref.ref(layer)
        far = f"{longest:.3f} px ({longest * sizes['nm']:.2g} nm"
        far += f", {longest * sizes['eV']:.2g} eV at a surface)" if sizes["eV"] else ")"
        return f"{name}: at most {far}; drawn {times:.0f} times as long."

    def _put_heat(self, name: str, values: npt.NDArray[Any], place: npt.NDArray[Any]) -> None:
        scan = self._session.scan
        assert scan is not None
        middle = (np.array(scan.series.frame_shape) - 1) / 2
        first, last = np.nanmin(place, axis=(0, 1)), np.nanmax(place, axis=(0, 1))
        step = (last - first) / np.maximum(np.array(values.shape) - 1, 1)
        top = max(float(np.nanmax(values)), 1e-9)
        options = {"name": name, "colormap": "viridis", "contrast_limits": (0.0, top), "opacity": 0.5}
        options |= {"interpolation2d": "nearest", "scale": tuple(step), "translate": tuple(first + middle)}
        self._heat._put(values.astype(np.float32), options)


def _reader(
    made: dict[int, tuple[Any, npt.NDArray[np.float32], npt.NDArray[np.intp]]],
) -> Callable[[int, int], npt.NDArray[np.float32]]:
    where = {e: {int(a): i for i, a in enumerate(index)} for e, (_, _, index) in made.items()}
    shape = next(iter(made.values()))[1].shape[1:]

    def read(energy: int, angle: int) -> npt.NDArray[np.float32]:
        at = where.get(energy, {}).get(angle)
        return np.zeros(shape, np.float32) if at is None else made[energy][1][at]

    return read


class SlicePreview(Preview):
    """One slice of a tomogram before or after the correction, (z, x), over the frame."""

    def put(self, views: Mapping[str, npt.NDArray[np.float64]], which: str, where: str) -> None:
        """Show ``before`` or ``after`` of `views.tomogram_views`; both in the same grey values."""
        bin = float(views["bin"][0]) if "bin" in views else 1.0
        both = np.stack([views["before"], views["after"]])
        limits = spread_limits([both], 0.5, 99.8)
        self.hide()
        name = f"slice {which} the correction, row {int(views['row'][0])} (binned), {where}"
        options = {"name": name, "colormap": "gray", "contrast_limits": limits}
        shift = (bin - 1) / 2
        self._put(views[which].astype(np.float32), {**options, "scale": (bin, bin), "translate": (shift, shift)})


class QuickPreview(Preview):
    """A first guess at one energy: aligned projections, binned; the nearest one that was used stands for the others."""

    def add(self, energy: int, shown: npt.NDArray[np.float32], index: npt.NDArray[np.intp], bin: int) -> None:
        """Show ``(k, y, x)`` aligned projections, numbers `index`, of an energy."""
        scan = self._session.scan
        if scan is None:
            return
        n_energies, n_angles = scan.stack.shape[:2]
        nearest = np.abs(np.arange(n_angles)[:, None] - np.asarray(index)[None, :]).argmin(axis=1)
        blank = np.zeros(shown.shape[1:], np.float32)

        def read(e: int, angle: int) -> npt.NDArray[np.float32]:
            return shown[nearest[angle]] if e == energy else blank

        data = lazy_frames(read, (n_energies, n_angles, *shown.shape[1:]), np.float32)
        place = geometry(scan.series)
        place |= _over_frames(scan.series, energy, bin, place)
        name = f"preview: quick look at {scan.series.scans[energy].energy_ev:g} eV"
        self.hide()  # another binning is another layer
        self._put(
            data, {"name": name, "colormap": "gray", "contrast_limits": spread_limits([shown], 0.5, 99.9), **place}
        )


class FlatPreview(Preview):
    """The shots of all flat sets as a lazy layer."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.stack: FlatStack | None = None

    def show(self) -> bool:
        """Make the layer; return whether there is a flat at all."""
        scan = self._session.scan
        if scan is None or self._session.viewer is None:
            return False
        if self.layer is not None and self.stack is not None and self.stack.series is scan.series:
            return True
        self.hide()
        self.stack = FlatStack(scan.series)
        if not self.stack.shape[1]:
            return False
        energy = max(0, self._session.frame[0])
        limits = spread_limits([self.stack.read(energy, 0)], 0.5, 99.5)
        data = lazy_frames(self.stack.read, self.stack.shape, np.float32)
        options = {"name": "flats (reference frames)", "colormap": "gray", "contrast_limits": limits}
        self._put(data, {**options, **self.stack.geometry()})
        return True

    def text(self) -> str:
        """Return which shot the sliders stand at."""
        viewer, layer = self._session.viewer, self.layer
        if layer is None or viewer is None or self.stack is None:
            return ""
        point = layer.world_to_data(viewer.dims.point)
        return self.stack.text(round(float(point[0])), round(float(point[1])))


class AirPreview(Preview):
    """What is left of the air of one energy, at the binning of the estimation; the object is left blank."""

    @staticmethod
    def make(workflow: Workflow, energy: int, result: StepResult) -> dict[str, Any]:
        """Read the energy again; return what `put` shows. Runs on any thread."""
        bin = int(result.numbers["bin"])
        scans = dict(enumerate(workflow.series.scans))
        data = renormalise(workflow.scan(energy), workflow.recipe, result, number=energy, around=scans)
        margin = workflow.recipe.absorbance.air_margin_px * data.data.shape[2] / 256
        body = fit_air(data.data, margin)[2]
        rest = np.zeros((len(scans[energy]), *data.data.shape[1:]), dtype=np.float32)
        rest[data.index] = np.where(body, 0, data.data)
        spread = float(np.std(rest[data.index][~body])) if not body.all() else 0.01
        return {"rest": rest, "energy": energy, "bin": bin, "top": 4 * spread}

    def put(self, found: dict[str, Any]) -> None:
        """Show the layer."""
        scan = self._session.scan
        if scan is None:
            return
        rest, energy, bin = found["rest"], int(found["energy"]), int(found["bin"])
        n_energies, n_angles = scan.stack.shape[:2]
        blank = np.zeros(rest.shape[1:], dtype=np.float32)

        def read(e: int, angle: int) -> npt.NDArray[np.float32]:
            return rest[angle] if e == energy and angle < len(rest) else blank

        data = lazy_frames(read, (n_energies, n_angles, *rest.shape[1:]), np.float32)
        place = geometry(scan.series)
        place |= _over_frames(scan.series, energy, bin, place)
        name = f"air residual at {scan.series.scans[energy].energy_ev:g} eV"
        top = max(float(found["top"]), 1e-6)
        self._put(data, {"name": name, "colormap": "PiYG", "contrast_limits": (-top, top), **place})


class MaskPreview(Preview):
    """The pixels of the camera that are left out at an energy."""

    def put(self, energy: int, result: StepResult) -> bool:
        """Show the layer; return whether the result of an energy says anything about it."""
        scan, viewer, state = self._session.scan, self._session.viewer, self._session.state
        if scan is None or viewer is None or "bad_pixels" not in result.arrays:
            return False
        own = scan.series.scans[energy]
        mask = mask_from_runs(result.arrays["bad_pixels"], own.frames.frame_shape)
        mask = seen_as(mask, scan.series.frame_shape, pixel_width(usual_scan(scan.series.scans), own))
        mask = mask.astype(np.float32)
        workflow = self._session.workflow
        if workflow is not None and state is not None and state.manual.mask is not None:
            mask = np.maximum(mask, workflow.journal.get_array(state.manual.mask).astype(np.float32))
        options = {"name": "pixels left out", "colormap": "red", "opacity": 0.7, "blending": "additive"}
        self._put(mask, {**options, "contrast_limits": (0.0, 1.0)})
        return True
