"""Why a mix does what it does, and when it stops: linearity, geometry, steering, depth, forgetting.

Each diagnosis is a function from models and prompts or pairs to a dataclass that prints, saves JSON and draws.
"""

from tangent_peft.diagnose.geometry import AxisGeometry as AxisGeometry
from tangent_peft.diagnose.geometry import axis_geometry as axis_geometry
from tangent_peft.diagnose.interference import Interference as Interference
from tangent_peft.diagnose.interference import InterferenceSettings as InterferenceSettings
from tangent_peft.diagnose.interference import Overlap as Overlap
from tangent_peft.diagnose.interference import axis_interference as axis_interference
from tangent_peft.diagnose.interference import shift_overlap as shift_overlap
from tangent_peft.diagnose.linearity import Additivity as Additivity
from tangent_peft.diagnose.linearity import GapProbe as GapProbe
from tangent_peft.diagnose.linearity import LinearityPoint as LinearityPoint
from tangent_peft.diagnose.linearity import LinearityProfile as LinearityProfile
from tangent_peft.diagnose.linearity import PairAdditivity as PairAdditivity
from tangent_peft.diagnose.linearity import SafeRange as SafeRange
from tangent_peft.diagnose.linearity import additivity as additivity
from tangent_peft.diagnose.linearity import linearity_profile as linearity_profile
from tangent_peft.diagnose.linearity import safe_range as safe_range
from tangent_peft.diagnose.linearity import store_safe_range as store_safe_range
from tangent_peft.diagnose.moments import Moments as Moments
from tangent_peft.diagnose.moments import Spectrum as Spectrum
from tangent_peft.diagnose.result import Diagnosis as Diagnosis
from tangent_peft.diagnose.result import Table as Table
from tangent_peft.diagnose.result import Verdict as Verdict
from tangent_peft.diagnose.spinal import FitRule as FitRule
from tangent_peft.diagnose.spinal import PowerLaw as PowerLaw
from tangent_peft.diagnose.spinal import SpinalOptions as SpinalOptions
from tangent_peft.diagnose.spinal import SpinalScore as SpinalScore
from tangent_peft.diagnose.spinal import SpinalTrace as SpinalTrace
from tangent_peft.diagnose.spinal import fit_power_law as fit_power_law
from tangent_peft.diagnose.spinal import noise_exponent as noise_exponent
from tangent_peft.diagnose.spinal import spinal_score as spinal_score
from tangent_peft.diagnose.spinal import spinal_trace as spinal_trace
from tangent_peft.diagnose.stages import Conflict as Conflict
from tangent_peft.diagnose.stages import Forgetting as Forgetting
from tangent_peft.diagnose.stages import ObjectiveScores as ObjectiveScores
from tangent_peft.diagnose.stages import forgetting as forgetting
from tangent_peft.diagnose.states import ModelState as ModelState
from tangent_peft.diagnose.steering import EffectOptions as EffectOptions
from tangent_peft.diagnose.steering import ShiftOptions as ShiftOptions
from tangent_peft.diagnose.steering import SteeringDiagnosis as SteeringDiagnosis
from tangent_peft.diagnose.steering import SteeringEffect as SteeringEffect
from tangent_peft.diagnose.steering import SteeringOptions as SteeringOptions
from tangent_peft.diagnose.steering import SteeringShift as SteeringShift
from tangent_peft.diagnose.steering import SteeringVectors as SteeringVectors
from tangent_peft.diagnose.steering import diagnose_steering as diagnose_steering
from tangent_peft.diagnose.steering import steering_effect as steering_effect
from tangent_peft.diagnose.steering import steering_vectors as steering_vectors
from tangent_peft.tuner.linearity import LinearityGap as LinearityGap
from tangent_peft.tuner.linearity import linearity_gap as linearity_gap
