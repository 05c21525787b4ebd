"""One frame: body, light, shadow and stalk."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .fruits import Fruit
from .mesh import Mesh, build_mesh, visible
from .paint import Floats
from .stalk import draw_stalk, stalk_quads
from .view import View, frame_view, turn

_SUPERSAMPLE = 1.5
_ROWS_PER_PIXEL = 2.2  # of the mesh: with fewer, points are more than a pixel apart


def render_frame(fruit: Fruit, *, seed: int, number: int, image_px: int) -> Image.Image:
    """Render one frame of a fruit on white."""
    frame_px = round(image_px * _SUPERSAMPLE)
    mesh, outline = _prepared(fruit, seed, frame_px)
    rng = _rng(fruit, seed, 1 + number)
    view = frame_view(outline, rng, number=number, lies=fruit.lies, frame_px=frame_px)
    pixels, points, nearness = visible(mesh, view)
    canvas = _background(view.project(outline), frame_px)
    canvas[pixels] = _light(fruit, mesh, points, view)
    depth = np.full(frame_px**2, -np.inf, np.float32)
    depth[pixels] = nearness
    levels = (np.sqrt(np.clip(canvas, 0, 1)) * 255 + 0.5).astype(np.uint8)
    image = Image.fromarray(levels.reshape(frame_px, frame_px, 3))
    draw_stalk(fruit, view, depth.reshape(frame_px, frame_px), image)
    return image.resize((image_px, image_px), Image.Resampling.LANCZOS)


@lru_cache(maxsize=1)
def _prepared(fruit: Fruit, seed: int, frame_px: int) -> tuple[Mesh, Floats]:
    """Mesh and outline (3, n_points), which the frames of a fruit share as they come in a row."""
    mesh = build_mesh(fruit, _rng(fruit, seed, 0), round(frame_px * _ROWS_PER_PIXEL))
    few = mesh.points[:, :: max(1, mesh.points.shape[1] // 2000)]
    return mesh, np.concatenate([few, stalk_quads(fruit)[0].reshape(3, -1)], axis=1)


def _rng(fruit: Fruit, seed: int, use: int) -> np.random.Generator:
    """Give each skin and frame its own generator, so that none depends on which came before."""
    return np.random.default_rng([seed, zlib.crc32(fruit.label.encode()), use])


def _background(outline: Floats, frame_px: int) -> Floats:
    """White, with a soft shadow where the fruit stands, (n_pixels, 3)."""
    columns, rows, _ = outline
    bottom = float(rows.max())
    nearness = np.exp((rows - bottom) / (0.09 * frame_px))
    middle = np.average(columns, weights=nearness)
    spread = np.sqrt(np.average((columns - middle) ** 2, weights=nearness))
    # Never so wide that it would be cut by the border.
    width = min(1.7 * spread, 0.5 * min(middle, frame_px - middle))
    steps = np.arange(frame_px, dtype=np.float32) + 0.5
    across = np.exp(-(((steps - middle) / width) ** 2)).astype(np.float32)
    down = np.exp(-(((steps - bottom) / (0.028 * frame_px) + 0.4) ** 2)).astype(np.float32)
    shadow = 1.0 - 0.55 * down[:, None] * across[None, :]
    return np.repeat(shadow.reshape(-1, 1), 3, axis=1)


def _light(fruit: Fruit, mesh: Mesh, points: NDArray[np.intp], view: View) -> Floats:
    """Add a soft lamp, a white room, a highlight and a pale rim; linear light, (n_points, 3)."""
    facing = turn(view.rotation, mesh.normals.take(points, axis=1))
    halfway = view.light + np.asarray([0, 0, 1], np.float32)
    lamp, gleam = turn(np.stack([view.light, halfway / np.linalg.norm(halfway)]), facing)
    # The lamp is large: its light reaches a little beyond the terminator.
    diffuse = np.maximum(lamp + 0.25, 0.0) / 1.25
    room = 0.30 + 0.12 * facing[1] + 0.10 * facing[2]
    # A spherical Gaussian looks like the cosine power of Blinn and Phong, and costs less.
    gloss = fruit.skin.gloss
    shine = gloss * np.exp((4.0 + 80.0 * gloss) * (gleam - 1.0))
    rim = 1.0 - np.maximum(facing[2], 0.0)
    shine += fruit.skin.bloom * rim * rim * (0.35 + diffuse)
    lit = mesh.colours.take(points, axis=1) * (0.95 * diffuse + room)
    return np.asarray((lit + shine).T * view.tint)
