"""The displacements of all projections of a tomogram solved together, and their errors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .model import FloatArray
from .reprojection import FINE_PX, Fit, Scene, orbit

__all__ = ["Coupled", "noise_left"]

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
_RESAMPLING_PX = 0.001  # what halving and resampling leave without any noise, pixels of those frames
_CENTER_PX = 0.001  # the same for the rotation axis, where it does not average out


class Coupled:
    """The displacements of all projections, solved together; see `Scene.coupling`.

    What cannot be determined (a constant in y, cosine and sine in x) is kept out of the solution.
    """

    def __init__(self, scene: Scene, model: F32, information: FloatArray) -> None:
        self.model, self.usable = model, scene.usable
        n = len(model)
        self.modes = []
        for axis in (0, 1):
            gauge = np.ones((n, 1)) if axis == 0 else orbit(scene.theta, constant=False)
            root = self._root(information[:, axis])
            free = np.linalg.qr(root[:, None] * gauge, mode="complete")[0][:, gauge.shape[1] :]
            value, vector = np.linalg.eigh(free.T @ (np.eye(n) - scene.coupling(model, axis)) @ free)
            self.modes.append((value, free @ vector))

    def _root(self, information: FloatArray) -> FloatArray:
        """Square roots of the information of each projection; none is without."""
        known = information[self.usable]
        return np.asarray(np.sqrt(np.maximum(information, 1e-3 * np.median(known) + 1e-30)))

    def solve(self, step: FloatArray, information: FloatArray, floor: float) -> FloatArray:
        """Turn the steps of each projection for itself (n, 2) into those of all together."""
        out = np.empty_like(step)
        for axis, (value, vector) in enumerate(self.modes):
            root = self._root(information[:, axis])
            size = 20 * np.median(np.abs(step[self.usable, axis]))
            together = np.where(self.usable, np.clip(step[:, axis], -size, size), 0.0)
            solved = vector @ ((vector.T @ (root * together)) / np.maximum(value, floor)) / root
            out[:, axis] = np.where(self.usable, solved + step[:, axis] - together, step[:, axis])
        return out

    def together(self, past: list[tuple[FloatArray, FloatArray]], information: FloatArray, floor: float) -> FloatArray:
        """Return the next step (n, 2) from the last one of `past`, which holds displacements and the steps asked there.

        Where the coupling is not quite what it was computed to be (gain and slopes take their part, rows that were not
        recorded come from the model), slow drifts would come in slowly or run away: what the last steps did about them
        tells (Anderson 1965, doi 10.1145/321296.321305), each axis for itself.
        """
        solved = [self.solve(asked, information, floor) for _, asked in past]
        out = solved[-1].copy()
        for axis in (0, 1):
            if len(past) < 2:
                continue
            root = np.where(self.usable, self._root(information[:, axis]), 0.0)
            moves = np.stack([b[0][:, axis] - a[0][:, axis] for a, b in pairwise(past)], axis=1)
            changes = np.stack([b[:, axis] - a[:, axis] for a, b in pairwise(solved)], axis=1)
            part = np.linalg.lstsq(root[:, None] * changes, root * out[:, axis], rcond=1e-3)[0]
            out[:, axis] -= (moves + changes) @ part
        return out

    def errors(
        self, fit: Fit, noise: FloatArray, theta: FloatArray, held_out: Fit, shared: FloatArray | float = 0.0
    ) -> tuple[FloatArray, float, FloatArray]:
        """Return standard errors (n, 2), that of the rotation centre, and the bound (n, 2).

        The formal covariance is that of the coupled fit with the measured noise. Two halves of the rows, in bands that
        take turns, answer independently, and so does each projection against the volume it had no part in: where they
        differ by more than their formal errors allow, the errors are that much larger. `shared` is what the noise of
        straight structures that were taken out adds to the variance in x, see `profile_noise`.
        """
        n, use = len(theta), self.usable
        sigma, bound = np.empty((n, 2)), np.empty((n, 2))
        constants = orbit(theta, constant=True)
        center = float("nan")
        for axis, (value, vector) in enumerate(self.modes):
            information = np.maximum(fit.information[:, :, axis], 1e-30)
            root = self._root(information[0])
            score = noise * (_score_noise(self.model, axis) + (shared if axis == 1 else 0.0))
            value = np.maximum(value, 0.05)
            # Newton: s = A^-1 b with A = root (1 - K) root and cov(b) = A * noise.
            half = (vector / np.sqrt(value)) @ vector.T
            cov = (half * score) @ half / root[:, None] / root[None, :]
            gauge = np.ones((n, 1)) if axis == 0 else constants
            known = np.linalg.pinv(gauge * use[:, None]) * use  # of the projections that were used
            pull = np.eye(n) - gauge @ known
            formal = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", pull, cov, pull, optimize=True), 0))
            bound[:, axis] = np.sqrt(noise / information[0])
            parts = []
            for k in (1, 2):
                r = self._root(information[k])
                solved = vector @ ((vector.T @ (r * np.where(use, fit.halves[k - 1, :, axis], 0.0))) / value) / r
                parts.append(solved)
            difference = parts[0] - parts[1]
            expected = formal**2 * information[0] * (1 / information[1] + 1 / information[2])
            rest = pull @ difference
            ratio = _local_mean(np.minimum(rest**2 / np.maximum(expected, 1e-30), 25.0), theta, use)
            alone = held_out.step[:, axis] - np.median(held_out.step[use, axis])
            free = np.median(((pull @ alone) ** 2 * information[0] / (2 * score))[use]) / 0.455
            empirical = np.sqrt(np.maximum(1.0, np.maximum(ratio, free)))
            sigma[:, axis] = np.hypot(formal * empirical, _RESAMPLING_PX)
            if axis == 1:
                functional = known[2]
                stays = float(functional @ held_out.step[:, axis])
                center = float(
                    np.sqrt(
                        functional @ cov @ functional + (functional @ difference) ** 2 / 4 + stays**2 + _CENTER_PX**2
                    )
                )
        return sigma, center, bound


def _local_mean(values: FloatArray, theta: FloatArray, use: Bool) -> FloatArray:
    """Mean over neighbouring angles, a quarter of them all; drawn to the mean of all as far as chance explains it.

    Parameters
    ----------
    values : (n,) array
        Squares of normal deviates, or more.
    theta, use : (n,) arrays
        Angles, and whose values count.
    """
    order = np.argsort(theta, kind="stable")
    reach = max(4, len(values) // 8)
    ones = np.full(2 * reach + 1, 1.0)
    weight = np.convolve(np.pad(use[order].astype(float), reach, mode="reflect"), ones, mode="valid")
    total = np.convolve(np.pad(np.where(use, values, 0.0)[order], reach, mode="reflect"), ones, mode="valid")
    middle = float(values[use].mean())
    mean = np.where(weight > 0, total / np.maximum(weight, 1.0), middle)
    chance = 2 * middle**2 / (2 * reach + 1)
    kept = max(0.0, 1 - chance / max(float(np.mean((mean - middle) ** 2)), 1e-30))
    out = np.empty_like(values)
    out[order] = middle + kept * (mean - middle)
    return out


def _score_noise(model: F32, axis: int) -> float:
    """Part of the noise variance that passes the filters of the frames, seen through the gradient of `model`."""
    from .agreement import smooth

    some = -np.gradient(model[:: max(1, len(model) // 24)], axis=1 + axis)
    # FINE_PX, and the weights of `halve`: together a blur of 0.8 px
    passed = smooth(np.ascontiguousarray(some), float(np.hypot(FINE_PX, 0.4)))
    return float(np.sum(passed**2, dtype=np.float64) / max(np.sum(some**2, dtype=np.float64), 1e-30))


def noise_left() -> float:
    """Part of the variance of white noise that passes the blur of the fit."""
    return float(1 / (4 * np.pi * FINE_PX**2))
