"""The router of a mixture of experts with all that models ask of it: a product, a scoring, a choice by groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from skyline.ops import dense
from skyline.ops.contract import Case, Cost, Op, nbytes, register

Scoring = Literal["softmax", "sigmoid", "softmax of the chosen"]


def _router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    factor: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """x [T, H], weight [E, H], bias [E] -> weights [T, top_k] float32 and expert ids [T, top_k] int64, best first.

    All in float32. Experts are chosen by score + `correction` [E], where there is one, and weighted by the score alone.
    With `groups`, experts come in that many runs of equal length; only those of the `top_groups` runs whose two best
    add up to most can be chosen (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). `renormalize`: the weights of the
    chosen are divided by their sum; then all are multiplied by `factor`. Among equals the lower id goes first.
    """
    logits = x.float() @ weight.float().T
    if bias is not None:
        logits = logits + bias.float()
    scores = logits.sigmoid() if scoring == "sigmoid" else logits
    scores = logits.softmax(-1) if scoring == "softmax" else scores
    ranked = scores if correction is None else scores + correction.float()
    if groups > 1:
        runs = ranked.view(len(ranked), groups, ranked.shape[1] // groups)
        best = runs.topk(min(2, runs.shape[-1]), dim=-1).values.sum(-1)
        kept = _best(best, top_groups)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, kept, True)
        ranked = runs.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = _best(ranked, top_k)
    weights = scores.gather(1, ids)
    if scoring == "softmax of the chosen":
        weights = weights.softmax(-1)
    elif renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * factor, ids


def _best(values: Tensor, count: int) -> Tensor:
    # A stable sort, because topk leaves open which of two equals it takes.
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _meta(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, top_k: int, *_: object
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, top_k: int, *_: object) -> Cost:
    rows, experts = x.shape[0], weight.shape[0]
    return Cost(nbytes(x, weight, bias, correction) + 12 * rows * top_k, rows * (2 * weight.numel() + 6 * experts))


def _cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 9):
        # Rows of one large value each, so that scores are well apart in every dtype: a permutation of the experts.
        x = torch.eye(12)[torch.randint(0, 12, (rows,), generator=generator)].to(dtype)
        order = torch.stack([torch.randperm(8, generator=generator) for _ in range(12)], dim=1)
        weight = (order * 0.5 - 2).to(dtype)
        bias = torch.linspace(-0.1, 0.1, 8).to(dtype)
        correction = torch.linspace(0.03, -0.03, 8)
        for scoring in ("softmax", "sigmoid", "softmax of the chosen"):
            for renormalize in (False, True):
                label = f"T={rows} {scoring} renormalize={renormalize}"
                yield Case(label, (x, weight, None, None, 3, scoring, renormalize, 1.0, 1, 1))
        yield Case(f"T={rows} bias", (x, weight, bias, None, 3, "softmax of the chosen", False, 1.0, 1, 1))
        yield Case(f"T={rows} groups", (x, weight, None, correction, 3, "sigmoid", True, 2.5, 4, 2))


router = register(Op("router", _router, cost=_cost, cases=_cases, meta=_meta, num_outputs=2))


def _norm_router(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    factor: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm(x, norm, eps) [T, H], which the experts read too, and its `router`: weights and ids [T, top_k].

    norm [H]. A graph pass puts it in.
    """
    normed: Tensor = dense.rms_norm.reference(x, norm, eps)
    chosen = _router(normed, weight, bias, correction, top_k, scoring, renormalize, factor, groups, top_groups)
    return normed, *chosen


def _norm_router_meta(x: Tensor, norm: Tensor, eps: float, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_meta(x, *rest)


def _norm_router_cost(x: Tensor, norm: Tensor, eps: float, *rest: Any) -> Cost:
    return _cost(x, *rest) + Cost(nbytes(x, norm), 4 * x.numel())


def _norm_router_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for case in _cases(dtype, generator):
        x, *rest = case.args
        # One large value of 12 is normed to sqrt(12), eps and the weight aside: bring it back to where it was.
        norm = (12**-0.5 * (1 + 0.1 * torch.rand(12, generator=generator))).to(dtype)
        yield Case(case.label, (2 * x, norm, 0.01, *rest))


norm_router = register(
    Op(
        "norm_router",
        _norm_router,
        cost=_norm_router_cost,
        cases=_norm_router_cases,
        meta=_norm_router_meta,
        num_outputs=3,
    )
)
