"""The PEFT method: configuration, wrapped layers, the tuner with its λ, exports. Importing it registers the method."""

from tangent_peft.tuner.algebra import axis_gram as axis_gram
from tangent_peft.tuner.algebra import axis_inner as axis_inner
from tangent_peft.tuner.algebra import axis_norm as axis_norm
from tangent_peft.tuner.axes import tangent_tuner as tangent_tuner
from tangent_peft.tuner.config import TangentConfig as TangentConfig
from tangent_peft.tuner.embedding import TangentEmbedding as TangentEmbedding
from tangent_peft.tuner.experts import TangentExperts as TangentExperts
from tangent_peft.tuner.export.record import LoraExport as LoraExport
from tangent_peft.tuner.export.record import MergedExport as MergedExport
from tangent_peft.tuner.layer import TangentLayer as TangentLayer
from tangent_peft.tuner.linear import TangentConv1D as TangentConv1D
from tangent_peft.tuner.linear import TangentLinear as TangentLinear
from tangent_peft.tuner.linearity import LinearityGap as LinearityGap
from tangent_peft.tuner.linearity import linearity_gap as linearity_gap
from tangent_peft.tuner.model import TangentModel as TangentModel
from tangent_peft.tuner.registration import register


register(TangentConfig, TangentModel)
