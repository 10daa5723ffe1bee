"""Axes as directions in weight space: cosines per module, ranks, principal angles."""

from tangent_peft.diagnose.geometry.axes import AxisGeometry as AxisGeometry
from tangent_peft.diagnose.geometry.axes import axis_geometry as axis_geometry
