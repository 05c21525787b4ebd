"""The catalogue: one record per label, with all that tells it from the others.

Lengths are in radii of the body, angles in degrees, colours in sRGB.
"""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Body:
    """A solid of revolution around the stem axis, optionally bent."""

    width: float = 1.0  # across the axis
    height: float = 1.0  # along the axis
    # Bulges and hollows: where from stem (0) to blossom (180), how wide, how high.
    swells: tuple[tuple[float, float, float], ...] = ()
    bend: float = 0.0  # sideways shift of the ends, in widths


@dataclass(frozen=True, slots=True)
class Skin:
    """The ground under the coats of paint, and its answer to light."""

    colour: Colour
    gloss: float = 0.35  # strength of the highlight, and how narrow it is
    bloom: float = 0.08  # paleness towards the rim: down or wax


@dataclass(frozen=True, slots=True)
class Coat:
    """One coat of paint: a pattern of weights between 0 and 1, its colour and its relief."""

    pattern: str  # name in paint.py
    colour: Colour
    amount: float = 1.0  # opacity where the weight is 1
    size: float = 20.0  # of one element; of noise its wavelength
    count: int = 1  # elements around or on the whole fruit, where the pattern has any
    at: float = 0.0  # angle from the stem, of a cap
    relief: float = 0.0  # height of the surface where the weight is 1


@dataclass(frozen=True, slots=True)
class Stem:
    """A tapered, bent stalk along the axis."""

    start: float  # height where it leaves the fruit
    length: float
    width: float = 0.05  # radius at the start
    lean: float = 0.25  # sideways shift of its tip, in lengths
    colour: Colour = (104, 78, 44)


@dataclass(frozen=True, slots=True)
class Leaves:
    """Whorls of leaves around the stem."""

    start: float  # height where they leave the axis
    n_leaves: int  # in one whorl
    length: float
    width: float  # half of the breadth
    rises: tuple[float, ...]  # steepness at the base, one entry per whorl
    droop: float  # how far the tip sinks, in lengths
    colour: Colour = (74, 132, 48)


@dataclass(frozen=True, slots=True)
class Fruit:
    """All that tells one label from another."""

    label: str  # name of the folder
    body: Body
    skin: Skin
    coats: tuple[Coat, ...]  # over the ground, first to last
    stem: Stem | None = None
    leaves: Leaves | None = None
    lies: float = 0.0  # roll of the axis in the picture when the fruit lies at rest


FRUITS = (
    Fruit(
        label="Apple Golden 1",
        body=Body(1.0, 0.92, ((0, 15, -0.42), (48, 26, 0.06), (180, 13, -0.2), (135, 30, -0.05))),
        skin=Skin((214, 190, 66)),
        coats=(
            Coat("side", (226, 150, 60), 0.4),
            Coat("noise", (182, 186, 62), 0.6, size=70),
            Coat("cap", (136, 128, 40), 0.8, size=22),
            Coat("spots", (158, 128, 60), 0.65, size=1.5, count=170),
        ),
        stem=Stem(0.42, 0.62, width=0.07),
    ),
    Fruit(
        label="Apple Red 1",
        body=Body(1.0, 1.0, ((0, 15, -0.42), (45, 26, 0.08), (180, 13, -0.16), (138, 30, -0.06))),
        skin=Skin((158, 16, 26), gloss=0.55),
        coats=(
            Coat("noise", (196, 52, 34), 0.7, size=80),
            Coat("cap", (188, 150, 58), 0.9, size=20),
            Coat("spots", (238, 192, 150), 0.6, size=1.3, count=150),
        ),
        stem=Stem(0.46, 0.68, width=0.07),
        leaves=Leaves(0.84, 1, 0.66, 0.16, (30,), 0.3),
    ),
    Fruit(
        label="Banana 1",
        body=Body(0.30, 1.25, ((42, 24, 0.14), (138, 24, 0.10), (180, 8, 0.1)), bend=1.5),
        skin=Skin((240, 204, 56), gloss=0.16),
        coats=(
            Coat("noise", (226, 180, 44), 0.6, size=60),
            Coat("ridges", (198, 150, 36), 0.35, count=5, relief=0.05),
            Coat("cap", (150, 166, 62), 0.85, size=24),
            Coat("cap", (62, 48, 30), size=9, at=180),
            Coat("spots", (112, 70, 26), 0.75, size=2.2, count=90),
        ),
        stem=Stem(1.16, 0.36, width=0.115, lean=0.1, colour=(168, 150, 58)),
        lies=64,
    ),
    Fruit(
        label="Grape Blue 1",
        body=Body(0.86, 1.0, ((0, 8, -0.06),)),
        skin=Skin((46, 38, 84), gloss=0.4, bloom=0.2),
        coats=(Coat("noise", (92, 100, 158), 0.75, size=55), Coat("side", (84, 32, 84), 0.5)),
        stem=Stem(0.92, 0.32, colour=(124, 112, 60)),
    ),
    Fruit(
        label="Kiwi 1",
        body=Body(0.82, 1.02, ((0, 8, 0.03), (180, 8, 0.03))),
        skin=Skin((126, 94, 52), gloss=0.05, bloom=0.12),
        coats=(
            Coat("noise", (98, 92, 46), 0.7, size=50),
            Coat("fuzz", (74, 52, 28), 0.75, size=3.2, relief=0.025),
            Coat("spots", (176, 140, 88), 0.5, size=1.4, count=220),
        ),
        lies=70,
    ),
    Fruit(
        label="Lemon 1",
        body=Body(0.8, 0.98, ((0, 16, 0.12), (180, 16, 0.28))),
        skin=Skin((246, 212, 36), gloss=0.3),
        coats=(
            Coat("noise", (236, 190, 30), 0.7, size=60),
            Coat("fuzz", (206, 160, 24), 0.35, size=1.9, relief=0.014),
        ),
        lies=60,
    ),
    Fruit(
        label="Lime 1",
        body=Body(0.9, 0.98, ((0, 10, 0.05), (180, 10, 0.14))),
        skin=Skin((74, 140, 36), gloss=0.35),
        coats=(
            Coat("noise", (128, 172, 54), 0.8, size=60),
            Coat("fuzz", (46, 98, 24), 0.4, size=1.9, relief=0.014),
        ),
        lies=40,
    ),
    Fruit(
        label="Orange 1",
        body=Body(1.0, 0.96, ((0, 9, -0.05), (180, 8, -0.05))),
        skin=Skin((244, 140, 20), gloss=0.26),
        coats=(
            Coat("noise", (236, 118, 16), 0.7, size=70),
            Coat("fuzz", (198, 88, 8), 0.4, size=1.9, relief=0.016),
            Coat("cap", (112, 130, 52), size=6, relief=0.05),
        ),
    ),
    Fruit(
        label="Peach 1",
        body=Body(1.0, 0.95, ((0, 17, -0.26), (180, 7, 0.05))),
        skin=Skin((240, 176, 96), gloss=0.06, bloom=0.28),
        coats=(
            Coat("side", (206, 62, 50), 0.95),
            Coat("noise", (226, 106, 66), 0.7, size=55),
            Coat("crease", (176, 66, 46), 0.55, size=7, relief=-0.1),
        ),
        stem=Stem(0.55, 0.26),
    ),
    Fruit(
        label="Pear 1",
        body=Body(0.84, 0.9, ((0, 30, 0.72), (0, 8, -0.1), (180, 14, -0.1))),
        skin=Skin((184, 190, 72), gloss=0.22),
        coats=(
            Coat("side", (196, 140, 62), 0.55),
            Coat("noise", (152, 172, 62), 0.6, size=60),
            Coat("cap", (150, 110, 56), 0.7, size=16),
            Coat("spots", (118, 104, 44), 0.7, size=1.3, count=320),
        ),
        stem=Stem(1.38, 0.5, width=0.065, lean=0.45, colour=(92, 66, 38)),
    ),
    Fruit(
        label="Pineapple 1",
        body=Body(0.72, 1.0, ((45, 22, 0.06), (135, 22, 0.06))),
        skin=Skin((120, 84, 30), gloss=0.15),
        coats=(
            Coat("lattice", (218, 156, 46), size=10.5, count=150, relief=0.14),
            Coat("noise", (132, 132, 48), 0.35, size=60),
        ),
        leaves=Leaves(0.9, 9, 0.95, 0.09, (28, 52, 74), 0.18, colour=(78, 122, 66)),
    ),
    Fruit(
        label="Plum 1",
        body=Body(0.88, 1.0, ((0, 12, -0.14),)),
        skin=Skin((88, 26, 62), gloss=0.3, bloom=0.2),
        coats=(
            Coat("noise", (128, 40, 62), 0.7, size=60),
            Coat("crease", (52, 12, 40), 0.6, size=6, relief=-0.07),
        ),
        stem=Stem(0.76, 0.42, colour=(112, 96, 52)),
    ),
    Fruit(
        label="Strawberry 1",
        body=Body(0.86, 0.95, ((180, 34, 0.28), (60, 26, 0.06), (0, 16, -0.14))),
        skin=Skin((204, 22, 30), gloss=0.5),
        coats=(
            Coat("noise", (226, 54, 40), 0.5, size=60),
            Coat("lattice", (150, 10, 22), 0.8, size=5.5, count=190, relief=-0.06),
            Coat("lattice", (240, 206, 110), size=2.4, count=190, relief=0.04),
        ),
        stem=Stem(0.78, 0.42, colour=(104, 140, 60)),
        leaves=Leaves(0.86, 9, 0.72, 0.16, (22,), 0.5),
    ),
    Fruit(
        label="Tomato 1",
        body=Body(1.0, 0.84, ((0, 17, -0.24), (180, 9, -0.06), (50, 24, 0.04))),
        skin=Skin((208, 34, 20), gloss=0.75),
        coats=(
            Coat("noise", (226, 70, 26), 0.6, size=80),
            Coat("ridges", (176, 20, 16), 0.2, count=6, relief=0.035),
        ),
        stem=Stem(0.5, 0.42, colour=(86, 120, 48)),
        leaves=Leaves(0.68, 6, 0.68, 0.085, (36,), 0.32),
    ),
    Fruit(
        label="Watermelon 1",
        body=Body(0.92),
        skin=Skin((142, 172, 84), gloss=0.3),
        coats=(
            Coat("noise", (176, 194, 112), 0.6, size=30),
            Coat("stripes", (28, 68, 30), 0.95, count=11),
        ),
        stem=Stem(0.94, 0.22, lean=0.7, colour=(120, 124, 60)),
        lies=35,
    ),
)
"""Sorted by label in byte order."""
