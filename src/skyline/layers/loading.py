"""From a model to its checkpoint: which tensor goes where, and random weights for when there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from skyline.checkpoint.weights import Destination
from skyline.layers.basic import RMSNorm

# The length of the noise that `randomize` repeats: small enough for a core's cache, and prime, so that the rows of a
# weight all start elsewhere in it.
_NOISE = 262_147


@runtime_checkable
class CustomLayout(Protocol):
    """A module whose own parameters are laid out otherwise than in the checkpoint."""

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        """Full checkpoint name -> its place in this module, which is at `path` of the model."""
        ...


def destinations(model: nn.Module) -> dict[str, Destination]:
    """Checkpoint name -> where it goes, covering every element of every parameter exactly once.

    A module's path is its name in the checkpoint, unless it has a CustomLayout. A parameter shared by several modules
    (tied embeddings) is listed under the first.
    """
    found: dict[str, Destination] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        if isinstance(module, CustomLayout):
            places = module.checkpoint_tensors(path)
        else:
            places = {name: Destination(tensor) for name, tensor in own.items() if id(tensor) not in seen}
        seen.update(map(id, own.values()))
        if twice := found.keys() & places.keys():
            raise ValueError(f"two modules claim the checkpoint tensor {min(twice)}")
        found.update(places)
    return found


def ignorable(model: nn.Module) -> list[str]:
    """fnmatch patterns of tensors that a checkpoint may hold though the model has no place for them."""
    # Old exporters wrote what follows from the config.
    patterns = ["*.rotary_emb.inv_freq", *getattr(model, "ignored", ())]
    listed: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in listed:  # tied: transformers, too, takes the first and passes over the copy
            patterns.append(name)
        listed.setdefault(id(parameter), name)
    return patterns


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Fill the parameters with noise that keeps activations near unit scale; norms become the identity.

    The same seed gives the same weights on every device. On the meta device nothing happens.
    """
    for parameter, fill in random_values(model, seed):
        if not parameter.is_meta:
            fill(parameter)


def random_values(model: nn.Module, seed: int = 0) -> Iterator[tuple[nn.Parameter, Callable[[torch.Tensor], None]]]:
    """Each parameter and what fills a tensor of its shape, once, with the values that `randomize` means for it.

    A block of noise is drawn once and repeated, because drawing each of a billion values would take longer than
    everything else at start-up.
    """
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed))
    scaled: dict[tuple[float, torch.dtype], torch.Tensor] = {}  # on the parameters' device, which is one for the model
    start = 0
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, RMSNorm):
                yield parameter, _fill_with_zeros if module.offset else _fill_with_ones
                continue
            scale = 0.02 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            start = (start + 7919) % _NOISE  # equally shaped weights must differ

            def fill(target: torch.Tensor, scale: float = scale, start: int = start) -> None:
                key = (scale, target.dtype)
                if key not in scaled:
                    scaled[key] = (noise * scale).to(target)
                _repeat(scaled[key], start, target.view(-1))

            yield parameter, fill


def _fill_with_zeros(target: torch.Tensor) -> None:
    target.zero_()


def _fill_with_ones(target: torch.Tensor) -> None:
    target.fill_(1.0)


def _repeat(block: torch.Tensor, start: int, target: torch.Tensor) -> None:
    """Fill target [n] with block[start:], then with the whole block again and again."""
    head = block[start:][: target.numel()]
    target[: head.numel()].copy_(head)
    rest = target[head.numel() :]
    whole = rest.numel() // _NOISE * _NOISE
    rest[:whole].view(-1, _NOISE).copy_(block)
    rest[whole:].copy_(block[: rest.numel() - whole])
