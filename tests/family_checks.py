"""What is measured for every row of the table of families, against the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cases import config, deltas, tangent_layers
from families import VOCABULARY, Family
from oracle import CAPS, InFloat64, float64_twin, gradient, linearized, soft_cap
from peft import PeftModel, get_peft_model
from tolerances import relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_peft.forward import LinearizedForward
from tangent_peft.forward.replay import replayable_blocks


NEW_TOKENS = 5


@dataclass(frozen=True)
class Measured:
    """Relative errors of one family in float32 against its float64 oracle, over all real positions.

    Attributes:
        model: the model's class.
        attention: its attention implementation, transformers' default.
        experts: its experts implementation, or "" without experts.
        left: of the part that the axis adds to the logits of left-padded rows.
        right: of right-padded rows.
        gradient: of the recorded gradient, over both.
        replay: of the replayed gradient, `None` where there is nothing to replay.
    """

    model: str
    attention: str
    experts: str
    left: float
    right: float
    gradient: float
    replay: float | None

    def worst(self) -> float:
        """The largest of the errors."""
        return max(self.left, self.right, self.gradient, self.replay or 0.0)


def padded() -> dict[str, Tensor]:
    """Token ids (3, 9): a full row, one padded left, one padded right."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, -3:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def linearize(family: Family) -> PeftModel:
    """The family's tiny model with a dense random axis on its last two blocks and its head."""
    return get_peft_model(family.build(), config()).eval()


def measure(family: Family) -> Measured:
    """Linearized logits and both gradients against the oracle."""
    model, inputs = linearize(family), padded()
    base: Any = model.get_base_model()
    real = inputs["attention_mask"].bool()
    cotangent = torch.randn((*real.shape, VOCABULARY), generator=torch.Generator().manual_seed(2)) * real[..., None]
    expected_base, expected, reference = _oracle(family, deltas(model), inputs, cotangent)
    logits, recorded = _gradient(model, inputs, cotangent)
    replayed = None
    if replayable_blocks(base):
        installed = LinearizedForward.installed(base)
        assert installed is not None
        with installed.replayed():
            again, replayed = _gradient(model.train(), inputs, cotangent)
        assert relative_error(again[real], expected[real]) <= family.tolerance
    added = (logits - expected_base, expected - expected_base)
    errors = [relative_error(*(x[row][real[row]] for x in added)) for row in (1, 2)]
    assert relative_error(logits[real], expected[real]) <= family.tolerance
    return Measured(
        model=type(base).__name__,
        attention=base.config._attn_implementation,
        experts=_experts(base),
        left=errors[0],
        right=errors[1],
        gradient=_worst(recorded, reference),
        replay=None if replayed is None else _worst(replayed, reference),
    )


def _oracle(family: Family, tangents: Any, inputs: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """f(θ₀), f_lin and the gradient in float64, of the logits as the model returns them."""
    model = family.build()
    cap = next((vars(model.config)[name] for name in CAPS if name in vars(model.config)), None)
    twin = float64_twin(model, family.oracle)
    own_name, wrapped = _own_names(twin), tangents.keys()
    tangents = {own_name[name]: x.double() for name, x in tangents.items()}
    with InFloat64(), sdpa_kernel(SDPBackend.MATH):
        base, linear = linearized(twin, tangents, **inputs)
        linear = linear.detach().requires_grad_()
        capped = soft_cap(linear, cap)
        (above,) = torch.autograd.grad(capped, linear, cotangent.double())
        pulled = gradient(twin, tangents, above, **inputs)
    return soft_cap(base, cap), capped.detach(), {name: pulled[own_name[name]] for name in own_name.keys() & wrapped}


def _own_names(twin: Any) -> dict[str, str]:
    """The first name of every parameter by any of its names: blocks may share one. The oracle unties the head."""
    first = {id(parameter): name for name, parameter in twin.named_parameters()}
    head = twin.get_output_embeddings().weight
    every = twin.named_parameters(remove_duplicate=False)
    return {name: name if parameter is head else first[id(parameter)] for name, parameter in every}


def _gradient(model: PeftModel, inputs: Any, cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Linearized logits, and the gradient of every ΔW in the layout of the base weight."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.backward(cotangent)
    layers = tangent_layers(model)
    found = {f"{x.layer_name}.weight": x._layout(x.tangent_delta["default"].weight.grad) for x in layers}
    return logits.detach(), found


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest entry of all of them: an axis is one vector."""
    assert found.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    return max(float((found[n].double() - expected[n]).abs().max()) for n in expected) / largest


def _experts(base: Any) -> str:
    return base.config._experts_implementation if any(hasattr(m, "has_gate") for m in base.modules()) else ""


def cached_error(family: Family) -> float:
    """Largest relative difference of a step's logits between cached and uncached generation; 1 for other tokens."""
    model = linearize(family)
    prompts = {name: x[:2, :7] for name, x in padded().items()}
    options: Any = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**prompts, **options, use_cache=False)
    found = model.generate(**prompts, **options, use_cache=True)
    if not torch.equal(found.sequences, expected.sequences):
        return 1.0
    return max(relative_error(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
