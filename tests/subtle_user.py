"""A user's own model, task and physics, with every kind of size that DMCSubtle can shrink."""

from r2dreamer.envs.base import gl  # isort: skip

gl.choose_gl()  # first, because dm_control reads the choice when it is imported

# ruff: noqa: E402
from dm_control.mujoco import Physics
from dm_control.rl import control
from dm_control.suite import base
from torchrl.envs import DMControlWrapper

MODEL = """
<mujoco>
  <include file="floor.xml"/>
  <asset>
    <mesh name="rock" scale="{mesh} {mesh} {mesh}" vertex="0 0 0  .2 0 0  0 .3 0  0 0 .4"/>
  </asset>
  <default>
    <default class="limb">
      <geom type="capsule" size="{limb}" density="700"/>
      <default class="toe"><geom size="{toe}"/></default>
    </default>
  </default>
  <worldbody>
    <geom name="floor" class="ground" type="plane" size="{floor} .5"/>
    <site name="goal" type="ellipsoid" size="{goal}" pos="1 1 1"/>
    <body name="trunk" pos="0 0 1" childclass="limb">
      <freejoint/>
      <geom name="trunk" type="box" size="{trunk}" mass="2"/>
      <geom fromto="0 0 0 .3 0 0"/>
      <body pos=".3 0 0">
        <joint name="knee" axis="0 1 0" range="-45 45"/>
        <geom name="shank" fromto="0 0 0 0 0 -.4"/>
        <geom name="toe" class="toe" fromto="0 0 -.4 .1 0 -.4"/>
        <geom name="calf" size="{calf}" pos="0 .1 -.2"/>
        <geom name="rock" type="mesh" mesh="rock" pos=".5 .1 0" euler="10 20 30"/>
        <site name="heel" pos="0 0 -.4" size="{heel}"/>
      </body>
    </body>
    <body name="weight" pos="0 1 1">
      <joint type="slide" axis="0 0 1"/>
      <inertial pos="0 0 0" mass="3" diaginertia=".1 .2 .25"/>
      <geom name="weight" type="cylinder" size="{weight}"/>
      <geom name="beam" type="box" fromto="0 0 .2 .3 .1 .5" size="{beam}"/>
    </body>
  </worldbody>
  <tendon><spatial name="rope" width="{rope}"><site site="heel"/><site site="goal"/></spatial></tendon>
  <actuator><motor name="knee" joint="knee" gear="3" ctrlrange="-1 1"/></actuator>
</mujoco>
"""
ASSETS = {"floor.xml": b'<mujoco><default><default class="ground"><geom rgba="0 1 0 1"/></default></default></mujoco>'}
WRITTEN = {
    "limb": [0.04], "toe": [0.02], "goal": [0.1, 0.2, 0.3], "trunk": [0.1, 0.2, 0.05], "calf": [0.06, 0.1],
    "weight": [0.1, 0.07], "heel": [0.005], "beam": [0.06], "rope": [0.01], "mesh": [1.5], "floor": [3, 2],
}  # fmt: skip
LIMB = ["limb", "trunk", "calf", "mesh", "heel"]


def written(*small, shrink=1.0):
    """The model with the sizes called `small` multiplied."""
    factor = {name: shrink if name in small else 1.0 for name in WRITTEN}
    return MODEL.format(**{name: " ".join(repr(n * factor[name]) for n in sizes) for name, sizes in WRITTEN.items()})


SMALLER = {"shrink": 0.5, "xml": written(), "assets": ASSETS}
RENAMED = written().replace('name="calf"', 'name="foot"')


class Wander(base.Task):
    """A user's own task: a goal of a random size every episode, from which its reward is computed."""

    resizes = False

    def initialize_episode(self, physics):
        if self.resizes:
            self.drawn = self.random.uniform(0.1, 0.4)
            physics.named.model.site_size["goal", 0] = self.drawn
        super().initialize_episode(physics)

    def get_observation(self, physics):
        return {"position": physics.position()}

    def get_reward(self, physics):
        return float(physics.named.model.site_size["goal", 0])


class Body(Physics):
    """A user's own physics, from a module that is not of the suite."""


def user_env(text=None, resizes=False):
    physics = Body.from_xml_string(written() if text is None else text, ASSETS)
    task = Wander(random=0)
    task.resizes = resizes
    return DMControlWrapper(control.Environment(physics, task))
