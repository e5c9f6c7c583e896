"""Procedural images of people: the appearance of a person, the effect of a camera, and variation between images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["HEIGHT", "WIDTH", "Camera", "Person", "draw", "make_camera", "make_person", "make_twin"]

HEIGHT, WIDTH = 128, 64
_OVERSAMPLE = 2

Colour = tuple[int, int, int]

_SKINS: list[Colour] = [(241, 204, 177), (224, 172, 138), (180, 124, 88), (116, 76, 54)]
_HAIRS: list[Colour] = [(28, 22, 20), (74, 46, 30), (140, 96, 52), (206, 176, 112), (128, 126, 124)]
_CLOTHES: list[Colour] = [
    (32, 32, 36), (92, 94, 98), (176, 178, 180), (232, 230, 224), (40, 56, 104), (74, 116, 176), (142, 36, 42),
    (206, 78, 66), (46, 96, 62), (128, 148, 84), (212, 178, 72), (116, 74, 126), (122, 88, 58), (222, 154, 168),
]  # fmt: skip
_WALLS: list[Colour] = [
    (92, 88, 80), (126, 124, 118), (160, 152, 138), (106, 114, 100), (112, 118, 128), (142, 124, 108), (78, 82, 86),
]  # fmt: skip
_TOPS = ("plain", "stripes", "two-tone", "logo")
_BOTTOMS = ("trousers", "trousers", "shorts", "skirt")
_BAGS = ("none", "none", "backpack", "shoulder", "hand")
_HEADS = ("short", "long", "bun", "cap", "bald")


@dataclass(frozen=True)
class Person:
    """What stays the same in all images of a person. Lengths are relative to the height of the body."""

    skin: Colour
    hair: Colour
    head: str
    top: str
    top_colour: Colour
    top_detail: Colour
    long_sleeves: bool
    bottom: str
    bottom_colour: Colour
    shoes: Colour
    bag: str
    bag_colour: Colour
    shoulders: float
    legs: float
    height: float


@dataclass(frozen=True)
class Camera:
    """What a camera does to all its images."""

    gain: np.ndarray  # (3,), light and colour cast
    gamma: float
    wall: Colour
    floor: Colour
    horizon: float
    stripes: int
    offset: float
    mirrored: bool
    squeeze: float  # a high viewpoint shortens people


def _pick(rng: np.random.Generator, choices: list[Colour]) -> Colour:
    return choices[rng.integers(len(choices))]


def make_person(rng: np.random.Generator) -> Person:
    """Draws a random identity."""
    return Person(
        skin=_pick(rng, _SKINS),
        hair=_pick(rng, _HAIRS),
        head=str(rng.choice(_HEADS)),
        top=str(rng.choice(_TOPS)),
        top_colour=_pick(rng, _CLOTHES),
        top_detail=_pick(rng, _CLOTHES),
        long_sleeves=bool(rng.random() < 0.6),
        bottom=str(rng.choice(_BOTTOMS)),
        bottom_colour=_pick(rng, _CLOTHES),
        shoes=_pick(rng, _CLOTHES),
        bag=str(rng.choice(_BAGS)),
        bag_colour=_pick(rng, _CLOTHES),
        shoulders=float(rng.uniform(0.20, 0.29)),
        legs=float(rng.uniform(0.44, 0.52)),
        height=float(rng.uniform(0.78, 0.95)),
    )


def make_twin(person: Person, rng: np.random.Generator) -> Person:
    """Draws another person who differs from `person` in one small detail."""
    details = ["shoes", "head", "bag"]
    if person.top in ("plain", "logo") and person.head != "cap":  # a cap has the logo's colour
        details.append("logo")
    detail = str(rng.choice(details))
    if detail == "head":
        return replace(person, head=str(rng.choice([head for head in _HEADS if head != person.head])))
    if detail == "bag":
        return replace(person, bag="shoulder" if person.bag == "none" else "none")
    if detail == "logo":
        return replace(person, top="logo", top_detail=_other(rng, person.top_detail, person.top_colour))
    return replace(person, shoes=_other(rng, person.shoes))


def _other(rng: np.random.Generator, *colours: Colour) -> Colour:
    return _pick(rng, [colour for colour in _CLOTHES if colour not in colours])


def make_camera(rng: np.random.Generator) -> Camera:
    """Draws a random camera."""
    return Camera(
        gain=rng.uniform(0.7, 1.1) * rng.uniform(0.88, 1.12, size=3),
        gamma=float(rng.uniform(0.85, 1.2)),
        wall=_pick(rng, _WALLS),
        floor=_pick(rng, _WALLS),
        horizon=float(rng.uniform(0.25, 0.6)),
        stripes=int(rng.integers(0, 5)),
        offset=float(rng.random()),
        mirrored=bool(rng.random() < 0.5),
        squeeze=float(rng.uniform(0.86, 1.0)),
    )


def draw(person: Person, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Draws one RGB image of a person as a camera sees it, `HEIGHT` x `WIDTH` pixels."""
    canvas = Image.new("RGB", (WIDTH * _OVERSAMPLE, HEIGHT * _OVERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    _draw_background(pen, camera, rng)
    _draw_person(pen, person, camera, rng)
    if rng.random() < 0.2:
        _draw_occluder(pen, rng)
    if camera.mirrored:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = canvas.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.9))))

    pixels = np.asarray(canvas, dtype=np.float32) / 255
    pixels = pixels**camera.gamma * camera.gain * rng.uniform(0.85, 1.15)
    pixels = pixels + rng.normal(0.0, rng.uniform(0.01, 0.03), size=pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _draw_background(pen: ImageDraw.ImageDraw, camera: Camera, rng: np.random.Generator) -> None:
    width, height = WIDTH * _OVERSAMPLE, HEIGHT * _OVERSAMPLE
    horizon = (camera.horizon + rng.uniform(-0.05, 0.05)) * height
    pen.rectangle((0, 0, width, horizon), fill=camera.wall)
    pen.rectangle((0, horizon, width, height), fill=camera.floor)
    offset = (camera.offset + rng.uniform(-0.15, 0.15)) * width
    for stripe in range(camera.stripes):  # windows and posts in the background
        left = (offset + stripe * width / camera.stripes) % width
        pen.rectangle((left, 0, left + width * 0.07, horizon), fill=_shade(camera.wall, 0.7))
    for _ in range(rng.integers(0, 4)):  # clutter
        x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(5, 30)
        pen.rectangle((x, y, x + size, y + rng.uniform(5, 60)), fill=_shade(_pick(rng, _CLOTHES), 0.9))


def _draw_person(pen: ImageDraw.ImageDraw, person: Person, camera: Camera, rng: np.random.Generator) -> None:
    size = HEIGHT * _OVERSAMPLE * person.height * rng.uniform(0.92, 1.06)
    tall = size * camera.squeeze
    middle = WIDTH * _OVERSAMPLE * (0.5 + rng.uniform(-0.1, 0.1))
    feet = HEIGHT * _OVERSAMPLE * (0.98 + rng.uniform(-0.03, 0.03))
    from_behind = rng.random() < 0.5
    turn = rng.uniform(0.75, 1.0)  # a person is slimmer from the side
    stride = rng.uniform(-0.11, 0.11)
    swing = rng.uniform(-0.09, 0.09)
    lean = rng.uniform(-0.02, 0.02)

    def at(x: float, y: float) -> tuple[float, float]:
        """The pixel of a point `x` right of the middle and `y` above the feet, relative to the height of the body."""
        return middle + (x + lean * y) * size, feet - y * tall

    def limb(start: tuple[float, float], end: tuple[float, float], thick: float, colour: Colour) -> None:
        pen.line([at(*start), at(*end)], fill=colour, width=max(1, round(thick * size)))

    def box(left: float, low: float, right: float, high: float, colour: Colour) -> None:
        pen.polygon([at(left, low), at(right, low), at(right, high), at(left, high)], fill=colour)

    def disc(x: float, y: float, radius: float, colour: Colour, tallness: float = 1.0) -> None:
        cx, cy = at(x, y)
        pen.ellipse(
            (cx - radius * size, cy - radius * tallness * size, cx + radius * size, cy + radius * tallness * size),
            fill=colour,
        )

    half = person.shoulders / 2 * turn
    hip, shoulder = person.legs, 0.82
    hip_half = half * 0.8
    sleeve = person.top_colour if person.long_sleeves else person.skin

    # Legs, shoes and a skirt.
    for side, shift in ((-1, stride), (1, -stride)):
        knee = (side * hip_half * 0.5 + shift * 0.6, hip * 0.5)
        foot = (side * hip_half * 0.5 + shift, 0.02)
        upper = person.bottom_colour if person.bottom != "skirt" else person.skin
        lower = person.bottom_colour if person.bottom == "trousers" else person.skin
        limb((side * hip_half * 0.5, hip), knee, 0.085, upper)
        limb(knee, foot, 0.07, lower)
        disc(foot[0], foot[1], 0.045, person.shoes, tallness=0.6)
    if person.bottom == "skirt":
        pen.polygon(
            [at(-hip_half, hip), at(hip_half, hip), at(hip_half * 1.6, hip * 0.45), at(-hip_half * 1.6, hip * 0.45)],
            fill=person.bottom_colour,
        )

    # The far arm, and the trunk over it.
    limb((-half, shoulder - 0.02), (-half - 0.02 - swing, hip + 0.14), 0.055, person.top_colour)
    limb((-half - 0.02 - swing, hip + 0.14), (-half - 0.01 - 1.6 * swing, hip - 0.01), 0.045, sleeve)
    pen.polygon(
        [at(-half, shoulder), at(half, shoulder), at(hip_half, hip - 0.01), at(-hip_half, hip - 0.01)],
        fill=person.top_colour,
    )
    trunk = shoulder - hip
    if person.top == "stripes":
        for low in np.arange(hip + 0.03, shoulder - 0.03, 0.07):
            box(-hip_half, low, hip_half, low + 0.03, person.top_detail)
    elif person.top == "two-tone":
        box(-hip_half, hip - 0.01, hip_half, hip + trunk * 0.45, person.top_detail)
    elif person.top == "logo" and not from_behind:
        box(-half * 0.45, shoulder - trunk * 0.45, half * 0.45, shoulder - trunk * 0.22, person.top_detail)

    if person.bag == "backpack":
        if from_behind:
            box(-half * 0.75, hip + trunk * 0.2, half * 0.75, shoulder, person.bag_colour)
        else:  # the straps
            for side in (-1, 1):
                limb((side * half * 0.6, shoulder), (side * half * 0.6, hip + trunk * 0.4), 0.022, person.bag_colour)
    elif person.bag == "shoulder":
        limb((-half, shoulder), (hip_half + 0.02, hip + 0.02), 0.02, person.bag_colour)
        box(hip_half - 0.02, hip - 0.08, hip_half + 0.09, hip + 0.04, person.bag_colour)

    # The near arm.
    hand = (half + 0.01 + 1.6 * swing, hip - 0.01)
    limb((half, shoulder - 0.02), (half + 0.02 + swing, hip + 0.14), 0.055, person.top_colour)
    limb((half + 0.02 + swing, hip + 0.14), hand, 0.045, sleeve)
    if person.bag == "hand":
        box(hand[0] - 0.05, hand[1] - 0.13, hand[0] + 0.05, hand[1] - 0.02, person.bag_colour)

    # The head.
    limb((0, shoulder - 0.01), (0, shoulder + 0.04), 0.05, person.skin)
    face = shoulder + 0.095
    if person.head == "long":
        box(-0.062, shoulder - 0.03, 0.062, face, person.hair)
    disc(0, face, 0.06, person.skin, tallness=1.25)
    if person.head in ("short", "long", "bun"):
        disc(0, face + (0.0 if from_behind else 0.035), 0.062, person.hair, tallness=1.2 if from_behind else 0.8)
    if person.head == "bun":
        disc(0, face + 0.085, 0.03, person.hair)
    elif person.head == "cap":
        disc(0, face + 0.04, 0.064, person.top_detail, tallness=0.7)
        box(-0.064, face + 0.02, 0.1, face + 0.035, person.top_detail)


def _draw_occluder(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    width, height = WIDTH * _OVERSAMPLE, HEIGHT * _OVERSAMPLE
    colour = _shade(_pick(rng, _CLOTHES), 0.8)
    if rng.random() < 0.5:  # something low in the foreground
        pen.rectangle((0, height * rng.uniform(0.65, 0.9), width, height), fill=colour)
    else:  # a post, or another person at the edge
        thick = width * rng.uniform(0.12, 0.3)
        left = rng.choice([rng.uniform(-thick / 2, width * 0.2), rng.uniform(width * 0.65, width)])
        pen.rectangle((left, height * rng.uniform(0.0, 0.4), left + thick, height), fill=colour)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (round(channel * factor) for channel in colour)
    return red, green, blue
