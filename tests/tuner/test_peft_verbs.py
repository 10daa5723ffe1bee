"""Every ordinary verb of PEFT and of transformers' adapter interface, on every form of τ."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, config, logits, tangent_layers, tangent_model
from conftest import MODELS, batch, build
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tolerances import TOLERANCE, assert_equal, relative_error
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from tangent_peft import TangentConfig
from tangent_peft.forward import LinearizedForward
from tangent_peft.tuner.targets import find_blocks


INPUTS = batch("left")


def saved_base(path: Path, name: str = "llama") -> PreTrainedModel:
    """A base model that lives in a directory."""
    build(name).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


# ---- making and looking ------------------------------------------------------------------------------------


def test_counts_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    model = tangent_model("llama", "dense")
    sizes = [layer.in_features * layer.out_features for layer in tangent_layers(model)]
    assert model.get_nb_trainable_parameters()[0] == sum(sizes)
    model.print_trainable_parameters()
    assert f"{sum(sizes):,}" in capsys.readouterr().out
    status = get_model_status(model)
    assert status.base_model_type == "LlamaForCausalLM" and status.peft_types == {"default": "TANGENT"}
    assert status.num_adapter_layers == len(sizes) == 2 * 7 + 1
    assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
    layers = get_layer_status(model)
    assert [layer.name for layer in layers] == [f"model.{layer.layer_name}" for layer in tangent_layers(model)]
    assert all(layer.requires_grad == {"default": True} for layer in layers)
    assert "tangent.TangentLinear" in repr(model)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_tangent_trains(form: str) -> None:
    model = tangent_model("gpt2", form)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {"dense": {"tangent_delta"}, "shared": {"tangent_B"}, "trained": {"tangent_A", "tangent_B"}}[form]
    assert {name.split(".")[-3] for name in training} == kinds


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_optimizer_reduces_the_loss(form: str) -> None:
    model = get_peft_model(build("llama"), TangentConfig(task_type="CAUSAL_LM", **FORMS[form])).train()
    labels = INPUTS["input_ids"].masked_fill(INPUTS["attention_mask"] == 0, -100)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**INPUTS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


# ---- several adapters --------------------------------------------------------------------------------------


def two_axes(first: str = "dense", second: str = "shared") -> PeftModel:
    model = tangent_model("llama", first)
    model.add_adapter("other", config(second, num_layers=3))
    return model


def test_add_set_delete_disable() -> None:
    base = logits(build("llama"), **INPUTS)
    model = two_axes()
    first = logits(model, **INPUTS)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    second = logits(model, **INPUTS)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model, **INPUTS), base)
    assert torch.equal(logits(model, **INPUTS), second)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not any("other" in name for name, _ in model.named_parameters())
    model.set_adapter("default")
    assert torch.equal(logits(model, **INPUTS), first)
    assert all(set(layer.tangent_r) <= {"default"} for layer in tangent_layers(model))


@pytest.mark.parametrize("forms", [("dense", "shared"), ("trained", "trained"), ("shared", "trained")])
def test_active_adapters_add_up(forms: tuple[str, str]) -> None:
    model = two_axes(*forms)
    base = logits(build("llama"), **INPUTS)
    real = INPUTS["attention_mask"].bool()
    effects = []
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        effects.append((logits(model, **INPUTS) - base)[real])
    assert_equal(effects[2], effects[0] + effects[1])


def test_modules_to_save(tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", modules_to_save=["model.norm"])
    norm = model.get_base_model().model.norm
    assert norm.modules_to_save["default"].weight.requires_grad
    with torch.no_grad():
        norm.modules_to_save["default"].weight.mul_(1.5)
    expected = logits(model, **INPUTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, **INPUTS), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, **INPUTS), logits(build("llama"), **INPUTS))


def training(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["model.norm"]}])
def test_disabling_leaves_what_trains(options: dict[str, Any]) -> None:
    model = tangent_model("llama", "trained", **options)
    model.add_adapter("other", config("shared"))
    before = training(model)
    with model.disable_adapter():
        assert not training(model)
        with model.disable_adapter():
            pass
        assert not training(model)
    assert training(model) == before != set()
    model.combine_axes({"default": 1.0})
    with model.disable_adapter(), model.axes({"other": 0.5}):
        pass
    assert not training(model)
    model.set_adapter("default")
    with model.disable_adapter():
        model.combine_axes({"other": 0.5})
    assert not training(model)
    with model.disable_adapter():
        model.set_adapter("default")
    assert training(model) == before


def test_one_configuration_for_two_bases() -> None:
    """What is found out about a base is not written into the caller's object."""
    shared = config("shared")
    first = get_peft_model(build("llama"), shared)
    torch.manual_seed(5)
    second = get_peft_model(MODELS["llama"](), shared)
    get_peft_model(build("gpt2"), shared)
    assert shared.base_fingerprint is None and shared.target_modules is None
    fingerprints = [model.peft_config["default"].base_fingerprint for model in (first, second)]
    assert None not in fingerprints and len(set(fingerprints)) == 2


def test_a_lora_can_not_be_mixed_in() -> None:
    with pytest.raises((ValueError, TypeError)):
        tangent_model("llama").add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


# ---- saving and loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_save_and_load(name: str, form: str, low_memory: bool, tmp_path: Path) -> None:
    model = tangent_model(name, form)
    expected = logits(model, **INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(name), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(logits(loaded, **INPUTS), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True)
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (trainable, model)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("form", "kinds"),
    [("dense", {"tangent_delta"}), ("shared", {"tangent_B"}), ("trained", {"tangent_A", "tangent_B"})],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # both have a tied head with a tangent
def test_the_file_holds_the_tangents_alone(name: str, form: str, kinds: set[str], tmp_path: Path) -> None:
    model = tangent_model(name, form)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.split(".")[-2] for key in keys} == kinds
    assert len(keys) == len(tangent_layers(model)) * len(kinds)
    assert "import tangent_peft" in (tmp_path / "README.md").read_text()


def test_a_half_precision_base_keeps_its_tangent_in_single(tmp_path: Path) -> None:
    model = get_peft_model(build("llama").bfloat16(), config("shared")).eval()
    expected = logits(model, **INPUTS)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(build("llama").bfloat16(), tmp_path).eval()
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, **INPUTS), expected)
    single = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    real = INPUTS["attention_mask"].bool()
    assert relative_error(expected[real], logits(single, **INPUTS)[real]) <= 2 * TOLERANCE[torch.bfloat16]


def test_several_named_axes(tmp_path: Path) -> None:
    model = two_axes()
    model.set_adapter("other")
    expected = logits(model, **INPUTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    loaded.load_adapter(tmp_path / "other", adapter_name="mine")
    assert loaded.axis_weights == {"default": 1.0}
    loaded.set_adapter("mine")
    assert torch.equal(logits(loaded, **INPUTS), expected)


def test_auto_class(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base").eval()
    model = get_peft_model(base, config("shared")).eval()
    model.save_pretrained(tmp_path / "axis")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "axis").eval()
    assert torch.equal(logits(loaded, **INPUTS), logits(model, **INPUTS))


def test_state_dict_functions() -> None:
    model, fresh = tangent_model("llama", "trained"), tangent_model("llama", "trained", init_weights=True)
    state = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(fresh, **INPUTS), logits(model, **INPUTS))


@pytest.mark.parametrize("form", FORMS)
def test_config_round_trip(form: str, tmp_path: Path) -> None:
    before = config(
        form,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        projection_seed=5,
        linearize=False,
    )
    before.save_pretrained(tmp_path)
    after = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(after, TangentConfig)
    unlike = {"inference_mode"}  # PEFT saves every configuration for inference
    for key, value in before.to_dict().items():
        if key not in unlike:
            found = after.to_dict()[key]
            assert (set(found) if isinstance(found, list) else found) == (
                set(value) if isinstance(value, (list, set)) else value
            ), key
    assert pickle.loads(pickle.dumps(before)) == before


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"from_the_future": 1,', 1))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).num_layers == 2


# ---- transformers' own interface ---------------------------------------------------------------------------


def test_transformers_verbs(tmp_path: Path) -> None:
    base = build("llama")
    expected_base = logits(base, **INPUTS)
    base.add_adapter(config("shared"), adapter_name="help")
    help_logits = logits(base, **INPUTS)
    assert not torch.equal(help_logits, expected_base)
    base.add_adapter(config("dense"), adapter_name="verb")
    base.set_adapter("verb")
    assert not torch.equal(logits(base, **INPUTS), help_logits)
    base.set_adapter("help")
    assert torch.equal(logits(base, **INPUTS), help_logits)
    base.disable_adapters()
    assert torch.equal(logits(base, **INPUTS), expected_base)
    base.enable_adapters()
    base.delete_adapter("verb")
    assert torch.equal(logits(base, **INPUTS), help_logits)
    base.save_pretrained(tmp_path)
    other = build("llama")
    other.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(logits(other, **INPUTS), help_logits)


def test_auto_model_loads_an_adapter_directory(tmp_path: Path) -> None:
    model = get_peft_model(saved_base(tmp_path / "base").eval(), config("trained")).eval()
    model.save_pretrained(tmp_path / "axis")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "axis").eval()
    assert torch.equal(logits(loaded, **INPUTS), logits(model, **INPUTS))


@pytest.mark.parametrize("form", FORMS)
def test_injection(form: str) -> None:
    model = tangent_model("llama", form)
    injected = inject_adapter_in_model(config(form, init_weights=True), build("llama"))
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(injected, state)
    assert torch.equal(logits(injected, **INPUTS), logits(model, **INPUTS))
    from_state = inject_adapter_in_model(config(form, init_weights=True), build("llama"), state_dict=state)
    set_peft_model_state_dict(from_state, state)
    assert torch.equal(logits(from_state, **INPUTS), logits(model, **INPUTS))


# ---- copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(duplicate: Any) -> None:
    model = tangent_model("llama", "shared")
    expected = logits(model, **INPUTS)
    clone = duplicate(model)
    assert torch.equal(logits(clone, **INPUTS), expected)
    clone.combine_axes({"default": -1.0})
    with torch.no_grad():
        for layer in tangent_layers(clone):
            layer.tangent_B["default"].weight.mul_(2.0)
    assert not torch.equal(logits(clone, **INPUTS), expected)
    assert torch.equal(logits(model, **INPUTS), expected)
    hooks = LinearizedForward.installed(clone.get_base_model())
    assert hooks is not None and set(hooks.carriers) == set(tangent_layers(clone))
    clone.add_adapter("second", config("dense"))
    clone.unload()
    assert LinearizedForward.installed(clone.get_base_model()) is None
    assert torch.equal(logits(model, **INPUTS), expected)


# ---- merging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.filterwarnings("ignore:The head is tied")
def test_merge_and_unmerge(name: str, form: str) -> None:
    model = tangent_model(name, form)
    weights = {key: value.clone() for key, value in build(name).state_dict().items()}
    linearized = logits(model, **INPUTS)
    with model.linearized(False):
        additive = logits(model, **INPUTS)
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    assert_equal(logits(model, **INPUTS), additive)
    model.unmerge_adapter()
    assert_equal(logits(model, **INPUTS), linearized)
    restored = model.unload()
    for key, value in restored.state_dict().items():
        assert_equal(value, weights[key], tolerance=1e-6)
    tied = restored.config.tie_word_embeddings
    head, embedding = restored.get_output_embeddings().weight, restored.get_input_embeddings().weight
    assert (head is embedding) == tied
    if tied:
        assert torch.equal(head, weights["lm_head.weight"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.filterwarnings("ignore:The head is tied")
def test_merge_and_unload(name: str, form: str, tmp_path: Path) -> None:
    model = tangent_model(name, form)
    embedding = build(name).get_input_embeddings().weight
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    merged = model.merge_and_unload()
    assert type(merged) is type(build(name)) and not tangent_layers(merged)
    assert LinearizedForward.installed(merged) is None
    assert_equal(logits(merged, **INPUTS), expected)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_equal(logits(loaded, **INPUTS), expected)


def test_merging_a_mix() -> None:
    model = two_axes()
    model.combine_axes({"default": 0.5, "other": -1.5})
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    with pytest.warns(UserWarning, match="tied to the input embedding"):
        merged = model.merge_and_unload()
    assert_equal(logits(merged, **INPUTS), expected)


def test_merging_without_a_head_tangent_keeps_the_tie() -> None:
    model = tangent_model("llama", "dense", lm_head=False)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("verb", ["merge_and_unload", "merge_adapter"])
@pytest.mark.filterwarnings("ignore:The head is tied")
def test_safe_merge(verb: str) -> None:
    model = tangent_model("llama", "dense")
    before = {name: p.clone() for name, p in model.named_parameters() if "tangent_" not in name}
    layer = tangent_layers(model)[0]
    with torch.no_grad():
        layer.tangent_delta["default"].weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        {"merge_and_unload": model.merge_and_unload, "merge_adapter": model.merge_adapter}[verb](safe_merge=True)
    assert layer.merged_adapters == []
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in before.items())


@pytest.mark.filterwarnings("ignore:The head is tied")
def test_disabling_a_merged_adapter_unmerges_it() -> None:
    model = tangent_model("llama", "dense")
    base = logits(build("llama"), **INPUTS)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"\['default'\] are merged.*stay out.*merge_adapter"), model.disable_adapter():
        assert_equal(logits(model, **INPUTS), base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with model.disable_adapter():
            assert_equal(logits(model, **INPUTS), base)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unload_restores_the_base(name: str) -> None:
    expected = logits(build(name), **INPUTS)
    base = tangent_model(name, "dense").unload()
    assert LinearizedForward.installed(base) is None and not tangent_layers(base)
    assert torch.equal(logits(base, **INPUTS), expected)
    assert base.state_dict().keys() == build(name).state_dict().keys()


def test_converting_to_a_lora(tmp_path: Path) -> None:
    """PEFT's own conversion, an SVD of every ΔW."""
    from peft import save_as_lora

    model = tangent_model("qwen3", "shared", lm_head=False)
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    save_as_lora(tmp_path, model, rank=4)
    converted = PeftModel.from_pretrained(build("qwen3"), tmp_path).eval()
    assert converted.peft_config["default"].peft_type == "LORA"
    assert_equal(logits(converted, **INPUTS), expected, tolerance=1e-4)


# ---- what is wrapped ---------------------------------------------------------------------------------------


def wrapped(name: str = "llama", **options: Any) -> set[str]:
    model = get_peft_model(build(name), TangentConfig(task_type="CAUSAL_LM", **options))
    return {layer.layer_name for layer in tangent_layers(model)}


def blocks(names: set[str]) -> set[int]:
    return {int(part) for name in names for part in name.split(".") if part.isdigit()}


def test_the_last_blocks_and_the_head() -> None:
    everything = wrapped(num_layers=None)
    assert len(everything) == 3 * 7 + 1 and "lm_head" in everything
    assert wrapped(num_layers=16) == wrapped() == everything
    assert wrapped(num_layers=3, target_modules="all-linear") == everything
    assert wrapped(num_layers=1) == {n for n in everything if "layers.2." in n or n == "lm_head"}
    assert "lm_head" not in wrapped(lm_head=False)
    assert wrapped("gpt2", num_layers=1, lm_head=False) == {
        f"transformer.h.2.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_the_text_decoder_of_a_vision_model() -> None:
    """Not its vision tower, though that has more blocks."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=300, num_hidden_layers=2, num_key_value_heads=2, **sizes)
    vision = CLIPVisionConfig(num_hidden_layers=4, image_size=8, patch_size=4, **sizes)
    base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=299))
    assert find_blocks(base) == ("model.language_model.layers", 2)
    names = {layer.layer_name for layer in tangent_layers(get_peft_model(base, TangentConfig(r=2, num_layers=1)))}
    assert len(names) == 7 + 1 and all(n == "lm_head" or n.startswith("model.language_model.layers.1.") for n in names)


def test_selecting_modules() -> None:
    assert wrapped(target_modules=["q_proj"], num_layers=2, lm_head=False) == {
        f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)
    }
    assert blocks(wrapped(layers_to_transform=[0, 2], target_modules=["q_proj"], lm_head=False)) == {0, 2}
    assert blocks(wrapped(layers_to_transform=0, lm_head=False)) == {0}
    assert wrapped(target_modules=r".*\.0\..*q_proj") == {"model.layers.0.self_attn.q_proj"}
    names = wrapped(exclude_modules=["lm_head", "mlp.down_proj"])
    assert not any("down_proj" in n or "lm_head" in n for n in names) and len(names) == 3 * 6
    assert not any("mlp" in name for name in wrapped(exclude_modules=r".*mlp.*"))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_the_head_by_name(targets: list[str], tmp_path: Path) -> None:
    """PEFT would save the base's embedding beside an adapter whose `target_modules` name the head."""
    model = tangent_model("llama", "dense", target_modules=targets, lm_head=False)
    names = {layer.layer_name for layer in tangent_layers(model)}
    assert "lm_head" in names and len(names) == (1 if len(targets) == 1 else 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(names)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, **INPUTS), logits(model, **INPUTS))


def test_rank_pattern(tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", rank_pattern={"q_proj": 2, r".*\.2\.mlp\.up_proj": 7})
    for layer in tangent_layers(model):
        rank = 2 if "q_proj" in layer.layer_name else 7 if layer.layer_name.endswith("2.mlp.up_proj") else 4
        assert layer.tangent_B["default"].weight.shape == (layer.out_features, rank)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, **INPUTS), logits(model, **INPUTS))


def test_gradients_flow_to_every_tangent() -> None:
    model: PeftModel = two_axes("shared", "trained")
    model.base_model.set_adapter(["default", "other"])
    loss: Tensor = model(**INPUTS).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
