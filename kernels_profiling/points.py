"""Which sizes are measured: those that models put on a rank, by tensor degree, and a grid beside them.

A ``Scale`` holds the grids: ``QUICK`` for a minute on a CPU, ``CPU`` for some minutes, ``CUDA`` for a datacenter GPU.
Points come in orders drawn with a fixed seed, so that a disturbance meets all operators alike and a run cut short by
its budget knows something of each; in several rounds where others' work disturbs, as on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from apexsim.errors import Unsupported
from apexsim.specs.model import ModelSpec
from kernels_profiling.tables import ROUND

Points = Iterator[tuple[str, dict[str, Any]]]
SEED = 20260101
# Tables whose points take long enough to be measured in the first round only.
ONCE = ("sustained", "collective")
ROUTINGS = ("balanced", "power_law_1.01", "power_law_1.2")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")


class Scale(NamedTuple):
    """The grids of a run, and seconds that a point may take."""

    tokens: tuple[int, ...]
    survivors: tuple[int, ...]
    chunks: tuple[int, ...]
    histories: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    most_keys: int
    widths: tuple[int, ...]
    copies: tuple[int, ...]
    mixed: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, ...]
    held_s: float
    point_s: float
    rounds: int


QUICK = Scale(
    tokens=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256),
    survivors=(1, 2, 4, 8, 16, 32),
    chunks=(4, 16, 32, 64, 128, 192, 256),
    histories=(0, 64, 256),
    batches=(1, 2, 4, 8, 16, 32),
    contexts=(16, 64, 128, 256, 512),
    most_keys=1 << 13,
    widths=(),
    copies=(1 << 16, 1 << 20, 1 << 24),
    mixed=((32, 128), (0, 128), (2, 8), (128,)),
    dtypes=("bf16",),
    held_s=0.0,  # no sustained rows
    point_s=0.03,
    rounds=4,
)
CPU = QUICK._replace(
    tokens=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024),
    survivors=(1, 2, 4, 8, 16, 32, 64),
    chunks=(4, 8, 16, 32, 64, 128, 256, 512, 1024),
    histories=(0, 64, 256, 1024),
    contexts=(16, 64, 128, 256, 512, 1024, 2048),
    most_keys=1 << 15,
    widths=(512, 2048),
    copies=tuple(1 << power for power in range(14, 27, 2)),
    mixed=((32, 128, 512), (0, 256), (2, 8), (128, 1024)),
    dtypes=("bf16", "fp32", "fp8"),
    held_s=5.0,
    point_s=0.1,
    rounds=3,
)
CUDA = Scale(
    tokens=(1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384),
    survivors=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    chunks=(16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    histories=(0, 512, 2048, 8192, 32768),
    batches=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    contexts=(64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072),
    most_keys=1 << 21,
    widths=(512, 1024, 2048, 4096, 8192, 16384),
    copies=tuple(1 << power for power in range(14, 31, 2)),
    mixed=((128, 512, 1024, 2048, 4096, 8192), (0, 2048, 8192, 32768), (1, 8, 32, 64, 128, 256), (512, 2048, 8192)),
    dtypes=("bf16", "fp8"),
    held_s=5.0,
    point_s=0.04,
    rounds=1,
)


class Rank(NamedTuple):
    """What one rank of a model at a tensor degree is made of."""

    model: ModelSpec
    tensor: int

    @property
    def heads(self) -> int:
        return self.model.heads // self.tensor

    @property
    def kv_heads(self) -> int:
        return max(1, self.model.kv_heads // self.tensor)

    @property
    def shape(self) -> dict[str, Any]:
        """Attention columns."""
        return {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.model.head_dim, "kv_dtype": "bf16"}

    def products(self) -> list[tuple[int, int]]:
        """(n, k) of its products, the LM head last."""
        model, ffn = self.model, (self.model.ffn or 0) // self.tensor
        found = [
            ((self.heads + 2 * self.kv_heads) * model.head_dim, model.hidden),
            (model.hidden, self.heads * model.head_dim),
        ]
        if ffn:
            found += [((2 if model.gated else 1) * ffn, model.hidden), (model.hidden, ffn)]
        if model.moe:
            found.append((model.moe.experts, model.hidden))
        return [*found, (-(-model.vocab // self.tensor), model.hidden)]

    def elementwise(self, rows: int) -> Iterator[dict[str, Any]]:
        """Its element-wise kernels over so many rows; ``bytes`` as simulations count them."""
        model, rotated = self.model, 4 * (self.heads + self.kv_heads) * self.model.head_dim
        none = {"hidden": 0, "heads": 0, "kv_heads": 0, "head_dim": 0, "width": 0, "rows": rows}
        heads = {name: self.shape[name] for name in ("heads", "kv_heads", "head_dim")}
        yield none | {"kind": "norm", "bytes": 8 * rows * model.hidden, "hidden": model.hidden}
        yield none | {"kind": "rope", "bytes": rotated * rows} | heads
        if model.qk_norm:
            yield none | {"kind": "qk_norm", "bytes": rotated * rows} | heads
        if model.ffn:
            width = model.ffn // self.tensor
            yield none | {"kind": "activation", "bytes": 6 * rows * width, "width": width}
        yield none | {
            "kind": "embedding",
            "bytes": 4 * rows * model.hidden,
            "hidden": model.hidden,
            "width": model.vocab,
        }


def check_measured(model: ModelSpec) -> None:
    """Raise ``Unsupported`` for a model of layers that no point here has the shapes of."""
    parts = {"latent attention": model.mla, "recurrent layers": model.recurrent}
    if missing := [part for part, present in parts.items() if present]:
        raise Unsupported(f"{model.name}: {' and '.join(missing)} cannot be measured; name another --model")


def ranks(models: Sequence[ModelSpec], degrees: Sequence[int]) -> list[Rank]:
    """Every model at every tensor degree that divides its heads, its vocabulary and its FFN."""
    pairs = itertools.product(models, degrees)
    return [Rank(m, t) for m, t in pairs if not m.heads % t and not m.vocab % t and not (m.ffn or 0) % t]


def all_points(scale: Scale, of: Sequence[Rank], group: int) -> list[tuple[str, dict[str, Any]]]:
    """Every point once a round, shuffled: (table, sizes). ``group``: ranks that collectives run over."""
    makers = (_products, _prefill, _decode, _mixed, _elementwise, _sampling, _experts, _host)
    found = [point for maker in makers for point in maker(scale, of)]
    found += _collectives(group)
    unique = list({(name, *sorted(point.items())): (name, point) for name, point in found}.values())
    draw = np.random.default_rng(SEED)
    orders = [draw.permutation(len(unique)) for _ in range(scale.rounds)]
    rounds = [(*unique[at], number) for number, order in enumerate(orders) for at in order]
    return [(name, point | {ROUND: number}) for name, point, number in rounds if not (number and name in ONCE)]


def _products(scale: Scale, of: Sequence[Rank]) -> Points:
    for rank, dtype in itertools.product(of, scale.dtypes):
        *inner, (vocab, hidden) = rank.products()
        for m, (n, k) in itertools.product(scale.tokens, inner):
            yield "gemm", {"m": m, "n": n, "k": k, "dtype": dtype}
        if dtype == "bf16":  # the LM head is, whatever the weights are
            for m in scale.survivors:
                yield "gemm", {"m": m, "n": vocab, "k": hidden, "dtype": dtype}
    for dtype, m, n, k in itertools.product(scale.dtypes, scale.tokens[::2], scale.widths, scale.widths):
        yield "gemm", {"m": m, "n": n, "k": k, "dtype": dtype}


def _prefill(scale: Scale, of: Sequence[Rank]) -> Points:
    for rank, chunk, history in itertools.product(of, scale.chunks, scale.histories):
        sizes = {"batch": 1, "q_len": chunk, "kv_len": chunk + history, "window_size": 0}
        yield "prefill_attention", sizes | rank.shape


def _decode(scale: Scale, of: Sequence[Rank]) -> Points:
    for rank, batch, context in itertools.product(of, scale.batches, scale.contexts):
        if batch * context <= scale.most_keys:
            sizes = {"batch": batch, "q_len": 1, "kv_len": context, "window_size": 0}
            yield "decode_attention", sizes | rank.shape


def _mixed(scale: Scale, of: Sequence[Rank]) -> Points:
    for rank, (chunk, history, decodes, keys) in itertools.product(of, itertools.product(*scale.mixed)):
        if decodes * keys + chunk + history <= scale.most_keys:
            yield "mixed_attention", {"chunk": chunk, "history": history, "decodes": decodes, "keys": keys} | rank.shape


def _elementwise(scale: Scale, of: Sequence[Rank]) -> Points:
    for rank, rows in itertools.product(of, scale.tokens[::2]):
        yield from (("elementwise", point) for point in rank.elementwise(rows))


def _sampling(scale: Scale, of: Sequence[Rank]) -> Points:
    vocabularies = sorted({rank.model.vocab for rank in of})
    for vocab, sequences, method in itertools.product(vocabularies, scale.survivors, ("greedy", "top_p")):
        yield "sampling", {"sequences": sequences, "vocab": vocab, "method": method}


def _experts(scale: Scale, of: Sequence[Rank]) -> Points:
    for rank, tokens, routing in itertools.product(of, scale.tokens, ROUTINGS):
        experts = rank.model.moe
        if experts and not experts.ffn % rank.tensor:
            sizes = {"hidden": rank.model.hidden, "inter": experts.ffn, "topk": experts.active}
            sizes |= {"experts": experts.experts, "tp": rank.tensor, "ep": 1, "tokens": tokens}
            yield "moe", sizes | {"routing": routing, "dtype": "bf16"}


def _host(scale: Scale, of: Sequence[Rank]) -> Points:
    for size in scale.copies:
        yield "memory_copy", {"bytes": size}
    for kernels, mode in itertools.product((1, 16, 256), ("eager", "graph")):
        yield "launch", {"kernels": kernels, "mode": mode}
    if scale.held_s > 0:
        yield from _sustained(scale, of[0])


def _sustained(scale: Scale, rank: Rank) -> Points:
    """Two products at a few numbers of tokens, two prompts and two batches, each with random weights and with zeros."""
    (qkv, output, *_), tokens = rank.products(), [size for size in scale.tokens if size >= 128] or scale.tokens
    some = tokens[:: max(1, len(tokens) // 4)]
    held: list[tuple[str, int, int, int]] = [("gemm", m, *shape) for m in some for shape in (qkv, output)]
    held += [("prefill_attention", chunk, 0, 0) for chunk in scale.chunks[-2:]]
    held += [("decode_attention", batch, scale.most_keys // batch // 8, 0) for batch in scale.batches[-2:]]
    for (operator, *sizes), content in itertools.product(held, ("normal", "zeros")):
        named = {f"size_{at}": size for at, size in enumerate(sizes)}
        yield "sustained", {"operator": operator, "content": content, "held_s": scale.held_s} | named


def _collectives(group: int) -> list[tuple[str, dict[str, Any]]]:
    """Collectives over ``group`` ranks; none over one."""
    if group == 1:
        return []
    pairs = itertools.product(COLLECTIVES if group == 2 else COLLECTIVES[:-1], range(10, 27, 2))
    return [
        ("collective", {"collective": name, "num_gpus": group, "bytes": 1 << power, "dtype": "bf16"})
        for name, power in pairs
    ]
