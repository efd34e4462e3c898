"""What LIBERO's scripted experts know of a scene and no policy may: shapes, joints, what stands where.

Everything is read from the running simulation, in metres, radians and the world's axes; nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.libero import LiberoEnv


@dataclass(frozen=True)
class Joint:
    """A drawer's slide or a knob's hinge, as it is now."""

    value: float
    axis: np.ndarray
    """(3,) unit vector: the way it slides, or what it turns about, as the value grows."""
    anchor: np.ndarray
    """(3,) a point of the hinge."""
    pieces: list[np.ndarray]
    """Corners, (N, 3) each, of the collision shapes that it moves."""


class Scene:
    """A view of one environment; see the module's docstring."""

    def __init__(self, env: LiberoEnv):
        self._env = env

    @property
    def goal(self) -> list[list[str]]:
        """Predicates, e.g. [["on", "akita_black_bowl_1", "plate_1"]]; all of them must hold."""
        return self._env.goal()

    def holds(self, predicate: list[str]) -> bool:
        """Whether a predicate is true now, as the benchmark judges it."""
        return bool(self._env.robosuite._eval_predicate(predicate))

    def position(self, name: str) -> np.ndarray:
        """(3,) of an object, fixture or region."""
        return self._env.position(name)

    def points(self, name: str) -> np.ndarray:
        """(N, 3) corners of the collision shapes of an object or fixture."""
        root = self._env.robosuite.obj_body_id[name]
        return np.concatenate([self._corners(geom) for geom in self._geoms_of(root)])

    def joint(self, name: str) -> Joint:
        """The joint of a drawer (by its region) or of a fixture that has one."""
        sites = self._env.robosuite.object_sites_dict
        owner = sites[name] if name in sites else self._env.robosuite.get_object(name)
        joint = self._model.joint(owner.joints[0]).id
        pieces = [self._corners(geom) for geom in self._geoms_of(self._model.jnt_bodyid[joint])]
        value = float(self._data.qpos[self._model.jnt_qposadr[joint]])
        return Joint(value, self._data.xaxis[joint].copy(), self._data.xanchor[joint].copy(), pieces)

    def surface(self, x: float, y: float, below: float, ignoring: str) -> float:
        """Height of the highest thing under the point (x, y, below) but one object and the robot; -inf if none."""
        import mujoco

        down, hit = np.array([0.0, 0.0, -1.0]), np.zeros(1, np.int32)
        own = self._env.robosuite.obj_body_id[ignoring]
        while True:
            away = mujoco.mj_ray(self._model, self._data, np.array([x, y, below]), down, None, 1, -1, hit)
            if away < 0:
                return -np.inf
            below -= away
            bodies = self._bodies_above(self._model.geom_bodyid[hit[0]])
            robot = any(self._model.body(body).name.startswith(("robot", "gripper")) for body in bodies)
            if self._model.geom_contype[hit[0]] and not robot and own not in bodies:
                return below
            below -= 1e-4  # on, through what does not count

    @property
    def _model(self):
        return self._env.robosuite.sim.model._model

    @property
    def _data(self):
        return self._env.robosuite.sim.data._data

    def _geoms_of(self, root: int) -> list[int]:
        """Collision shapes of a body and of those fixed to it or hinged on it."""
        solid = np.flatnonzero(self._model.geom_contype)
        return [int(geom) for geom in solid if root in self._bodies_above(self._model.geom_bodyid[geom])]

    def _bodies_above(self, body: int) -> list[int]:
        """The body and all that it hangs on, the world left out."""
        bodies = [int(body)]
        while bodies[-1]:
            bodies.append(int(self._model.body_parentid[bodies[-1]]))
        return bodies[:-1]

    def _corners(self, geom: int) -> np.ndarray:
        import mujoco

        model, size = self._model, self._model.geom_size[geom]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            first = model.mesh_vertadr[mesh]
            local = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        else:
            half = {
                mujoco.mjtGeom.mjGEOM_SPHERE: [size[0]] * 3,
                mujoco.mjtGeom.mjGEOM_CYLINDER: [size[0], size[0], size[1]],
                mujoco.mjtGeom.mjGEOM_CAPSULE: [size[0], size[0], size[0] + size[1]],
            }.get(model.geom_type[geom], size)
            local = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]) * half
        return local @ self._data.geom_xmat[geom].reshape(3, 3).T + self._data.geom_xpos[geom]
