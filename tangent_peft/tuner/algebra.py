"""The geometry of axes: inner products, norms, and the part of an axis that is orthogonal to others.

⟨τᵢ, τⱼ⟩ is the Frobenius inner product of ΔWᵢ and ΔWⱼ, at λ = 1, summed over the layers in float64; `weights.py` has
that of one layer. A layer that only one of two axes wraps adds nothing: the other's ΔW is zero there. Nothing here
knows of λ, of what is active, or of modules that an axis keeps (`modules_to_save`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tangent_peft.forward import gathered, whole
from tangent_peft.tuner.axes import tangent_layers
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.weights import TangentFactors


def axis_norm(model: nn.Module, axis: str) -> float:
    """‖τ‖: the Frobenius norm of an axis's ΔW over all wrapped layers, at λ = 1; all processes of a sharded model.

    Args:
        model: the wrapped model.
        axis: name of the axis.

    Returns:
        The norm; NaN for a tangent with NaN entries.

    Raises:
        ValueError: for an unknown axis.
    """
    return math.sqrt(float(_gram(model, [axis])[0, 0]))


def axis_inner(model: nn.Module, first: str, second: str) -> float:
    """⟨τ₁, τ₂⟩: the Frobenius inner product of two axes' ΔW over all wrapped layers, at λ = 1.

    Args:
        model: the wrapped model; all processes of a sharded one call this together.
        first: name of an axis, of any form, rank and projection.
        second: name of another axis, or the same.

    Raises:
        ValueError: for an unknown axis, or a tangent that is not finite.
    """
    return float(axis_gram(model, [first, second])[0, 1])


def axis_gram(model: nn.Module, names: Sequence[str], cosine: bool = False) -> Tensor:
    """The inner products of several axes with each other.

    Args:
        model: the wrapped model; all processes of a sharded one call this together.
        names: the K axes.
        cosine: divide by the norms: ⟨τᵢ, τⱼ⟩ / (‖τᵢ‖ ‖τⱼ‖).

    Returns:
        G (K, K) in float64 on the CPU, symmetric, in the order of `names`.

    Raises:
        ValueError: for an unknown axis, a tangent that is not finite, or, with `cosine`, one that is zero.
    """
    chosen = _as_list(names)
    gram = _gram(model, chosen)
    for index, name in enumerate(chosen):
        if not math.isfinite(gram[index, index]):
            raise ValueError(
                f"Axis {name!r} has a tangent with NaN or infinite entries. Its training broke down or its file is "
                "damaged; load a checkpoint from before, or leave the axis out."
            )
    return _cosines(gram, chosen) if cosine else gram


def _cosines(gram: Tensor, names: Sequence[str]) -> Tensor:
    norms = gram.diagonal().sqrt()
    zero = [name for name, norm in zip(names, norms.tolist(), strict=True) if norm == 0.0]
    if zero:
        raise ValueError(f"Axes {zero} have τ = 0 and thus no direction. Train them, or leave them out.")
    return gram / norms / norms[:, None]


def orthogonal_weights(model: nn.Module, name: str, against: str | Sequence[str]) -> dict[str, float]:
    """The mix τ − Σ cⱼ τⱼ that is orthogonal to every τⱼ: the projection of an axis off the span of others.

    c solves the normal equations G c = (⟨τⱼ, τ⟩)ⱼ of the least-squares problem min ‖τ − Σ cⱼ τⱼ‖, with G the Gram
    matrix of the τⱼ.

    Args:
        model: the wrapped model.
        name: the axis to project.
        against: the axes whose components are taken out, one or several.

    Returns:
        λ by axis: 1 for `name`, −cⱼ for the others.

    Raises:
        ValueError: for an unknown axis, one named twice, none to project off, axes that are linearly dependent up to
            the rounding of their dtype (they are named), or an axis of which nothing is left.
    """
    others = _as_list(against)
    twice = sorted({other for other in others if other == name or others.count(other) > 1})
    if twice or not others:
        raise ValueError(f"`against={others}` names axes other than {name!r} itself, at least one and each one once.")
    gram = axis_gram(model, [*others, name])
    cosines, epsilon = _cosines(gram, [*others, name]), _epsilon(model, [*others, name])
    within, along = cosines[:-1, :-1], cosines[:-1, -1]
    values, vectors = torch.linalg.eigh(within)
    if float(values[0]) < epsilon:
        dependent = [other for other, part in zip(others, vectors[:, 0].tolist(), strict=True) if abs(part) > 1e-3]
        raise ValueError(
            f"Axes {dependent} are linearly dependent (their cosines have the eigenvalue {float(values[0]):.1e}), so "
            "the part of an axis along each of them is not defined. Leave one of them out of `against`; their span "
            "stays the same."
        )
    parts = torch.linalg.solve(within, along)
    left = 1.0 - float(along @ parts)
    if left < epsilon:
        raise ValueError(
            f"Axis {name!r} lies in the span of {others}: nothing but rounding would be left of it (a share of "
            f"{max(left, 0.0):.1e} of its ‖τ‖²). Leave out an axis that it was made of."
        )
    norms = gram.diagonal().sqrt()
    coefficients = (parts * norms[-1] / norms[:-1]).tolist()
    return {name: 1.0, **{other: -c for other, c in zip(others, coefficients, strict=True)}}


def _epsilon(model: nn.Module, names: Sequence[str]) -> float:
    """Rounding of the least precise of these tangents, or of the Gram matrix if that is coarser."""
    leaves = [leaf for layer in tangent_layers(model) for name in names for leaf in layer.leaves(name)]
    coarsest = max(torch.finfo(parameter.dtype).eps for leaf in leaves for parameter in leaf.parameters())
    return max(coarsest, len(names) * 1e-14)


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _known(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for layer in tangent_layers(model) for name in layer.tangent_r))


# ---- the sum over layers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_factors(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[TangentLayer, dict[str, TangentFactors]]]:
    """Each wrapped layer with the tangents, at λ = 1, that some axes have there; one layer in memory at a time.

    Args:
        model: the wrapped model; all processes of a sharded one go through all layers together.
        names: the axes.

    Returns:
        Layers in the model's order, without those that none of the axes wraps; tangents whole where an engine shards
        them, for as long as the layer is the current one.

    Raises:
        ValueError: for an unknown axis.
    """
    known = _known(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"Unknown axis {unknown[0]!r}; this model has {sorted(known)}. Load it first with "
            f"`model.load_adapter(path, adapter_name={unknown[0]!r})`."
        )
    for layer in tangent_layers(model):
        present = [name for name in dict.fromkeys(names) if name in layer.tangent_r]
        if present:
            with gathered(
                parameter for name in present for leaf in layer.leaves(name) for parameter in leaf.parameters()
            ):
                yield layer, {name: _whole(layer.factors(name, 1.0)) for name in present}


@torch.no_grad()
def _gram(model: nn.Module, names: Sequence[str]) -> Tensor:
    gram = torch.zeros(len(names), len(names), dtype=torch.float64)
    for _, factors in layer_factors(model, names):
        present = [index for index, name in enumerate(names) if name in factors]
        gram[torch.tensor(present)[:, None], present] += _layer_gram([factors[names[index]] for index in present])
    return gram


def _layer_gram(factors: Sequence[TangentFactors]) -> Tensor:
    """The inner products at one layer (K, K), on the CPU."""
    gram = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    for i, x in enumerate(factors):
        for j, y in enumerate(factors[: i + 1]):
            gram[i, j] = gram[j, i] = x.inner(y).item()
    return gram


def _whole(factors: TangentFactors) -> TangentFactors:
    return TangentFactors(**{name: None if x is None else whole(x) for name, x in vars(factors).items()})
