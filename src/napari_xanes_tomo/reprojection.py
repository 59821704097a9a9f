"""Projections of one tomogram against the reprojection of the volume made from them.

A filter along the rows of all projections is a filter of the volume, so it changes nothing in the comparison, but a
high-pass takes away what does not turn with the object: background, slow illumination, the mean of what lies outside
the field. It also takes away most of what is known about slow drifts, and is used only where the data ask for it.

The answer of all projections to all displacements is one matrix: a displacement changes a projection, the changed
projection changes the volume, and so the reprojection at every other angle. Solving with it (a Newton step for all
projections together) finds the slow drifts that projection by projection take dozens of iterations, and its inverse is
the covariance of the answer, slow drifts included.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft2, next_fast_len, rfft2

from .agreement import band_pass, displacement_equations, object_support, smooth, solve_normal
from .model import Alignment, FloatArray
from .parallel import in_threads
from .projector import Projector, filter_response
from .reconstruction import angular_weights
from .reprojection_kernels import (
    air_sums,
    frame_products,
    gradient_power,
    left_over,
    lines_to_images,
    pixel_weights,
    row_power,
)
from .resample import place

__all__ = ["FINE_PX", "Fit", "Scene", "gauge_free", "orbit"]

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
FINE_PX = 0.7  # inner width of the band-pass, pixels of the scene: below it nothing is shared between projections
_EDGE = 3  # pixels at the border of a frame that are not compared
_WHOLE = 0.9  # part of the half turn that must be covered for a filtered back-projection to be taken as it is
_SOLVES = 24  # steps of the reconstruction where angles are missing
_SOLVES_ON = 8  # the same from the last volume of frames that were placed almost the same
_AT_THE_SIDE = 0.05  # of what the thickest parts absorb: more than that at a side is the object
_AROUND = 9  # frames, one of which has to show the end of the object
_SELDOM = 0.02  # of the frames
_FEWEST_WHOLE = 8  # rows that the field does not cut
_ROWS = 8  # rows the coupling of the projections is computed from


def orbit(theta_deg: FloatArray, *, constant: bool) -> FloatArray:
    """(n, 2 or 3) columns ``[cos, sin(, 1)]`` of the angles."""
    t = np.deg2rad(theta_deg)
    columns = [np.cos(t), np.sin(t)] + ([np.ones_like(t)] if constant else [])
    return np.stack(columns, axis=1)


def gauge_free(change: FloatArray, theta_deg: FloatArray, weight: FloatArray | None = None) -> FloatArray:
    """Take out of a change (n, 2) what cannot be determined: a constant in y, cosine and sine in x."""
    w = np.ones(len(change)) if weight is None else weight
    out = change.copy()
    out[:, 0] -= np.average(change[:, 0], weights=w)
    basis = orbit(theta_deg, constant=True)
    root = np.sqrt(w)
    fit = np.linalg.lstsq(basis * root[:, None], change[:, 1] * root, rcond=None)[0]
    out[:, 1] -= basis[:, :2] @ fit[:2]
    return out


@dataclass(frozen=True)
class Fit:
    """Every projection fitted to its own reprojection.

    Attributes
    ----------
    step : (n, 2) array
        Displacement of the data against the reprojection, ``[dy, dx]``, each projection for itself.
    halves : (2, n, 2) array
        The same from two halves of the rows, bands that take turns.
    information : (3, n, 2) array
        Inverse variance of a displacement for unit noise: both halves, the first, the second.
    gain : (n,) array
        Contrast of the data over that of the reprojection.
    residual : (n,) array
        Mean squared difference that is left where the object may be.
    unexplained : (n,) array
        The same over the mean square of the data.
    """

    step: FloatArray
    halves: FloatArray
    information: FloatArray
    gain: FloatArray
    residual: FloatArray
    unexplained: FloatArray


class Scene:
    """The projections of one tomogram, and where they are compared.

    Parameters
    ----------
    data : (n, y, x) float32 array
        Projections, contrast positive.
    theta_deg : (n,) array
    coarse_px : float
        Outer width of the band-pass, pixels; 0 keeps everything that is slow (and with it most of what is known about
        slow drifts).
    """

    def __init__(self, data: F32, theta_deg: FloatArray, *, coarse_px: float = 0.0) -> None:
        self.theta = theta_deg
        self.shape = (data.shape[1], data.shape[2])
        self.coarse_px = coarse_px
        self.slopes = coarse_px == 0
        self.usable: Bool = np.ones(len(data), dtype=bool)
        self.projector = Projector(self.shape[1], theta_deg)
        order = np.argsort(theta_deg, kind="stable")
        self.halves = (np.sort(order[0::2]), np.sort(order[1::2]))
        self.half_projectors = tuple(Projector(self.shape[1], theta_deg[k]) for k in self.halves)
        self.footprint: Bool = self._circle()
        self.set_data(data)
        self.open()

    def set_data(self, data: F32) -> None:
        """Use other frames of the same size."""
        self.plain = data
        self.steep: F32 | None = None
        self._last: tuple[F32, Bool, F32 | None] | None = None
        self.data = band_pass(data, FINE_PX, self.coarse_px) if self.coarse_px else smooth(data, FINE_PX)

    def banded(self, coarse_px: float) -> Scene:
        """Return the same scene in another band, without bounds for the object."""
        other = copy(self)
        other.coarse_px, other.slopes = coarse_px, coarse_px == 0
        other.set_data(self.plain)
        if self.steep is not None:
            other.steep = self.steep - smooth(self.steep, coarse_px)
        other.unbind()
        return other

    # ------------------------------------------------------------------------------------------ the scene

    def _circle(self) -> Bool:
        c = np.arange(self.shape[1]) - (self.shape[1] - 1) / 2
        return np.asarray(np.hypot(c[:, None], c) < self.shape[1] / 2)

    def open(self) -> None:
        """Compare whole frames and let the object be anywhere."""
        self.rows = (0, self.shape[0])
        self.mask: F32 | None = None
        self.body: F32 = np.ones(self.shape, dtype=np.float32)
        self.compared: F32 = self.body
        self.whole: Bool = np.ones(self.shape[0], dtype=bool)
        self.object_rows: Bool = self.whole
        self.ring: Bool = np.zeros(self.shape, dtype=bool)
        self.thickness: F32 = np.zeros((0, *self.shape), dtype=np.float32)
        self.footprint = self._circle()

    def unbind(self) -> None:
        """Let the object be anywhere in the rows it covers, and compare all of them."""
        self.mask, self.footprint = None, self._circle()
        self.compared = np.ones_like(self.body) * self.whole[slice(*self.rows), None]

    def look(self, shift: FloatArray) -> None:
        """Settle, from displacements that are about right, where the object is and which rows it covers."""
        from scipy.ndimage import binary_dilation

        self.open()
        self.steep = None
        placed = self._place(self.plain, shift)
        volume = self.projector.filtered(placed, "hann", angular_weight=self._angular(self.projector, self.usable))
        support = object_support(volume)
        mass = np.median(smooth(placed, 1.0).clip(0).sum(axis=2), axis=0)
        filled = (support > 0).any(axis=(1, 2)) & (mass > 0.01 * mass.max())
        self.thickness = self.projector.forward(volume * support)
        body = smooth(self.thickness.max(axis=0)[None], 1.0)[0]
        body = body > 0.03 * max(float(body.max()), 1e-30)
        if not filled.any() or not body.any():
            return
        rows = np.flatnonzero(filled)
        margin = max(2, round(0.03 * self.shape[0]))
        top, bottom = max(0, int(rows[0]) - margin), min(self.shape[0], int(rows[-1]) + 1 + margin)
        # Rows that many frames did not record (an object that leaves the field, a post below it) tell little.
        seen = np.flatnonzero(self._inside(shift[self.usable], _EDGE)[0].mean(axis=0) >= 0.75)
        if len(seen) and min(bottom, seen[-1] + 1) - max(top, seen[0]) >= 8:
            top, bottom = max(top, int(seen[0])), min(bottom, int(seen[-1]) + 1)
        self.rows = (top, bottom)
        self.mask = support[top:bottom]
        footprint = self.mask.any(axis=0)
        self.footprint = np.asarray(footprint & self._circle()) if footprint.any() else self._circle()
        grown = binary_dilation(body, iterations=3)
        self.body = grown[top:bottom].astype(np.float32)
        far = max(4, round(0.12 * self.shape[1]))
        near = binary_dilation(grown, iterations=far)
        self.ring = np.asarray(near & ~binary_dilation(grown, iterations=2))
        # The air beside the object settles level and slopes: on the object alone they would take the part of slow
        # drifts, of which little else is known.
        self.compared = near[top:bottom].astype(np.float32)
        # Every row is a slice of its own: one that the field cuts at the sides has no reprojection that holds.
        self.object_rows = filled
        whole = self._whole(shift)
        if (whole & filled)[top:bottom].sum() >= _FEWEST_WHOLE:
            self.whole = whole
            self.body *= whole[top:bottom, None]
            self.compared *= whole[top:bottom, None]

    def _whole(self, shift: FloatArray) -> Bool:
        """(y,) rows of the common grid in which the object does not go beyond the sides of the frames.

        It may leave some, as long as one of the frames around them shows its end.
        """
        from scipy.ndimage import minimum_filter1d

        height = self.shape[0]
        y, order = np.arange(height), np.argsort(self.theta, kind="stable")
        limit = _AT_THE_SIDE * float(np.percentile(self.plain, 99))
        cut = np.zeros((len(shift), height), dtype=bool)
        for side in (self.plain[:, :, :_EDGE], self.plain[:, :, -_EDGE:]):
            seen = np.stack([np.interp(y + dy, y, f) for f, dy in zip(side.mean(axis=2), shift[:, 0], strict=True)])
            cut |= minimum_filter1d(seen[order], _AROUND, axis=0, mode="nearest") > limit
        return np.asarray(cut.mean(axis=0) < _SELDOM)

    def air(self, shift: FloatArray) -> Bool:
        """(n, y, x) where a frame shows nothing of the object, three pixels away from it; all where none was found."""
        from .air import dilated

        n, (height, width) = len(shift), self.shape
        if not len(self.thickness):
            return np.ones((n, height, width), dtype=bool)
        thick = smooth(self.thickness, 1.0)
        each = dilated(thick > 0.03 * float(thick.max()), 3.0)
        out = np.ones((n, height, width), dtype=bool)
        for i, (dy, dx) in enumerate(np.clip(np.rint(shift), [-height, -width], [height, width]).astype(int)):
            here, there = (
                (slice(max(0, d), min(s, s + d)) for d, s in ((dy, height), (dx, width))),
                (slice(max(0, -d), min(s, s - d)) for d, s in ((dy, height), (dx, width))),
            )
            out[i][tuple(here)] = ~each[i][tuple(there)]
        return out

    def _place(self, frames: F32, shift: FloatArray) -> F32:
        return place(frames, Alignment(shift, np.zeros_like(shift)), rows=self.rows, grid_shape=self.shape)

    def _inside(self, shift: FloatArray, edge: float) -> tuple[Bool, Bool]:
        """(n, rows) and (n, x): which rows and columns of the common grid a frame has recorded."""
        height, width = self.shape
        y = np.arange(*self.rows)[None, :] + shift[:, :1]
        x = np.arange(width)[None, :] + shift[:, 1:]
        return (y >= edge) & (y <= height - 1 - edge), (x >= edge) & (x <= width - 1 - edge)

    def weight(self, shift: FloatArray) -> F32:
        """Where data and reprojection are compared: the object and the air around it, on what every frame recorded."""
        y, x = self._inside(shift, _EDGE)
        out = np.empty((len(shift), *self.compared.shape), np.float32)
        in_threads(len(shift), lambda a, b: pixel_weights(a, b, self.compared, y, x, out))
        return out

    def cut(self, shift: FloatArray) -> bool:
        """Whether one frame or another did not record a twentieth of where the object may be."""
        y, x = self._inside(shift, 1.0)
        seen = np.einsum("ny,yx,nx->n", y.astype(np.float32), self.body, x.astype(np.float32), optimize=True)
        return bool((seen < 0.95 * self.body.sum()).any())

    def background(self, shift: FloatArray) -> F32:
        """Return the frames less the plane fitted to the air around the object, each frame for itself."""
        from .air import plane

        height, width = self.shape
        rows, self.rows = self.rows, (0, height)
        y_in, x_in = self._inside(shift, 1.0)
        placed = self._place(self.plain, shift)
        self.rows = rows
        n = len(shift)
        c: FloatArray = np.zeros((n, 3))
        limit = np.full(n, np.inf)

        def air() -> FloatArray:
            sums = np.zeros((n, 10))
            in_threads(n, lambda a, b: air_sums(a, b, placed, self.ring, y_in, x_in, c, limit, sums))
            return sums

        sums = air()
        for again in (True, False):
            rhs = sums[:, 6:9]
            c, inverse = solve_normal(sums[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]], rhs)
            # A plane must be held at three sides: where its slope could be anything only the level is taken.
            loose = ~np.isfinite(inverse).all(axis=(1, 2)) | (
                inverse[:, 1, 1] + inverse[:, 2, 2] > 60 * inverse[:, 0, 0]
            )
            count = np.maximum(sums[:, 0], 1.0)
            c[loose] = np.stack([rhs[:, 0] / count, 0 * count, 0 * count], axis=1)[loose]
            c[sums[:, 0] < 0.005 * height * width] = 0
            if again:
                limit = 2.5 * np.sqrt(air()[:, 9] / count)
                sums = air()
        # The plane was fitted on the common grid: bring it to the frame.
        half = width / 2
        c[:, 0] -= (c[:, 1] * shift[:, 0] + c[:, 2] * shift[:, 1]) / half
        return np.asarray(self.plain - plane(c, self.shape), dtype=np.float32)

    def _response(self, projector: Projector) -> FloatArray:
        """Return the ramp, level from where a line through the spectrum no longer meets its neighbours on.

        Beyond 1 / (D dtheta) a projection shares nothing with others; the ramp would give it more than its own weight.
        """
        return np.asarray(np.minimum(filter_response("ramp", projector.filter_length), self._alone(projector)))

    def _alone(self, projector: Projector) -> float:
        """Return the frequency, cycles/pixel, from which on a projection shares nothing with its neighbours."""
        share = self._angular(projector, np.ones(len(projector.theta_deg), dtype=bool))
        diameter = float(2 * np.sqrt(self.footprint.sum() / np.pi))
        return 1.0 / (float(np.median(share)) * diameter)

    def shared(self) -> bool:
        """Whether neighbouring projections have enough in common to predict each other."""
        covered = float(self._angular(self.projector, self.usable).sum()) / np.pi
        return self._alone(self.projector) > 0.2 and covered > _WHOLE

    @staticmethod
    def _angular(projector: Projector, usable: Bool) -> FloatArray:
        return np.asarray(angular_weights(projector.theta_deg, usable=usable))

    def _volume(
        self, projector: Projector, placed: F32, usable: Bool, *, own: bool = True, begin: F32 | None = None
    ) -> F32:
        """Reconstruct; `own` where the projections compared have part in it: the level ramp keeps that at its share.

        Where angles are missing, `begin` is a volume to go on from.
        """
        weight = self._angular(projector, usable)
        covered = float(weight.sum() / np.pi) > _WHOLE
        response = self._response(projector) if own or not covered else filter_response("ramp", projector.filter_length)

        def back(lines: F32) -> F32:
            volume = projector.adjoint(lines, weight=weight, response=response)
            if self.mask is not None:
                volume *= self.mask
            return volume

        if covered:
            return back(placed)
        # A missing wedge takes mass and slow structure away: least squares within the bounds instead, every row for
        # itself (conjugate gradients, weighted as the back-projection; the level ramp keeps them well conditioned).
        if begin is None:
            volume = np.zeros((placed.shape[1], self.shape[1], self.shape[1]), np.float32)
            rest = back(placed)
        else:
            volume = begin.copy()
            rest = back(placed - projector.forward(volume))
        direction = rest.copy()
        size = np.einsum("rzx,rzx->r", rest, rest, dtype=np.float64)
        for _ in range(_SOLVES if begin is None else _SOLVES_ON):
            turned = back(projector.forward(direction))
            bend = np.einsum("rzx,rzx->r", direction, turned, dtype=np.float64)
            part = np.where(bend > 0, size / np.where(bend > 0, bend, 1.0), 0.0).astype(np.float32)[:, None, None]
            volume += part * direction
            rest -= part * turned
            before, size = size, np.einsum("rzx,rzx->r", rest, rest, dtype=np.float64)
            direction *= np.where(before > 0, size / np.where(before > 0, before, 1.0), 0.0).astype(np.float32)[
                :, None, None
            ]
            direction += rest
        return volume

    # ------------------------------------------------------------------------------------------- comparing

    def placed(self, shift: FloatArray, known: F32 | None = None) -> F32:
        """Return the frames on the common grid; what they did not record is filled from `known`, a model of them.

        `steep` is added: what they lack in absorbance, see `blurred.lost_to_blur`.
        """
        out = self._place(self.data, shift)
        if self.steep is not None:
            out += self.steep
        if known is not None and known.shape == out.shape:
            y, x = self._inside(shift, 1.0)
            for i in np.flatnonzero(~(y.all(axis=1) & x.all(axis=1))):
                out[i, ~y[i]] = known[i, ~y[i]]
                out[i][:, ~x[i]] = known[i][:, ~x[i]]
        return out

    def model(self, shift: FloatArray, known: F32 | None = None) -> tuple[F32, F32]:
        """Return the projections as placed and the reprojection of the volume made from them, (n, rows, x)."""
        placed = self.placed(shift, known)
        begin = None
        if self._last is not None:
            volume, usable, mask = self._last
            same = volume.shape[0] == placed.shape[1] and mask is self.mask and (usable == self.usable).all()
            begin = volume if same else None
        volume = self._volume(self.projector, placed, self.usable, begin=begin)
        self._last = (volume, self.usable.copy(), self.mask)
        return placed, self.projector.forward(volume)

    def explained(self, lines: F32, rows: npt.NDArray[np.intp]) -> F32:
        """Return the reprojection of the volume made of `lines` (n, some, x), the rows `rows` of `self.rows`."""
        part = copy(self)
        if self.mask is not None:
            part.mask = np.ascontiguousarray(self.mask[rows])
        return self.projector.forward(part._volume(self.projector, lines, self.usable))

    def noise_unexplained(self, shift: FloatArray) -> float:
        """Return what the volume leaves of frames of white noise of unit variance: median of the mean squares."""
        other = copy(self)
        white = np.random.default_rng(0).standard_normal(self.data.shape, dtype=np.float32)
        other.set_data(white)
        placed, model = other.model(shift)
        return float(np.median(other.compare(placed, model, shift).residual[self.usable]))

    def held_out_model(self, placed: F32) -> F32:
        """Return reprojections, each of the volume of the half of the angles it does not belong to."""
        model = np.zeros_like(placed)
        for k in (0, 1):
            model[self.halves[1 - k]] = self._other_half(placed, k)
        return model

    def _other_half(self, placed: F32, k: int) -> F32:
        """Return the reprojections of the volume of half `k` of the angles, at the angles of the other half."""
        part = self.halves[k]
        if not self.usable[part].any():
            return np.zeros((len(self.halves[1 - k]), *placed.shape[1:]), np.float32)
        volume = self._volume(self.half_projectors[k], placed[part], self.usable[part], own=False)
        return self.half_projectors[1 - k].forward(volume)

    def compare(self, placed: F32, model: F32, shift: FloatArray, *, keep_step: bool = False) -> Fit:
        """Fit displacement, gain and background of every projection to `model`.

        With `keep_step` the displacement is left in the residual: the misfit of the displacements as they are.
        """
        weight = self.weight(shift)
        fit = displacement_equations(
            placed, model, weight, second_rows=self._every_second_band(model, weight), slopes=self.slopes
        )
        steps, information = [], []
        gain: FloatArray = np.ones(len(shift))
        for part in (None, 0, 1):
            solution, inverse = fit.solve(part)
            gains = np.clip(1 + solution[:, 2], 0.3, 3.0)
            gain = gains if part is None else gain
            steps.append(solution[:, :2] / gains[:, None])
            variance = inverse[:, (0, 1), (0, 1)]
            fine = np.isfinite(variance) & (variance > 0)
            information.append(np.where(fine, 1 / np.where(fine, variance, 1.0), 0.0))
        first = 2 if keep_step else 0
        solution, _ = solve_normal(fit.normal.sum(axis=1)[:, first:, first:], fit.rhs.sum(axis=1)[:, first:])
        whole = np.zeros((len(shift), 6))
        whole[:, first : first + solution.shape[1]] = solution
        y, x = self._inside(shift, _EDGE)
        sums: FloatArray = np.empty((len(shift), 3))
        in_threads(len(shift), lambda a, b: left_over(a, b, placed, model, self.body, y, x, whole, sums))
        count, power, cost = sums.T
        return Fit(
            steps[0], np.stack(steps[1:]), np.stack(information), gain, cost / np.maximum(count, 1e-9),
            cost / np.maximum(power, 1e-30),
        )  # fmt: skip

    @staticmethod
    def _every_second_band(model: F32, weight: F32) -> Bool:
        """(rows,) True in the second and the fourth of four bands of rows that tell equally much."""
        told: FloatArray = np.empty((len(model), 2, model.shape[1]))
        in_threads(len(model), lambda a, b: gradient_power(a, b, weight, model, told))
        both = told.sum(axis=0)
        power = (both / np.maximum(both.sum(axis=1, keepdims=True), 1e-30)).sum(axis=0)
        band = np.floor(4 * (np.cumsum(power) - power / 2) / max(float(power.sum()), 1e-30))
        return np.asarray(band % 2 == 1) if power.sum() > 0 else np.arange(len(power)) % 2 == 1

    def held_out(self, shift: FloatArray, placed: F32 | None = None) -> Fit:
        """Fit every projection to the reprojection of the others; its displacement stays in the residual."""
        frames = self.placed(shift) if placed is None else placed
        return self.compare(frames, self.held_out_model(frames), shift, keep_step=True)

    def misfit(self, shift: FloatArray, placed: F32) -> float:
        """Median residual of every second projection, in the order of the angles, against the volume of the others."""
        asked = self.halves[1]
        fit = self.compare(placed[asked], self._other_half(placed, 0), shift[asked], keep_step=True)
        return float(np.median(fit.residual))

    def correlate(self, model: F32, limit: float) -> tuple[FloatArray, FloatArray]:
        """Where the content of every frame lies against `model`, pixels (n, 2), anywhere within `limit`.

        Unnormalised cross-correlation of whole frames, padded with zeros; also the correlation coefficient (n,).
        """
        height, width = self.shape
        top, bottom = self.rows
        size = (next_fast_len(2 * height, real=True), next_fast_len(2 * width, real=True))
        full = np.zeros(self.data.shape, np.float32)
        full[:, top:bottom] = model * self.body[None]
        out, score = np.empty((len(full), 2)), np.empty(len(full))
        reach = np.minimum(np.ceil([limit + 1, limit + 1]), [height - 1, width - 1]).astype(int)

        def work(first: int, end: int) -> None:
            a = rfft2(self.data[first:end], size)
            b = rfft2(full[first:end], size)
            corner = np.roll(irfft2(a * b.conj(), size), tuple(reach), axis=(1, 2))
            corner = corner[:, : 2 * reach[0] + 1, : 2 * reach[1] + 1]
            for i, c in enumerate(corner):
                k = np.unravel_index(int(np.argmax(c)), c.shape)
                at = [float(k[0] - reach[0]), float(k[1] - reach[1])]
                for axis in (0, 1):
                    if 0 < k[axis] < c.shape[axis] - 1:
                        line = c[:, k[1]] if axis == 0 else c[k[0]]
                        lo, mid, hi = (float(line[k[axis] + o]) for o in (-1, 0, 1))
                        bend = lo - 2 * mid + hi
                        at[axis] += 0.5 * (lo - hi) / bend if bend < 0 else 0.0
                out[first + i] = at
                norm = np.linalg.norm(self.data[first + i]) * np.linalg.norm(full[first + i])
                score[first + i] = c[k] / max(float(norm), 1e-30)

        in_threads(len(full), work)
        return out, score

    # -------------------------------------------------------------------------------------------- coupling

    def coupling(self, model: F32, axis: int) -> FloatArray:
        """(n, n) how much of a displacement of projection j along `axis` comes back in the reprojection at i.

        In units in which each projection's own information is 1: 0 is nothing. ``P_i B_j`` between the gradient images,
        written as an inner product of both smeared back over the slice, the ramp shared between the two.
        """
        n, rows, width = model.shape
        gradient = -np.gradient(model, axis=1 + axis) * self.whole[slice(*self.rows), None]
        power = np.empty((n, rows))
        in_threads(n, lambda a, b: row_power(a, b, gradient, power))
        total = np.cumsum(power.sum(axis=0))
        wanted = (np.arange(_ROWS) + 0.5) / _ROWS * total[-1]
        chosen = np.unique(np.minimum(np.searchsorted(total, wanted), rows - 1))
        lines = np.ascontiguousarray(gradient[:, chosen])
        own = power[:, chosen].sum(axis=1)
        size = self.projector.filter_length
        root = np.sqrt(self._response(self.projector))
        spectrum = np.fft.rfft(lines, size, axis=2) * root
        lines = np.fft.irfft(spectrum, size, axis=2)[:, :, :width].astype(np.float32)
        z, x = np.nonzero(self.footprint)
        # Every fourth point or so, scattered without pattern; fewer where there are many projections.
        wanted_points = max(500, int(len(z) / 4 * min(1.0, (180 / n) ** 2)))
        pick = np.random.default_rng(0).permutation(len(z))[:wanted_points]
        pick.sort()
        area = len(z) / len(pick)
        middle = (width - 1) / 2
        zs, xs = (z[pick] - middle).astype(np.float32), (x[pick] - middle).astype(np.float32)
        images = np.empty((n, lines.shape[1] * len(pick)), np.float32)
        t = np.deg2rad(self.theta)
        cos, sin = np.cos(t), np.sin(t)
        in_threads(n, lambda a, b: lines_to_images(a, b, lines, cos, sin, zs, xs, images))
        if self.mask is not None:  # every row has its own bounds
            images *= self.mask[chosen][:, z[pick], x[pick]].ravel()
        products = np.empty((n, n))
        in_threads(-(-n // 4), lambda a, b: frame_products(a, b, images, products))
        weight = np.sqrt(angular_weights(self.theta, usable=self.usable))
        scale = weight / np.sqrt(np.maximum(own, 1e-30))
        return np.asarray(area * products * scale[:, None] * scale[None, :])
