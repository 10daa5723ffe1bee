"""What all diagnoses stand on: states of a model, its layers, batches, moments, spectra, spools, results."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import build
from peft import LoraConfig, get_peft_model
from strong_axes import two_axes

from tangent_peft.diagnose import Diagnosis, ModelState, Moments, Spectrum, Table, Verdict
from tangent_peft.diagnose.activations import check_layer, decoder_blocks, layer_states, layer_tangents, row_means
from tangent_peft.diagnose.prompts import answer_batches, prompt_batches
from tangent_peft.diagnose.spool import Spool
from tangent_peft.diagnose.states import check_comparable, check_same_tokenizer


PAIR = {"prompt": "Is it", "chosen": " yes", "rejected": " no, it is not"}


def inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_layers_are_those_of_transformers_before_the_final_norm(name: str) -> None:
    root, (batch, keep) = build(name), inputs()
    with torch.no_grad():
        expected = root(**batch, output_hidden_states=True).hidden_states
    found = layer_states(root, batch, keep)
    assert found.shape == (len(decoder_blocks(root)) + 1, int(keep.sum()), 32)
    for layer, states in enumerate(expected[:-1]):
        torch.testing.assert_close(found[layer], states[keep])
    norm = root.base_model.norm if name != "gpt2" else root.base_model.ln_f
    torch.testing.assert_close(norm(found[-1]), expected[-1][keep])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_tangents_of_layers_are_directional_derivatives(name: str) -> None:
    model, (batch, keep) = two_axes(build(name).double()), inputs()
    with ModelState.mix(model, {"help": 1.0}, linearized=True).active() as root:
        primal, tangent = layer_tangents(root, batch, keep)
        joined = layer_states(root, batch, keep)
    step = 1e-4
    sides = []
    for weight in (step, -step):
        with ModelState.mix(model, {"help": weight}, linearized=False).active() as root:
            sides.append(layer_states(root, batch, keep))
    with ModelState.base(model).active() as root:
        torch.testing.assert_close(primal, layer_states(root, batch, keep))
    torch.testing.assert_close(joined, primal + tangent)
    assert float(tangent[0].abs().max()) == 0.0
    difference = (sides[0] - sides[1])[-1] / (2 * step)
    torch.testing.assert_close(tangent[-1], difference, rtol=1e-2, atol=1e-2 * float(tangent[-1].abs().max()))


def test_a_base_state_has_no_adapter_of_any_kind() -> None:
    root, (batch, keep) = build("llama"), inputs()
    expected = layer_states(root, batch, keep)
    model = get_peft_model(root, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    with ModelState.base(model).active() as found:
        torch.testing.assert_close(layer_states(found, batch, keep), expected)
    with ModelState.plain(model, "lora").active() as found:
        assert float((layer_states(found, batch, keep) - expected).abs().max()) > 1e-3


def test_a_state_leaves_the_model_as_it_was() -> None:
    model = two_axes(build("llama")).train()
    model.combine_axes({"help": 0.5})
    with pytest.raises(RuntimeError, match="inside"), ModelState.mix(model, {"verb": 2.0}, linearized=False).active():
        assert not model.training
        assert model.axis_weights == {"verb": 2.0}
        raise RuntimeError("inside")
    assert model.training and model.axis_weights == {"help": 0.5}
    assert not decoder_blocks(ModelState.base(model).root)[0]._forward_hooks


def test_rows_are_averaged_over_their_own_positions() -> None:
    keep = torch.tensor([[True, False, True], [False, True, False]])
    states = torch.arange(12.0).reshape(2, 3, 2)
    expected = torch.stack([(states[:, 0] + states[:, 1]) / 2, states[:, 2]], 1)
    torch.testing.assert_close(row_means(states, keep), expected)
    with pytest.raises(ValueError, match="Row 0 of the batch has no position"):
        row_means(states[:, :0], torch.zeros(1, 3, dtype=torch.bool))


def test_layers_are_counted_from_either_end() -> None:
    assert [check_layer(index, 30) for index in (0, 30, -1, -31)] == [0, 30, 30, 0]
    for index in (31, -32):
        with pytest.raises(IndexError, match=f"Layer {index} is out of range"):
            check_layer(index, 30)


# ---- what can be compared --------------------------------------------------------------------------------------------


def test_models_of_other_architecture_are_refused() -> None:
    llama, gpt2 = ModelState.plain(build("llama"), "one"), ModelState.plain(build("gpt2"), "other")
    check_comparable(llama, ModelState.base(two_axes(build("llama"))))
    with pytest.raises(ValueError, match="class LlamaForCausalLM and GPT2LMHeadModel"):
        check_comparable(llama, gpt2)


def test_tokenizers_that_differ_are_refused(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    check_same_tokenizer(tokenizer, other)
    other.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="chat templates"):
        check_same_tokenizer(tokenizer, other)
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="differ in 1 tokens, for example '<new>'"):
        check_same_tokenizer(tokenizer, other)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="'mine' is a Linear"):
        _ = ModelState.plain(torch.nn.Linear(2, 2), "mine").root


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_the_last_token_of_each_prompt_is_kept(tokenizer: Any) -> None:
    prompts = ["How do I boil an egg?", "Name a color.", "What is rain?"]
    batches = list(prompt_batches(tokenizer, prompts, 2))
    assert [batch.rows for batch in batches] == [2, 1]
    for batch in batches:
        assert batch.keep.sum(1).tolist() == [1] * batch.rows
        last = batch.inputs["attention_mask"].sum(1) - 1
        assert batch.keep[torch.arange(batch.rows), last].all()
    with pytest.raises(ValueError, match="No prompts are given"):
        list(prompt_batches(tokenizer, [], 2))


def test_the_tokens_of_an_answer_are_kept(tokenizer: Any) -> None:
    (batch,) = answer_batches(tokenizer, [PAIR], 4)
    whole, prompt = (tokenizer(text)["input_ids"] for text in ("Is it yes", "Is it"))
    kept = batch.inputs["input_ids"][batch.keep].tolist()
    assert kept[: len(whole) - len(prompt)] == whole[len(prompt) :]
    (before,) = answer_batches(tokenizer, [PAIR, PAIR], 4, keep="predicting")
    assert not before.keep[:, -1].any() and before.keep.sum() == 2 * batch.keep.sum()
    assert before.inputs["input_ids"][:, 1:][before.keep[:, :-1]].tolist() == 2 * kept
    (other,) = answer_batches(tokenizer, [PAIR], 4, answer="rejected", keep="all")
    assert other.keep.all()
    rejected = tokenizer("Is it no, it is not")["input_ids"]
    assert other.inputs["input_ids"][0].tolist()[: len(rejected)] == rejected
    with pytest.raises(ValueError, match="The rejected answer of pair 1 is empty"):
        list(answer_batches(tokenizer, [PAIR, {**PAIR, "rejected": "  "}], 4))


# ---- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_moments_are_those_of_the_whole_matrix(centred: bool) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 2
    moments = Moments(6)
    for part in x.split(7):
        moments.add(part)
    expected = x.double().numpy() - (x.double().numpy().mean(0) if centred else 0)
    values, vectors = moments.principal(centred)
    np.testing.assert_allclose(values, np.linalg.svd(expected, compute_uv=False), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(expected @ vectors.numpy(), axis=0), values, rtol=1e-9)
    np.testing.assert_allclose(moments.mean, x.double().mean(0))


def test_moments_of_few_vectors_have_few_singular_values() -> None:
    moments = Moments(5)
    moments.add(torch.eye(5)[:2])
    assert moments.singular_values().tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        moments.add(torch.full((1, 5), math.inf))


def test_a_spectrum_in_closed_form() -> None:
    flat, single = Spectrum.of([2.0] * 8), Spectrum.of([3.0])
    assert flat.effective_rank == pytest.approx(8) and flat.normalized_entropy == pytest.approx(1)
    assert (single.ratio, single.entropy, single.effective_rank, single.top_energy) == (0, 0, 1, 1)
    two = Spectrum.of([1.0, 3.0])
    assert two.values == [3.0, 1.0] and two.ratio == pytest.approx(1 / 3) and two.top_energy == pytest.approx(0.9)
    assert two.entropy == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert Spectrum.of([1.0, 3.0], power=1).entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert (two.rank(0.3), two.rank(0.4)) == (2, 1)
    assert math.isnan(Spectrum.of([0.0, 0.0]).effective_rank)
    with pytest.raises(ValueError, match="finite and not negative"):
        Spectrum.of([1.0, -1.0])
    with pytest.raises(ValueError, match="`power` is 3"):
        Spectrum.of([1.0], power=3)


def test_a_spool_gives_back_its_rows() -> None:
    rows = torch.randn(10, 2, 3)
    with Spool((2, 3)) as spool:
        assert spool.array().shape == (0, 2, 3)
        for part in rows.split(4):
            spool.append(part)
        np.testing.assert_array_equal(spool.array(), rows.numpy())
        torch.testing.assert_close(torch.cat(list(spool.chunks(3))), rows)
        with pytest.raises(ValueError, match="do not go with"):
            spool.append(torch.zeros(1, 3, 2))


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample(Diagnosis):
    title: ClassVar[str] = "A sample"
    numbers: dict[str, float]
    spectrum: Spectrum

    def tables(self) -> list[Table]:
        return [
            Table("Numbers", ["name", "value"], [[name, value] for name, value in self.numbers.items()], "Read it.")
        ]

    def verdicts(self) -> list[Verdict]:
        return [Verdict("warning", "b has no value: too few prompts.")]

    def plot(self, folder: str | Path) -> list[Path]:
        return []


def test_a_diagnosis_prints_and_saves(tmp_path: Path) -> None:
    sample = Sample({"a": 1.23456, "b": math.nan}, Spectrum.of([1.0]))
    text = str(sample)
    assert text.splitlines()[0] == "A sample" and "[warning] b has no value" in text
    assert [line.split() for line in text.splitlines() if line.startswith("  ")][1:] == [["a", "1.235"], ["b", "–"]]
    sample.save(tmp_path / "deep" / "sample.json")
    held = json.loads((tmp_path / "deep" / "sample.json").read_text(encoding="utf-8"))
    assert held["numbers"] == {"a": 1.23456, "b": None}
    assert held["verdicts"] == [{"finding": "warning", "text": "b has no value: too few prompts."}]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sample.json"]
