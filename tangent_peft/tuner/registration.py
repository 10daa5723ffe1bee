"""The one place that touches PEFT's registry of methods.

PEFT has no route for a method outside its tree: `register_peft_method` refuses names that the closed enum `PeftType`
lacks. So the enum is extended in place, after which every ordinary path works: `get_peft_model`, `AutoPeftModel…`,
transformers' `add_adapter` and `load_adapter`, pickle. If PEFT ever ships a method of this name, its member is reused.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


NAME = "TANGENT"
PREFIX = "tangent_"


def _extend_peft_type(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or member not in list(PeftType):
        raise ImportError(
            f"peft's PeftType could not be extended by {name!r}: its enum works differently in this version. Install a "
            "version of peft within the bounds that tangent-peft declares."
        )
    return member


TANGENT: PeftType = _extend_peft_type(NAME)


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Makes the method known to PEFT; a second call changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if TANGENT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
