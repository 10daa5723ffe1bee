"""How far λ may go: gap and KL per axis and λ, safe ranges, and whether axes add up in what the network says."""

from tangent_peft.diagnose.linearity.additivity import Additivity as Additivity
from tangent_peft.diagnose.linearity.additivity import PairAdditivity as PairAdditivity
from tangent_peft.diagnose.linearity.additivity import additivity as additivity
from tangent_peft.diagnose.linearity.profile import LinearityPoint as LinearityPoint
from tangent_peft.diagnose.linearity.profile import LinearityProfile as LinearityProfile
from tangent_peft.diagnose.linearity.profile import linearity_profile as linearity_profile
from tangent_peft.diagnose.linearity.safe_range import GapProbe as GapProbe
from tangent_peft.diagnose.linearity.safe_range import SafeRange as SafeRange
from tangent_peft.diagnose.linearity.safe_range import safe_range as safe_range
from tangent_peft.diagnose.linearity.safe_range import store_safe_range as store_safe_range
