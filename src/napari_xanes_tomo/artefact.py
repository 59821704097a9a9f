"""What energies that lie beside the others add to the maps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .model import FloatArray

__all__ = ["added_components", "displaced_lines"]

F32 = npt.NDArray[np.float32]


def displaced_lines(lines: F32, theta_deg: npt.ArrayLike, by: npt.ArrayLike) -> F32:
    """Return projections (angle, row, column) of the same object displaced, px.

    Parameters
    ----------
    lines : (angle, row, column) array
    theta_deg : (angles,) array
    by : (4,) array
        Along y, z, x: positive moves the content down and along the axes. Then the error of the rotation centre:
        positive moves every projection to the right.
    """
    from scipy.ndimage import shift

    dy, dz, dx, centre = (float(v) for v in np.asarray(by, dtype=float))
    if not any((dy, dz, dx, centre)):
        return lines
    t = np.deg2rad(np.asarray(theta_deg, dtype=float))
    across = dx * np.cos(t) + dz * np.sin(t) + centre
    moved = [shift(frame, (dy, c), order=3, mode="nearest") for frame, c in zip(lines, across, strict=True)]
    return np.asarray(moved, dtype=np.float32).reshape(lines.shape)


def added_components(
    lines: F32,
    theta_deg: FloatArray,
    share: FloatArray,
    strength: FloatArray,
    weights: Mapping[str, FloatArray],
    displacement: FloatArray,
) -> dict[str, F32]:
    """Return what displaced energies add to the sinograms of components: {name: (angle, row, column)}.

    Parameters
    ----------
    lines : (angle, row, column) array
        The object's line integrals, mean of the energies.
    theta_deg : (angles,) array
    share : (energy, angle) array
        What a projection counts for at its energy.
    strength : (energies,) array
        Attenuation relative to that of `lines`.
    weights : dict of str to (energies,) array
        Of the components.
    displacement : (energies, 4) array
        As in `displaced_lines`; energies with 0 add nothing.
    """
    out = {name: np.zeros_like(lines) for name in weights}
    for e in np.flatnonzero(np.any(displacement != 0, axis=1)):
        if not any(w[e] for w in weights.values()):
            continue
        more = displaced_lines(lines, theta_deg, displacement[e]) - lines
        more *= (strength[e] * share[e]).astype(np.float32)[:, None, None]
        for name, w in weights.items():
            out[name] += np.float32(w[e]) * more
    return out
