"""θ(λ) − θ₀ as a plain LoRA: exact where it can be, its error stated where not, and what servers take."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from cases import FORMS, config, logits, tangent_layers, tangent_model
from conftest import MODELS, build, make_llama
from exports import INPUTS, WEIGHTS, at_weights, two_axes
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tolerances import assert_equal, relative_error
from torch import Tensor

from tangent_peft import TangentConfig


pytestmark = [
    pytest.mark.filterwarnings("ignore:The (head|input embedding) .*is tied to the"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
]


@pytest.fixture(autouse=True)
def _untied_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "untied", lambda: make_llama(tied=False))


# ---- as a LoRA ---------------------------------------------------------------------------------------------


def lora_logits(path: Path, name: str) -> Tensor:
    model = PeftModel.from_pretrained(build(name), path).eval()
    assert model.peft_config["default"].peft_type == "LORA"
    return logits(model, **INPUTS)


@pytest.mark.parametrize("forms", [("shared", "shared"), ("shared", "trained"), ("trained", "trained")])
@pytest.mark.parametrize("name", ["llama", "untied", "qwen3", "gpt2"])
def test_lora_of_low_rank_axes_is_exact(name: str, forms: tuple[str, str], tmp_path: Path) -> None:
    model = two_axes(name, *forms)
    result = model.export_lora(tmp_path, WEIGHTS)
    assert result.rank == (4 if forms == ("shared", "shared") else 8)
    assert result.relative_error == 0.0 and result.path == tmp_path
    assert_equal(lora_logits(tmp_path, name), at_weights(model, WEIGHTS))


@pytest.mark.parametrize("rank", [None, 2, 6, 32])
@pytest.mark.parametrize("form", ["dense", "shared", "trained"])
def test_lora_of_another_rank_reports_its_error(form: str, rank: int | None, tmp_path: Path) -> None:
    """The reported error is that of the files, and no LoRA of this rank is closer."""
    model = tangent_model("qwen3", form, axis="help")
    result = model.export_lora(tmp_path, {"help": -0.5}, rank=rank)
    state = load_file(tmp_path / "adapter_model.safetensors")
    saved = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(saved, LoraConfig) and saved.lora_alpha == saved.r == result.rank
    missed = best = total = 0.0
    for layer in tangent_layers(model):
        delta = -0.5 * layer.delta("help", 1.0).detach().double()
        prefix = f"base_model.model.{layer.layer_name}.lora_"
        b, a = state[f"{prefix}B.weight"].double(), state[f"{prefix}A.weight"].double()
        kept = a.shape[0]
        assert kept == result.rank  # the same at every layer
        missed += float((delta - b @ a).square().sum())
        best += float(torch.linalg.svdvals(delta)[kept:].square().sum())
        total += float(delta.square().sum())
    assert result.relative_error == pytest.approx((missed / total) ** 0.5, rel=1e-3, abs=1e-6)
    assert missed / total == pytest.approx(best / total, rel=1e-3, abs=1e-10)


def test_lora_of_a_dense_axis_at_full_rank(tmp_path: Path) -> None:
    model = tangent_model("llama", "dense", axis="help")
    result = model.export_lora(tmp_path, rank=32)
    assert result.relative_error < 1e-5
    assert relative_error(lora_logits(tmp_path, "llama"), at_weights(model, {"help": 1.0})) < 1e-4


def test_lora_with_a_rank_pattern(tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", axis="help", rank_pattern={"q_proj": 2, "up_proj": 7})
    result = model.export_lora(tmp_path)
    assert result.rank == 7 and result.relative_error == 0.0
    assert_equal(lora_logits(tmp_path, "llama"), at_weights(model, {"help": 1.0}))


def test_lora_on_the_tied_head(tmp_path: Path) -> None:
    """The head's factors are in the file, the embedding is not and stays as it is."""
    model = tangent_model("llama", "shared", axis="help")
    model.export_lora(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_B.weight" in state
    assert all(".lora_" in key for key in state)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, build("llama").get_input_embeddings().weight)


def test_lora_on_the_tied_head_warns(tmp_path: Path) -> None:
    """PEFT's `merge_and_unload` of it changes the embedding, too."""
    with pytest.warns(UserWarning, match=r"'lm_head' is tied to the input embedding.*export_merged"):
        tangent_model("llama", "shared", axis="help").export_lora(tmp_path / "tied")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tangent_model("llama", "shared", axis="help", lm_head=False).export_lora(tmp_path / "blocks")
        tangent_model("untied", "shared", axis="help").export_lora(tmp_path / "untied")


@pytest.mark.parametrize("form", FORMS)
def test_lora_of_a_half_precision_axis(form: str, tmp_path: Path) -> None:
    """torch decomposes no half-precision matrices."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tangent_model("untied", form, axis="help").to(dtype)
        found.append(model.export_lora(tmp_path, rank=2, overwrite=True))
    assert found[1].rank == 2
    assert found[1].relative_error == pytest.approx(found[0].relative_error, rel=0.05)


def test_lora_of_an_axis_at_zero(tmp_path: Path) -> None:
    model = two_axes()
    model.export_lora(tmp_path, {"help": 0.0})
    assert torch.equal(lora_logits(tmp_path, "llama"), logits(build("llama"), **INPUTS))


@pytest.mark.parametrize("form", FORMS)
def test_lora_of_mixed_layers(form: str, tmp_path: Path) -> None:
    """Axes on different blocks: every layer at its own rank."""
    model = tangent_model("llama", "shared", axis="help", num_layers=1)
    model.add_adapter("verb", config(form, num_layers=3, lm_head=False))
    result = model.export_lora(tmp_path, WEIGHTS, rank=64, calibration=False)
    assert result.relative_error < 1e-5
    assert relative_error(lora_logits(tmp_path, "llama"), at_weights(model, WEIGHTS)) < 1e-4


def test_one_rank_at_every_layer(tmp_path: Path) -> None:
    """Servers differ in whether they follow `rank_pattern`; zeros change nothing."""
    model = tangent_model("llama", "shared", axis="help", rank_pattern={"q_proj": 2, "up_proj": 7})
    model.export_lora(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == saved["alpha_pattern"] == {} and saved["r"] == saved["lora_alpha"] == 7
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        assert value.shape[0 if "lora_A" in name else 1] == 7, name


@pytest.mark.parametrize("form", FORMS)
def test_lora_by_its_energy(form: str, tmp_path: Path) -> None:
    """Every layer keeps the share at least; a share below 1 is smaller than all of it."""
    model = tangent_model("untied", form, axis="help")
    results = [model.export_lora(tmp_path / str(share), rank=share, calibration=False) for share in (0.3, 0.9, 0.999)]
    for share, result in zip((0.3, 0.9, 0.999), results, strict=True):
        assert all(error**2 <= 1 - share + 1e-6 for error in result.layer_errors.values())
        assert result.relative_error**2 <= 1 - share + 1e-6
    ranks = [result.rank for result in results]
    assert ranks[0] < ranks[1] <= ranks[2]
    error = relative_error(lora_logits(tmp_path / "0.999", "untied"), at_weights(model, {"help": 1.0}))
    assert error < 0.2


def test_it_prints(tmp_path: Path) -> None:
    model = two_axes("untied")
    text = str(model.export_lora(tmp_path / "exact", WEIGHTS))
    assert "LoRA of rank 4, exact" in text and "--enable-lora --max-lora-rank 8" in text and "linearity gap 0." in text
    dense = model.export_lora(tmp_path / "smaller", WEIGHTS, rank=2)
    assert f"relative error {dense.relative_error:.2e}" in str(dense) and 0.1 < dense.relative_error < 1.0


# ---- the head and the embedding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, ["embed_tokens", "q_proj", "down_proj"]], ids=["head", "head+embedding"])
@pytest.mark.parametrize(("name", "form"), [("llama", "dense"), ("llama", "shared"), ("untied", "trained")])
def test_head_merged_into_a_base_of_its_own(name: str, form: str, targets: list[str] | None, tmp_path: Path) -> None:
    """The LoRA on that base is the mix, also when stock PEFT merges it; the tie is gone, and named in the config."""
    model = two_axes(name, form, "shared", **({} if targets is None else {"target_modules": targets}))
    expected = at_weights(model, WEIGHTS)
    result = model.export_lora(tmp_path / "lora", WEIGHTS, rank=32, head="merge")
    assert result.head == "merged" and result.base_path == tmp_path / "lora" / "base"
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert not any("lm_head" in key or "embed" in key for key in keys)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()  # finds the base by its name
    assert loaded.get_base_model().config.tie_word_embeddings is False
    assert relative_error(logits(loaded, **INPUTS), expected) < (1e-4 if form == "dense" else 1e-5)
    merged = loaded.merge_and_unload()
    assert relative_error(logits(merged, **INPUTS), expected) < (1e-4 if form == "dense" else 2e-5)
    assert "`base/`" in (tmp_path / "lora" / "README.md").read_text()


def test_merging_a_head_warns_of_no_tie(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        two_axes().export_lora(tmp_path / "lora", WEIGHTS, head="merge")


def test_head_merge_without_a_head(tmp_path: Path) -> None:
    result = tangent_model("llama", "shared", axis="help", lm_head=False).export_lora(tmp_path / "lora", head="merge")
    assert result.head == "none" and result.base_path is None and not (tmp_path / "lora" / "base").exists()


def test_head_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['lm_head'\] have tangents.*head='merge'.*lm_head=False"):
        two_axes().export_lora(tmp_path / "lora", head="refuse")
    tangent_model("llama", "shared", lm_head=False).export_lora(tmp_path / "lora", head="refuse")


def test_nothing_but_a_head(tmp_path: Path) -> None:
    model = tangent_model("untied", "shared", target_modules=["lm_head"], num_layers=None)
    with pytest.raises(ValueError, match="nothing is left for a LoRA"):
        model.export_lora(tmp_path / "lora", head="merge")


# ---- servers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3, 8, 9, 0.5])
def test_padded_for_vllm(rank: int | float | None, tmp_path: Path) -> None:
    """The rank that is asked for is padded to a served one, with singular values where there are more."""
    model = two_axes("untied", "shared", "trained")  # together of rank 8
    result = model.export_lora(tmp_path / "lora", WEIGHTS, rank=rank, server="vllm")
    assert result.rank == 8 and result.relative_error < 1e-6
    assert_equal(lora_logits(tmp_path / "lora", "untied"), at_weights(model, WEIGHTS), 2e-5)


def test_a_rank_above_all_served(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(640, 640))
    model = get_peft_model(network, TangentConfig(target_modules=["0"], r=600, init_weights=False))
    with pytest.raises(ValueError, match=r"rank 600.*vLLM serves ranks up to 512.*rank=512.*export_merged"):
        model.export_lora(tmp_path / "lora", server="vllm")
    assert not (tmp_path / "lora").exists()
    result = model.export_lora(tmp_path / "lora")
    assert result.rank == 600 and result.vllm_flags is None and "refuses rank 600" in str(result)
    assert model.export_lora(tmp_path / "less", rank=400, server="vllm").rank == 512


@pytest.mark.parametrize(
    ("name", "server", "message"),
    [
        ("gpt2", "vllm", r"'lm_head' has a tangent, and vLLM takes no LoRA.*of a GPT2LMHeadModel.*head='merge'"),
        ("llama", "sglang", r"SGLang.*tied head.*head='merge'"),
        ("llama", "llama.cpp", r"llama\.cpp loads no LoRA.*head='merge'"),
    ],
)
def test_heads_that_a_server_does_not_take(name: str, server: str, message: str, tmp_path: Path) -> None:
    model = two_axes(name)
    with pytest.raises(ValueError, match=message):
        model.export_lora(tmp_path / "lora", WEIGHTS, server=server)
    assert not (tmp_path / "lora").exists()
    model.export_lora(tmp_path / "lora", WEIGHTS, server=server, head="merge")


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_an_untied_head_is_kept_for_servers(server: str, tmp_path: Path) -> None:
    result = two_axes("untied").export_lora(tmp_path / "lora", WEIGHTS, server=server)
    assert result.head == "kept" and result.server == server
    assert "made ready for" in (tmp_path / "lora" / "README.md").read_text()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_an_empty_mix_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        two_axes().export_lora(tmp_path, {})


@pytest.mark.parametrize("rank", [0, -1, True, 1.0, 0.0, 1.5, "8"])
def test_a_rank_that_is_none(rank: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`rank` is a positive integer.*found {rank!r}"):
        two_axes().export_lora(tmp_path, rank=rank)


def test_options_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`head` is one of.*'merge'.*found 'drop'"):
        two_axes().export_lora(tmp_path, head="drop")
    with pytest.raises(ValueError, match=r"`server` is one of.*'vllm'.*found 'tgi'"):
        two_axes().export_lora(tmp_path, server="tgi")
