"""Why a mix does what it does, and when it stops: linearity, geometry, steering, depth, forgetting.

Each diagnosis is a function from models and prompts or pairs to a dataclass that prints, saves JSON and draws.
"""

from tangent_peft.diagnose.geometry import AxisGeometry as AxisGeometry
from tangent_peft.diagnose.geometry import axis_geometry as axis_geometry
from tangent_peft.diagnose.interference import axis_interference as axis_interference
from tangent_peft.diagnose.interference_result import Interference as Interference
from tangent_peft.diagnose.interference_result import InterferenceSettings as InterferenceSettings
from tangent_peft.diagnose.moments import Moments as Moments
from tangent_peft.diagnose.moments import Spectrum as Spectrum
from tangent_peft.diagnose.overlap import Overlap as Overlap
from tangent_peft.diagnose.overlap import shift_overlap as shift_overlap
from tangent_peft.diagnose.result import Diagnosis as Diagnosis
from tangent_peft.diagnose.result import Table as Table
from tangent_peft.diagnose.result import Verdict as Verdict
from tangent_peft.diagnose.states import ModelState as ModelState
from tangent_peft.tuner.linearity import LinearityGap as LinearityGap
from tangent_peft.tuner.linearity import linearity_gap as linearity_gap
