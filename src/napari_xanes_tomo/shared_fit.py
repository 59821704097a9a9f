"""What all angles of an energy share, from the normal equations of every projection.

Each projection has a gain and a level of its own; both are eliminated before the rest is solved for together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .agreement import LinearFit, solve_normal
from .model import FloatArray

__all__ = ["NUMBERS", "Solved", "solve_shared"]

NUMBERS = 9
"""How many numbers all angles share, see `Solved`."""
_BLOCKS = 12  # contiguous blocks of angles left out in turn for the standard errors
_CORRELATED = 4.0  # pixels are correlated after the band-pass: a mean over N of them is this much less certain


@dataclass(frozen=True)
class Solved:
    """What all angles of an energy share, with errors; and each angle by itself.

    Attributes
    ----------
    value, covariance : (9,), (9, 9) arrays
        ``[scale, roll, ty, a, b, angle, pitch, blur, steep]``, see `agreement.registration_equations`: a horizontal
        displacement ``a cos(theta) + b sin(theta)``. Of what has no image the value is 0 and the variance infinite.
    rms : (n,) array
        What is left of each projection, root mean square.
    correlation, contrast : float
        Medians over the projections: correlation with the template, and 1 + gain.
    shift, shift_sigma : (n, 2) arrays
        ``[dy, dx]`` of each projection beyond what is shared, common-grid px, and its standard error.
    """

    value: FloatArray
    covariance: FloatArray
    rms: FloatArray
    correlation: float
    contrast: float
    shift: FloatArray
    shift_sigma: FloatArray


def solve_shared(
    fit: LinearFit, theta_deg: FloatArray, held: Mapping[int, tuple[float, float]], noise: FloatArray | float = 0.0
) -> Solved:
    """Solve for what all angles share, each with a gain and level of its own, with jackknife covariances.

    Angles that agree with the rest less well than chance allows are given less weight (Huber). What is `held` at a
    value is not fitted, but its standard deviation is carried over to what is. `noise` is the part of each angle's cost
    that the template's noise is known to be; the correlation is the one without it.
    """
    t = np.deg2rad(np.asarray(theta_deg, dtype=float))
    n, k = len(t), NUMBERS
    # The horizontal displacement of an angle is a cos + b sin of what is shared.
    expand = np.zeros((n, 10, k + 2))
    for row, column in ((0, 0), (1, 1), (2, 2), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
        expand[:, row, column] = 1
    expand[:, 3, 3], expand[:, 3, 4] = np.cos(t), np.sin(t)
    own, own_rhs = fit.normal.sum(axis=1), fit.rhs.sum(axis=1)
    cost, count = fit.cost.sum(axis=1), fit.count.sum(axis=1)
    normal = expand.transpose(0, 2, 1) @ own @ expand
    rhs = (own_rhs[:, None, :] @ expand)[:, 0]
    # Eliminate gain and level of every angle (Schur complement).
    _, inverse = solve_normal(normal[:, k:, k:], rhs[:, k:])
    inverse = np.where(np.isfinite(inverse), inverse, 0.0)
    cross = normal[:, :k, k:]
    inner = (inverse @ rhs[:, k:, None])[:, :, 0]
    reduced = normal[:, :k, :k] - cross @ inverse @ cross.transpose(0, 2, 1)
    right = rhs[:, :k] - (cross @ inner[:, :, None])[:, :, 0]
    left_over = cost - np.einsum("ni,ni->n", inner, rhs[:, k:])
    fixed = np.zeros(k)
    for number, (value, _) in held.items():
        fixed[number] = value
    # A column without an image is all zeros: nothing is known about its number, and it stays at zero.
    blank = np.einsum("nii->i", reduced) <= 0
    free = np.array([i for i in range(k) if i not in held and not blank[i]])

    def solve(total: FloatArray, vector: FloatArray) -> FloatArray:
        size = np.sqrt(np.maximum(np.diag(total), 1e-300))
        scaled = total / size[:, None] / size
        return np.asarray(
            (np.linalg.pinv(scaled, rcond=1e-12, hermitian=True) @ (vector / size[:, None])) / size[:, None]
        )

    def estimate(weight: FloatArray) -> FloatArray:
        total, vector = np.einsum("n,nij->ij", weight, reduced), weight @ right
        out = fixed.copy()
        out[free] = solve(total[np.ix_(free, free)], (vector - total @ fixed)[free, None])[:, 0]
        return out

    robust = np.ones(n)
    solution: FloatArray = fixed
    rms: FloatArray = np.zeros(n)
    for _ in range(4):
        solution = estimate(robust)
        rest = left_over - 2 * right @ solution + np.einsum("i,nij,j->n", solution, reduced, solution)
        rms = np.sqrt(np.maximum(rest, 0) / np.maximum(count, 1e-9))
        middle = np.median(rms)
        scatter = 1.4826 * np.median(np.abs(rms - middle)) + 0.05 * middle + 1e-12
        robust = np.minimum(1.0, 2.5 * scatter / np.maximum(np.abs(rms - middle), 1e-12))
    blocks = np.array_split(np.arange(n), min(_BLOCKS, n))
    estimates = []
    for block in blocks:
        keep = robust.copy()
        keep[block] = 0
        estimates.append(estimate(keep))
    off = np.array(estimates) - np.mean(estimates, axis=0)
    covariance = (len(blocks) - 1) / len(blocks) * off.T @ off
    covariance[blank, blank] = np.inf
    # What is held is known only so well: that is an error of the others, as far as they depend on it.
    total = np.einsum("n,nij->ij", robust, reduced)
    for number, (_, spread) in held.items():
        if spread > 0:
            pull = np.zeros(k)
            pull[free] = -solve(total[np.ix_(free, free)], total[free, number][:, None])[:, 0]
            pull[number] = 1
            covariance += spread**2 * np.outer(pull, pull)
    # The derivatives are those of the template; where the data have another contrast, theirs are larger or smaller.
    gain = 1 + inner[:, 0]
    contrast = float(np.clip(np.median(gain), 0.2, 5.0))
    signal = gain**2 * normal[:, k, k]
    correlation = float(
        np.median(np.sqrt(signal / np.maximum(signal + np.maximum(left_over - noise, 0), 1e-30)) * np.sign(gain))
    )
    # Every angle by itself, beyond what all share.
    alone = own_rhs - (own @ (expand[:, :, :k] @ solution)[:, :, None])[:, :, 0]
    chosen = np.array([2, 3, 8, 9])
    shift, own_inverse = solve_normal(own[:, chosen[:, None], chosen], alone[:, chosen])
    shift_variance = own_inverse[:, (0, 1), (0, 1)] * (_CORRELATED * rms**2)[:, None]
    unit = np.where(np.arange(k) < 8, contrast, 1.0)
    return Solved(
        solution / unit,
        covariance / unit[:, None] / unit,
        rms,
        correlation,
        contrast,
        shift[:, :2] / contrast,
        np.sqrt(shift_variance) / contrast,
    )
