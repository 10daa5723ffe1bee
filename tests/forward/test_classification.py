"""Classifiers: f_lin up to the logits of a head that is trained in full, has a tangent, or is left alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import config, deltas, tangent_layers
from conftest import TINY, VOCABULARY, batch, enlarge
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tolerances import assert_equal, relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForQuestionAnswering,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from tangent_peft import TangentConfig


LABELS = 3
_LLAMA: dict[str, Any] = {**TINY, "num_hidden_layers": 3, "pad_token_id": 0, "classifier_dropout": 0.0}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_DISTILBERT: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
_DISTILBERT |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "pad_token_id": 0}
_MODERN: dict[str, Any] = {**{k: v for k, v in _BERT.items() if "dropout" not in k}, "local_attention": 4}
_MODERN |= {"global_attn_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
_MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
_DEBERTA: dict[str, Any] = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_DEBERTA |= {"max_relative_positions": 16}

Make = Callable[[int], PreTrainedModel]
DECODERS: dict[str, Make] = {
    "llama": lambda n: LlamaForSequenceClassification(LlamaConfig(**_LLAMA, num_labels=n)),
    "gpt2": lambda n: GPT2ForSequenceClassification(GPT2Config(**_GPT2, num_labels=n)),
}
ENCODERS: dict[str, Make] = {  # their pooler or head has an activation
    "bert": lambda n: BertForSequenceClassification(BertConfig(**_BERT, num_labels=n)),
    "roberta": lambda n: RobertaForSequenceClassification(RobertaConfig(**_BERT, num_labels=n)),
    "distilbert": lambda n: DistilBertForSequenceClassification(DistilBertConfig(**_DISTILBERT, num_labels=n)),
    "modernbert": lambda n: ModernBertForSequenceClassification(ModernBertConfig(**_MODERN, num_labels=n)),
    "deberta_v2": lambda n: DebertaV2ForSequenceClassification(DebertaV2Config(**_DEBERTA, num_labels=n)),
}
TOKENS: dict[str, Make] = {
    "llama_tokens": lambda n: LlamaForTokenClassification(LlamaConfig(**_LLAMA, num_labels=n)),
    "bert_tokens": lambda n: BertForTokenClassification(BertConfig(**_BERT, num_labels=n)),
}
CLASSIFIERS = {**DECODERS, **ENCODERS, **TOKENS}


def build_classifier(name: str, labels: int = LABELS) -> PreTrainedModel:
    """A fresh tiny classifier in eval mode, the same weights at every call."""
    torch.manual_seed(0)
    return enlarge(CLASSIFIERS[name](labels))


def task(name: str) -> str:
    return "TOKEN_CLS" if name in TOKENS else "SEQ_CLS"


def classifier(name: str, form: str = "dense", labels: int = LABELS, **options: Any) -> PeftModel:
    """The classifier with one axis, in eval mode; by default with PEFT's task, which trains the head in full."""
    base = build_classifier(name, labels)
    torch.manual_seed(1)
    return get_peft_model(base, config(form, **{"task_type": task(name), **options})).eval()


def labels_of(name: str) -> Tensor:
    return torch.randint(0, LABELS, (3, 10) if name in TOKENS else (3,))


def saved(model: PeftModel) -> dict[str, nn.Parameter]:
    """What trains beside the tangents, by its name in the stock model."""
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad and ".tangent_" not in name
    }


def head_gradient(clean: PreTrainedModel, taus: oracle.Deltas, head: Any, cotangent: Tensor, inputs: Any) -> Any:
    """∂⟨cotangent, f + J·τ⟩/∂head by torch.func on the stock network: through f and through J."""
    clone = oracle.untied_copy(clean)
    weights = {name: p.detach() for name, p in clone.named_parameters()}
    moving = {name: weights.pop(name) for name in taus}

    def value(head: dict[str, Tensor]) -> Tensor:
        def logits(part: dict[str, Tensor]) -> Tensor:
            return functional_call(clone, {**weights, **head, **part}, kwargs={**inputs, "use_cache": False}).logits

        base, tangent = jvp(logits, (moving,), (dict(taus),))
        return ((base + tangent) * cotangent).sum()

    return grad(value)({name: p.detach() for name, p in head.items()})


@pytest.mark.parametrize("gradient", ["recorded", "replay"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_and_gradients_equal_the_oracle(name: str, gradient: str) -> None:
    """Those of every tangent, and those of the head that PEFT trains in full beside them."""
    model, clean = classifier(name, gradient=gradient), build_classifier(name)
    # A bidirectional window that begins with padding sees nothing: ModernBERT's own kernels differ there.
    inputs = batch("right" if name == "modernbert" or gradient == "recorded" else "left")
    inputs = {**inputs, "use_cache": False} if name in ("gpt2", "llama") else inputs
    plain = {key: value for key, value in inputs.items() if key != "use_cache"}
    real = inputs["attention_mask"].bool() if name in TOKENS else slice(None)
    taus = deltas(model)
    base, expected = oracle.linearized(clean, taus, **plain)
    assert relative_error(base[real], expected[real]) > 0.02
    with torch.no_grad():
        assert_equal(model(**inputs).logits[real], expected[real])
    logits = model.train()(**inputs).logits
    assert_equal(logits[real], expected[real])
    cotangent = torch.zeros_like(logits)
    cotangent[real] = torch.randn_like(logits[real])
    logits.backward(cotangent)
    gradients = oracle.gradient(clean, taus, cotangent, **plain)
    for layer in tangent_layers(model):
        full = gradients[f"{layer.layer_name}.weight"]
        found = layer.tangent_delta["default"].weight.grad
        assert_equal(found, full.mT if name == "gpt2" else full)
    head = saved(model)
    assert head and all("classifier" in key or "score" in key for key in head)
    for key, full in head_gradient(clean, taus, head, cotangent, plain).items():
        assert_equal(head[key].grad, full)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_loss_is_that_of_the_linearized_logits(name: str) -> None:
    model, labels = classifier(name).train(), labels_of(name)
    output = model(**batch(), labels=labels)
    expected = nn.functional.cross_entropy(output.logits.reshape(-1, LABELS), labels.reshape(-1))
    assert_equal(output.loss, expected)
    output.loss.backward()
    found = [p.grad for n, p in model.named_parameters() if p.requires_grad]
    model.zero_grad()
    logits = model(**batch()).logits
    nn.functional.cross_entropy(logits.reshape(-1, LABELS), labels.reshape(-1)).backward()
    for gradient, p in zip(found, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert_equal(gradient, p.grad)


@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_other_losses(name: str) -> None:
    """One label is a regression (a reward), float labels are several classes at once."""
    target = torch.randn(3)
    output = classifier(name, labels=1)(**batch(), labels=target)
    assert_equal(output.loss, nn.functional.mse_loss(output.logits[:, 0], target))
    several = torch.randint(0, 2, (3, LABELS)).float()
    output = classifier(name)(**batch(), labels=several)
    assert_equal(output.loss, nn.functional.binary_cross_entropy_with_logits(output.logits, several))


def test_a_loss_of_its_own_is_refused() -> None:
    """A module whose loss is no module: nobody could tell what it was computed of."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 7), nn.Linear(7, LABELS)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.last(self.first(x).tanh())
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = get_peft_model(Network(), TangentConfig(target_modules=["first"], init_weights=False))
    with pytest.raises(NotImplementedError, match=r"linearized loss.*compute_loss_func"):
        model(torch.randn(2, 5), torch.tensor([0, 1]))


class InATuple(nn.Module):
    """Returns the loss first, as transformers models do with `return_dict=False`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, LABELS)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        logits = self.last(self.first(x).tanh()) ** 2
        return None if labels is None else nn.functional.cross_entropy(logits, labels), logits


def test_a_loss_in_a_tuple_is_refused() -> None:
    model = get_peft_model(InATuple(), TangentConfig(target_modules=["first"], init_weights=False))
    x, labels = torch.randn(2, 5), torch.tensor([0, 1])
    for args, kwargs in (((x, labels), {}), ((x,), {"labels": labels})):
        with pytest.raises(NotImplementedError, match=r"InATuple.*linearized loss.*compute_loss_func"):
            model(*args, **kwargs)
    assert model(x)[1].shape == model(x, labels=None)[1].shape == (2, LABELS)


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_labels_by_position_and_losses_in_a_tuple(name: str) -> None:
    model, labels, inputs = classifier(name), labels_of(name), batch("right")
    given = {"labels": labels, "return_dict": False}
    loss, logits = model(**inputs, **given)
    assert_equal(loss, nn.functional.cross_entropy(logits, labels))
    root: Any = model.get_base_model()
    names = list(inspect.signature(root.forward).parameters)
    values: list[Any] = [inputs.get(name) for name in names[: names.index("labels")]]
    assert_equal(root(*values, labels).loss, loss)


class Surprise(nn.Module):
    """A loss module in the middle of a network: how far the first layer is from its input gates the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.distance = nn.Linear(5, 5), nn.Linear(5, LABELS), nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden) * torch.sigmoid(self.distance(hidden, x))


def test_a_loss_in_the_middle_of_a_network_keeps_its_tangent() -> None:
    network, x = Surprise().double(), torch.randn(2, 5).double()
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    clean = copy.deepcopy(network)
    model = get_peft_model(network, TangentConfig(target_modules=["first", "last"], init_weights=False)).double()
    taus = {name: torch.zeros_like(p) for name, p in weights.items()} | deltas(model)
    base, change = jvp(lambda weights: functional_call(clean, weights, (x,)), (weights,), (taus,))
    assert_equal(model(x), base + change)


@pytest.mark.parametrize("name", ["llama", "bert", "bert_tokens"])
def test_a_tangent_on_the_head(name: str) -> None:
    """Without a task that trains the head it gets a tangent like a language model's: it is frozen and steered."""
    model = classifier(name, task_type=None)
    head = "score" if name == "llama" else "classifier"
    assert not saved(model) and head in [layer.layer_name for layer in tangent_layers(model)]
    inputs, taus = batch("right"), deltas(model)
    real = inputs["attention_mask"].bool() if name in TOKENS else slice(None)
    _, expected = oracle.linearized(build_classifier(name), taus, **inputs)
    logits = model.train()(**inputs).logits
    assert_equal(logits[real], expected[real])
    cotangent = torch.zeros_like(logits)
    cotangent[real] = 1.0
    logits.backward(cotangent)
    gradients = oracle.gradient(build_classifier(name), taus, cotangent, **inputs)
    for layer in tangent_layers(model):
        assert_equal(layer.tangent_delta["default"].weight.grad, gradients[f"{layer.layer_name}.weight"])
    without = classifier(name, task_type=None, lm_head=False)
    assert head not in [layer.layer_name for layer in tangent_layers(without)]


def test_a_head_of_several_layers_is_not_taken_for_an_affine_one() -> None:
    """RoBERTa's has an activation that is no module; no layer of it has a tangent by default."""
    model = classifier("roberta", task_type=None)
    assert all(".layer." in layer.layer_name for layer in tangent_layers(model))


@pytest.mark.parametrize("name", ["llama", "roberta", "bert_tokens"])
def test_save_load_merge(name: str, tmp_path: Path) -> None:
    model, inputs = classifier(name, "shared"), batch()
    with torch.no_grad():
        for parameter in saved(model).values():
            parameter.add_(0.1)  # trained
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build_classifier(name), tmp_path).eval()
        assert_equal(loaded(**inputs).logits, expected)
        with loaded.linearized(False):
            additive = loaded(**inputs).logits
        assert relative_error(additive, expected) > 1e-3
        merged = loaded.merge_and_unload()
        assert type(merged) is type(build_classifier(name))
        assert_equal(merged(**inputs).logits, additive)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, build_classifier(name)(**inputs).logits)


def test_a_head_trained_in_full_has_no_lambda() -> None:
    model = classifier("llama")
    model.add_adapter("other", config("dense", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"score.*no λ"):
        model.combine_axes({"default": 0.5})
    with pytest.raises(ValueError, match="score"):
        model.combine_axes({"default": 1.0, "other": 1.0})
    steered = classifier("llama", task_type=None)
    steered.add_adapter("other", config("dense"))
    steered.combine_axes({"default": 0.5, "other": -1.0})
    _, expected = oracle.linearized(build_classifier("llama"), deltas(steered), **batch())
    with torch.no_grad():
        assert_equal(steered(**batch()).logits, expected)


def test_export_of_a_tangent_on_the_head(tmp_path: Path) -> None:
    model, inputs = classifier("llama", "shared", task_type=None), batch()
    model.export_lora(tmp_path)
    lora = PeftModel.from_pretrained(build_classifier("llama"), tmp_path).eval()
    with torch.no_grad(), model.linearized(False):
        assert_equal(lora(**inputs).logits, model(**inputs).logits)


def test_question_answering_trains_its_head() -> None:
    settings = Qwen3Config(**TINY, num_hidden_layers=3, head_dim=8)
    model = get_peft_model(enlarge(Qwen3ForQuestionAnswering(settings)), config("dense", task_type="QUESTION_ANS"))
    start, end = torch.tensor([1, 2, 3]), torch.tensor([4, 3, 5])
    output = model(**batch(), start_positions=start, end_positions=end)
    losses = [
        nn.functional.cross_entropy(logits, target)
        for logits, target in ((output.start_logits, start), (output.end_logits, end))
    ]
    assert_equal(output.loss, sum(losses) / 2)
    assert model.peft_config["default"].modules_to_save == ["qa_outputs"]
    assert {name.rpartition(".")[0] for name in saved(model)} == {"qa_outputs"}


def test_dropout_behind_the_exit_is_an_ordinary_one() -> None:
    """Llama's token classifier has one in front of its head, on linearized values; in the blocks it is refused."""
    model = classifier("llama_tokens").train()
    model.get_base_model().dropout.p = 0.5
    first, second = model(**batch()).logits, model(**batch()).logits
    assert not torch.equal(first, second)
    first.sum().backward()
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**{**_BERT, "hidden_dropout_prob": 0.1}))
    drawn = get_peft_model(base, config("dense", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"drew random numbers.*dropout"):
        drawn.train()(**batch())


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_plain_trainer(name: str, tmp_path: Path) -> None:
    """transformers' own Trainer, with labels in the batch."""
    rows = [{"input_ids": [3 + 7 * (i % 2), 5, 7 + i], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    axis = TangentConfig(task_type="SEQ_CLS", r=4, num_layers=2)
    model = get_peft_model(build_classifier(name), axis)
    settings = {"max_steps": 8, "logging_steps": 1, "learning_rate": 2e-2, "per_device_train_batch_size": 8}
    settings |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=False, **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert any(p.any() for name, p in model.named_parameters() if "tangent_B" in name)


def test_reward_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]) -> None:
    """TRL's reward model is a classifier of one label; its loss is computed outside of the model."""
    settings = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    settings |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    trainer = RewardTrainer(
        model=build_classifier("llama", labels=1),
        args=RewardConfig(output_dir=str(tmp_path), dataloader_pin_memory=False, **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=TangentConfig(task_type="SEQ_CLS", r=4, num_layers=2),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
