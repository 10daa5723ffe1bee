"""D-STEER (arXiv 2512.11838): steering vectors, how much of a training they are, and what applying them does."""

from tangent_peft.diagnose.steering.measure import ShiftOptions as ShiftOptions
from tangent_peft.diagnose.steering.measure import steering_vectors as steering_vectors
from tangent_peft.diagnose.steering.section import SteeringDiagnosis as SteeringDiagnosis
from tangent_peft.diagnose.steering.section import SteeringOptions as SteeringOptions
from tangent_peft.diagnose.steering.section import diagnose_steering as diagnose_steering
from tangent_peft.diagnose.steering.shift import SteeringShift as SteeringShift
from tangent_peft.diagnose.steering.sweep import SteeringEffect as SteeringEffect
from tangent_peft.diagnose.steering.trial import EffectOptions as EffectOptions
from tangent_peft.diagnose.steering.trial import steering_effect as steering_effect
from tangent_peft.diagnose.steering.vectors import SteeringVectors as SteeringVectors
