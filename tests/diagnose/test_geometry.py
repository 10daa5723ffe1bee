"""The geometry of axes against numpy and scipy on ΔW formed in the test, and planted spectra, subspaces and cosines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import config, tangent_layers
from conftest import build
from moe import build_moe
from peft import PeftModel, get_peft_model

from tangent_peft.diagnose.geometry.axes import axis_geometry
from tangent_peft.diagnose.geometry.places import place_of
from tangent_peft.diagnose.geometry.subspaces import Angles, Ranks, energy_rank, leading, principal_angles
from tangent_peft.tuner.weights import TangentFactors


def axes(name: str = "llama", **configs: Any) -> PeftModel:
    (first, options), *others = configs.items()
    base = build_moe("qwen3_moe") if name == "experts" else build(name)
    model = get_peft_model(base, config(**options), adapter_name=first).eval()
    for other, options in others:
        model.add_adapter(other, config(**options))
    return model


MIXED = {
    "help": {"form": "shared"},
    "verb": {"form": "shared"},
    "safe": {"form": "trained"},
    "full": {"form": "dense"},
}


def formed(model: PeftModel, axis: str) -> dict[str, np.ndarray]:
    """ΔW (out, in) in float64 by module."""
    return {
        layer.layer_name: layer.factors(axis, 1.0).product().detach().double().numpy()
        for layer in tangent_layers(model)
        if axis in layer.tangent_r
    }


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma: list[float], out: int, size: int, seed: int = 0) -> torch.Tensor:
    u = torch.linalg.qr(normal(seed, out, len(sigma)))[0]
    v = torch.linalg.qr(normal(seed + 1, size, len(sigma)))[0]
    return u * torch.tensor(sigma, dtype=torch.float64) @ v.mT


# ---- one matrix ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (40, 3)])
@pytest.mark.parametrize("form", ["dense", "low rank", "rank above a side"])
def test_values_and_directions_are_those_of_the_svd(
    shape: tuple[int, int], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangent_peft.diagnose.geometry.subspaces.DOUBLE_ENTRIES", 20)  # read in pieces
    r = {"low rank": 2, "rank above a side": 6}.get(form)
    whole = normal(0, *shape)
    factors = TangentFactors(dense=whole)
    if r is not None:
        factors = TangentFactors(b=normal(1, shape[0], r), a=normal(2, r, shape[1]))
        whole = factors.product()
    u, s, vh = np.linalg.svd(whole.numpy(), full_matrices=False)
    found = leading(factors, energy=0.8)
    assert found.values.numpy() == pytest.approx(s[: len(found.values)], rel=1e-9)
    k = int(np.sum(np.cumsum(s**2) < 0.8 * np.sum(s**2))) + 1
    assert found.left.shape == (shape[0], k) and found.right.shape == (shape[1], k)
    projectors = [(found.left, u[:, :k]), (found.right, vh[:k].T)]
    for basis, expected in projectors:
        assert (basis @ basis.mT).numpy() == pytest.approx(expected @ expected.T, abs=1e-9)
    assert leading(factors, 0.8, count=2).left.shape[1] == 2


def test_ranks_of_planted_spectra() -> None:
    flat = Ranks.of(torch.full((8,), 3.0, dtype=torch.float64), 0.5, 2)
    assert (flat.effective, flat.stable, flat.energy, flat.top) == pytest.approx((8.0, 8.0, 4, 1 / 8))
    assert flat.norm == pytest.approx(3.0 * math.sqrt(8)) and flat.values == [3.0, 3.0] and flat.possible == 8
    sigma = [4.0, 2.0, 1.0]
    found = leading(TangentFactors(dense=with_spectrum(sigma, 9, 6)), 0.9)
    shares = np.square(sigma) / 21.0
    ranks = Ranks.of(found.values, 0.9, 10)
    assert ranks.effective == pytest.approx(math.exp(-np.sum(shares * np.log(shares))))
    assert ranks.stable == pytest.approx(21 / 16) and ranks.energy == 2 and ranks.possible == 6
    assert energy_rank(found.values, 1.0 - 1e-9) == 3
    zero = Ranks.of(torch.zeros(4, dtype=torch.float64), 0.9, 4)
    assert zero.norm == 0.0 and math.isnan(zero.effective) and math.isnan(zero.stable) and zero.energy == 0


# ---- angles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_angles_are_those_of_scipy(k: int, m: int) -> None:
    x, y = (torch.linalg.qr(normal(seed, 12, size))[0] for seed, size in ((0, k), (1, m)))
    expected = np.sort(scipy.linalg.subspace_angles(x.numpy(), y.numpy()))
    assert principal_angles(x, y).numpy() == pytest.approx(expected, rel=1e-9)


def test_planted_angles_however_small() -> None:
    planted = torch.tensor([1e-12, 1e-6, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    basis = torch.linalg.qr(normal(0, 20, 10))[0]
    x, off = basis[:, :5], basis[:, 5:]
    y = x * planted.cos() + off * planted.sin()
    turn = torch.linalg.qr(normal(1, 5, 5))[0]
    assert principal_angles(x, y @ turn)[1:].tolist() == pytest.approx(planted[1:].tolist(), rel=1e-7)
    assert float(principal_angles(x, y @ turn)[0]) < 1e-11
    found = Angles.between(x, y, 20, 3)
    assert found.overlap == pytest.approx(float(planted.cos().square().mean()))
    assert found.angles == pytest.approx(torch.rad2deg(planted[:3]).tolist(), abs=1e-9)


def test_chance_is_what_random_subspaces_have() -> None:
    found = [
        Angles.between(torch.linalg.qr(normal(s, 30, 4))[0], torch.linalg.qr(normal(999 + s, 30, 7))[0], 30, 1)
        for s in range(100)
    ]
    assert found[0].chance == pytest.approx(7 / 30)
    assert np.mean([angles.overlap for angles in found]) == pytest.approx(7 / 30, rel=0.1)


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_pair_of_forms(name: str) -> None:
    model = axes(name, **MIXED)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "tangent_A" in parameter_name:
                parameter.add_(torch.randn_like(parameter) / 10)  # it starts as the shared projection
    found = axis_geometry(model, energy=0.95)
    assert found.axes == list(MIXED)
    deltas = {axis: formed(model, axis) for axis in MIXED}
    vectors = np.stack([np.concatenate([delta.ravel() for delta in deltas[axis].values()]) for axis in MIXED])
    norms = np.linalg.norm(vectors, axis=1)
    assert np.array(found.cosines) == pytest.approx(vectors @ vectors.T / np.outer(norms, norms), abs=1e-6)
    assert len(found.modules) == 4 * len(deltas["help"]) and len(found.pairs) == 6 * len(deltas["help"])
    for m in found.modules:
        s = np.linalg.svd(deltas[m.axis][m.place.name], compute_uv=False)
        assert m.ranks.norm == pytest.approx(np.linalg.norm(s), rel=1e-5)
        assert m.ranks.values == pytest.approx(s[: len(m.ranks.values)], rel=1e-4, abs=1e-5 * s[0])
        assert m.shape == deltas[m.axis][m.place.name].shape
        assert m.form == ("dense" if m.axis == "full" else "low rank")
    for p in found.pairs:
        x, y = deltas[p.first][p.place.name], deltas[p.second][p.place.name]
        assert p.cosine == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
        (u, _, uh), (v, _, vh) = np.linalg.svd(x), np.linalg.svd(y)
        (j, k), (n, m_) = p.columns.dimensions, p.rows.dimensions
        columns = np.sort(np.rad2deg(scipy.linalg.subspace_angles(u[:, :j], v[:, :k])))
        assert p.columns.angles == pytest.approx(columns[: len(p.columns.angles)], abs=0.05)
        rows = np.sort(np.rad2deg(scipy.linalg.subspace_angles(uh[:n].T, vh[:m_].T)))
        assert p.rows.angles == pytest.approx(rows[: len(p.rows.angles)], abs=0.05)
        assert p.shared_rows == ({p.first, p.second} == {"help", "verb"})


def test_ranks_of_an_axis_are_those_of_the_block_diagonal_matrix() -> None:
    model = axes(help={"form": "dense"})
    s = np.linalg.svd(scipy.linalg.block_diag(*formed(model, "help").values()), compute_uv=False)
    shares = s[s > 0] ** 2 / np.sum(s**2)
    found = axis_geometry(model).ranks[0]
    assert found.norm == pytest.approx(np.linalg.norm(s))
    assert found.stable == pytest.approx(np.sum(s**2) / s[0] ** 2, rel=1e-5)
    assert found.effective == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)
    assert found.energy == int(np.sum(np.cumsum(shares) < 0.9)) + 1


def test_shared_rows_coincide_and_have_a_chance_of_their_own() -> None:
    found = axis_geometry(axes(help={"form": "shared"}, verb={"form": "shared"}), directions=4)
    assert all(p.shared_rows and p.rows.overlap == pytest.approx(1.0) == p.rows.chance for p in found.pairs)
    assert all(p.columns.overlap < 0.9 for p in found.pairs)
    assert "coincide by construction" in str(found)
    apart = axis_geometry(axes(help={"form": "shared"}, verb={"form": "shared", "projection_seed": 7}))
    assert not any(p.shared_rows for p in apart.pairs) and "coincide by construction" not in str(apart)


def test_each_expert_is_a_matrix() -> None:
    options = {"target_modules": [], "target_parameters": ["experts.down_proj"], "lm_head": False, "num_layers": 1}
    model = axes("experts", help={"form": "shared", **options}, verb={"form": "dense", **options})
    found = axis_geometry(model)
    names = [m.place.name for m in found.modules if m.axis == "help"]
    assert len(names) == 4 and names[2].endswith("experts.down_proj[2]")
    (delta,) = formed(model, "verb").values()
    for index, m in enumerate(m for m in found.modules if m.axis == "verb"):
        assert m.ranks.norm == pytest.approx(np.linalg.norm(delta[index]))
    assert found.ranks[1].norm == pytest.approx(np.linalg.norm(delta))
    cells = {(p.place.kind, p.place.block) for p in found.pairs}
    assert len(cells) == 1


def test_an_embedding() -> None:
    options = {"target_modules": ["embed_tokens"], "lm_head": False}
    model = axes(help={"form": "dense", **options}, verb={"form": "shared", **options})
    found = axis_geometry(model)
    assert found.modules[0].shape == (32, 300) and found.pairs[0].place.block is None
    (delta,) = formed(model, "help").values()
    assert found.ranks[0].stable == pytest.approx(np.sum(delta**2) / np.linalg.norm(delta, 2) ** 2, rel=1e-6)


def test_modules_that_only_one_axis_has() -> None:
    model = axes(
        help={"form": "shared", "target_modules": ["q_proj"], "lm_head": False},
        verb={"form": "shared", "target_modules": ["k_proj"], "lm_head": False},
    )
    found = axis_geometry(model)
    assert found.pairs == [] and found.cosines[0][1] == 0.0 and len(found.modules) == 4
    assert found.verdicts()[0].finding == "fine" and "no module carries both" in found.verdicts()[0].text


# ---- verdicts, bad input, files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "finding", "word"),
    [
        ({"verb": 1.0}, "fine", "arXiv 2608.09490"),
        ({"help": 1.0, "verb": 1.0}, "warning", "the same way"),
        ({"help": -1.0, "verb": 1.0}, "warning", "against each other"),
    ],
)
def test_flags_a_cosine_beyond_the_limit_of_either_sign(mix: dict[str, float], finding: str, word: str) -> None:
    model = axes(help={"form": "shared"}, verb={"form": "shared"})
    model.combine_axes(mix, "other")
    found = axis_geometry(model, ["help", "other"])
    (verdict,) = found.verdicts()
    assert verdict.finding == finding and word in verdict.text
    assert (abs(found.cosines[0][1]) > 0.3) == (finding == "warning")


def test_an_axis_that_is_zero() -> None:
    model = axes(help={"form": "dense"}, verb={"form": "shared", "init_weights": True})
    found = axis_geometry(model)
    assert math.isnan(found.cosines[0][1]) and found.cosines[0][0] == pytest.approx(1.0)
    assert found.ranks[1].norm == 0.0 and math.isnan(found.ranks[1].effective)
    assert all(math.isnan(p.cosine) and math.isnan(p.columns.overlap) for p in found.pairs)
    assert found.verdicts()[0].finding == "unknown" and "τ = 0" in found.verdicts()[0].text


def test_refuses() -> None:
    model = axes(help={"form": "shared"}, verb={"form": "dense"})
    with pytest.raises(ValueError, match="Unknown axis 'safe'"):
        axis_geometry(model, ["help", "safe"])
    with pytest.raises(ValueError, match="one twice"):
        axis_geometry(model, ["help", "help"])
    with pytest.raises(ValueError, match="energy=0"):
        axis_geometry(model, energy=0.0)
    with pytest.raises(ValueError, match="directions=0"):
        axis_geometry(model, directions=0)
    with pytest.raises(TypeError, match="PeftModel"):
        axis_geometry(build("llama"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "tangent_delta" in n)[0, 0] = math.inf
    with pytest.raises(ValueError, match="Axis 'verb' has a tangent with NaN or infinite"):
        axis_geometry(model)


def test_places() -> None:
    name = "model.layers.12.self_attn.q_proj"
    place = place_of(name)
    assert (place.kind, place.block, place.name) == ("self_attn.q_proj", 12, name)
    assert place_of("lm_head").block is None and place_of("lm_head").kind == "lm_head"
    expert = place_of("model.layers.0.mlp.experts.down_proj", 3)
    assert expert.name.endswith("down_proj[3]") and expert.kind == "mlp.experts.down_proj"
    assert place_of("vision.layers.0.fc1", several=True).kind == "vision.layers: fc1"


def test_one_axis_has_no_pairs_and_draws(tmp_path: Path) -> None:
    found = axis_geometry(axes(help={"form": "shared", "target_modules": ["q_proj"]}))
    assert found.pairs == [] and found.verdicts() == [] and len(found.tables()) == 1
    assert [file.stem for file in found.plot(tmp_path)] == ["geometry_modules", "geometry_spectra"]


def test_prints_saves_and_draws(tmp_path: Path) -> None:
    few: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
    configs = {"help": {"form": "shared"}, "verb": {"form": "dense"}, "zero": {"init_weights": True}}
    found = axis_geometry(axes(**{axis: {**options, **few} for axis, options in configs.items()}))
    text = str(found)
    assert "help – verb" in text and "self_attn.q_proj" in text and "lm_head" in text
    found.save(tmp_path / "out.json")
    saved = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert saved["cosines"][0][1] == found.cosines[0][1] and saved["cosines"][0][2] is None
    assert saved["pairs"][0]["columns"]["overlap"] == found.pairs[0].columns.overlap
    files = found.plot(tmp_path / "figures")
    expected = ["geometry_modules", "geometry_spectra", "geometry_cosines", "geometry_overlaps"]
    assert [file.stem for file in files] == expected
    assert all(file.stat().st_size > 5000 and file.with_suffix(".svg").is_file() for file in files)
