"""The trunk of a model: everything below the first block that carries a tangent.

The trunk is a frozen ordinary network, so what it sends to that block, the *entry*, is a function of the tokens alone.
`Trunk` runs the trunk without the rest (`hidden_states`), and the rest without the trunk (`skipped`), after it has
verified on a few tokens that the model can be cut there: that it is causal, reads no padding, draws no random numbers
below the entry, and hands nothing to the upper blocks past the hidden states.

This file knows torch and transformers, and modules that carry tangents. It knows no disk, no trainer, and not PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, PreTrainedModel

from tangent_peft.forward.carrier import TangentCarrier
from tangent_peft.forward.level import autocast_dtype, carries_tangent
from tangent_peft.forward.mode import evaluating, mode


# Far above rounding, far below what a wrong cut does; relative, per token.
PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
PROBE_LENGTH, PROBE_PREFIX = 8, 5  # tokens of the probe's first row, and how many of them its padded second row keeps
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings that change with the longest row of the batch

Autocast = Callable[[], AbstractContextManager[Any]]


class _EntryReached(Exception):
    """The forward has come to the entry."""


class Trunk:
    """The frozen part of `root` below its first block with a tangent, verified to be separable.

    Args:
        root: the model whose call is one forward pass.
        blocks: its list of blocks.
        autocast: makes the context in which the model trains; none by default.

    Attributes:
        first: index of the entry, the first block with an active tangent; the last block if only the head has one.
        hidden_size: D of the hidden states (B, T, D) that enter it.
        dtype: their dtype.
        autocast_dtype: dtype of `autocast` on the model's device, `None` without.
        probe: the hidden states (T, D) of a fixed row of tokens, by which two trunks can be compared.

    Raises:
        ValueError: if there is no active tangent, no block below it, or the model can not be cut there; the message
            says why.
    """

    def __init__(self, root: PreTrainedModel, blocks: nn.ModuleList, autocast: Autocast = nullcontext) -> None:
        self.root, self.blocks, self.autocast = root, blocks, autocast
        refuse_configuration(root)
        self.first = _first_carrier(blocks, root)
        self.entry = blocks[self.first]
        self._outputs: list[int | None] = [None] * self.first  # length of the tuple a block returns; None: a tensor
        with self.autocast():
            self.autocast_dtype = autocast_dtype(self.device.type)
        self._weight_dtype = self._first_weight().dtype
        ids, mask = self._probe_rows()
        output, hidden, names = self._observe(ids, mask)
        self.below = names
        if carriers := self.carries():
            raise ValueError(
                f"{carriers} carry a tangent below the blocks. Exclude them (`exclude_modules`). Or: {_OFF}"
            )
        self.hidden_size, self.dtype = hidden.shape[-1], hidden.dtype
        self.probe = hidden[0].cpu()
        self._check_rows(ids, hidden)
        self._check_trainingmode(ids, mask, hidden)
        self._check_skipped(ids, mask, hidden, output)

    # ---- running a part ----------------------------------------------------------------------------------------

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The hidden states (B, T, D) that enter the entry, in eval mode; no block from the entry on runs.

        Args:
            input_ids: tokens (B, T), on the model's device.
            attention_mask: ones at real tokens (B, T).
        """
        with evaluating(self.root):
            return self._run_below(input_ids, attention_mask)

    @torch.no_grad()
    def _run_below(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        caught: list[Tensor] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(_entering(args, kwargs).detach())
            raise _EntryReached

        handle = self.entry.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        backbone: Any = self.root.base_model  # not the root: its call would open a linearized pass
        try:
            with self.autocast():
                backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _EntryReached:
            return caught[0]
        finally:
            handle.remove()
        raise RuntimeError(f"The forward of {type(backbone).__name__} ended without calling block {self.first}.")

    @contextmanager
    def skipped(self, hidden_BTD: Tensor) -> Iterator[None]:
        """Makes each forward inside the `with` block start at the entry, with these hidden states (B, T, D).

        The blocks below stay in the model's list and pass their input on, so that masks chosen by a block's index
        remain what they are. All is as before after the block, also after an exception.

        Raises:
            ValueError: by the forward, if its batch has another shape, it fills a key/value cache, or it runs under
                another autocast than the trunk did.
        """

        def feed(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            self._check_entry(hidden_BTD, args, kwargs)
            incoming = _entering(args, kwargs)
            # As without the cache where `enable_input_require_grads` makes them a leaf that requires gradients.
            hidden = hidden_BTD.to(incoming.device).detach().requires_grad_(incoming.requires_grad)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        lower = list(self.blocks[: self.first])
        before = [(vars(block), vars(block).get("forward")) for block in lower]
        handle = self.entry.register_forward_pre_hook(feed, with_kwargs=True)
        try:
            for block, length in zip(lower, self._outputs, strict=True):
                vars(block)["forward"] = _pass_on(length)
            yield
        finally:
            handle.remove()
            for attributes, forward in before:
                attributes.pop("forward", None)
                if forward is not None:
                    attributes["forward"] = forward

    def _check_entry(self, hidden_BTD: Tensor, args: Any, kwargs: Any) -> None:
        incoming = _entering(args, kwargs)
        if incoming.shape != hidden_BTD.shape:
            raise ValueError(
                f"The forward has hidden states of shape {tuple(incoming.shape)} and those given to start from are "
                f"{tuple(hidden_BTD.shape)}. Look up the batch that the model is called with."
            )
        if carries_tangent(incoming):
            raise ValueError(f"A tangent is born below block {self.first}; the trunk is not frozen. Do not skip it.")
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ValueError("A key/value cache was given, which skipped blocks do not fill. Pass `use_cache=False`.")
        found = autocast_dtype(incoming.device.type)
        if found != self.autocast_dtype:
            raise ValueError(
                f"The forward runs under autocast to {found} and the trunk ran under {self.autocast_dtype}. Open the "
                "trunk with the `autocast` of the training."
            )

    # ---- what the trunk consists of ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model's tokens go."""
        return self._first_weight().device

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every saved tensor and buffer below the entry, tied ones too; `ValueError` if one is sharded."""
        modules = dict(self.root.named_modules())
        tensors = dict(self.root.state_dict())
        for name, module in self._modules_below():
            tensors.update((f"{name}.{key}", buffer) for key, buffer in module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            owner = name
            while owner and owner not in modules:
                owner = owner.rpartition(".")[0]
            if owner not in self.below or not isinstance(tensor, Tensor):
                continue
            if tensor.is_meta or tensor.numel() == 0 or is_traceable_wrapper_subclass(tensor):
                raise ValueError(
                    f"{name!r} can not be read here: it is sharded, on the meta device, or quantized inside a wrapper. "
                    f"Nobody could tell whose hidden states a cache holds. {_OFF}"
                )
            yield name, tensor

    def check_frozen(self) -> None:
        """Raises a `ValueError` that names a parameter below the entry, if one trains."""
        named = ((name, module.named_parameters(recurse=False)) for name, module in self._modules_below())
        moving = [f"{name}.{key}" for name, parameters in named for key, p in parameters if p.requires_grad]
        if moving:
            raise ValueError(
                f"{len(moving)} parameters below block {self.first} train, for example {moving[0]!r}, so its hidden "
                "states change at every step. Take them out of `modules_to_save` and freeze them, or train without a "
                "trunk cache."
            )

    def carries(self) -> list[str]:
        """Names of the modules below the entry that have an active tangent, or ΔW, by now."""
        return [name for name, module in self._modules_below() if _is_active(module)]

    def _modules_below(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, module) for name, module in self.root.named_modules() if name in self.below)

    def is_recast(self) -> bool:
        """Whether the weights have another dtype than they had when the trunk was verified."""
        return self._first_weight().dtype != self._weight_dtype

    def _first_weight(self) -> Tensor:
        embedding: Any = self.root.get_input_embeddings()
        return next(embedding.parameters())

    # ---- the probe ---------------------------------------------------------------------------------------------

    def _probe_rows(self) -> tuple[Tensor, Tensor]:
        """Tokens and mask (2, 8): a row, and its first five tokens followed by other, masked ones."""
        vocabulary = self.root.config.get_text_config().vocab_size
        row = (torch.arange(PROBE_LENGTH) * 7 + 3) % vocabulary
        other = torch.where(torch.arange(PROBE_LENGTH) < PROBE_PREFIX, row, (row + 1) % vocabulary)
        mask = torch.ones(2, PROBE_LENGTH, dtype=torch.long)
        mask[1, PROBE_PREFIX:] = 0
        return torch.stack([row, other]).to(self.device), mask.to(self.device)

    def _call(self, ids: Tensor, mask: Tensor) -> Tensor:
        root: Any = self.root
        with torch.no_grad(), evaluating(root), self.autocast():
            return root(input_ids=ids, attention_mask=mask, use_cache=False)[0]

    def _observe(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, frozenset[str]]:
        """Output, hidden states at the entry, and the modules that are not first called from the entry on."""
        order: dict[str, bool] = {}  # module -> whether it was first called below the entry
        caught: list[Tensor] = []
        handles = []

        def note(name: str) -> Callable[..., None]:
            def called(module: nn.Module, args: Any) -> None:
                order.setdefault(name, not caught)

            return called

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(_entering(args, kwargs).detach())

        def returned(index: int) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                if not isinstance(output, Tensor) and not (isinstance(output, tuple) and output):
                    raise ValueError(f"Block {index} returns a {type(output).__name__}; no trunk cache for this model.")
                self._outputs[index] = len(output) if isinstance(output, tuple) else None

            return keep

        handles.append(self.entry.register_forward_pre_hook(entered, with_kwargs=True))
        handles += [m.register_forward_pre_hook(note(name)) for name, m in self.root.named_modules()]
        handles += [b.register_forward_hook(returned(i)) for i, b in enumerate(self.blocks[: self.first])]
        try:
            output = self._call(ids, mask)
        finally:
            for handle in handles:
                handle.remove()
        if len(caught) != 1 or caught[0].shape[:2] != ids.shape or caught[0].ndim != 3:
            shapes = [tuple(hidden.shape) for hidden in caught]
            raise ValueError(f"Hidden states of shapes {shapes} enter block {self.first}, not one of (B, T, D). {_OFF}")
        return output, caught[0], self._not_above(order)

    def _not_above(self, order: dict[str, bool]) -> frozenset[str]:
        """Modules that run below the entry or may be read there; one never called goes with its nearest caller."""
        upper = {id(module) for block in self.blocks[self.first :] for module in block.modules()}
        below = set()
        for name, module in self.root.named_modules():
            caller = name
            while caller not in order and caller:
                caller = caller.rpartition(".")[0]
            if id(module) not in upper and order.get(caller, True):
                below.add(name)
        return frozenset(below)

    def _check_rows(self, ids: Tensor, hidden: Tensor) -> None:
        """Causal, blind to padding, and the same for a row alone."""
        short = hidden[1, :PROBE_PREFIX]
        alone = self.hidden_states(ids[:1, :PROBE_PREFIX], torch.ones_like(ids[:1, :PROBE_PREFIX]))[0]
        if not (_close(hidden[0, :PROBE_PREFIX], short) and _close(alone, short)):
            raise ValueError(
                f"Below block {self.first} of {type(self.root).__name__} the hidden state of a token depends on later "
                f"tokens, on padding or on the other rows of the batch, so it can not be kept per sequence. {_OFF}"
            )

    def _check_trainingmode(self, ids: Tensor, mask: Tensor, hidden: Tensor) -> None:
        """Nothing below the entry, its ancestors aside, does something else in training mode."""
        modules = {n: m for n, m in self._modules_below() if self.entry not in set(m.modules())}
        dropouts = {name: module.p for name, module in modules.items() if isinstance(module, nn.Dropout) and module.p}
        with evaluating(self.root), mode(modules.values(), training=True):
            trained = hidden if dropouts else self._run_below(ids, mask)
        if dropouts or not _close(trained, hidden):
            config = self.root.config.get_text_config().to_dict()
            found = dropouts or {k: v for k, v in config.items() if "drop" in k and isinstance(v, float) and v}
            raise ValueError(
                f"Below block {self.first} the model is random in training mode ({found}), so its hidden states are "
                "not the same at every step. Set these to 0 in the model's config, or train without a trunk cache."
            )

    def _check_skipped(self, ids: Tensor, mask: Tensor, hidden: Tensor, output: Tensor) -> None:
        """The rest of the model needs nothing but the hidden states of real tokens."""
        self.hidden_states(ids.flip(1), mask)  # what blocks may have left somewhere is of other tokens now
        with self.skipped(hidden.masked_fill(mask[..., None] == 0, 0.0)):
            again = self._call(ids, mask)
        if not _close(again[mask.bool()], output[mask.bool()]):
            raise ValueError(
                f"{type(self.root).__name__} gives other results when its blocks below {self.first} are skipped: upper "
                f"blocks read something of lower ones past the hidden states, keys and values for example. {_OFF}"
            )


_OFF = "Train without a trunk cache."


def refuse_configuration(root: PreTrainedModel) -> None:
    """Refuses what a short probe would not notice.

    Raises:
        ValueError: for an encoder-decoder, layer drop, and rotary embeddings that depend on the longest row.
    """
    config = root.config.to_dict()
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{type(root).__name__} is an encoder-decoder; its trunk is not one causal network. {_OFF}")
    if config.get("layerdrop"):
        raise ValueError(f"`layerdrop={config['layerdrop']}` leaves out blocks at random. Set it to 0. Or: {_OFF}")
    kinds = sorted({kind for kind in _rope_types(config) if any(word in kind for word in _LENGTH_DEPENDENT)})
    if kinds:
        raise ValueError(
            f"The rotary embeddings of {type(root).__name__} are of type {kinds}: they change with the longest row of "
            f"a batch, so hidden states can not be kept per sequence. {_OFF}"
        )


def _rope_types(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                yield value
            yield from _rope_types(value)


def _first_carrier(blocks: nn.ModuleList, root: nn.Module) -> int:
    """The first block with an active tangent; the last one if all tangents are above the blocks."""
    if not any(_is_active(module) for module in root.modules()):
        raise ValueError("No axis of the model is active, so no block carries a tangent. Activate the axis to train.")
    first = next((i for i, b in enumerate(blocks) if any(_is_active(m) for m in b.modules())), len(blocks) - 1)
    if first == 0:
        raise ValueError(
            f"The first of the {len(blocks)} blocks carries a tangent, so there is nothing frozen below it to keep. "
            "Wrap fewer blocks (`TangentConfig(num_layers=...)`), or train without a trunk cache."
        )
    return first


def _is_active(module: nn.Module) -> bool:
    return isinstance(module, TangentCarrier) and (module.tangent_mix() is not None or module.is_additive())


def _entering(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _pass_on(length: int | None) -> Callable[..., Any]:
    """A block's forward that returns its input: as a tensor, or as the first of a tuple of `length`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = _entering(args, kwargs)
        return hidden if length is None else (hidden, *[None] * (length - 1))

    return forward


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether each token's vector (…, D) is within the tolerance; a token with large entries hides no other."""
    error, size = (found.double() - expected.double()).norm(dim=-1), expected.double().norm(dim=-1)
    return bool((error <= PROBE_TOLERANCE[expected.dtype] * size).all())
