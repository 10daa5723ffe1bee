"""A batch in which every row has a mix of its own equals its rows run one by one, each under its mix."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import config, logits, tangent_layers, tangent_model
from conftest import VOCABULARY, batch, build
from families import FAMILIES, Family
from peft import PeftModel, get_peft_model
from tolerances import assert_equal, relative_error
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)
from vision import VLMS, build_vlm, vision_batch

from tangent_peft import TangentConfig


MIXES: list[dict[str, float]] = [{"help": 1.0, "verb": -0.5}, {}, {"verb": 2.0}]
NEW = 6
READ_WEIGHTS = {"jamba", "mamba", "falcon_mamba"}  # of a wrapped layer, which has one for all rows
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without a cache": {"do_sample": False, "use_cache": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
}


def two_axes(name: str = "llama", forms: tuple[str, str] = ("dense", "shared"), **options: Any) -> PeftModel:
    model = get_peft_model(build(name), config(forms[0], **options), adapter_name="help")
    model.add_adapter("verb", config(forms[1], **options))
    return model.eval()


def one_by_one(model: PeftModel, inputs: dict[str, Tensor], mixes: list[dict[str, float]], **options: Any) -> Tensor:
    """Logits (B, T, V) of the rows run apart, each under its own mix."""
    rows = []
    for index, mix in enumerate(mixes):
        with model.axes(mix):
            rows.append(logits(model, **{name: x[index : index + 1] for name, x in inputs.items()}, **options))
    return torch.cat(rows)


# ---- forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linearized", [True, False], ids=["linearized", "weights"])
@pytest.mark.parametrize("forms", [("dense", "shared"), ("shared", "trained")], ids="-".join)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_rows_equal_their_rows_alone(name: str, forms: tuple[str, str], linearized: bool) -> None:
    model = two_axes(name, forms)
    for side in ("left", "right"):
        inputs = batch(side)
        real = inputs["attention_mask"].bool()
        with model.linearized(linearized):
            expected = one_by_one(model, inputs, MIXES)
            found = logits(model, **inputs, axis_weights=MIXES)
        assert_equal(found[real], expected[real])


def test_a_row_without_axes_is_the_base_bit_for_bit() -> None:
    model, inputs = two_axes(), batch("left")
    with model.axes({}):
        base = logits(model, **inputs)
    for linearized in (True, False):
        with model.linearized(linearized):
            assert torch.equal(logits(model, **inputs, axis_weights=MIXES)[1], base[1])
    assert torch.equal(logits(model, **inputs, axis_weights=[{}, {}, {}]), base)


def test_as_many_tokens_as_rows() -> None:
    """(B, T) with B = T: a model that puts time first would be noticed by nothing else."""
    model, inputs = two_axes(), batch("right", rows=3, length=3)
    inputs = {"input_ids": inputs["input_ids"].clamp(min=3), "attention_mask": torch.ones(3, 3, dtype=torch.long)}
    assert_equal(logits(model, **inputs, axis_weights=MIXES), one_by_one(model, inputs, MIXES))


def test_embeddings_and_inputs_embeds() -> None:
    model, inputs = two_axes(target_modules=["embed_tokens", "q_proj", "mlp.up_proj"], num_layers=None), batch("right")
    real = inputs["attention_mask"].bool()
    expected = one_by_one(model, inputs, MIXES)
    assert_equal(logits(model, **inputs, axis_weights=MIXES)[real], expected[real])
    base: Any = build("llama")
    embeds = {"inputs_embeds": base.get_input_embeddings()(inputs["input_ids"]).detach()}
    embeds["attention_mask"] = inputs["attention_mask"]
    found = logits(model, **embeds, axis_weights=MIXES)
    assert_equal(found[real], one_by_one(model, embeds, MIXES)[real])


def test_axes_takes_a_list_and_names_the_axes_of_peft() -> None:
    model, inputs = two_axes(), batch("right")
    expected = logits(model, **inputs, axis_weights=[{"help": 1.0}, {}, {"verb": 1.0}])
    with model.axes([{"help": 1.0}, {}, {"verb": 1.0}]):
        assert torch.equal(logits(model, **inputs), expected)
    assert torch.equal(logits(model, **inputs, adapter_names=["help", "__base__", "verb"]), expected)


def test_without_a_task_type_and_while_training() -> None:
    """`PeftModel` without a task hands the arguments to the base past the tuner."""
    model = get_peft_model(build("llama"), config(task_type=None), adapter_name="help").eval()
    inputs = batch("right")
    mixes: list[dict[str, float]] = [{"help": 1.0}, {}, {"help": -1.0}]
    real = inputs["attention_mask"].bool()
    expected = one_by_one(model, inputs, mixes)
    training = [parameter.requires_grad for parameter in model.parameters()]
    assert any(training)
    assert_equal(logits(model, **inputs, axis_weights=mixes)[real], expected[real])
    assert [parameter.requires_grad for parameter in model.parameters()] == training
    assert model.axis_weights == {"help": 1.0}


def test_calls_of_several_threads_wait_for_each_other() -> None:
    model, inputs = two_axes(), batch("right")
    others = [MIXES, [*MIXES[1:], MIXES[0]], [{"help": -1.0}, {"help": 0.5}, {"verb": 1.0}]]
    expected = [logits(model, **inputs, axis_weights=iter(mixes)) for mixes in others]

    def call(index: int) -> bool:
        return torch.equal(logits(model, **inputs, axis_weights=others[index % 3]), expected[index % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(24)))
    assert model.axis_weights == {"help": 1.0}


def test_the_live_mix_comes_back() -> None:
    model, inputs = two_axes(), batch("right")
    model.combine_axes({"verb": 0.5})
    before = logits(model, **inputs)
    logits(model, **inputs, axis_weights=MIXES)
    assert model.axis_weights == {"verb": 0.5}
    assert torch.equal(logits(model, **inputs), before)
    handle = model.get_base_model().model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, axis_weights=MIXES)
    handle.remove()
    assert model.axis_weights == {"verb": 0.5}
    assert torch.equal(logits(model, **inputs), before)


def test_one_mix_inside_a_block_of_many() -> None:
    model, inputs = two_axes(), batch("right")
    one = {name: x[:1] for name, x in inputs.items()}
    with model.axes({"help": 1.0}):
        expected = logits(model, **one)
    with model.axes(MIXES):
        with model.axes({"help": 1.0}):
            assert torch.equal(logits(model, **one), expected)
        inside = logits(model, **inputs)
    assert torch.equal(inside, logits(model, **inputs, axis_weights=MIXES))


def test_a_copy_has_mixes_of_its_own() -> None:
    model, inputs = two_axes(), batch("right")
    model.combine_axes({"help": 1.0})
    other = copy.deepcopy(model)
    other.combine_axes({"verb": 1.0})
    assert model.axis_weights == {"help": 1.0}
    found = logits(other, **inputs, axis_weights=MIXES)
    assert torch.equal(found, logits(model, **inputs, axis_weights=MIXES))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family: Family) -> None:
    """Every family gives its rows their mixes, or says that it can not; with T ≠ B and with T = B."""
    model = get_peft_model(family.build(), config(), adapter_name="help").eval()
    mixes: list[dict[str, float]] = [{"help": 1.0}, {}, {"help": -1.0}]
    for length in (5, 3):
        ids = torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = one_by_one(model, inputs, mixes, use_cache=False)
        with model.axes(mixes):
            if family.name in READ_WEIGHTS:
                with pytest.raises(RuntimeError, match="one mix here"):
                    logits(model, **inputs, use_cache=False)
                continue
            found = logits(model, **inputs, use_cache=False)
        assert relative_error(found, expected) <= family.tolerance


# ---- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("linearized", [True, False], ids=["linearized", "weights"])
def test_generation(decoding: str, linearized: bool) -> None:
    model, prompts = two_axes(), batch("left", rows=3, length=7)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, **DECODING[decoding]}
    several = options.get("num_return_sequences", 1)
    with model.linearized(linearized):
        found = model.generate(**prompts, **options, axis_weights=MIXES)
        for index, mix in enumerate(MIXES):
            with model.axes(mix):
                alone = model.generate(**{name: x[index : index + 1] for name, x in prompts.items()}, **options)
            assert torch.equal(found[several * index : several * (index + 1)], alone), mix
    assert model.axis_weights == {"help": 1.0}


def test_generation_by_adapter_names_and_in_a_block() -> None:
    model, prompts = two_axes(), batch("left", rows=3, length=7)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 2}
    expected = model.generate(**prompts, **options, axis_weights=[{"help": 1.0}, {}, {"verb": 1.0}])
    assert torch.equal(model.generate(**prompts, **options, adapter_names=["help", "__base__", "verb"]), expected)
    with model.axes([{"help": 1.0}, {}, {"verb": 1.0}]):
        assert torch.equal(
            model.generate(prompts["input_ids"], **options, **{"attention_mask": prompts["attention_mask"]}), expected
        )


def test_sampling_gives_several_answers_of_each_row() -> None:
    model, prompts = two_axes(), batch("left", rows=2, length=7)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    found = model.generate(**prompts, **options, axis_weights=[{"help": 1.0}] * 2)
    torch.manual_seed(0)
    with model.axes({"help": 1.0}):
        assert torch.equal(model.generate(**prompts, **options), found)


def test_a_cache_filled_under_other_mixes_is_refused() -> None:
    model, inputs = two_axes(), batch("right")
    filled = model(**inputs, use_cache=True, axis_weights=MIXES).past_key_values
    step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": filled}
    with pytest.raises(ValueError, match="filled by the linearized mix"):
        model(**step, axis_weights=[*MIXES[1:], MIXES[0]])


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis_weights": MIXES[:2]}, ValueError, "2 mixes are given for a batch of 3 rows"),
        ({"axis_weights": []}, ValueError, "is empty"),
        ({"axis_weights": {"help": 1.0}}, TypeError, "one dict .* for every row"),
        ({"axis_weights": [1.0, 2.0, 3.0]}, TypeError, "one dict .* for every row"),
        ({"axis_weights": [{"nice": 1.0}, {}, {}]}, ValueError, "Unknown axis 'nice'"),
        ({"axis_weights": [{"help": float("nan")}, {}, {}]}, ValueError, "must be a finite number"),
        ({"axis_weights": MIXES, "adapter_names": ["help"] * 3}, ValueError, "two ways to say the same"),
        ({"adapter_names": ["help", "nice", "help"]}, ValueError, "Unknown axis 'nice'"),
        ({"adapter_names": ["help"]}, ValueError, "1 mixes are given for a batch of 3 rows"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs = two_axes(), batch("left")
    before = logits(model, **inputs)
    for call in (model, model.generate):
        with pytest.raises(error, match=message):
            call(**inputs, **options)
    assert torch.equal(logits(model, **inputs), before)


def test_rows_that_were_repeated_by_hand() -> None:
    """In `generate` a batch of 6 may be 3 rows and their beams; given as inputs it is 6 rows."""
    model, inputs = two_axes(), batch("left")
    twice = {name: x.repeat_interleave(2, dim=0) for name, x in inputs.items()}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="3 mixes are given for a batch of 6 rows"):
            call(**twice, axis_weights=MIXES)


def test_a_model_called_past_its_peft_model_or_disabled() -> None:
    model, inputs = two_axes(), batch("left")
    with pytest.raises(ValueError, match="called past its PeftModel"):
        model.get_base_model()(**inputs, axis_weights=MIXES)
    with model.disable_adapter():
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="axes are disabled"):
                call(**inputs, axis_weights=MIXES)


def test_no_merging_and_no_reading_of_one_mix() -> None:
    model = two_axes(lm_head=False)
    layer = model.get_base_model().model.layers[2].mlp.up_proj
    with model.axes(MIXES):
        for action in (lambda: model.axis_weights, model.merge_adapter, lambda: layer.get_delta_weight("verb")):
            with pytest.raises(ValueError, match="differs from row to row"):
                action()
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged"), model.axes(MIXES):
        pass


class Subset(nn.Module):
    """Gives its layer the tokens that it likes, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        chosen = input_ids > 4
        return x.masked_scatter(chosen[..., None], self.layer(x[chosen]))


def test_a_layer_that_sees_some_of_the_tokens_is_refused() -> None:
    ids = torch.tensor([[1, 5, 6], [1, 2, 7]])
    torch.manual_seed(0)
    model = get_peft_model(Subset(), TangentConfig(target_modules=["layer"], num_layers=None, init_weights=False))
    for linearized in (True, False):
        with model.linearized(linearized), pytest.raises(ValueError, match=r"'layer' has values of shape \(3, 8\)"):
            model(ids, axis_weights=[{"default": 1.0}, {}])


class Experts(nn.Module):
    """Two experts, of which each gets every token once, in an order of its own."""

    def __init__(self, container: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(10, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        if container is nn.ModuleDict:
            self.experts = nn.ModuleDict({"0": self.experts[0], "1": self.experts[1]})

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        order = torch.arange(len(x)).flip(0)
        called: Any = self.experts["0"] if isinstance(self.experts, nn.ModuleDict) else self.experts[0]
        return torch.empty_like(x).index_copy(0, order, called(x[order])).view(*input_ids.shape, -1)


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
@pytest.mark.parametrize("tokens", [1, 3])
def test_an_expert_that_sees_all_tokens_in_another_order_is_refused(container: type[nn.Module], tokens: int) -> None:
    model = get_peft_model(
        Experts(container), TangentConfig(target_modules=["experts.0"], num_layers=None, init_weights=False)
    )
    for linearized in (True, False):
        with model.linearized(linearized), pytest.raises(ValueError, match="can not be told apart"):
            model(torch.ones(2, tokens, dtype=torch.long), axis_weights=[{"default": 1.0}, {}])


def test_an_axis_that_keeps_modules() -> None:
    model = tangent_model(modules_to_save=["norm"])
    with pytest.raises(ValueError, match="keeps its own copy of the modules"):
        model(**batch("left"), axis_weights=[{"default": 1.0}, {}, {}])


@pytest.mark.parametrize("linearized", [True, False], ids=["linearized", "weights"])
def test_a_weight_that_is_not_rounded_to_the_precision_of_the_model(linearized: bool) -> None:
    model, inputs = two_axes().to(torch.bfloat16), batch("right")
    with model.linearized(linearized), model.axes({"help": 0.7}):
        expected = logits(model, **inputs)
    with model.linearized(linearized):
        assert torch.equal(logits(model, **inputs, axis_weights=[{"help": 0.7}] * 3), expected)


def test_a_model_that_reads_the_dtype_of_a_weight() -> None:
    """T5 reads that of `wo`."""
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    model = get_peft_model(base, config(task_type="SEQ_2_SEQ_LM", num_layers=None), adapter_name="help").eval()
    ids = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    mixes: list[dict[str, float]] = [{"help": 1.0}, {"help": -1.0}]
    assert_equal(logits(model, **inputs, axis_weights=mixes), one_by_one(model, inputs, mixes))


@pytest.mark.parametrize("tokens", [2, 5])
def test_pooled_inputs(tokens: int) -> None:
    """BERT's pooler and classifier get one entry per row."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24)).eval()
    targets = ["pooler.dense", "classifier", "query"]
    options = {"task_type": None, "num_layers": None, "target_modules": targets, "lm_head": False}
    model = get_peft_model(base, config(**options), adapter_name="help").eval()
    inputs = {"input_ids": torch.randint(3, 40, (2, tokens), generator=torch.Generator().manual_seed(1))}
    mixes: list[dict[str, float]] = [{"help": 1.0}, {"help": -1.0}]
    assert_equal(logits(model, **inputs, axis_weights=mixes), one_by_one(model, inputs, mixes))


def test_a_model_that_puts_time_first() -> None:
    base = XLNetLMHeadModel(XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24))
    model = get_peft_model(base, config(target_modules=["ff.layer_1"], num_layers=None, lm_head=False))
    with pytest.raises(NotImplementedError, match="puts time before rows"):
        model(torch.ones(3, 3, dtype=torch.long), axis_weights=[{"default": 1.0}, {}, {}])


def test_an_axis_that_is_not_finite_stays_in_its_rows() -> None:
    model, inputs = two_axes(), batch("right")
    with model.axes({}):
        base = logits(model, **inputs)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.2.mlp.up_proj.tangent_delta.help.weight").fill_(torch.inf)
    for linearized in (True, False):
        with model.linearized(linearized):
            found = logits(model, **inputs, axis_weights=[{"help": 1.0}, {}, {"verb": 0.0}])
            assert not found[0].isfinite().all() and torch.equal(found[1:], base[1:])


@pytest.mark.parametrize("name", VLMS)
def test_an_encoder_of_images_has_one_mix(name: str) -> None:
    """There may be as many images as rows, and all of them in one row."""
    inputs = vision_batch(name)
    model = get_peft_model(build_vlm(name), config(), adapter_name="help").eval()
    assert all("batch" in layer.tangent_rows for layer in tangent_layers(model))  # those of the text
    assert logits(model, **inputs, axis_weights=[{"help": 1.0}, {}]).isfinite().all()
    inside = next(n for n, m in build_vlm(name).named_modules() if "vis" in n and isinstance(m, nn.Linear))
    seen = get_peft_model(
        build_vlm(name), config(target_modules=[inside], num_layers=None, lm_head=False), adapter_name="help"
    ).eval()
    with pytest.raises(ValueError, match="can not be told apart"):
        seen(**inputs, axis_weights=[{"help": 1.0}, {}])


def test_experts_have_one_mix() -> None:
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    options = {"target_parameters": ["experts.down_proj"]}
    model = get_peft_model(family.build(), config(**options), adapter_name="help").eval()
    with pytest.raises(RuntimeError, match="one mix here"):
        model(torch.ones(2, 3, dtype=torch.long), axis_weights=[{"help": 1.0}, {}])
