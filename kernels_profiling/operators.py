"""Cases of every operator: a point of a table becomes a call on operands that take turns.

What serving finds cold takes turns over more memory than the last cache holds: weights and cached keys and values. What
the kernel before has just written stays where it is: activations, queries, logits. Element-wise kernels see only such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from apexsim.costs.forms.routing import pick_chances
from apexsim.fitting.own import ONE_LAUNCH
from apexsim.fitting.routing import EXPONENTS
from kernels_profiling import attention, kernels
from kernels_profiling.rig import Rig, UnsupportedHereError
from kernels_profiling.timers import Case

Point = Mapping[str, Any]
LIBRARY = f"torch {torch.__version__}"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def gemm(point: Point, rig: Rig) -> Case:
    """y = x W^T over weights that take turns."""
    m, n, k = (int(point[name]) for name in ("m", "n", "k"))
    dtype = DTYPES[point["dtype"]]
    if point["dtype"] == "fp8":
        return _gemm_fp8(m, n, k, rig)
    weights = rig.cold(dtype, (n, k))
    x = rig.hot(dtype, (m, k))
    return Case(lambda i: kernels.gemm(x, weights[i]), len(weights), _bytes(weights), f"{LIBRARY} linear")


def _gemm_fp8(m: int, n: int, k: int, rig: Rig) -> Case:
    """With the quantisation of its inputs, as a served layer runs it."""
    if rig.device.type != "cuda" or torch.cuda.get_device_capability(rig.device) < (8, 9):
        raise UnsupportedHereError("fp8 products need an NVIDIA GPU of compute capability 8.9 or newer")
    weights, x = rig.cold(DTYPES["fp8"], (n, k)), rig.hot(torch.bfloat16, (m, k))
    one = torch.ones((), dtype=torch.float32, device=rig.device)

    def call(i: int) -> torch.Tensor:
        return kernels.gemm_fp8(kernels.quantise_fp8(x, one), weights[i], one, one)

    return Case(call, len(weights), _bytes(weights), f"{LIBRARY} _scaled_mm, one scale a tensor")


def prefill_attention(point: Point, rig: Rig) -> Case:
    """A chunk behind its history, its keys and values written first."""
    chunk, history = int(point["q_len"]), int(point["kv_len"] - point["q_len"])
    cache = rig.cache(int(point["kv_heads"]), int(point["head_dim"]), [history + chunk])
    q, k, v = _qkv(point, chunk, rig)
    slots = [cache.slots(turn[0], history, chunk) for turn in cache.tables]

    def call(i: int) -> torch.Tensor:
        kernels.write_kv(cache.k, cache.v, slots[i], k, v)
        return attention.prefill_attention(q, cache.k, cache.v, cache.tables[i][0], history)

    return Case(call, len(slots), cache.turn_bytes * len(slots), attention.source(rig.device))


def decode_attention(point: Point, rig: Rig) -> Case:
    """One token of every sequence, its key and value written first."""
    batch, keys = int(point["batch"]), int(point["kv_len"])
    cache = rig.cache(int(point["kv_heads"]), int(point["head_dim"]), [keys] * batch)
    q, k, v = _qkv(point, batch, rig)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=rig.device)
    slots = [torch.cat([cache.slots(table, keys - 1, 1) for table in turn]) for turn in cache.tables]

    def call(i: int) -> torch.Tensor:
        kernels.write_kv(cache.k, cache.v, slots[i], k, v)
        return attention.decode_attention(q, cache.k, cache.v, cache.tables[i], lengths)

    return Case(call, len(slots), cache.turn_bytes * len(slots), attention.source(rig.device))


def mixed_attention(point: Point, rig: Rig) -> Case:
    """A chunk behind its history beside decodes: in one launch where the kernel can, else one after the other."""
    chunk, history, decodes, keys = (int(point[name]) for name in ("chunk", "history", "decodes", "keys"))
    lengths = [history + chunk] + [keys] * decodes
    cache = rig.cache(int(point["kv_heads"]), int(point["head_dim"]), lengths)
    q, k, v = _qkv(point, chunk + decodes, rig)
    slots = [
        torch.cat([cache.slots(turn[0], history, chunk), *(cache.slots(table, keys - 1, 1) for table in turn[1:])])
        for turn in cache.tables
    ]
    used = torch.tensor(lengths, dtype=torch.int32, device=rig.device)
    starts = torch.tensor([0, *range(chunk, chunk + decodes + 1)], dtype=torch.int32, device=rig.device)
    together = attention.one_launch(rig.device)

    def call(i: int) -> Any:
        kernels.write_kv(cache.k, cache.v, slots[i], k, v)
        tables = cache.tables[i]
        if together:
            return attention.mixed_attention(q, cache.k, cache.v, attention.Ragged(tables, used, starts, chunk))
        blocks = -(-keys // cache.k.shape[1])
        apart = attention.prefill_attention(q[:chunk], cache.k, cache.v, tables[0], history)
        return apart, attention.decode_attention(q[chunk:], cache.k, cache.v, tables[1:, :blocks], used[1:])

    how = ONE_LAUNCH if together else "two launches"
    return Case(call, len(slots), cache.turn_bytes * len(slots), f"{attention.source(rig.device)}; {how}")


def elementwise(point: Point, rig: Rig) -> Case:
    """A norm, a rotation, an activation or a lookup over operands that were just written."""
    return ELEMENTWISE[point["kind"]](point, rig)


def _norm(point: Point, rig: Rig) -> Case:
    shape = (int(point["rows"]), int(point["hidden"]))
    x, residual, w = rig.hot(torch.bfloat16, shape), rig.hot(torch.bfloat16, shape), rig.hot(torch.bfloat16, shape[1:])
    return Case(lambda i: kernels.add_rms_norm(x, residual, w), 1, 0, f"{LIBRARY} add, rms_norm")


def _qk_norm(point: Point, rig: Rig) -> Case:
    q, k, _ = _qkv(point, int(point["rows"]), rig)
    w = rig.hot(torch.bfloat16, (int(point["head_dim"]),))
    return Case(lambda i: (kernels.rms_norm(q, w), kernels.rms_norm(k, w)), 1, 0, f"{LIBRARY} rms_norm, twice")


def _rope(point: Point, rig: Rig) -> Case:
    q, k, _ = _qkv(point, int(point["rows"]), rig)
    cos, sin = kernels.rope_tables(int(point["rows"]), int(point["head_dim"]), 1e4, q)
    return Case(lambda i: kernels.rope(q, k, cos, sin), 1, 0, f"{LIBRARY} addcmul")


def _activation(point: Point, rig: Rig) -> Case:
    x = rig.hot(torch.bfloat16, (int(point["rows"]), 2 * int(point["width"])))
    return Case(lambda i: kernels.silu_mul(x), 1, 0, f"{LIBRARY} silu, mul")


def _embedding(point: Point, rig: Rig) -> Case:
    rows, vocab = int(point["rows"]), int(point["width"])
    table = rig.cold(torch.bfloat16, (vocab, int(point["hidden"])))[0]
    ids = rig.integers(vocab, (32, rows))
    return Case(lambda i: kernels.embed(ids[i], table), 32, table.nbytes, f"{LIBRARY} embedding")


ELEMENTWISE: dict[str, Callable[[Point, Rig], Case]] = {
    "norm": _norm,
    "qk_norm": _qk_norm,
    "rope": _rope,
    "activation": _activation,
    "embedding": _embedding,
}


def sampling(point: Point, rig: Rig) -> Case:
    """A token from the logits of every sequence."""
    logits = rig.hot(torch.bfloat16, (int(point["sequences"]), int(point["vocab"])))
    sample = {"greedy": kernels.sample_greedy, "top_p": kernels.sample_top_p}[point["method"]]
    return Case(lambda i: sample(logits), 1, 0, f"{LIBRARY} {'argmax' if point['method'] == 'greedy' else 'sort'}")


def moe(point: Point, rig: Rig) -> Case:
    """Routed experts of one rank, which holds a slice of each."""
    names = ("tokens", "hidden", "inter", "topk", "experts", "tp")
    tokens, hidden, inter, topk, experts, tp = (int(point[name]) for name in names)
    gate_up = rig.cold(torch.bfloat16, (experts, 2 * inter // tp, hidden))
    down = rig.cold(torch.bfloat16, (experts, hidden, inter // tp))
    x, turns = rig.hot(torch.bfloat16, (tokens, hidden)), min(len(gate_up), len(down))
    logits = _router_logits(point, rig)

    def call(i: int) -> torch.Tensor:
        return kernels.moe(x, logits[i % len(logits)], gate_up[i], down[i], topk)

    return Case(call, turns, turns * (gate_up[0].nbytes + down[0].nbytes), f"{LIBRARY} grouped_mm")


def _router_logits(point: Point, rig: Rig) -> torch.Tensor:
    """Scores whose largest are drawn by the routing's law, eight draws of them.

    Balanced: every expert in turn. A power law: Gumbel noise on the log chances picks without repeats.
    """
    tokens, experts, topk = int(point["tokens"]), int(point["experts"]), int(point["topk"])
    alpha = EXPONENTS[point["routing"]]
    if alpha == 0:
        turn = torch.arange(tokens * topk, device=rig.device).view(tokens, topk) % experts
        scores = torch.zeros(tokens, experts, device=rig.device).scatter_(1, turn, 1.0)
        return scores.expand(8, -1, -1).contiguous()
    chances = torch.as_tensor(pick_chances(experts, topk, alpha), dtype=torch.float32, device=rig.device)
    noise = -torch.log(-torch.log(rig.uniform((8, tokens, experts))))
    return chances.log() + noise


def memory_copy(point: Point, rig: Rig) -> Case:
    """A copy of so many bytes within the memory of the device."""
    sources = rig.cold(torch.uint8, (int(point["bytes"]),))
    target = torch.empty_like(sources[0])
    return Case(lambda i: target.copy_(sources[i]), len(sources), _bytes(sources), f"{LIBRARY} copy_")


def _qkv(point: Point, tokens: int, rig: Rig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of so many tokens, cut from one row each as a product leaves them."""
    heads, kv_heads, dim = (int(point[name]) for name in ("heads", "kv_heads", "head_dim"))
    rows = rig.hot(torch.bfloat16, (tokens, heads + 2 * kv_heads, dim))
    q, k, v = rows.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


CASES: dict[str, Callable[[Point, Rig], Case]] = {
    "gemm": gemm,
    "prefill_attention": prefill_attention,
    "decode_attention": decode_attention,
    "mixed_attention": mixed_attention,
    "elementwise": elementwise,
    "sampling": sampling,
    "moe": moe,
    "memory_copy": memory_copy,
}
