"""The skin of one fruit: coats of paint over a sphere, in colour and relief."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .fruits import Coat, Colour, Fruit

Floats = NDArray[np.float32]

GOLDEN_ANGLE = float(np.pi * (3.0 - np.sqrt(5.0)))
_N_ROWS = 144
"""Of texels, from stem to blossom."""
_N_WAVES = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Task:
    """What every pattern is given; arrays are of (n_texels,), row by row."""

    coat: Coat
    rng: np.random.Generator
    theta: Floats  # angle from the stem in radians
    phi: Floats  # angle around the axis in radians
    directions: Floats  # (3, n_texels), unit length, third axis towards the stem

    def noise(self, wavelength_degrees: float) -> Floats:
        """Sum plane waves through the sphere: seamless, about -1 to 1."""
        waves = self.rng.normal(size=(_N_WAVES, 3))
        waves *= 360.0 / wavelength_degrees / np.linalg.norm(waves, axis=1, keepdims=True)
        waves *= self.rng.uniform(0.6, 1.4, (_N_WAVES, 1))
        angles = np.einsum("wi,in->wn", waves.astype(np.float32), self.directions)
        angles += self.rng.uniform(0, 2 * np.pi, (_N_WAVES, 1)).astype(np.float32)
        return np.asarray(np.cos(angles).sum(axis=0) / np.sqrt(2.0 * _N_WAVES), np.float32)


def paint(fruit: Fruit, rng: np.random.Generator) -> Floats:
    """Lay the coats over each other: linear red, green, blue and relief, (4, rows, columns)."""
    theta, phi = (angles.ravel() for angles in sphere_grid(_N_ROWS))
    directions = [np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)]
    sphere = {"theta": theta, "phi": phi, "directions": np.stack(directions)}
    skin = np.zeros((4, theta.size), np.float32)
    skin[:3] = linear(fruit.skin.colour)[:, None]
    for coat in fruit.coats:
        weight = _PATTERNS[coat.pattern](_Task(coat=coat, rng=rng, **sphere))
        skin[:3] += coat.amount * weight * (linear(coat.colour)[:, None] - skin[:3])
        skin[3] += coat.relief * weight
    return skin.reshape(4, _N_ROWS, -1)


def linear(colour: Colour) -> Floats:
    """Bring sRGB to linear light, with the square as its curve: light adds up, sRGB does not."""
    return (np.asarray(colour, np.float32) / 255.0) ** 2


def sphere_grid(n_rows: int) -> tuple[Floats, Floats]:
    """Angles from the stem and around it, (n_rows, 2 * n_rows) each; no row is at a pole."""
    steps = (np.arange(2 * n_rows, dtype=np.float32) + 0.5) * np.float32(np.pi / n_rows)
    theta, phi = np.broadcast_arrays(steps[:n_rows, None], steps[None, :])
    return theta, phi


def _smoothstep(low: float, high: float, values: Floats) -> Floats:
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t))


def _blotches(task: _Task) -> Floats:
    mixed = task.noise(task.coat.size) + 0.4 * task.noise(task.coat.size / 3)
    return _smoothstep(-1.0, 1.0, mixed)


def _fuzz(task: _Task) -> Floats:
    # Texels are narrow at the poles, where grain would turn into rays.
    grain = task.rng.standard_normal(task.phi.size, np.float32) * np.sin(task.theta)
    return _smoothstep(-0.6, 1.2, task.noise(3 * task.coat.size) + 0.35 * grain)


def _cap(task: _Task) -> Floats:
    distance = (np.degrees(task.theta) - task.coat.at) / task.coat.size
    return np.asarray(np.exp(-((distance * (1.0 + 0.25 * task.noise(40.0))) ** 2)))


def _side(task: _Task) -> Floats:
    x, _, z = task.directions
    return _smoothstep(-0.5, 1.0, x + 0.3 * z + 0.2 * task.noise(35.0))


def _stripes(task: _Task) -> Floats:
    wobble = 0.9 * task.noise(26.0) + 0.5 * task.noise(10.0)
    return _smoothstep(-0.1, 0.45, np.cos(task.coat.count * task.phi + wobble))


def _ridges(task: _Task) -> Floats:
    wave = 0.5 + 0.5 * np.cos(task.coat.count * task.phi)
    return np.asarray(wave**3 * np.sin(task.theta))


def _crease(task: _Task) -> Floats:
    """Draw one line from pole to pole, far from where the angle jumps from a turn to zero."""
    theta = task.theta
    away = np.degrees(task.phi - np.pi + 0.15 * np.sin(3 * theta)) * np.sin(theta)
    return np.asarray(np.exp(-((away / task.coat.size) ** 2)) * np.cos(theta / 2))


def _spots(task: _Task) -> Floats:
    centres = task.rng.normal(size=(task.coat.count, 3))
    dots = _dots(task, centres / np.linalg.norm(centres, axis=1, keepdims=True))
    return dots * _smoothstep(-1.6, 0.6, task.noise(25.0))


def _lattice(task: _Task) -> Floats:
    """Set dots on the Fibonacci spiral, as seeds and scales grow."""
    number = np.arange(task.coat.count)
    z = 1.0 - (2.0 * number + 1.0) / task.coat.count
    around, phi = np.sqrt(1.0 - z * z), GOLDEN_ANGLE * number
    return _dots(task, np.stack([around * np.cos(phi), around * np.sin(phi), z], axis=1))


def _dots(task: _Task, centres: NDArray[np.float64]) -> Floats:
    x, y, z = task.directions
    nearest = np.full_like(x, -1.0)
    # Dot by dot: all of them at once are slower to reduce, and fill tens of megabytes.
    for i, j, k in centres.tolist():
        np.maximum(nearest, i * x + j * y + k * z, out=nearest)
    degrees = np.degrees(np.arccos(np.minimum(nearest, 1.0)))
    return 1.0 - _smoothstep(0.35 * task.coat.size, 1.15 * task.coat.size, degrees)


_PATTERNS: dict[str, Callable[[_Task], Floats]] = {
    "noise": _blotches,
    "fuzz": _fuzz,
    "cap": _cap,
    "side": _side,
    "stripes": _stripes,
    "ridges": _ridges,
    "crease": _crease,
    "spots": _spots,
    "lattice": _lattice,
}
