"""Why a mix does what it does, and when it stops: linearity, geometry, steering, depth, forgetting.

Each diagnosis is a function from models and prompts or pairs to a dataclass that prints, saves JSON and draws.
"""

from tangent_peft.diagnose.forgetting import Conflict as Conflict
from tangent_peft.diagnose.forgetting import Forgetting as Forgetting
from tangent_peft.diagnose.forgetting import forgetting as forgetting
from tangent_peft.diagnose.moments import Moments as Moments
from tangent_peft.diagnose.moments import Spectrum as Spectrum
from tangent_peft.diagnose.result import Diagnosis as Diagnosis
from tangent_peft.diagnose.result import Table as Table
from tangent_peft.diagnose.result import Verdict as Verdict
from tangent_peft.diagnose.states import ModelState as ModelState
from tangent_peft.diagnose.steering import ShiftOptions as ShiftOptions
from tangent_peft.diagnose.steering import steering_vectors as steering_vectors
from tangent_peft.diagnose.steering_section import SteeringDiagnosis as SteeringDiagnosis
from tangent_peft.diagnose.steering_section import SteeringOptions as SteeringOptions
from tangent_peft.diagnose.steering_section import diagnose_steering as diagnose_steering
from tangent_peft.diagnose.steering_shift import SteeringShift as SteeringShift
from tangent_peft.diagnose.steering_sweep import SteeringEffect as SteeringEffect
from tangent_peft.diagnose.steering_trial import EffectOptions as EffectOptions
from tangent_peft.diagnose.steering_trial import steering_effect as steering_effect
from tangent_peft.diagnose.steering_vector import SteeringVectors as SteeringVectors
from tangent_peft.diagnose.transfer import ObjectiveScores as ObjectiveScores
from tangent_peft.tuner.linearity import LinearityGap as LinearityGap
from tangent_peft.tuner.linearity import linearity_gap as linearity_gap
