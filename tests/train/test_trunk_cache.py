"""The trunk cache: the same loss and gradients, lower blocks that never run again, no row of another model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch, build
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer
from tangent_peft.train import trunk_cache
from tangent_peft.train.trunk_cache import TrunkCache, open_for_training


class CachedTrainer(TangentDPOTrainer):
    """As `TangentDPOConfig(trunk_cache=...)` makes it."""

    trunk: TrunkCache | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.trunk is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.trunk.apply(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)


def config(**options: Any) -> TangentConfig:
    return TangentConfig(**{"r": 4, "num_layers": 1, "task_type": "CAUSAL_LM", "init_weights": False, **options})


def wrapped(change: Callable[[Any], None] | None = None, dtype: torch.dtype = torch.float32, **kw: Any) -> PeftModel:
    base = build("llama").to(dtype)
    with torch.no_grad():
        if change is not None:
            change(base)
    return get_peft_model(base, config(**kw)).eval()


def count_lower_blocks(model: PeftModel) -> list[int]:
    calls: list[int] = []
    for block in model.get_base_model().model.layers[:2]:
        block.self_attn.register_forward_pre_hook(lambda *unused: calls.append(1))
    return calls


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]) -> Callable[..., Any]:
    def make(rows: list[dict[str, Any]] = pairs, dtype: torch.dtype = torch.float32, **options: Any) -> CachedTrainer:
        arguments = {
            **{"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "num_train_epochs": 2},
            **{"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False},
            **{"beta": 0.5, "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2},
        }
        torch.manual_seed(0)
        return CachedTrainer(
            model=build("llama").to(dtype),
            args=TangentDPOConfig(**{**arguments, **options}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=config(),
        )

    return make


def trained(trainer: CachedTrainer) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_two_epochs_equal_those_without(
    dtype: torch.dtype, tolerance: float, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """Weights after Adam, which divides rounding by rounding: gradients are compared in the next test."""
    expected_losses, expected = trained(make_trainer(dtype=dtype))
    trainer = make_trainer(dtype=dtype)
    trainer.trunk = open_for_training(tmp_path / "cache", trainer)
    calls = count_lower_blocks(trainer.model)
    losses, found = trained(trainer)
    assert not calls and trainer.trunk.hits == 4 and trainer.trunk.misses == 0
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    for name, weight in found.items():
        assert torch.allclose(weight, expected[name], atol=tolerance * 10), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_gradients_equal_those_without(
    dtype: torch.dtype, tolerance: float, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(dtype=dtype)
    inputs = next(iter(trainer.get_train_dataloader()))

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        trainer.model.train().zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    expected_loss, expected = gradients()
    trainer.trunk = open_for_training(tmp_path, trainer)
    loss, found = gradients()
    assert trainer.trunk.hits == 1 and set(found) == set(expected)
    assert abs(loss.item() - expected_loss.item()) <= tolerance
    for name, gradient in found.items():
        error = (gradient - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-3)
        assert error <= 10 * tolerance, name


def test_another_axis_and_another_form_reuse_it(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    first = open_for_training(tmp_path, make_trainer())
    trainer = make_trainer(axis="verb")
    trainer.model.add_adapter("all", config(num_layers=3))  # inactive, below as well
    calls = count_lower_blocks(trainer.model)
    second = open_for_training(tmp_path, trainer)
    probes = len(calls)
    assert second.folder == first.folder and second.store.keys == first.store.keys
    trainer.trunk = second
    trained(trainer)
    assert len(calls) == probes and second.misses == 0


def test_training_draws_the_same_random_numbers(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer()
    before = torch.get_rng_state()
    open_for_training(tmp_path, trainer)
    assert torch.equal(torch.get_rng_state(), before)


def test_iterable_data_is_refused(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"IterableDataset.*datasets\.Dataset"):
        open_for_training(tmp_path, trainer)


# ---- whose rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["embed_tokens", "layers.0.mlp.up_proj", "layers.1.input_layernorm"])
def test_one_changed_number_below_is_another_cache(where: str, tmp_path: Path) -> None:
    def change(base: Any) -> None:
        base.model.get_submodule(where).weight.view(-1)[-1] += 1e-6 if "norm" not in where else 1e-3

    first, second = TrunkCache(tmp_path, wrapped()), TrunkCache(tmp_path, wrapped(change, lm_head=False))
    first.build([batch()])
    assert second.folder != first.folder and second.folder.parent == first.folder.parent
    assert second.lookup(**batch()) is None and second.build([batch()]).rows == 3


def test_what_is_above_does_not_matter(tmp_path: Path) -> None:
    def change(base: Any) -> None:
        base.model.layers[2].mlp.up_proj.weight.mul_(2)
        base.model.norm.weight.mul_(2)

    options = {"modules_to_save": ["model.norm"], "lm_head": False, "r": None}
    same = [wrapped(), wrapped(change), wrapped(**options), wrapped(linearize=False)]
    assert len({TrunkCache(tmp_path, model).folder for model in same}) == 1


def test_first_block_dtype_and_autocast_are_part_of_the_key(tmp_path: Path) -> None:
    caches = [
        TrunkCache(tmp_path, wrapped()),
        TrunkCache(tmp_path, wrapped(num_layers=2)),
        TrunkCache(tmp_path, wrapped(dtype=torch.bfloat16)),
        TrunkCache(tmp_path, wrapped(), autocast=lambda: torch.autocast("cpu", torch.bfloat16)),
    ]
    assert len({cache.folder for cache in caches}) == 4


def test_changed_data_adds_its_rows_only(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, wrapped())
    assert cache.build([batch(), batch()]).rows == 3
    assert cache.build([batch()]).rows == 0
    other = batch()
    other["input_ids"][0, 3] += 1
    plan = cache.build([batch(), other])
    assert (plan.known, plan.rows, plan.tokens, plan.bytes) == (3, 1, 10, 10 * 32 * 4)


def test_rows_of_other_code_are_refused(tmp_path: Path) -> None:
    """Same weights, other numbers: a class that computes something else than when the cache was built."""
    TrunkCache(tmp_path, wrapped())
    model = wrapped()
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda m, args, out: out * 1.1)
    with pytest.raises(ValueError, match=r"differ by .*Delete that folder"):
        TrunkCache(tmp_path, model)


# ---- rows and padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_keep_their_dtype_and_are_zero_at_padding(dtype: torch.dtype, tmp_path: Path) -> None:
    model = wrapped(dtype=dtype)
    cache = TrunkCache(tmp_path, model)
    cache.build([batch()])
    wide = {name: torch.nn.functional.pad(x, (0, 3)) for name, x in batch().items()}
    hidden = TrunkCache(tmp_path, model).lookup(**wide)
    assert hidden.dtype == dtype and hidden.shape == (3, 13, 32)
    real = wide["attention_mask"].bool()
    expected = cache.trunk.hidden_states(**wide)[real]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    assert (hidden[real] - expected).abs().max() <= tolerance * expected.abs().max()
    assert not hidden[~real].any()
    stored = list(cache.folder.glob("rows-*.safetensors"))
    with safe_open(stored[0], framework="pt") as file:
        assert sorted(file.get_tensor(key).shape[0] for key in file.keys()) == [6, 8, 10]  # noqa: SIM118


def holes() -> dict[str, Tensor]:
    inputs = batch()
    inputs["attention_mask"][0, 4] = 0
    return inputs


UNUSABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "left padding": lambda: batch("left"),
    "holes": holes,
    "positions": lambda: {**batch(), "position_ids": torch.arange(10).expand(3, 10)},
    "images": lambda: {**batch(), "pixel_values": torch.zeros(3, 3, 4, 4)},
    "an empty row": lambda: {**batch(), "attention_mask": torch.tensor([[1] * 10, [1] * 10, [0] * 10])},
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_other_batches_run_as_usual(case: str, tmp_path: Path) -> None:
    model, inputs = wrapped(), UNUSABLE[case]()
    cache = TrunkCache(tmp_path, model)
    cache.build([batch()])
    calls = count_lower_blocks(model)
    with cache.apply(inputs) as skips:
        assert not skips
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    assert len(calls) == 2 and cache.misses == 1
    with pytest.raises(ValueError, match="No batch can use the trunk cache"):
        cache.build([inputs])


def test_missing_rows_run_as_usual_or_are_added(tmp_path: Path) -> None:
    model = wrapped()
    cache = TrunkCache(tmp_path, model)
    with cache.apply(batch()) as skips:
        assert not skips
    cache.add_missing = True
    calls = count_lower_blocks(model)
    for _ in range(2):
        with cache.apply(batch()) as skips:
            assert skips
    assert len(calls) == 2
    cache.flush()
    assert TrunkCache(tmp_path, model).lookup(**batch()) is not None


def test_a_changed_model_runs_as_usual_or_is_refused(tmp_path: Path) -> None:
    model = wrapped()
    model.add_adapter("all", config(num_layers=3))
    cache = TrunkCache(tmp_path, model)
    cache.build([batch()])
    with cache.apply(batch()) as skips:
        assert skips
    model.base_model.set_adapter("all", inference_mode=True)
    with cache.apply(batch()) as skips:
        assert not skips
    model.set_adapter("default")
    model.to(torch.float64)
    with cache.apply(batch()) as skips:
        assert not skips
    model.to(torch.float32)
    model.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight"), cache.apply(batch()):
        pass


# ---- the disk --------------------------------------------------------------------------------------------------------


def batches(count: int = 4) -> Iterator[dict[str, Tensor]]:
    for index in range(count):
        inputs = batch()
        inputs["input_ids"][:, 0] = 10 + index
        yield inputs


def test_an_interrupted_build_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_cache, "BUILD_TOKENS", 16)
    monkeypatch.setattr(trunk_cache, "SHARD_BYTES", 2000)
    model = wrapped()
    cache = TrunkCache(tmp_path, model)
    run, done = cache.trunk.hidden_states, []

    def failing(*args: Any) -> Tensor:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return run(*args)

    monkeypatch.setattr(cache.trunk, "hidden_states", failing)
    with pytest.raises(KeyboardInterrupt):
        cache.build(batches())
    again = TrunkCache(tmp_path, model)
    held = len(again.store.keys)
    assert 0 < held < 12
    plan = again.build(batches())
    assert plan.known == held and plan.rows == 12 - held
    assert all(again.lookup(**inputs) is not None for inputs in batches())


def test_a_file_that_is_cut_off_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = wrapped()
    cache = TrunkCache(tmp_path, model)
    cache.build([batch()])
    expected = cache.lookup(**batch()).clone()
    (path,) = cache.folder.glob("rows-*.safetensors")
    data = path.read_bytes()
    path.unlink()  # the first cache still maps it
    path.write_bytes(data[:-100])
    path.with_suffix(".safetensors.1.unfinished").write_bytes(data)
    again = TrunkCache(tmp_path, model)
    assert "damaged" in caplog.text and again.lookup(**batch()) is None
    again.build([batch()])
    assert torch.equal(again.lookup(**batch()), expected)
    assert torch.equal(TrunkCache(tmp_path, model).lookup(**batch()), expected)


def test_the_size_is_told_before_anything_is_computed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TrunkCache(tmp_path, wrapped(), max_bytes=1000)
    calls = count_lower_blocks(wrapped())
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=r"3072 bytes, max_bytes=1000"):
        cache.build([batch()])
    assert "3 sequences, 24 tokens × 32 × 4 bytes" in caplog.text
    assert not calls and not list(cache.folder.glob("rows-*"))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TrunkCache(tmp_path, wrapped())
    monkeypatch.setattr(trunk_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match="add 3072 bytes, 100 free"):
        cache.build([batch()])


def test_processes_build_their_shares(tmp_path: Path) -> None:
    caches = [TrunkCache(tmp_path, wrapped()) for _ in range(2)]
    for index, cache in enumerate(caches):
        cache.build(batches(), share=(index, 2))
    for cache in caches:
        assert len(cache.store.keys) in (6, 12)
        cache.store.refresh()
        assert all(cache.lookup(**inputs) is not None for inputs in batches())


def test_what_people_read(tmp_path: Path) -> None:
    for name in ("a", "b", "b"):
        cache = TrunkCache(tmp_path, wrapped(), notes={"data": name})
        cache.build(batches(2 if name == "a" else 4))
    meta = json.loads((cache.folder / "meta.json").read_text())
    assert (meta["rows"], meta["tokens"], meta["bytes"]) == (12, 96, 96 * 32 * 4)
    assert meta["notes"] == [{"data": "a"}, {"data": "b"}] and meta["first_wrapped_block"] == 2
