"""Where a fruit is in one frame, and in what light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .paint import GOLDEN_ANGLE, Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """A camera without perspective, and a lamp."""

    rotation: Floats  # (3, 3) from the fruit's axes to right, up and towards the viewer
    centre: tuple[float, float]  # what is in the middle of the frame, right and up, in radii
    scale: float  # pixels in one radius
    frame_px: int  # width and height of the frame
    light: Floats  # (3,) unit vector towards the lamp, in the viewer's axes
    tint: Floats  # (3,) colour and strength of the lamp

    def project(self, points: Floats) -> Floats:
        """Bring points (3, ...) of the fruit to column, row and depth towards the viewer."""
        seen = turn(self.rotation, points)
        seen[0] = self.frame_px / 2 + (seen[0] - self.centre[0]) * self.scale
        seen[1] = self.frame_px / 2 - (seen[1] - self.centre[1]) * self.scale
        return seen


def turn(matrix: Floats, vectors: Floats) -> Floats:
    """Multiply (m, 3) by (3, ...) without BLAS, whose threads cost more than they save here."""
    return np.asarray(np.einsum("ij,j...->i...", matrix, vectors))


def frame_view(
    outline: Floats, rng: np.random.Generator, *, number: int, lies: float, frame_px: int
) -> View:
    """Turn, crop and light a fruit with the given outline (3, n_points) for one frame."""
    # The golden angle between two frames lets any few of them show all sides.
    spin = number * GOLDEN_ANGLE + rng.normal(0, 0.1)
    tilt, roll = np.radians([rng.uniform(-18, 48), lies + rng.uniform(-22, 22)])
    rotation = _rotation(spin, tilt, roll)
    seen = turn(rotation[:2], outline)
    low, high = seen.min(axis=1), seen.max(axis=1)
    scale = rng.uniform(0.81, 0.89) * frame_px / float((high - low).max())
    right, up = ((low + high) / 2).tolist()
    lamp = np.asarray([-0.5, 0.68, 0.72]) + rng.normal(0, 0.09, 3)
    tint = rng.uniform(0.92, 1.08) * (1 + rng.normal(0, 0.015, 3))
    return View(
        rotation=rotation,
        # A little above the middle, so that the shadow has ended before the lower border.
        centre=(right, up - 0.022 * frame_px / scale),
        scale=scale,
        frame_px=frame_px,
        light=(lamp / np.linalg.norm(lamp)).astype(np.float32),
        tint=tint.astype(np.float32),
    )


def _rotation(spin: float, tilt: float, roll: float) -> Floats:
    """Spin around the stem axis, tip the stem towards the viewer, then roll in the picture."""
    cos, sin = np.cos, np.sin
    spun = np.asarray([[cos(spin), -sin(spin), 0], [sin(spin), cos(spin), 0], [0, 0, 1]])
    tipped = np.asarray([[1, 0, 0], [0, sin(tilt), cos(tilt)], [0, -cos(tilt), sin(tilt)]])
    rolled = np.asarray([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
    return np.asarray(rolled @ tipped @ spun, np.float32)
