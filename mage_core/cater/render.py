"""A ray tracer for CATER's table: a frame is a pure function of where the objects are (paper A.1.1, A.1.2).

Camera, lights, shapes and materials are those of CATER's scene in Blender's conventions: an area light of power
P and area A has radiance P / (pi A), a sun's strength is its irradiance, and the picture is plain sRGB. What
never changes (table, backdrop and axes with their unshadowed light; the light that they throw back) is worked
out once for each image size; a frame then holds one ray a pixel, more where an edge runs through it, soft
shadows from points spread over each light, and reflections in two glossy lobes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit, prange

SHAPES = ("cube", "sphere", "cylinder", "cone", "snitch")
MATERIALS = ("rubber", "metal")
CUBE, SPHERE, CYLINDER, CONE, SNITCH = range(5)
METAL = 1

CAMERA = np.array([7.48113, -6.50764, 5.34367])
CAMERA_ROWS = np.array([[0.65718, -0.35778, 0.66341], [0.75374, 0.31194, -0.57842], [0.0, 0.88016, 0.47467]])
FIELD = 16 / 35  # half the sensor over the focal length

_AT_ONCE = 64    # frames drawn together
TILE = 8         # pixels a side of the squares for which hidden objects and shadows are sorted out together
NO_HIT = 1e30


class Look(NamedTuple):
    """What the renders of the original scene told about its materials; all else is given by the scene."""

    ground: float = 0.8            # diffuse albedo of the table
    backdrop_start: float = 8.57   # from the origin to where the table begins to curve up
    backdrop_radius: float = 11.9
    backdrop_heading: float = 2.744  # radians from x to y
    backdrop_top: float = 23.0
    bounce: float = 0.0145         # radiance of the table in light that came from the backdrop, as grey
    bounce_slope: float = 0.0      # how that changes as the surface turns upright
    sheen: float = 1.0             # of rubber
    gloss: float = 1.0             # of rubber, in the light of the lamps
    gloss_around: float = 0.6      # and in the light of the table, whose horizon the lobe often passes
    sun_spread: float = 0.1        # radius of the sun, as a tangent
    glow: float = 1.0              # light that the table gets from objects


LOOK = Look()

_BOUND = {  # shape: the sphere around it, at unit scale (height of its centre, radius)
    CUBE: (0.0, 0.79 * math.sqrt(3.0) + 0.21), SPHERE: (0.0, 1.0), CYLINDER: (0.0, 1.19),
    CONE: (-0.25, 1.25), SNITCH: (0.0, 1.29),
}
_SNITCH_SCALE = 0.9362
_TORUS_NORMALS = np.array([[0.0, 0.0, 1.0], [0.814, -0.560, 0.153], [-0.575, -0.818, -0.012]])
_TORUS_NORMALS /= np.linalg.norm(_TORUS_NORMALS, axis=1, keepdims=True)
_TORUS_CENTRES = np.array([[0.0, 0.0, 0.0], [0.004, -0.004, 0.004], [-0.012, 0.015, 0.052]])

_FACETS = 32
_APOTHEM = math.cos(math.pi / _FACETS)
_FACET_OUT, _FACET_UP = (np.array([2.0, _APOTHEM]) / math.hypot(2.0, _APOTHEM)).tolist()
_FACET_COS = np.cos((np.arange(_FACETS) + 0.5) * 2 * math.pi / _FACETS) * _FACET_OUT
_FACET_SIN = np.sin((np.arange(_FACETS) + 0.5) * 2 * math.pi / _FACETS) * _FACET_OUT

# Lights: key, fill, back. Each is a square that faces the middle of the table.
_LIGHT_AT = np.array([[6.4467, -2.9052, 4.2584], [-4.6711, -4.0136, 3.0112], [-1.1685, 2.646, 5.8157]])
_LIGHT_SIDE = np.array([0.5, 0.5, 1.0])
_LIGHT_POWER = np.array([78.540, 23.562, 39.270])
_LIGHT_RGB = np.array([[1.0, 0.9323, 0.8167], [0.7617, 0.8177, 1.0], [1.0, 1.0, 1.0]])
_LIGHT_NORMAL = -_LIGHT_AT / np.linalg.norm(_LIGHT_AT, axis=1, keepdims=True)
_LIGHT_U = np.cross(_LIGHT_NORMAL, [0.0, 0.0, 1.0])
_LIGHT_U /= np.linalg.norm(_LIGHT_U, axis=1, keepdims=True)
_LIGHT_V = np.cross(_LIGHT_NORMAL, _LIGHT_U)
_LIGHTS = len(_LIGHT_AT)
SUN = _LIGHTS
_SUN_STRENGTH = 0.45


def euler_matrix(angles: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of Euler angles (..., 3) in radians: about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = (np.moveaxis(f(np.asarray(angles, np.float64)), -1, 0) for f in (np.cos, np.sin))
    rows = [[cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx]]
    return np.stack([np.stack(row, -1) for row in rows], -2)


_SUN_TO = np.ascontiguousarray(euler_matrix(np.array([0.236, 0.4169, 0.0971]))[:, 2])

# Points spread over a light, (-1/2, 1/2)^2: 4 x 4 with the corners first, so that where these agree the
# others need no look.
_ORDER = [0, 15, 3, 12, 5, 10, 6, 9, 1, 14, 4, 11, 2, 13, 7, 8]
_SPREAD = np.array([((k % 4 + 0.5) / 4 - 0.5, (k // 4 + 0.5) / 4 - 0.5) for k in _ORDER])

# Columns of an object's row in the compiled code.
_SHAPE, _MATERIAL, _RGB, _AT, _SCALE, _BOUND_AT, _RADIUS, _ROT = 0, 1, 2, 5, 8, 9, 12, 13
_COLUMNS = 22

_fast = njit(cache=True, fastmath=True, error_model="numpy", inline="never")


# ------------------------------------------------------------------------------------------- shapes


@_fast
def _clip_sphere(ox, oy, oz, dx, dy, dz, radius):
    """Where a unit-direction ray is inside a sphere about the origin: (t0, t1), t0 > t1 for nowhere."""
    b = ox * dx + oy * dy + oz * dz
    h = b * b - (ox * ox + oy * oy + oz * oz) + radius * radius
    if h <= 0.0:
        return 1.0, 0.0
    h = math.sqrt(h)
    return -b - h, -b + h


@_fast
def _cube_distance(x, y, z):
    qx, qy, qz = abs(x) - 0.79, abs(y) - 0.79, abs(z) - 0.79
    px, py, pz = max(qx, 0.0), max(qy, 0.0), max(qz, 0.0)
    return math.sqrt(px * px + py * py + pz * pz) + min(max(qx, max(qy, qz)), 0.0) - 0.21


@_fast
def _cylinder_distance(x, y, z):
    qr, qz = math.sqrt(x * x + y * y) - 0.932, abs(z) - 0.582
    pr, pz = max(qr, 0.0), max(qz, 0.0)
    return math.sqrt(pr * pr + pz * pz) + min(max(qr, qz), 0.0) - 0.068


@_fast
def _torus_distance(k, x, y, z):
    px, py, pz = x - _TORUS_CENTRES[k, 0], y - _TORUS_CENTRES[k, 1], z - _TORUS_CENTRES[k, 2]
    h = px * _TORUS_NORMALS[k, 0] + py * _TORUS_NORMALS[k, 1] + pz * _TORUS_NORMALS[k, 2]
    r = math.sqrt(max(px * px + py * py + pz * pz - h * h, 0.0)) - 1.0
    return math.sqrt(r * r + h * h) - 0.25


@_fast
def _snitch_distance(x, y, z):
    return min(_torus_distance(0, x, y, z), min(_torus_distance(1, x, y, z), _torus_distance(2, x, y, z)))


@_fast
def _march(shape, ox, oy, oz, dx, dy, dz, t, end):
    """Step along a ray by the distance to the nearest surface, until it is met or `end` is passed."""
    for _ in range(48):
        x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
        if shape == SNITCH:
            d = _snitch_distance(x, y, z)
        elif shape == CUBE:
            d = _cube_distance(x, y, z)
        else:
            d = _cylinder_distance(x, y, z)
        if d < 2e-4:
            return t
        t += d
        if t > end:
            return NO_HIT
    return NO_HIT


@_fast
def _meet_cube(ox, oy, oz, dx, dy, dz):
    ix, iy, iz = 1.0 / dx, 1.0 / dy, 1.0 / dz
    ax, ay, az = abs(ix), abs(iy), abs(iz)
    tx, ty, tz = -ox * ix - ax, -oy * iy - ay, -oz * iz - az
    start = max(tx, max(ty, tz))
    end = min(tx + 2 * ax, min(ty + 2 * ay, tz + 2 * az))
    if start > end or end < 0.0:
        return NO_HIT
    if start > 0.0:
        x, y, z = abs(ox + start * dx), abs(oy + start * dy), abs(oz + start * dz)
        if (x < 0.79) + (y < 0.79) + (z < 0.79) >= 2:  # on the flat of a face
            return start
    return _march(CUBE, ox, oy, oz, dx, dy, dz, max(start, 0.0), end)


@_fast
def _meet_cylinder(ox, oy, oz, dx, dy, dz):
    iz = 1.0 / dz
    t0, t1 = -oz * iz - 0.65 * abs(iz), -oz * iz + 0.65 * abs(iz)
    a = dx * dx + dy * dy
    b, c = ox * dx + oy * dy, ox * ox + oy * oy - 1.0
    h = b * b - a * c
    if h <= 0.0:
        return NO_HIT
    h = math.sqrt(h)
    start, end = max(t0, (-b - h) / a), min(t1, (-b + h) / a)
    if start > end or end < 0.0:
        return NO_HIT
    if start > 0.0:
        x, y, z = ox + start * dx, oy + start * dy, oz + start * dz
        if abs(z) < 0.582 or x * x + y * y < 0.932 * 0.932:
            return start
    return _march(CYLINDER, ox, oy, oz, dx, dy, dz, max(start, 0.0), end)


@_fast
def _meet_cone(ox, oy, oz, dx, dy, dz):
    """The 32-sided pyramid between its planes."""
    start, end = -NO_HIT, NO_HIT
    apex = _FACET_UP * (oz - 1.0)
    slope = _FACET_UP * dz
    for k in range(_FACETS):
        into = slope + _FACET_COS[k] * dx + _FACET_SIN[k] * dy
        t = -(apex + _FACET_COS[k] * ox + _FACET_SIN[k] * oy) / into
        start = max(start, t if into < 0.0 else -NO_HIT)
        end = min(end, t if into >= 0.0 else NO_HIT)
    t = (-1.0 - oz) / dz
    if dz > 0.0:
        start = max(start, t)
    else:
        end = min(end, t)
    if start > end or end < 0.0:
        return NO_HIT
    return start if start > 0.0 else end


@_fast
def _meet(thing, ox, oy, oz, dx, dy, dz, least, most):
    """The distance along a unit-direction ray to an object, between `least` and `most`, or NO_HIT."""
    bx, by, bz = ox - thing[_BOUND_AT], oy - thing[_BOUND_AT + 1], oz - thing[_BOUND_AT + 2]
    radius = thing[_RADIUS]
    b = bx * dx + by * dy + bz * dz
    far = bx * bx + by * by + bz * bz - radius * radius
    h = b * b - far
    if h <= 0.0 or (far > 0.0 and b > 0.0):
        return NO_HIT
    h = math.sqrt(h)
    if -b - h > most or -b + h < least:
        return NO_HIT
    scale, shape = thing[_SCALE], int(thing[_SHAPE])
    wx, wy, wz = ox - thing[_AT], oy - thing[_AT + 1], oz - thing[_AT + 2]
    # A short step back keeps the numbers small; the start of the march is the near side of the sphere.
    inv = 1.0 / scale
    px = (thing[_ROT] * wx + thing[_ROT + 3] * wy + thing[_ROT + 6] * wz) * inv
    py = (thing[_ROT + 1] * wx + thing[_ROT + 4] * wy + thing[_ROT + 7] * wz) * inv
    pz = (thing[_ROT + 2] * wx + thing[_ROT + 5] * wy + thing[_ROT + 8] * wz) * inv
    qx = thing[_ROT] * dx + thing[_ROT + 3] * dy + thing[_ROT + 6] * dz
    qy = thing[_ROT + 1] * dx + thing[_ROT + 4] * dy + thing[_ROT + 7] * dz
    qz = thing[_ROT + 2] * dx + thing[_ROT + 5] * dy + thing[_ROT + 8] * dz
    if shape == CONE:
        t = _meet_cone(px, py, pz, qx, qy, qz)
    elif shape == CUBE:
        t = _meet_cube(px, py, pz, qx, qy, qz)
    elif shape == CYLINDER:
        t = _meet_cylinder(px, py, pz, qx, qy, qz)
    elif shape == SPHERE:
        t0, t1 = _clip_sphere(px, py, pz, qx, qy, qz, 1.0)
        t = t0 if t0 > 0.0 else t1
        if t0 > t1:
            t = NO_HIT
    else:
        t = _march(SNITCH, px, py, pz, qx, qy, qz, max(max(-b - h, least) * inv, 0.0), (-b + h) * inv)
    return t * scale if least < t * scale < most and t < NO_HIT else NO_HIT


@_fast
def _normal(thing, x, y, z):
    """Outward normal and, for telling edges, the number of the face of a surface point: (nx, ny, nz, face)."""
    inv, shape = 1.0 / thing[_SCALE], int(thing[_SHAPE])
    wx, wy, wz = x - thing[_AT], y - thing[_AT + 1], z - thing[_AT + 2]
    px = (thing[_ROT] * wx + thing[_ROT + 3] * wy + thing[_ROT + 6] * wz) * inv
    py = (thing[_ROT + 1] * wx + thing[_ROT + 4] * wy + thing[_ROT + 7] * wz) * inv
    pz = (thing[_ROT + 2] * wx + thing[_ROT + 5] * wy + thing[_ROT + 8] * wz) * inv
    face = 0
    if shape == CONE:
        if pz < -0.9999:
            nx, ny, nz, face = 0.0, 0.0, -1.0, _FACETS
        else:
            face = int(math.floor(math.atan2(py, px) * (_FACETS / (2 * math.pi)))) & (_FACETS - 1)
            nx, ny, nz = _FACET_COS[face], _FACET_SIN[face], _FACET_UP
    elif shape == CUBE:
        nx = math.copysign(max(abs(px) - 0.79, 0.0), px)
        ny = math.copysign(max(abs(py) - 0.79, 0.0), py)
        nz = math.copysign(max(abs(pz) - 0.79, 0.0), pz)
        face = (abs(px) > 0.79) + 2 * (abs(py) > 0.79) + 4 * (abs(pz) > 0.79)
    elif shape == CYLINDER:
        r = math.sqrt(px * px + py * py)
        out = max(r - 0.932, 0.0) / max(r, 1e-9)
        nx, ny, nz = px * out, py * out, math.copysign(max(abs(pz) - 0.582, 0.0), pz)
        face = (r > 0.932) + 2 * (abs(pz) > 0.582)
    elif shape == SPHERE:
        nx, ny, nz = px, py, pz
    else:
        d0, d1, d2 = _torus_distance(0, px, py, pz), _torus_distance(1, px, py, pz), _torus_distance(2, px, py, pz)
        face = 0 if d0 <= d1 and d0 <= d2 else (1 if d1 <= d2 else 2)
        px -= _TORUS_CENTRES[face, 0]
        py -= _TORUS_CENTRES[face, 1]
        pz -= _TORUS_CENTRES[face, 2]
        ax, ay, az = _TORUS_NORMALS[face, 0], _TORUS_NORMALS[face, 1], _TORUS_NORMALS[face, 2]
        h = px * ax + py * ay + pz * az
        rx, ry, rz = px - h * ax, py - h * ay, pz - h * az
        r = 1.0 - 1.0 / max(math.sqrt(rx * rx + ry * ry + rz * rz), 1e-9)
        nx, ny, nz = rx * r + h * ax, ry * r + h * ay, rz * r + h * az
    length = 1.0 / max(math.sqrt(nx * nx + ny * ny + nz * nz), 1e-12)
    nx, ny, nz = nx * length, ny * length, nz * length
    return (thing[_ROT] * nx + thing[_ROT + 1] * ny + thing[_ROT + 2] * nz,
            thing[_ROT + 3] * nx + thing[_ROT + 4] * ny + thing[_ROT + 5] * nz,
            thing[_ROT + 6] * nx + thing[_ROT + 7] * ny + thing[_ROT + 8] * nz, face)


@_fast
def _nearest(things, mask, ox, oy, oz, dx, dy, dz, least):
    """The first object of `mask` (a bit each) that a ray meets: (its number or -1, the distance)."""
    best, found = NO_HIT, -1
    for k in range(len(things)):
        if mask >> k & 1:
            t = _meet(things[k], ox, oy, oz, dx, dy, dz, least, best)
            if t < best:
                best, found = t, k
    return found, best


@_fast
def _blocked(things, mask, ox, oy, oz, dx, dy, dz, most):
    for k in range(len(things)):
        if mask >> k & 1 and _meet(things[k], ox, oy, oz, dx, dy, dz, 1e-3, most) < NO_HIT:
            return True
    return False


# ------------------------------------------------------------------------------ table and light


@_fast
def _table(look, ox, oy, oz, dx, dy, dz):
    """Table, curve and backdrop: (distance or NO_HIT, nx, ny, nz)."""
    hx, hy = math.cos(look.backdrop_heading), math.sin(look.backdrop_heading)
    radius, start = look.backdrop_radius, look.backdrop_start
    s, ds = ox * hx + oy * hy, dx * hx + dy * hy
    if dz < 0.0:
        t = -oz / dz
        if s + t * ds <= start:
            return t, 0.0, 0.0, 1.0
    if ds <= 0.0:
        return NO_HIT, 0.0, 0.0, 1.0
    t = (start + radius - s) / ds
    z = oz + t * dz
    if z > radius:
        return (t if z < look.backdrop_top else NO_HIT), -hx, -hy, 0.0
    a = ds * ds + dz * dz
    qs, qz = s - start, oz - radius
    b, c = qs * ds + qz * dz, qs * qs + qz * qz - radius * radius
    t = (-b + math.sqrt(max(b * b - a * c, 0.0))) / a
    out, z = (s + t * ds - start) / radius, oz + t * dz
    return t, -out * hx, -out * hy, (radius - z) / radius


@_fast
def _irradiance(light, x, y, z, nx, ny, nz):
    """Unshadowed irradiance from a light's middle (W/m2 over pi, so that albedo times it is radiance)."""
    if light == SUN:
        return max(nx * _SUN_TO[0] + ny * _SUN_TO[1] + nz * _SUN_TO[2], 0.0) * (_SUN_STRENGTH / math.pi)
    lx, ly, lz = _LIGHT_AT[light, 0] - x, _LIGHT_AT[light, 1] - y, _LIGHT_AT[light, 2] - z
    r2 = lx * lx + ly * ly + lz * lz
    cos_out = -(lx * _LIGHT_NORMAL[light, 0] + ly * _LIGHT_NORMAL[light, 1] + lz * _LIGHT_NORMAL[light, 2])
    cos_in = lx * nx + ly * ny + lz * nz
    if cos_out <= 0.0 or cos_in <= 0.0:
        return 0.0
    return cos_out * cos_in / (r2 * r2) * _LIGHT_POWER[light] / (math.pi * math.pi)


@_fast
def _colour(light, channel):
    return 1.0 if light == SUN else _LIGHT_RGB[light, channel]


@_fast
def _to_light(look, light, point, x, y, z):
    """Unit direction and distance from a place to one of the points of a light."""
    u, v = _SPREAD[point, 0], _SPREAD[point, 1]
    if light == SUN:
        wide = 2.0 * look.sun_spread
        lx = _SUN_TO[0] + wide * (u * _SUN_TO[2])
        ly = _SUN_TO[1] + wide * v
        lz = _SUN_TO[2] - wide * u * _SUN_TO[0]
        far = 1e3
    else:
        side = _LIGHT_SIDE[light]
        lx = _LIGHT_AT[light, 0] + side * (u * _LIGHT_U[light, 0] + v * _LIGHT_V[light, 0]) - x
        ly = _LIGHT_AT[light, 1] + side * (u * _LIGHT_U[light, 1] + v * _LIGHT_V[light, 1]) - y
        lz = _LIGHT_AT[light, 2] + side * (u * _LIGHT_U[light, 2] + v * _LIGHT_V[light, 2]) - z
        far = math.sqrt(lx * lx + ly * ly + lz * lz)
    inv = 1.0 / math.sqrt(lx * lx + ly * ly + lz * lz)
    return lx * inv, ly * inv, lz * inv, far


@_fast
def _visible(look, things, mask, light, x, y, z, first, points):
    """The part of a light that a place sees past the objects of `mask`, from up to `points` points of it."""
    if mask == 0:
        return 1.0
    if light == SUN and look.sun_spread == 0.0:
        points = 1
    seen = 0
    for k in range(points):
        dx, dy, dz, far = _to_light(look, light, (first + k) & 15, x, y, z)
        seen += not _blocked(things, mask, x, y, z, dx, dy, dz, far)
        if k == 7 and points == 16 and (seen == 0 or seen == 8):
            return seen / 8.0
    return seen / points


@_fast
def _may_shade(look, thing, light, x, y, z, radius):
    """Whether an object can stand between a light and any place in a sphere."""
    cx, cy, cz = thing[_BOUND_AT] - x, thing[_BOUND_AT + 1] - y, thing[_BOUND_AT + 2] - z
    if light == SUN:
        t = cx * _SUN_TO[0] + cy * _SUN_TO[1] + cz * _SUN_TO[2]
        reach = thing[_RADIUS] + radius + 2.0 * max(t, 0.0) * look.sun_spread
        if t < -reach:
            return False
        gap = cx * cx + cy * cy + cz * cz - t * t
        return gap < reach * reach
    lx, ly, lz = _LIGHT_AT[light, 0] - x, _LIGHT_AT[light, 1] - y, _LIGHT_AT[light, 2] - z
    t = (cx * lx + cy * ly + cz * lz) / (lx * lx + ly * ly + lz * lz)
    t = min(max(t, 0.0), 1.0)
    cx, cy, cz = cx - t * lx, cy - t * ly, cz - t * lz
    reach = thing[_RADIUS] + radius * (1.0 - t) + 0.7072 * _LIGHT_SIDE[light] * t
    return cx * cx + cy * cy + cz * cz < reach * reach


@_fast
def _table_radiance(look, things, mask, point, x, y, z, nx, ny, nz):
    """Radiance of a place on the table or the backdrop as a ray that came from an object sees it."""
    grey = look.bounce + look.bounce_slope * (1.0 - nz)
    r = g = b = grey
    for light in range(_LIGHTS + 1):
        e = _irradiance(light, x, y, z, nx, ny, nz) * look.ground
        if e > 0.004:
            shade = 0
            for k in range(len(things)):
                if mask >> k & 1 and _may_shade(look, things[k], light, x, y, z, 0.0):
                    shade |= 1 << k
            if shade:
                e *= _visible(look, things, shade, light, x, y, z, point, 1)
        r += e * _colour(light, 0)
        g += e * _colour(light, 1)
        b += e * _colour(light, 2)
    return r, g, b


# ---------------------------------------------------------- light from the table, in spherical harmonics

_FIELD_FROM, _FIELD_STEP, _FIELD_SHAPE = np.array([-4.5, -4.5, 0.0]), 0.5, (19, 19, 9)
_LOBES = np.array([math.pi, 2 * math.pi / 3, 2 * math.pi / 3, 2 * math.pi / 3] + [math.pi / 4] * 5) / math.pi


@_fast
def _harmonics(x, y, z, out):
    out[0] = 0.282095
    out[1], out[2], out[3] = 0.488603 * y, 0.488603 * z, 0.488603 * x
    out[4], out[5] = 1.092548 * x * y, 1.092548 * y * z
    out[6], out[7] = 0.315392 * (3 * z * z - 1), 1.092548 * x * z
    out[8] = 0.546274 * (x * x - y * y)


@njit(cache=True, parallel=True, fastmath=True, error_model="numpy")
def _fill_field(look, directions, field):
    """Coefficients of irradiance over pi from table and backdrop on a lattice above the table."""
    nothing = np.zeros((0, _COLUMNS))
    nx, ny, nz = field.shape[:3]
    for cell in prange(nx * ny * nz):
        i, j, k = cell // (ny * nz), cell // nz % ny, cell % nz
        x, y, z = (_FIELD_FROM[0] + i * _FIELD_STEP, _FIELD_FROM[1] + j * _FIELD_STEP,
                   max(_FIELD_FROM[2] + k * _FIELD_STEP, 0.02))
        base = np.empty(9)
        total = np.zeros((9, 3))
        for d in range(len(directions)):
            dx, dy, dz = directions[d]
            t, ax, ay, az = _table(look, x, y, z, dx, dy, dz)
            if t < 1e3:
                rgb = _table_radiance(look, nothing, 0, 0, x + t * dx, y + t * dy, z + t * dz, ax, ay, az)
                _harmonics(dx, dy, dz, base)
                for c in range(9):
                    for channel in range(3):
                        total[c, channel] += base[c] * rgb[channel]
        for c in range(9):
            for channel in range(3):
                field[i, j, k, c, channel] = total[c, channel] * (4 * math.pi / len(directions)) * _LOBES[c]


@_fast
def _from_table(field, x, y, z, nx, ny, nz):
    """Irradiance over pi that an unblocked place with a normal gets from table and backdrop: (r, g, b)."""
    fx = min(max((x - _FIELD_FROM[0]) / _FIELD_STEP, 0.0), field.shape[0] - 1.001)
    fy = min(max((y - _FIELD_FROM[1]) / _FIELD_STEP, 0.0), field.shape[1] - 1.001)
    fz = min(max((z - _FIELD_FROM[2]) / _FIELD_STEP, 0.0), field.shape[2] - 1.001)
    i, j, k = int(fx), int(fy), int(fz)
    fx, fy, fz = fx - i, fy - j, fz - k
    h0, h1, h2, h3 = 0.282095, 0.488603 * ny, 0.488603 * nz, 0.488603 * nx
    h4, h5, h6 = 1.092548 * nx * ny, 1.092548 * ny * nz, 0.315392 * (3 * nz * nz - 1)
    h7, h8 = 1.092548 * nx * nz, 0.546274 * (nx * nx - ny * ny)
    r = g = b = 0.0
    for corner in range(8):
        a, e, o = corner & 1, corner >> 1 & 1, corner >> 2
        w = (fx if a else 1 - fx) * (fy if e else 1 - fy) * (fz if o else 1 - fz)
        f = field[i + a, j + e, k + o]
        r += w * (h0 * f[0, 0] + h1 * f[1, 0] + h2 * f[2, 0] + h3 * f[3, 0] + h4 * f[4, 0] + h5 * f[5, 0]
                  + h6 * f[6, 0] + h7 * f[7, 0] + h8 * f[8, 0])
        g += w * (h0 * f[0, 1] + h1 * f[1, 1] + h2 * f[2, 1] + h3 * f[3, 1] + h4 * f[4, 1] + h5 * f[5, 1]
                  + h6 * f[6, 1] + h7 * f[7, 1] + h8 * f[8, 1])
        b += w * (h0 * f[0, 2] + h1 * f[1, 2] + h2 * f[2, 2] + h3 * f[3, 2] + h4 * f[4, 2] + h5 * f[5, 2]
                  + h6 * f[6, 2] + h7 * f[7, 2] + h8 * f[8, 2])
    return max(r, 0.0), max(g, 0.0), max(b, 0.0)


# ------------------------------------------------------------------- what objects take and give around

# (The six along the axes miss upright cylinders and, but for some sides, cubes and cones. A tilt would mend that, and
# change pictures by up to 3 of 255: something for the next `scene.VERSION`.)
_AROUND = np.array([(a, b, c) for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0) for c in (-1.0, 0.0, 1.0)
                    if abs(a) + abs(b) + abs(c) in (1, 3)])
_AROUND /= np.linalg.norm(_AROUND, axis=1, keepdims=True)
_PROBE_RAYS = 32
_REACH = 4.0  # radii of an object within which the table sees its light
# The sphere that an object is for the table around it: as large as its outline, at unit scale.
_GLOW_RADIUS = np.array([1.2, 1.0, 0.95, 0.8, 0.8])
_GLOW_UP = np.array([0.0, 0.0, 0.0, -0.35, 0.0])


@_fast
def _towards(probe, column, x, y, z):
    """Three columns of an object's probes, blended for a direction."""
    r = g = b = whole = 0.0
    for k in range(len(_AROUND)):
        w = _AROUND[k, 0] * x + _AROUND[k, 1] * y + _AROUND[k, 2] * z
        if w > 0.0:
            w *= w
            w *= w
            whole += w
            r += w * probe[k, column]
            g += w * probe[k, column + 1]
            b += w * probe[k, column + 2]
    inv = 1.0 / whole
    return r * inv, g * inv, b * inv


@_fast
def _dull(field, thing, x, y, z, nx, ny, nz):
    """Radiance of an object's place as if it were plain and diffuse, unshadowed."""
    r, g, b = _from_table(field, x, y, z, nx, ny, nz)
    for light in range(_LIGHTS + 1):
        e = _irradiance(light, x, y, z, nx, ny, nz)
        r, g, b = r + e * _colour(light, 0), g + e * _colour(light, 1), b + e * _colour(light, 2)
    return r * thing[_RGB], g * thing[_RGB + 1], b * thing[_RGB + 2]


@njit(cache=True, parallel=True, fastmath=True, error_model="numpy")
def _fill_probes(look, field, things, counts, masks, rays, probes):
    """For each object and direction: how table and neighbours change what it takes, and what it gives off.

    probes (frames, n, 14, 6): irradiance over pi less that of the empty table, and radiance.
    """
    ways = len(_AROUND)
    for item in prange(things.shape[0] * things.shape[1] * ways):
        frame, me, way = item // (things.shape[1] * ways), item // ways % things.shape[1], item % ways
        if me >= counts[frame]:
            continue
        objects = things[frame, :counts[frame]]
        thing = objects[me]
        everything = (1 << len(objects)) - 1
        others = everything & ~(1 << me)
        ux, uy, uz = _AROUND[way]
        far = thing[_RADIUS] * 1.01
        x, y, z = thing[_BOUND_AT] + far * ux, thing[_BOUND_AT + 1] + far * uy, thing[_BOUND_AT + 2] + far * uz
        t = _meet(thing, x, y, z, -ux, -uy, -uz, 0.0, far)
        nx, ny, nz = ux, uy, uz
        if t < far:
            x, y, z = x - t * ux, y - t * uy, z - t * uz
            nx, ny, nz, _ = _normal(thing, x, y, z)
        x, y, z = x + 2e-3 * nx, y + 2e-3 * ny, max(z + 2e-3 * nz, 2e-3)
        # a frame around the direction (Duff et al. 2017)
        sign = math.copysign(1.0, uz)
        a = -1.0 / (sign + uz)
        b = ux * uy * a
        px, py, pz = 1.0 + sign * ux * ux * a, sign * b, -sign * ux
        qx, qy, qz = b, sign + uy * uy * a, -uy
        er = eg = eb = 0.0
        for k in range(len(rays)):
            dx = rays[k, 0] * px + rays[k, 1] * qx + rays[k, 2] * ux
            dy = rays[k, 0] * py + rays[k, 1] * qy + rays[k, 2] * uy
            dz = rays[k, 0] * pz + rays[k, 1] * qz + rays[k, 2] * uz
            hit, t = _nearest(objects, others, x, y, z, dx, dy, dz, 0.0)
            end, gx, gy, gz = _table(look, x, y, z, dx, dy, dz)
            if hit >= 0 and t < end:
                sx, sy, sz = x + t * dx, y + t * dy, z + t * dz
                gx, gy, gz, _ = _normal(objects[hit], sx, sy, sz)
                r, g, b = _dull(field, objects[hit], sx, sy, sz, gx, gy, gz)
            elif end < 1e3:
                r, g, b = _table_radiance(look, objects, everything, k, x + end * dx, y + end * dy, z + end * dz,
                                          gx, gy, gz)
            else:
                r = g = b = 0.0
            er, eg, eb = er + r, eg + g, eb + b
        er, eg, eb = er / len(rays), eg / len(rays), eb / len(rays)
        fr, fg, fb = _from_table(field, x, y, z, ux, uy, uz)
        probe = probes[frame, me, way]
        probe[0], probe[1], probe[2] = er - fr, eg - fg, eb - fb
        for light in range(_LIGHTS + 1):
            e = _irradiance(light, x, y, z, nx, ny, nz)
            if e > 1e-4:
                e *= _visible(look, objects, masks[frame, me, light], light, x, y, z, 0, 4)
            er, eg, eb = er + e * _colour(light, 0), eg + e * _colour(light, 1), eb + e * _colour(light, 2)
        probe[3], probe[4], probe[5] = er * thing[_RGB], eg * thing[_RGB + 1], eb * thing[_RGB + 2]


# ---------------------------------------------------------------------------------------- materials


@_fast
def _fresnel(ior, cos):
    """Unpolarised reflectance of a dielectric (Fresnel's equations)."""
    g = math.sqrt(ior * ior - 1.0 + cos * cos)
    a, b = (g - cos) / (g + cos), (cos * (g + cos) - 1.0) / (cos * (g - cos) + 1.0)
    return 0.5 * a * a * (1.0 + b * b)


@_fast
def _smith(tx, ty, cos):
    """Smith's lambda of GGX; (tx, ty) are the direction's tangent parts times the roughness along each."""
    return 0.5 * (math.sqrt(1.0 + (tx * tx + ty * ty) / max(cos * cos, 1e-8)) - 1.0)


@_fast
def _ggx(ax, ay, vx, vy, vz, lx, ly, lz):
    """Reflected fraction a steradian, with the cosine: GGX D G / (4 cos v), directions in the tangent frame."""
    if lz <= 0.0 or vz <= 0.0:
        return 0.0
    hx, hy, hz = vx + lx, vy + ly, vz + lz
    inv = 1.0 / math.sqrt(hx * hx + hy * hy + hz * hz)
    hx, hy, hz = hx * inv / ax, hy * inv / ay, hz * inv
    q = hx * hx + hy * hy + hz * hz
    d = 1.0 / (math.pi * ax * ay * q * q)
    return d / (4.0 * vz * (1.0 + _smith(ax * vx, ay * vy, vz) + _smith(ax * lx, ay * ly, lz)))


@_fast
def _velvet(nh, nv, nl, vh):
    """Ashikhmin's velvet of roughness 0.6, with the cosine, a steradian."""
    if nl <= 0.0 or nv <= 0.0 or nh >= 0.9999:
        return 0.0
    cot2 = nh * nh / (1.0 - nh * nh)
    s = 1.0 - nh * nh
    inv = 1.0 / 0.36
    d = math.exp(-cot2 * inv) * inv / (math.pi * s * s)
    g = min(1.0, min(2.0 * nh * nv / vh, 2.0 * nh * nl / vh))
    return 0.25 * d * g / nv


@_fast
def _rubber(look, field, probes, things, me, masks, point, points, x, y, z, nx, ny, nz, dx, dy, dz):
    """Radiance of a rubber place towards the ray (dx, dy, dz) that met it."""
    thing = things[me]
    cos = max(-(nx * dx + ny * dy + nz * dz), 1e-3)
    soft, hard = _fresnel(1.25, cos), _fresnel(1.55, cos)
    flat = (1.0 - hard) * (1.0 - soft)
    fuzz = (1.0 - hard) * soft * look.sheen
    dr, dg, db = _from_table(field, x, y, z, nx, ny, nz)
    ar, ag, ab = _towards(probes[me], 0, nx, ny, nz)
    dr, dg, db = max(dr + ar, 0.0), max(dg + ag, 0.0), max(db + ab, 0.0)
    rx, ry, rz = dx + 2 * cos * nx, dy + 2 * cos * ny, dz + 2 * cos * nz
    gr, gg, gb = _from_table(field, x, y, z, 0.5 * (rx + nx), 0.5 * (ry + ny), 0.5 * (rz + nz))
    fr, fg, fb = fuzz * dr, fuzz * dg, fuzz * db
    around = hard * look.gloss_around
    gr, gg, gb = max(gr + ar, 0.0) * around, max(gg + ag, 0.0) * around, max(gb + ab, 0.0) * around
    hard *= look.gloss
    dr, dg, db = dr * flat, dg * flat, db * flat
    for light in range(_LIGHTS + 1):
        e = _irradiance(light, x, y, z, nx, ny, nz)
        if e <= 1e-5:
            continue
        e *= _visible(look, things, masks[light], light, x + 1e-3 * nx, y + 1e-3 * ny, z + 1e-3 * nz, point, points)
        lx, ly, lz, _ = _to_light(look, light, 4, x, y, z)
        hx, hy, hz = lx - dx, ly - dy, lz - dz
        inv = 1.0 / math.sqrt(hx * hx + hy * hy + hz * hz)
        nh, vh = (nx * hx + ny * hy + nz * hz) * inv, -(dx * hx + dy * hy + dz * hz) * inv
        nl = nx * lx + ny * ly + nz * lz
        alpha = 0.592 * 0.592
        q = nh * nh * (alpha * alpha - 1.0) + 1.0
        lobe = alpha * alpha / (math.pi * q * q) / (4.0 * cos * (
            1.0 + _smith(alpha * math.sqrt(max(1 - cos * cos, 0.0)), 0.0, cos)
            + _smith(alpha * math.sqrt(max(1 - nl * nl, 0.0)), 0.0, nl)))
        # e is the irradiance over pi; the lobes hold the cosine already
        whole = e * math.pi / max(nl, 1e-3)
        shine, fuzzy = hard * whole * lobe, fuzz * whole * _velvet(nh, cos, nl, vh)
        cr, cg, cb = _colour(light, 0), _colour(light, 1), _colour(light, 2)
        dr, dg, db = dr + flat * e * cr, dg + flat * e * cg, db + flat * e * cb
        fr, fg, fb = fr + fuzzy * cr, fg + fuzzy * cg, fb + fuzzy * cb
        gr, gg, gb = gr + shine * cr, gg + shine * cg, gb + shine * cb
    return (dr + fr) * thing[_RGB] + gr, (dg + fg) * thing[_RGB + 1] + gg, (db + fb) * thing[_RGB + 2] + gb


@_fast
def _frame(thing, nx, ny, nz):
    """The tangent frame of CATER's metal: around the object's own z."""
    ux, uy, uz = thing[_ROT + 2], thing[_ROT + 5], thing[_ROT + 8]
    tx, ty, tz = uy * nz - uz * ny, uz * nx - ux * nz, ux * ny - uy * nx
    length = tx * tx + ty * ty + tz * tz
    if length < 1e-6:
        tx, ty, tz = ny * nz + 1.0 - abs(nx), -nx * nz, 0.0
        c = tx * nx + ty * ny
        tx, ty, tz = tx - c * nx, ty - c * ny, -c * nz
        length = tx * tx + ty * ty + tz * tz
    inv = 1.0 / math.sqrt(length)
    tx, ty, tz = tx * inv, ty * inv, tz * inv
    return tx, ty, tz, ny * tz - nz * ty, nz * tx - nx * tz, nx * ty - ny * tx


_ROUGH, _SLEEK = (0.447**2 * 0.75, 0.447**2 / 0.75), (0.1**2 * 0.75, 0.1**2 / 0.75)


@_fast
def _highlight(things, thing, masks, look, point, points, x, y, z, nx, ny, nz, dx, dy, dz):
    """Light of the lamps in the two lobes of metal: (r, g, b), before the tint."""
    tx, ty, tz, bx, by, bz = _frame(thing, nx, ny, nz)
    vx, vy = -(dx * tx + dy * ty + dz * tz), -(dx * bx + dy * by + dz * bz)
    vz = max(-(dx * nx + dy * ny + dz * nz), 1e-3)
    r = g = b = 0.0
    for light in range(_LIGHTS + 1):
        e = _irradiance(light, x, y, z, nx, ny, nz)
        if e <= 1e-5:
            continue
        lx, ly, lz, _ = _to_light(look, light, 4, x, y, z)
        nl = lx * nx + ly * ny + lz * nz
        whole = e * math.pi / max(nl, 1e-3)
        # how far the mirror direction is from the lamp, and how wide the lamp is
        mx, my, mz = dx + 2 * vz * nx, dy + 2 * vz * ny, dz + 2 * vz * nz
        count = 1
        if light != SUN and mx * lx + my * ly + mz * lz > 0.9:
            count = 16
        total = 0.0
        for k in range(count):
            if count > 1:
                lx, ly, lz, far = _to_light(look, light, k, x, y, z)
            wx, wy, wz = lx * tx + ly * ty + lz * tz, lx * bx + ly * by + lz * bz, nl
            if count > 1:
                wz = lx * nx + ly * ny + lz * nz
            blur = 0.0
            if light != SUN:
                blur = 0.15 * _LIGHT_SIDE[light] / 6.0 if count > 1 else _LIGHT_SIDE[light] / 24.0
            ax, ay = _SLEEK[0], _SLEEK[1]
            ax, ay = math.sqrt(ax * ax + blur * blur), math.sqrt(ay * ay + blur * blur)
            total += 0.6 * _ggx(ax, ay, vx, vy, vz, wx, wy, wz)
            total += 0.4 * _ggx(_ROUGH[0], _ROUGH[1], vx, vy, vz, wx, wy, wz)
        total *= whole / count
        if total > 1e-4:
            total *= _visible(look, things, masks[light], light, x + 1e-3 * nx, y + 1e-3 * ny,
                              z + 1e-3 * nz, point, points)
        r += total * _colour(light, 0)
        g += total * _colour(light, 1)
        b += total * _colour(light, 2)
    return r, g, b


@_fast
def _incoming(look, field, probes, things, masks, me, point, x, y, z, dx, dy, dz):
    """Radiance that comes to an object along a reflected ray, lamps left out: (r, g, b)."""
    everything = (1 << len(things)) - 1
    others = everything
    if things[me, _SHAPE] != SNITCH:
        others &= ~(1 << me)
    k, t = _nearest(things, others, x, y, z, dx, dy, dz, 0.0)
    far, nx, ny, nz = _table(look, x, y, z, dx, dy, dz)
    if k < 0 or far < t:
        if far >= 1e3:
            return 0.0, 0.0, 0.0
        return _table_radiance(look, things, everything, point, x + far * dx, y + far * dy, z + far * dz, nx, ny, nz)
    x, y, z = x + t * dx, y + t * dy, z + t * dz
    nx, ny, nz, _ = _normal(things[k], x, y, z)
    if things[k, _MATERIAL] != METAL:
        return _rubber(look, field, probes, things, k, masks[k], point, 1, x, y, z, nx, ny, nz, dx, dy, dz)
    r, g, b = _highlight(things, things[k], masks[k], look, point, 1, x, y, z, nx, ny, nz, dx, dy, dz)
    cos = -(nx * dx + ny * dy + nz * dz)
    dx, dy, dz = dx + 2 * cos * nx, dy + 2 * cos * ny, dz + 2 * cos * nz
    far, nx, ny, nz = _table(look, x, y, z, dx, dy, dz)
    if far < 1e3:
        tr, tg, tb = _table_radiance(look, things, 0, point, x + far * dx, y + far * dy, z + far * dz, nx, ny, nz)
        r, g, b = r + tr, g + tg, b + tb
    return r * things[k, _RGB], g * things[k, _RGB + 1], b * things[k, _RGB + 2]


@_fast
def _metal(look, field, probes, things, masks, me, point, points, rays, x, y, z, nx, ny, nz, dx, dy, dz):
    """Radiance of a metal place towards the ray that met it."""
    thing = things[me]
    x, y, z = x + 1e-3 * nx, y + 1e-3 * ny, z + 1e-3 * nz  # clear of the surface
    r, g, b = _highlight(things, thing, masks[me], look, point, points, x, y, z, nx, ny, nz, dx, dy, dz)
    cos = max(-(nx * dx + ny * dy + nz * dz), 1e-3)
    sr, sg, sb = _incoming(look, field, probes, things, masks, me, point, x, y, z,
                           dx + 2 * cos * nx, dy + 2 * cos * ny, dz + 2 * cos * nz)
    r, g, b = r + 0.6 * sr, g + 0.6 * sg, b + 0.6 * sb
    tx, ty, tz, bx, by, bz = _frame(thing, nx, ny, nz)
    ax, ay = _ROUGH
    vx, vy, vz = -(dx * tx + dy * ty + dz * tz), -(dx * bx + dy * by + dz * bz), cos
    # normals as the ray sees them (Heitz 2018): stretch, take a disc, stretch back
    sx, sy = ax * vx, ay * vy
    inv = 1.0 / math.sqrt(sx * sx + sy * sy + vz * vz)
    sx, sy, sz = sx * inv, sy * inv, vz * inv
    across = math.sqrt(sx * sx + sy * sy)
    px, py = (-sy / across, sx / across) if across > 1e-6 else (1.0, 0.0)
    qx, qy, qz = -sz * py, sz * px, sx * py - sy * px
    for k in range(rays):
        radius = math.sqrt((k + 0.5) / rays)
        angle = 2.399963 * (k + point) + 0.5
        p, q = radius * math.cos(angle), radius * math.sin(angle)
        half = 0.5 * (1.0 + sz)
        q = (1.0 - half) * math.sqrt(max(1.0 - p * p, 0.0)) + half * q
        up = math.sqrt(max(1.0 - p * p - q * q, 0.0))
        hx, hy, hz = (p * px + q * qx + up * sx) * ax, (p * py + q * qy + up * sy) * ay, q * qz + up * sz
        hz = max(hz, 1e-6)
        inv = 1.0 / math.sqrt(hx * hx + hy * hy + hz * hz)
        hx, hy, hz = hx * inv, hy * inv, hz * inv
        vh = 2.0 * (vx * hx + vy * hy + vz * hz)
        lx, ly, lz = vh * hx - vx, vh * hy - vy, vh * hz - vz
        if lz <= 1e-3:
            continue
        a, c = _smith(ax * vx, ay * vy, vz), _smith(ax * lx, ay * ly, lz)
        weight = 0.4 / rays * (1.0 + a) / (1.0 + a + c)
        sr, sg, sb = _incoming(look, field, probes, things, masks, me, point + k, x, y, z, lx * tx + ly * bx + lz * nx,
                               lx * ty + ly * by + lz * ny, lx * tz + ly * bz + lz * nz)
        r, g, b = r + weight * sr, g + weight * sg, b + weight * sb
    return r * thing[_RGB], g * thing[_RGB + 1], b * thing[_RGB + 2]


# ------------------------------------------------------------------------------------------- frames


@_fast
def _shade(look, field, probes, things, masks, me, point, points, rays, ox, oy, oz, dx, dy, dz, t):
    x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
    nx, ny, nz, _ = _normal(things[me], x, y, z)
    if nx * dx + ny * dy + nz * dz > 0.0:  # a grazing ray at a rounded edge
        c = nx * dx + ny * dy + nz * dz
        nx, ny, nz = nx - 1.01 * c * dx, ny - 1.01 * c * dy, nz - 1.01 * c * dz
    if things[me, _MATERIAL] == METAL:
        return _metal(look, field, probes, things, masks, me, point, points, rays, x, y, z, nx, ny, nz, dx, dy, dz)
    return _rubber(look, field, probes, things, me, masks[me], point, points, x, y, z, nx, ny, nz, dx, dy, dz)


@_fast
def _view(u, v):
    """Unit direction of the camera's ray through (u, v) in [-1, 1], v up."""
    a, b = u * FIELD, v * FIELD
    inv = 1.0 / math.sqrt(a * a + b * b + 1.0)
    return ((CAMERA_ROWS[0, 0] * a + CAMERA_ROWS[0, 1] * b - CAMERA_ROWS[0, 2]) * inv,
            (CAMERA_ROWS[1, 0] * a + CAMERA_ROWS[1, 1] * b - CAMERA_ROWS[1, 2]) * inv,
            (CAMERA_ROWS[2, 0] * a + CAMERA_ROWS[2, 1] * b - CAMERA_ROWS[2, 2]) * inv)


@_fast
def _srgb(levels, value):
    """Linear radiance to an 8-bit sRGB level, by a table: a power for each pixel took a third of the time."""
    return levels[int(min(max(value, 0.0), 1.0) * (len(levels) - 1) + 0.5)]


@njit(cache=True, parallel=True, fastmath=True, error_model="numpy")
def _sort_out(look, things, counts, tiles, tile_spheres, size, seen, shaded, glows, masks):
    """Bit masks: objects that a tile may show, that may shade or light its table; that may shade an object."""
    for frame in prange(len(things)):
        for me in range(counts[frame]):
            thing = things[frame, me]
            for light in range(_LIGHTS + 1):
                mask = 0
                for k in range(counts[frame]):
                    if (k != me or thing[_SHAPE] == SNITCH) and _may_shade(
                            look, things[frame, k], light, thing[_BOUND_AT], thing[_BOUND_AT + 1],
                            thing[_BOUND_AT + 2], thing[_RADIUS]):
                        mask |= 1 << k
                masks[frame, me, light] = mask
        for tile in range(tiles * tiles):
            for light in range(_LIGHTS + 1):
                mask = 0
                for k in range(counts[frame]):
                    if _may_shade(look, things[frame, k], light, tile_spheres[tile, 0], tile_spheres[tile, 1],
                                  tile_spheres[tile, 2], tile_spheres[tile, 3]):
                        mask |= 1 << k
                shaded[frame, tile, light] = mask
            seen[frame, tile] = glows[frame, tile] = 0
            for k in range(counts[frame]):
                thing = things[frame, k]
                wx, wy, wz = (tile_spheres[tile, 0] - thing[_AT], tile_spheres[tile, 1] - thing[_AT + 1],
                              tile_spheres[tile, 2] - thing[_AT + 2])
                reach = thing[_SCALE] * 1.3 * _REACH + tile_spheres[tile, 3]
                if wx * wx + wy * wy + wz * wz < reach * reach:
                    glows[frame, tile] |= 1 << k
        for k in range(counts[frame]):
            thing = things[frame, k]
            wx, wy, wz = (thing[_BOUND_AT] - CAMERA[0], thing[_BOUND_AT + 1] - CAMERA[1],
                          thing[_BOUND_AT + 2] - CAMERA[2])
            a = CAMERA_ROWS[0, 0] * wx + CAMERA_ROWS[1, 0] * wy + CAMERA_ROWS[2, 0] * wz
            b = CAMERA_ROWS[0, 1] * wx + CAMERA_ROWS[1, 1] * wy + CAMERA_ROWS[2, 1] * wz
            depth = -(CAMERA_ROWS[0, 2] * wx + CAMERA_ROWS[1, 2] * wy + CAMERA_ROWS[2, 2] * wz)
            near = depth - thing[_RADIUS]
            if near < 0.1:  # around the camera: anywhere
                left, right, top, bottom = 0, tiles - 1, 0, tiles - 1
            else:
                # the sphere's image lies inside this square, whatever the perspective
                wide = thing[_RADIUS] / near / FIELD * (1.0 + max(abs(a), abs(b)) / depth) * size / 2 + 1.5
                col, row = (a / depth / FIELD + 1) * size / 2, (1 - b / depth / FIELD) * size / 2
                left, right = max(int((col - wide) // TILE), 0), min(int((col + wide) // TILE), tiles - 1)
                top, bottom = max(int((row - wide) // TILE), 0), min(int((row + wide) // TILE), tiles - 1)
            for i in range(top, bottom + 1):
                for j in range(left, right + 1):
                    seen[frame, i * tiles + j] |= 1 << k


@njit(cache=True, parallel=True, fastmath=True, error_model="numpy")
def _find(things, counts, tiles, size, seen, codes, depths):
    """What the ray through the middle of each pixel meets: 1 + 64 object + face, 0 for the table."""
    for line in prange(len(things) * size):
        frame, i = line // size, line % size
        v = 1.0 - (i + 0.5) * 2.0 / size
        for j in range(size):
            codes[frame, i, j] = 0
            mask = seen[frame, (i // TILE) * tiles + j // TILE]
            if mask == 0:
                continue
            dx, dy, dz = _view((j + 0.5) * 2.0 / size - 1.0, v)
            k, t = _nearest(things[frame, :counts[frame]], mask, CAMERA[0], CAMERA[1], CAMERA[2], dx, dy, dz, 0.0)
            if k >= 0 and CAMERA[2] + t * dz > 0.0:
                _, _, _, face = _normal(things[frame, k], CAMERA[0] + t * dx, CAMERA[1] + t * dy, CAMERA[2] + t * dz)
                codes[frame, i, j] = 1 + 64 * k + face
                depths[frame, i, j] = t


@njit(cache=True, parallel=True, fastmath=True, error_model="numpy")
def _paint(look, field, probes, glows, things, counts, tiles, size, seen, shaded, masks, codes, depths, spots, table,
           albedo, plain, levels, taps, weights, pictures):
    for line in prange(len(things) * size):
        frame, i = line // size, line % size
        objects = things[frame, :counts[frame]]
        v = 1.0 - (i + 0.5) * 2.0 / size
        group_code, group_me, group_tap = np.empty(16, np.int64), np.empty(16, np.int64), np.empty(16, np.int64)
        group_weight, group_at = np.empty(16), np.empty(16)
        for j in range(size):
            tile = (i // TILE) * tiles + j // TILE
            code, mixed = codes[frame, i, j], False
            if seen[frame, tile]:
                for a in range(max(i - 1, 0), min(i + 2, size)):
                    for b in range(max(j - 1, 0), min(j + 2, size)):
                        mixed |= codes[frame, a, b] != code
            x, y, z = spots[i, j]
            glow, dark = glows[frame, tile], 0
            if code == 0 or mixed:
                for light in range(_LIGHTS + 1):
                    dark |= shaded[frame, tile, light]
            if code == 0 and not mixed and glow == 0 and dark == 0:
                pictures[frame, i, j] = plain[i, j]
                continue
            r = g = b_ = 0.0
            ground = 1.0
            if mixed:
                ground = gx = gy = gz = 0.0
                groups = 0
                for k in range(len(taps)):
                    dx, dy, dz = _view((j + 0.5 + taps[k, 0]) * 2.0 / size - 1.0, v - taps[k, 1] * 2.0 / size)
                    me, t = _nearest(objects, seen[frame, tile], CAMERA[0], CAMERA[1], CAMERA[2], dx, dy, dz, 0.0)
                    if me < 0 or CAMERA[2] + t * dz < 0.0:
                        ground += weights[k]
                        gx, gy, gz = gx + weights[k] * dx, gy + weights[k] * dy, gz + weights[k] * dz
                        continue
                    # Points of one face share a shade, but for metal that curves within a pixel.
                    shape = objects[me, _SHAPE]
                    here = -1
                    if objects[me, _MATERIAL] != METAL or shape == CONE or shape == SPHERE:
                        face = 0
                        if shape != SPHERE:
                            _, _, _, face = _normal(objects[me], CAMERA[0] + t * dx, CAMERA[1] + t * dy,
                                                    CAMERA[2] + t * dz)
                        here = 64 * me + face
                    group = groups
                    if here >= 0:
                        for q in range(groups):
                            if group_code[q] == here:
                                group = q
                                break
                    if group == groups:
                        group_code[group], group_weight[group] = here, 0.0
                        group_me[group], group_tap[group], group_at[group] = me, k, t
                        groups += 1
                    group_weight[group] += weights[k]
                for q in range(groups):
                    k = group_tap[q]
                    dx, dy, dz = _view((j + 0.5 + taps[k, 0]) * 2.0 / size - 1.0, v - taps[k, 1] * 2.0 / size)
                    few = 2 if group_weight[q] < 0.2 else 4
                    rgb = _shade(look, field, probes[frame], objects, masks[frame], group_me[q], k, few, few,
                                 CAMERA[0], CAMERA[1], CAMERA[2], dx, dy, dz, group_at[q])
                    w = group_weight[q]
                    r, g, b_ = r + w * rgb[0], g + w * rgb[1], b_ + w * rgb[2]
                if ground > 0.0:  # where the pixel's table is in sight, not what the object hides
                    inv = 1.0 / math.sqrt(gx * gx + gy * gy + gz * gz)
                    dx, dy, dz = gx * inv, gy * inv, gz * inv
                    t, _, _, _ = _table(look, CAMERA[0], CAMERA[1], CAMERA[2], dx, dy, dz)
                    x, y, z = CAMERA[0] + t * dx, CAMERA[1] + t * dy, CAMERA[2] + t * dz
            elif code:
                dx, dy, dz = _view((j + 0.5) * 2.0 / size - 1.0, v)
                r, g, b_ = _shade(look, field, probes[frame], objects, masks[frame], (code - 1) // 64, 0, 4, 4,
                                  CAMERA[0], CAMERA[1], CAMERA[2], dx, dy, dz, depths[frame, i, j])
                ground = 0.0
            if ground > 0.0:
                er = eg = eb = table[i, j, _LIGHTS + 1]
                for light in range(_LIGHTS + 1):
                    e = table[i, j, light]
                    mask = shaded[frame, tile, light]
                    if mask and e > 1e-4:
                        near = 0
                        for k in range(len(objects)):
                            if mask >> k & 1 and _may_shade(look, objects[k], light, x, y, z, 0.0):
                                near |= 1 << k
                        e *= _visible(look, objects, near, light, x, y, z, 0, 16)
                    er += e * _colour(light, 0)
                    eg += e * _colour(light, 1)
                    eb += e * _colour(light, 2)
                for k in range(len(objects)):
                    if glow >> k & 1:
                        thing = objects[k]
                        shape = int(thing[_SHAPE])
                        up = _GLOW_UP[shape] * thing[_SCALE]
                        wx, wy, wz = (x - thing[_AT] - up * thing[_ROT + 2], y - thing[_AT + 1] - up * thing[_ROT + 5],
                                      z - thing[_AT + 2] - up * thing[_ROT + 8])
                        wide = _GLOW_RADIUS[shape] * thing[_SCALE]
                        d2 = max(wx * wx + wy * wy + wz * wz, wide * wide)
                        inv = 1.0 / math.sqrt(d2)
                        # a sphere's form factor, taken to nothing at the reach
                        share = max(-wz * inv, 0.0) * (wide * wide / d2 - 1.0 / (_REACH * _REACH)) * look.glow
                        if share > 0.0:
                            fr, fg, fb = _towards(probes[frame, k], 3, wx * inv, wy * inv, wz * inv)
                            er, eg, eb = er + share * fr, eg + share * fg, eb + share * fb
                r += ground * er * albedo[i, j, 0]
                g += ground * eg * albedo[i, j, 1]
                b_ += ground * eb * albedo[i, j, 2]
            pictures[frame, i, j, 0] = _srgb(levels, r)
            pictures[frame, i, j, 1] = _srgb(levels, g)
            pictures[frame, i, j, 2] = _srgb(levels, b_)


# --------------------------------------------------------------------------- what never changes

_TICK, _AXIS_WIDTH, _AXIS_RGB, _AXIS_COVER = 0.28, 0.035, np.array([0.008, 0.46, 0.8]), 0.72


def _axes_cover(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of a place on the table the axes' paint hides, in [0, 1].

    In the renders the far ends of both axes dip into the table: x is gone at -1.8, y is half as strong at 3.
    """
    half = _AXIS_WIDTH / 2
    along_x = np.sqrt(np.clip((x + 1.8) / 1.9, 0.0, 1.0)) * (x <= 3.0 + half)
    along_y = np.clip(0.8 - 0.132 * y, 0.0, 1.15) * (abs(y) <= 3.0 + half)
    on_x = (abs(y) <= half) | ((abs(x - np.round(x)) <= half) & (abs(y) <= _TICK / 2) & (np.round(x) >= -1))
    on_y = (abs(x) <= half) | ((abs(y - np.round(y)) <= half) & (abs(x) <= _TICK / 2))
    return np.clip(np.maximum(on_x * along_x, on_y * along_y), 0.0, 1.15) * _AXIS_COVER


def _filter(points: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (n, 2) in pixels and weights (n,) of the renderer's pixel filter, Blackman-Harris.

    It is 3 pixels wide in Blender, which doubles the 1.5 that are set. A smaller picture is seen as one of 256 x 256
    made smaller, its pixels being as many less.
    """
    # Equal shares of the filter: more points where it weighs more.
    fine = (np.arange(4096) + 0.5) / 4096
    density = sum(a * np.cos(2 * np.pi * k * fine) for k, a in enumerate((0.35875, -0.48829, 0.14128, -0.01168)))
    share = np.cumsum(density) / density.sum()
    at = np.interp((np.arange(points) + 0.5) / points, share, fine)
    offsets = (at - 0.5) * min(3.0, max(1.5, 3.0 * size / 256))
    u, v = np.meshgrid(offsets, offsets)
    return np.stack([u.ravel(), v.ravel()], 1), np.full(points * points, 1.0 / points**2)


@njit(cache=True, parallel=True, fastmath=True, error_model="numpy")
def _see_table(look, size, spots, table):
    for i in prange(size):
        for j in range(size):
            dx, dy, dz = _view((j + 0.5) * 2.0 / size - 1.0, 1.0 - (i + 0.5) * 2.0 / size)
            t, nx, ny, nz = _table(look, CAMERA[0], CAMERA[1], CAMERA[2], dx, dy, dz)
            x, y, z = CAMERA[0] + t * dx, CAMERA[1] + t * dy, CAMERA[2] + t * dz
            spots[i, j] = x, y, z
            for light in range(_LIGHTS + 1):
                table[i, j, light] = _irradiance(light, x, y, z, nx, ny, nz)
            table[i, j, _LIGHTS + 1] = (look.bounce + look.bounce_slope * (1.0 - nz)) / look.ground


@dataclass(frozen=True)
class _Still:
    """What a picture of some size shows before any object stands in it."""

    spots: np.ndarray         # (size, size, 3) the place that each pixel's ray meets
    table: np.ndarray         # (size, size, 5) its irradiance over pi from each light, and what comes back
    albedo: np.ndarray        # (size, size, 3) with the axes, filtered
    plain: np.ndarray         # (size, size, 3) uint8, the picture itself
    tile_spheres: np.ndarray  # (tiles^2, 4) around the places of a tile


@cache
def _levels() -> np.ndarray:
    """The 8-bit sRGB level of 16,384 radiances from 0 to 1."""
    value = np.linspace(0.0, 1.0, 16384)
    value = np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)
    return (value * 255 + 0.5).astype(np.uint8)


@cache
def _still(look: Look, size: int) -> _Still:
    spots, table = np.empty((size, size, 3)), np.empty((size, size, _LIGHTS + 2))
    _see_table(look, size, spots, table)
    cover = np.zeros((size, size))
    centres = np.arange(size) + 0.5
    for (du, dv), weight in zip(*_filter(8, size)):
        a = ((centres + du) * 2 / size - 1)[None, :] * FIELD
        b = (1 - (centres + dv) * 2 / size)[:, None] * FIELD
        x, y, z = (row[0] * a + row[1] * b - row[2] for row in CAMERA_ROWS)
        t = -CAMERA[2] / np.minimum(z, -1e-6)
        cover += weight * _axes_cover(CAMERA[0] + t * x, CAMERA[1] + t * y)
    albedo = look.ground + cover[..., None] * (_AXIS_RGB - look.ground)
    tiles = -(-size // TILE)
    spheres = np.empty((tiles * tiles, 4))
    for tile in range(tiles * tiles):
        i, j = tile // tiles * TILE, tile % tiles * TILE
        inside = spots[i:i + TILE, j:j + TILE].reshape(-1, 3)
        centre = (inside.min(0) + inside.max(0)) / 2
        spheres[tile] = *centre, np.linalg.norm(inside - centre, axis=1).max() + 1e-3
    light = table[..., :_LIGHTS] @ _LIGHT_RGB + table[..., SUN:].sum(-1, keepdims=True)
    levels = _levels()
    plain = levels[(np.clip(light * albedo, 0, 1) * (len(levels) - 1) + 0.5).astype(int)]
    return _Still(spots, table, np.ascontiguousarray(albedo), plain, spheres)


@cache
def _field(look: Look) -> np.ndarray:
    """`_fill_field` with 1,024 directions of a Fibonacci spiral."""
    k = np.arange(1024) + 0.5
    z, angle = 1 - 2 * k / 1024, k * math.pi * (3 - math.sqrt(5))
    r = np.sqrt(1 - z * z)
    field = np.empty((*_FIELD_SHAPE, 9, 3))
    _fill_field(look, np.stack([r * np.cos(angle), r * np.sin(angle), z], 1), field)
    return field


@cache
def _probe_rays() -> np.ndarray:
    """Directions (n, 3) about z, as many where a diffuse surface takes more light."""
    k = np.arange(_PROBE_RAYS) + 0.5
    r, angle = np.sqrt(k / _PROBE_RAYS), k * math.pi * (3 - math.sqrt(5))
    return np.stack([r * np.cos(angle), r * np.sin(angle), np.sqrt(1 - r * r)], 1)


# ------------------------------------------------------------------------------------------ public


@dataclass(frozen=True)
class Body:
    """An object as the renderer needs it: a shape of `SHAPES`, its size number, linear RGB, a material."""

    shape: str
    radius: float
    rgb: tuple[float, float, float]
    material: str


def _packed(bodies, locations, rotations) -> np.ndarray:
    """Rows (frames, n, columns) of the compiled code."""
    rows = np.zeros((*locations.shape[:2], _COLUMNS))
    matrices = euler_matrix(rotations)
    for k, body in enumerate(bodies):
        if body.shape not in SHAPES or body.material not in MATERIALS or not body.radius > 0:
            raise ValueError(f"body {k} is {body}: expected a shape of {', '.join(SHAPES)}, a material of "
                             f"{', '.join(MATERIALS)}, and a radius above 0")
        shape = SHAPES.index(body.shape)
        scale = body.radius * (_SNITCH_SCALE if shape == SNITCH else 1.0)
        up, radius = _BOUND[shape]
        rows[:, k, _SHAPE], rows[:, k, _MATERIAL] = shape, MATERIALS.index(body.material)
        rows[:, k, _RGB:_RGB + 3], rows[:, k, _SCALE], rows[:, k, _RADIUS] = body.rgb, scale, radius * scale
        rows[:, k, _AT:_AT + 3] = locations[:, k]
        rows[:, k, _BOUND_AT:_BOUND_AT + 3] = locations[:, k] + up * scale * matrices[:, k, :, 2]
        rows[:, k, _ROT:_ROT + 9] = matrices[:, k].reshape(-1, 9)
    return rows


def render(bodies: Sequence[Body], locations, rotations, size: int = 256, *, look: Look = LOOK,
           return_masks: bool = False):
    """Pictures of bodies at places, uint8 (frames, size, size, 3), on all cores.

    locations, rotations: (frames, n, 3), the centres in units of the scene and Euler angles in radians; ValueError for
    other shapes, values that are not finite, a body of an unknown shape or material, and more bodies than 62. With
    `return_masks` also int (frames, size, size): 0 for table and backdrop, 1 + the number of the body elsewhere.
    """
    if len(bodies) > 62:   # each is a bit of 64 where it is noted who shades whom
        raise ValueError(f"{len(bodies)} bodies in one picture: draw at most 62")
    locations, rotations = (np.asarray(a, np.float64) for a in (locations, rotations))
    if locations.shape != rotations.shape or locations.shape[1:] != (len(bodies), 3):
        raise ValueError(f"locations {locations.shape} and rotations {rotations.shape}: expected both as "
                         f"(frames, {len(bodies)}, 3), a row for each body")
    if not (np.isfinite(locations).all() and np.isfinite(rotations).all()):
        raise ValueError("locations and rotations must be finite numbers: a body has none there")
    rows = _packed(bodies, locations, rotations)
    pictures, numbers = _render_rows(rows, np.full(len(rows), len(bodies)), size, look)
    return (pictures, numbers) if return_masks else pictures


def render_scenes(scenes: Sequence[tuple], size: int) -> np.ndarray:
    """Pictures of several scenes one after another: uint8 (all frames, size, size, 3), on all cores.

    Each scene is its objects (with `shape`, `radius`, `rgb` and `material`), their centres and their Euler
    angles (frames, n, 3).
    """
    total = sum(len(at) for _, at, _ in scenes)
    most = max((len(objects) for objects, _, _ in scenes), default=1)
    rows, counts = np.zeros((total, most, _COLUMNS)), np.zeros(total, np.int64)
    start = 0
    for objects, at, turned in scenes:
        end = start + len(at)
        rows[start:end, :len(objects)], counts[start:end] = _packed(objects, at, turned), len(objects)
        start = end
    pictures = np.empty((total, size, size, 3), np.uint8)
    for start in range(0, total, _AT_ONCE):  # bounded memory, however many frames
        part = slice(start, start + _AT_ONCE)
        pictures[part], _ = _render_rows(rows[part], counts[part], size, LOOK)
    return pictures


def _render_rows(rows, counts, size, look):
    still, field, rays = _still(look, size), _field(look), _probe_rays()
    frames, most = rows.shape[:2]
    tiles = -(-size // TILE)
    seen, glows = np.zeros((2, frames, tiles * tiles), np.int64)
    shaded = np.zeros((frames, tiles * tiles, _LIGHTS + 1), np.int64)
    masks = np.zeros((frames, most, _LIGHTS + 1), np.int64)
    codes = np.zeros((frames, size, size), np.int32)
    depths = np.zeros((frames, size, size))
    probes = np.zeros((frames, most, len(_AROUND), 6))
    _sort_out(look, rows, counts, tiles, still.tile_spheres, size, seen, shaded, glows, masks)
    _fill_probes(look, field, rows, counts, masks, rays, probes)
    _find(rows, counts, tiles, size, seen, codes, depths)
    pictures = np.empty((frames, size, size, 3), np.uint8)
    taps, weights = _filter(3, size)
    _paint(look, field, probes, glows, rows, counts, tiles, size, seen, shaded, masks, codes, depths, still.spots,
           still.table, still.albedo, still.plain, _levels(), taps, weights, pictures)
    return pictures, np.where(codes > 0, 1 + (codes - 1) // 64, 0)
