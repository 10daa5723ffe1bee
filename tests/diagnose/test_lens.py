"""The lens is the model's own head after its own norm, applied once; its distances are those of float64."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from conftest import VOCABULARY, batch, build, enlarge
from strong_axes import two_axes
from torch import Tensor, nn
from transformers import AutoModel, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tangent_peft.diagnose.activations import layer_states, layer_tangents
from tangent_peft.diagnose.spinal import lens as lens_module
from tangent_peft.diagnose.spinal.lens import Lens, fisher_rao
from tangent_peft.diagnose.states import ModelState
from tangent_peft.forward.head import Head


def make_gemma2() -> Any:
    """Soft-capped logits, norm weights 1 + w."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=5.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Gemma2ForCausalLM(config)


def make_opt() -> Any:
    """Two modules between the last block and the head: a layer norm and a projection."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OPTForCausalLM(config)


def model_named(name: str) -> Any:
    torch.manual_seed(0)
    makers = {"gemma2": make_gemma2, "opt": make_opt}
    return enlarge(makers[name]()) if name in makers else build(name)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "opt"])
@torch.no_grad()
def test_the_final_norm_is_applied_once(name: str) -> None:
    model = model_named(name)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "ln_f" in parameter_name:  # a norm of all ones could be applied twice unseen
            parameter.uniform_(0.5, 2.0)
    inputs = batch()
    keep = inputs["attention_mask"].bool()
    found = model(**inputs, output_hidden_states=True, use_cache=False)
    lens = Lens.of(model, inputs)
    layers = layer_states(model, inputs, keep)
    assert len(lens.norm) == {"opt": 2}.get(name, 1)
    last = lens.logits((layers[-1], None))
    torch.testing.assert_close(last, found.logits[keep], rtol=1e-4, atol=1e-4)
    if name != "opt":  # transformers' last hidden state is normed already, the ones before are not
        torch.testing.assert_close(lens.normed(layers[-1]), found.hidden_states[-1][keep], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers[1], found.hidden_states[1][keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linearized", [True, False])
@pytest.mark.parametrize("weights", [{"help": 0.7, "verb": -0.2}, {}])
@torch.no_grad()
def test_the_last_layer_gives_the_logits_of_a_mix(linearized: bool, weights: dict[str, float]) -> None:
    model = two_axes(build("llama"))
    inputs = batch()
    keep = inputs["attention_mask"].bool()
    with ModelState.mix(model, weights, linearized).active() as root:
        lens = Lens.of(root, inputs)
        primal, tangent = layer_tangents(root, inputs, keep)
        assert bool(tangent.any()) == (linearized and bool(weights))
        logits = lens.logits((primal[-1], tangent[-1] if tangent.any() else None))
        torch.testing.assert_close(logits, root(**inputs, use_cache=False).logits[keep], rtol=1e-4, atol=1e-3)


class ScaledAfterwards(LlamaForCausalLM):
    """Does something to its logits that its configuration does not say."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_logits_that_are_not_of_the_head_are_refused() -> None:
    with pytest.raises(TypeError, match=r"not its head after its final norm.*LlamaRMSNorm"):
        Lens.of(enlarge(ScaledAfterwards(build("llama").config)), batch())
    with pytest.raises(TypeError, match="no affine head"):
        Lens.of(AutoModel.from_config(build("llama").config), batch())


# ---- distances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1e-6, 1e-5, 1e-3, 0.1, 1.0, 2.5])
@pytest.mark.parametrize("angle", [0.02, 0.3, 1.4])
def test_a_rotation_of_two_outcomes_has_its_angle_as_distance(distance: float, angle: float) -> None:
    """√p = (cos a, sin a), √q = (cos(a + d/2), sin(a + d/2)): 2 arccos Σ√(pq) = d."""
    with mpmath.workdps(40):
        turned = [mpmath.mpf(angle), mpmath.mpf(angle) + mpmath.mpf(distance) / 2]
        if turned[1] >= mpmath.pi / 2:
            turned[1] = turned[0] - mpmath.mpf(distance) / 2
        logits = [[2 * mpmath.log(mpmath.cos(a)), 2 * mpmath.log(mpmath.sin(a))] for a in turned]
        change = [float(after - before) for before, after in zip(*logits, strict=True)]
    found = fisher_rao(torch.tensor([[float(x) for x in logits[0]]]), torch.tensor([change]))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(distance, rel=1e-4)


def test_the_ends_of_the_range() -> None:
    z = torch.randn(3, 50)
    assert fisher_rao(z, torch.zeros(3, 50)).tolist() == [0.0, 0.0, 0.0]
    assert fisher_rao(z, torch.full((3, 50), 7.0)) == pytest.approx([0.0] * 3, abs=1e-6)
    apart = torch.tensor([[0.0, -300.0]])
    assert float(fisher_rao(apart, -2 * apart * torch.tensor([[0.0, 1.0]]))) == pytest.approx(math.pi, rel=1e-6)


def exact_norm(h: Tensor, kind: str, module: Any) -> Tensor:
    """The final norm written out."""
    if kind == "layer":
        h = h - h.mean(-1, keepdim=True)
        shift = module.bias.double()
    else:
        shift = 0.0
    return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight.double() + shift


def exact_logits(lens: Lens, kind: str, h: Tensor, dh: Tensor | None) -> Tensor:
    """Logits in float64; the derivative of the norm by autograd."""
    head, h = lens.head, h.double()
    n = m = exact_norm(h, kind, lens.norm[0])
    if dh is not None:
        n = m + torch.func.jvp(lambda x: exact_norm(x, kind, lens.norm[0]), (h,), (dh.double(),))[1]
    z = n @ head.weight.double().T
    if head.dense is not None:
        z = z + m @ head.dense.double().T
    if head.b is not None and head.a is not None:
        z = z + m @ head.a.double().T @ head.b.double().T
    z = head.scale * (z if head.bias is None else z + head.bias.double())
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def exact_distance(z: Tensor, y: Tensor) -> Tensor:
    root_p, root_q = ((x.log_softmax(-1) / 2).exp() for x in (z, y))
    return 4 * torch.asin((root_p - root_q).norm(dim=-1) / 2)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled with bias": {"bias": torch.randn(700), "scale": 0.4},
    "soft-capped": {"softcap": 6.0},
    "with its own tangents": {"dense": 0.1 * torch.randn(700, 24), "b": torch.randn(700, 3), "a": torch.randn(3, 24)},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("linearized", [False, True])
@torch.no_grad()
def test_distances_of_layers_are_exact_down_to_a_millionth(kind: str, options: Any, linearized: bool) -> None:
    norm: Any = nn.LayerNorm(24, eps=1e-6) if kind == "layer" else LlamaRMSNorm(24, eps=1e-6)
    norm.weight.uniform_(0.5, 2.0)  # Llama's norm computes in float32 whatever it is given
    lens = Lens((norm,), Head(1.5 * torch.randn(700, 24), **options))
    steps = 10.0 ** torch.linspace(-8, 0.5, 60)
    h, dh = 3 * torch.randn(60, 24), torch.randn(60, 24)
    k, dk = h + steps[:, None] * torch.randn(60, 24), dh + 0.3 * steps[:, None] * torch.randn(60, 24)
    streams = [(h, dh if linearized else None), (k, dk if linearized else None)]
    found = lens.transport(streams)
    expected = exact_distance(*(exact_logits(lens, kind, *stream) for stream in streams))
    told = expected > 1e-6
    assert found.dtype == torch.float32 and expected.min() < 1e-6 < 1e-5 < expected[told].min() * 10
    assert float(((found[:, 0] - expected) / expected)[told].abs().max()) < 1e-3


@torch.no_grad()
def test_rounded_logits_would_not_do() -> None:
    """What the exact change is for: the same distances from two rounded sets of logits, by either formula."""
    lens = Lens((nn.LayerNorm(24),), Head(1.5 * torch.randn(700, 24)))
    h = 3 * torch.randn(20, 24)
    k = h + 1e-6 * torch.randn(20, 24)
    z, y = lens.logits((h, None)), lens.logits((k, None))
    exact = exact_distance(*(exact_logits(lens, "layer", x, None) for x in (h, k)))
    overlap = ((z.log_softmax(-1) + y.log_softmax(-1)) / 2).logsumexp(-1).exp().clamp(max=1)
    assert float((2 * overlap.arccos() / exact - 1).abs().max()) > 0.5
    assert float((exact_distance(z, y) / exact - 1).abs().max()) > 1e-2
    assert float((lens.transport([(h, None), (k, None)])[:, 0] / exact - 1).abs().max()) < 1e-3


@torch.no_grad()
def test_tiles_do_not_matter_and_equal_layers_are_at_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = Lens((), Head(torch.randn(700, 24)))
    layers = [(torch.randn(11, 24), None) for _ in range(3)]
    whole = lens.transport([*layers, layers[-1]])
    assert whole.shape == (11, 3) and whole[:, 2].tolist() == [0.0] * 11
    monkeypatch.setattr(lens_module, "TILE_ENTRIES", 2000)
    monkeypatch.setattr(lens_module, "PART", 64)
    torch.testing.assert_close(lens.transport([*layers, layers[-1]]), whole, rtol=1e-5, atol=1e-6)
