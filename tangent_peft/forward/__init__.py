"""The linearized forward pass of a model: f_lin(x; τ) = f(x; θ₀) + J_θ₀ f(x)·τ, with torch and transformers only."""

from tangent_peft.forward import cache as cache
from tangent_peft.forward.carrier import Gradient as Gradient
from tangent_peft.forward.carrier import TangentCarrier as TangentCarrier
from tangent_peft.forward.deposit import deposit as deposit
from tangent_peft.forward.deposit import graft as graft
from tangent_peft.forward.deposit import is_replaying as is_replaying
from tangent_peft.forward.deposit import leave as leave
from tangent_peft.forward.dual import LinearizedForward as LinearizedForward
from tangent_peft.forward.exits import find_head as find_head
from tangent_peft.forward.flash import use_flash_tangent as use_flash_tangent
from tangent_peft.forward.level import current_pass as current_pass
from tangent_peft.forward.level import dual as dual
from tangent_peft.forward.level import join as join
from tangent_peft.forward.level import split as split
from tangent_peft.forward.mode import evaluating as evaluating
from tangent_peft.forward.opaque import OpaqueLinear as OpaqueLinear
from tangent_peft.forward.products import both_products as both_products
from tangent_peft.forward.products import can_join_products as can_join_products
from tangent_peft.forward.sharding import call_within as call_within
from tangent_peft.forward.sharding import full_shape as full_shape
from tangent_peft.forward.sharding import gathered as gathered
from tangent_peft.forward.sharding import has_zero3_hooks as has_zero3_hooks
from tangent_peft.forward.sharding import is_sharded as is_sharded
from tangent_peft.forward.sharding import leaf_that_gets_gradients as leaf_that_gets_gradients
from tangent_peft.forward.sharding import whole as whole
from tangent_peft.forward.support import check_support as check_support
