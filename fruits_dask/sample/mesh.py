"""The surface of a fruit as a cloud of points, so dense that hardly a pixel is missed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .fruits import Body, Fruit
from .paint import Floats, paint, sphere_grid
from .view import View, turn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mesh:
    """A painted surface, (3, n_points) each, in the fruit's axes."""

    points: Floats
    normals: Floats
    colours: Floats


def build_mesh(fruit: Fruit, rng: np.random.Generator, n_rows: int) -> Mesh:
    """Shape and paint a fruit, in points of `n_rows` from stem to blossom."""
    theta, phi = sphere_grid(n_rows)
    # Paint is dear and needs less detail than the outline.
    skin = [Image.fromarray(layer).resize((2 * n_rows, n_rows)) for layer in paint(fruit, rng)]
    *colours, relief = (np.asarray(layer) for layer in skin)
    points = _shape(fruit.body, theta, phi, relief)
    down = np.gradient(points, axis=1)
    around = np.roll(points, -1, axis=2) - np.roll(points, 1, axis=2)
    normals = np.cross(down, around, axis=0)
    normals /= np.sqrt((normals * normals).sum(axis=0))
    points, normals, paints = (x.reshape(3, -1) for x in (points, normals, np.stack(colours)))
    return Mesh(points=points, normals=normals, colours=paints)


def _shape(body: Body, theta: Floats, phi: Floats, relief: Floats) -> Floats:
    radius = 1.0 + relief
    for at, width, height in body.swells:
        radius = radius + height * np.exp(-(((np.degrees(theta) - at) / width) ** 2))
    across, along = radius * np.sin(theta), radius * np.cos(theta)
    x = across * np.cos(phi) + body.bend * (along**2 - 1.0 / 3.0)
    return np.stack([body.width * x, body.width * across * np.sin(phi), body.height * along])


def visible(mesh: Mesh, view: View) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Tell which pixels show which points, and the depth there, (n_pixels,) each."""
    facing = np.flatnonzero(turn(view.rotation[2:], mesh.normals)[0] > 0)
    columns, rows, depth = view.project(mesh.points.take(facing, axis=1))
    pixel = rows.astype(np.intp) * view.frame_px + columns.astype(np.intp)
    # The nearest point of a pixel has its largest number, whose remainder is the index.
    steps = ((depth - depth.min()) * 2.0**16).astype(np.int64)
    front = np.full(view.frame_px**2, -1, np.int64)
    np.maximum.at(front, pixel, steps * facing.size + np.arange(facing.size))
    # Where relief is steep a pixel may fall between two points: it shows what its neighbour does.
    for step in (1, view.frame_px):
        between = (front[: -2 * step] >= 0) & (front[2 * step :] >= 0)
        missed = step + np.flatnonzero(between & (front[step:-step] < 0))
        front[missed] = front[missed - step]
    pixels = np.flatnonzero(front >= 0)
    nearest = front[pixels] % facing.size
    return pixels, facing[nearest], depth[nearest]
