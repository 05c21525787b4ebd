"""Stems and leaves: small quadrilaterals, tested against the depth of the body."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .fruits import Body, Fruit, Leaves, Stem
from .paint import Floats, linear
from .view import View


@lru_cache(maxsize=32)
def stalk_quads(fruit: Fruit) -> tuple[Floats, Floats]:
    """Corners (3, n_quads, 4) in the fruit's axes, and linear colours (n_quads, 3)."""
    # An empty one, for the fruits that have neither.
    grids = [(np.empty((3, 0, 2, 2)), (0, 0, 0))]
    if fruit.leaves:
        grids.append((_leaf_grid(fruit.leaves), fruit.leaves.colour))
    if fruit.stem:
        grids.append((_stem_grid(fruit.stem, fruit.body), fruit.stem.colour))
    quads = [_quads(grid) for grid, _ in grids]
    colours = [np.tile(linear(grids[i][1]), (part.shape[1], 1)) for i, part in enumerate(quads)]
    return np.concatenate(quads, axis=1), np.concatenate(colours)


def _quads(grid: NDArray[np.float64]) -> Floats:
    """Cut strips of points, (3, n_strips, n_steps, n_lines), into quadrilaterals."""
    near, far = grid[:, :, :-1], grid[:, :, 1:]
    corners = [near[..., :-1], near[..., 1:], far[..., 1:], far[..., :-1]]
    return np.stack(corners, axis=-1).reshape(3, -1, 4).astype(np.float32)


def _stem_grid(stem: Stem, body: Body) -> NDArray[np.float64]:
    """Build a tube around a line from the fruit to the tip."""
    t = np.linspace(0.0, 1.0, 9)[None, :, None]
    phi = np.linspace(0.0, 2.0 * np.pi, 9)
    # The root of a bent fruit is where its end is.
    root = body.width * body.bend * ((stem.start / body.height) ** 2 - 1.0 / 3.0)
    slope = 2.0 * body.width * body.bend * stem.start / body.height**2 * stem.length
    # It ends in a knob, which closes at the tip.
    radius = stem.width * (1.0 - 0.35 * t + 0.45 * t**8) * (t < 1.0)
    x = root + t * slope + t**2 * stem.lean * stem.length + radius * np.cos(phi)
    z = np.broadcast_to(stem.start + t * stem.length, x.shape)
    return np.stack([x, radius * np.sin(phi), z])


def _leaf_grid(leaves: Leaves) -> NDArray[np.float64]:
    """Build the left edge, the middle and the right edge of each leaf."""
    t = np.linspace(0.0, 1.0, 8)[None, :, None]
    number = np.arange(len(leaves.rises) * leaves.n_leaves)[:, None, None]
    whorl, i = np.divmod(number, leaves.n_leaves)
    rise = np.radians(np.asarray(leaves.rises)[whorl])
    azimuth = 2 * np.pi * i / leaves.n_leaves + 0.7 * whorl + 0.4
    length = leaves.length * (1.0 + 0.12 * np.sin(5.0 * i + 2.0 * whorl))
    out = length * t * np.cos(rise) * (1 + 0.15 * t)
    up = leaves.start + length * (t * np.sin(rise) - leaves.droop * t**2)
    breadth = leaves.width * np.sin(np.pi * (t * 0.93 + 0.07) ** 0.8) * np.asarray([-1, 0, 1])
    x = out * np.cos(azimuth) - breadth * np.sin(azimuth)
    y = out * np.sin(azimuth) + breadth * np.cos(azimuth)
    # Edges stand above the midrib, so that the halves of a leaf catch different light.
    return np.stack([x, y, up + 0.35 * np.abs(breadth)])


def draw_stalk(fruit: Fruit, view: View, depth: Floats, image: Image.Image) -> None:
    """Draw what the body, whose depth (frame_px, frame_px) is given, does not hide."""
    quads, colours = stalk_quads(fruit)
    seen = view.project(quads)
    outlines = seen[:2].transpose(1, 2, 0).reshape(-1, 8).tolist()
    fills = _lit(quads, colours, view)
    column, row, height = seen.mean(axis=2)
    shown = height > depth[row.astype(np.intp), column.astype(np.intp)] - 0.02
    draw = ImageDraw.Draw(image)
    for i in np.argsort(height, kind="stable").tolist():
        if shown[i]:
            draw.polygon(outlines[i], fill=fills[i], outline=fills[i])


def _lit(quads: Floats, colours: Floats, view: View) -> list[tuple[int, int, int]]:
    """Light each quadrilateral by its own normal, from either side."""
    normals = np.cross(quads[..., 2] - quads[..., 0], quads[..., 3] - quads[..., 1], axis=0)
    normals /= np.linalg.norm(normals, axis=0) + 1e-9
    lamp = np.abs((view.light @ view.rotation) @ normals)[:, None]
    lit = colours * (0.4 + lamp) + 0.1 * lamp**12
    fills = (np.sqrt(np.clip(lit, 0, 1)) * 255).astype(int).tolist()
    return [(red, green, blue) for red, green, blue in fills]
