"""The one place that answers how long an operator takes on a device: forms, coefficients and residuals of a profile.

Every answer is cold (weights and keys come from HBM, unlike in the replayed measurements) and never faster than the
roofline. Sizes are numbers or arrays that broadcast; answers are float64 seconds. Shapes are those of one device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from apexsim.costs.attention import DecodeCost, PrefillCost, SharedLaunch
from apexsim.costs.collectives import CollectiveTable
from apexsim.costs.forms import gemm, moe, small
from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array, Hardware
from apexsim.costs.forms.prefill import Heads
from apexsim.costs.forms.residual import LogGrid
from apexsim.costs.forms.routing import fullest_device
from apexsim.costs.stand_ins import stand_in
from apexsim.errors import Unsupported
from apexsim.specs.device import DeviceProfile, Evidence, FittedOperator
from apexsim.units import dtype_bytes

# Messages of the tables that vLLM's all-reduce, the measured one, sends at once (custom_all_reduce.cuh: below 512 KiB
# on up to 4 ranks, below 256 KiB on up to 8; all on 2): the largest by ranks, and one to draw a line from.
ONE_SHOT_MEASURED = {4: 256 << 10, 8: 128 << 10}
ONE_SHOT_FROM = 16 << 10
# Element-wise kernels that a profile may have costs of their own for, the more special name first.
OWN_ELEMENTWISE = ("qk_norm", "norm", "rope", "activation", "embedding")
# The hold-outs nearest to serving a model that no fit has seen, best first; 90th percentile of |x| of a normal law.
HOLD_OUTS = ("generation_left_out", "device_left_out", "served_shapes_cold", "served_shapes", "random")
NORMAL_P90 = 1.645
UNSCORED_SPREAD = 0.25


class AttentionShape(NamedTuple):
    """Attention of one layer on one device; ``window`` None = full attention."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    kv_dtype: str = "bf16"

    @property
    def key(self) -> str:
        """Key of the fitted operator that answers for it."""
        return f"{self.kv_dtype}_d{self.head_dim}"

    @property
    def sizes(self) -> Heads:
        return Heads(self.heads, self.kv_heads, self.head_dim, self.window, dtype_bytes(self.kv_dtype))


class MoeLayer(NamedTuple):
    """Experts of one layer: ``inter`` is the width on one device, ``experts`` the model's, over ``ep`` devices.

    ``kernel``: the dtype whose measured kernel stands for the one they run on, where that is not their own.
    """

    hidden: int
    inter: int
    topk: int
    experts: int
    ep: int = 1
    dtype: str = "bf16"
    routing_exponent: float = 1.0
    gated: bool = True
    kernel: str | None = None

    @property
    def key(self) -> str:
        """Key of the fitted operator that answers for it."""
        return self.kernel or self.dtype


class OperatorCosts:
    """Costs of every operator of one device.

    ``sustained``: compute-bound kernels at the clock that holds under load, as in serving; without it the short bursts
    of the measured tables, which is how fits are scored.
    """

    def __init__(self, profile: DeviceProfile, *, sustained: bool = True) -> None:
        self.profile = profile
        knots, factors = profile.sustained.tokens, profile.sustained.factors
        self._clock = (np.log(knots), np.array(factors)) if sustained else (np.zeros(1), np.ones(1))
        self._grids: dict[tuple[str, str], LogGrid | None] = {}
        self._stand_ins: dict[tuple[str, str], FittedOperator | None] = {}
        self._tables: dict[tuple[str, str], CollectiveTable] = {}
        self.prefill_attention = lru_cache(maxsize=256)(self._prefill_attention)
        self._decode_cost = lru_cache(maxsize=4096)(self._decode_curve)
        self._own_experts = lru_cache(maxsize=64)(self._find_own_experts)

    def knows(self, kind: str, key: str) -> bool:
        """Whether there is such an operator, fitted or an estimate in its place."""
        try:
            self.operator(kind, key)
        except Unsupported:
            return False
        return True

    def operator(self, kind: str, key: str) -> FittedOperator:
        """The fitted operator, or an estimate in its place; raises Unsupported, naming what there is."""
        known = self.profile.operators.get(kind, {})
        if key in known:
            return known[key]
        if (kind, key) not in self._stand_ins:
            self._stand_ins[kind, key] = stand_in(self.profile, kind, key)
        found = self._stand_ins[kind, key]
        if found is None:
            have = ", ".join(sorted(known)) or "none"
            raise Unsupported(f"{self.profile.name} has no {kind} cost for {key}; it has: {have}")
        return found

    def evidence(self, kind: str, key: str) -> Evidence:
        """Whether the operator was fitted on this device or estimated from elsewhere."""
        return self.operator(kind, key).evidence

    def spread(self, kind: str, key: str) -> float:
        """Relative standard deviation of the operator's times on shapes that its fit never saw.

        90th percentile of the error of the first hold-out of ``HOLD_OUTS`` that was scored, else of any, over that of a
        normal law. Where nothing was scored: ``UNSCORED_SPREAD``, an assumption.
        """
        quality = self.operator(kind, key).quality
        scored = [quality[name] for name in HOLD_OUTS if name in quality] or list(quality.values())
        return scored[0].p90 / NORMAL_P90 if scored else UNSCORED_SPREAD

    def extrapolated(self, kind: str, key: str, **sizes: Any) -> Array:
        """Boolean array: whether any of the ``sizes`` lies outside the measured range (unknown names: inside)."""
        op = self.operator(kind, key)
        valid = op.valid | ({"bytes": (op.points.bytes[0], op.points.bytes[-1])} if op.points else {})
        outside = np.zeros((), dtype=bool)
        for name, value in sizes.items():
            low, high = valid.get(name, (-np.inf, np.inf))
            outside = outside | (np.asarray(value) < low) | (np.asarray(value) > high)
        return np.asarray(outside)

    def gemm_s(
        self, m: Any, n: Any, k: Any, dtype: str, *, quantised: bool = False, reads_like: str | None = None
    ) -> Array:
        """Seconds of y[m, n] = x[m, k] W[k, n] with operands of ``dtype``; zero where m is 0.

        The measured products contain the kernels that quantise x, which do not run where x comes ``quantised``. Kernels
        that nobody measured read W at no smaller a share of the memory's peak than products in ``reads_like`` do.
        """
        op = self.operator("gemm", dtype)
        rows = np.maximum(np.asarray(m, dtype=float), 1.0)
        shape = gemm.shape(rows, np.asarray(n, dtype=float), np.asarray(k, dtype=float), dtype)
        hw = self._hardware(dtype)
        seconds = gemm.gemm_s(shape, self._reading(op, reads_like), hw) * self._correction(
            "gemm", dtype, gemm.residual_coordinates(shape)
        )
        if quantised:
            seconds = seconds - self.quantise_s(rows * k, dtype)
        floor = gemm.roofline_s(shape, hw)
        return np.asarray(
            np.where(np.asarray(m) > 0, np.maximum(seconds, floor) * self.sustained_factor(rows, dtype), 0.0)
        )

    def _reading(self, op: FittedOperator, like: str | None) -> Mapping[str, float]:
        """Coefficients of a product, its share of the memory's peak no smaller than that of products in ``like``."""
        if like is None:
            return op.coefficients
        share = "memory_efficiency"
        return {**op.coefficients, share: max(op.coefficients[share], self.operator("gemm", like).coefficients[share])}

    def quantise_s(self, elements: Any, dtype: str) -> Array:
        """Seconds to find the scales of so many bf16 activations and to write them in ``dtype``."""
        moved = np.asarray(elements) * (dtype_bytes("bf16") + dtype_bytes(dtype))
        return small.elementwise_s(moved, self.operator("quantise", dtype).coefficients, self._hardware("bf16"))

    def _prefill_attention(self, shape: AttentionShape) -> PrefillCost:
        """Prepared cost of chunks under one attention shape: call it with floats, or ``many`` of it with arrays."""
        op = self.operator("prefill_attention", shape.key)
        return PrefillCost(op, shape.sizes, self._hardware(shape.kv_dtype, attention=True))

    def shared_launch(self, shape: AttentionShape) -> SharedLaunch | None:
        """Prepared cost of chunks and decodes in one launch; None where the parts of a step add up."""
        op = self.profile.operators.get("mixed_attention", {}).get("any")
        return SharedLaunch(op, shape.sizes, self._hardware(shape.kv_dtype, attention=True)) if op else None

    def _decode_curve(self, batch: int, shape: AttentionShape) -> DecodeCost:
        op = self.operator("decode_attention", shape.key)
        return DecodeCost(
            op,
            self._grid("decode_attention", shape.key),
            batch,
            shape.sizes,
            self._hardware(shape.kv_dtype, attention=True),
        )

    def decode_attention_s(self, batch: Any, mean_context: Any, shape: AttentionShape) -> Array:
        """Seconds of one token for each of ``batch`` sequences that attend to ``mean_context`` keys on average.

        Never decreases in context. Fast for one batch and many contexts; an array of batches costs one curve per
        distinct value. Contexts beyond the window count as the window; an empty batch takes no time.
        """
        keys = np.asarray(mean_context, dtype=float)
        if np.ndim(batch) == 0:
            return self._decode_cost(int(batch), shape)(keys) if batch > 0 else np.zeros_like(keys)
        batches, keys = np.broadcast_arrays(np.asarray(batch), keys)
        seconds = np.zeros(keys.shape)
        for value in np.unique(batches[batches > 0]).tolist():
            at = batches == value
            seconds[at] = self._decode_cost(int(value), shape)(keys[at])
        return seconds

    def moe_s(self, tokens: Any, layer: MoeLayer) -> Array:
        """Seconds of the experts of a layer for ``tokens`` tokens of the whole group, on its most loaded device."""
        op, hw = self.operator("moe", layer.key), self._hardware(layer.dtype)
        shape, width = self._moe_shape(tokens, layer), dtype_bytes(layer.dtype)
        seconds = moe.moe_s(shape, width, op.coefficients, hw)
        seconds = seconds * self._correction("moe", layer.key, moe.residual_coordinates(shape))
        if own := self._own_experts(layer):
            grid, split = own
            seconds = seconds * np.exp(grid.log_factor(*moe.shape_coordinates(split, shape.tokens)))
        floor = moe.roofline_s(shape, width, hw)
        per_expert = shape.tokens * layer.topk / layer.experts
        factor = self.sustained_factor(np.maximum(per_expert, 1.0), layer.dtype)
        return np.asarray(np.where(np.asarray(tokens) > 0, np.maximum(seconds, floor) * factor, 0.0))

    def elementwise_s(self, moved_bytes: Any, name: str = "any") -> Array:
        """Seconds of one element-wise kernel that moves ``moved_bytes``.

        ``name`` may end in norm, qk_norm, rope, activation or embedding, whose own cost serves where it was measured.
        """
        known = self.profile.operators.get("elementwise", {})
        key = next((key for key in OWN_ELEMENTWISE if key in known and name.endswith(key)), "any")
        return small.elementwise_s(moved_bytes, self.operator("elementwise", key).coefficients, self._hardware("bf16"))

    def sampling_s(self, sequences: Any, vocab: Any) -> Array:
        """Seconds to sample a token for ``sequences`` rows of ``vocab`` logits; zero for none."""
        seconds = small.sampling_s(
            sequences, vocab, self.operator("sampling", "any").coefficients, self._hardware("bf16")
        )
        return np.asarray(np.where(np.asarray(sequences) > 0, seconds, 0.0))

    def collective_s(
        self, kind: str, group: int, message_bytes: Any, custom_allowed: Any = False, *, nodes: int = 1
    ) -> Array:
        """Seconds of a collective over ``group`` devices on ``nodes`` nodes; zero for one device or nothing to send.

        ``kind``: all_reduce, all_gather, reduce_scatter, all_to_all (bytes as nccl-tests counts them: the largest
        buffer of a rank), send_recv (group 2), send_recv_across_nodes, or an exchange of expert layers (bytes that a
        rank sends, see ``copies_sent``): deepep, deepep_ll or trtllm with _dispatch or _combine. ``custom_allowed``
        (may be an array): the engine's own all-reduce kernel, which needs one node, may be used.
        """
        size = np.asarray(message_bytes, dtype=float)
        if group == 1:
            return np.zeros(size.shape)
        seconds = self._table(kind, self.collective_key(kind, group, nodes=nodes))(size)
        if kind == "all_reduce" and np.any(custom_allowed):
            custom = self._table(kind, self.collective_key(kind, group, custom=True))(size)
            seconds = np.where(custom_allowed, custom, seconds)
        return np.asarray(np.where(size > 0, seconds, 0.0))

    def one_shot_s(self, group: int, message_bytes: Any) -> Array:
        """Seconds of an all-reduce in which every rank sends its buffer to every other at once.

        Beyond what was measured so, a byte takes what it did before.
        """
        table = self._table("all_reduce", self.collective_key("all_reduce", group, custom=True))
        size = np.asarray(message_bytes, dtype=float)
        if (largest := ONE_SHOT_MEASURED.get(group)) is None:
            return table(size)
        s_per_byte = float(table(largest) - table(ONE_SHOT_FROM)) / (largest - ONE_SHOT_FROM)
        return np.asarray(table(np.minimum(size, largest)) + s_per_byte * np.maximum(0.0, size - largest))

    @staticmethod
    def collective_key(kind: str, group: int, *, custom: bool = False, nodes: int = 1) -> str:
        """Key of a collective's table: the library, where it is not in the kind, the group size, and ``nodes`` above 1.

        TensorRT-LLM's exchanges were measured between the nodes of one NVLink domain, however many those are.
        """
        if kind.startswith("send_recv"):
            return "p2p"
        across = f"_over_{nodes}" if nodes > 1 and not kind.startswith("trtllm") else ""
        if kind.endswith(("_dispatch", "_combine")):
            return f"ranks_{group}{across}"
        return f"{'custom' if custom else 'nccl'}_{group}{across}"

    def sustained_factor(self, rows: Any, dtype: str) -> Array:
        """How much slower than a short burst a product of ``rows`` rows in ``dtype`` runs under sustained load."""
        if dtype in self.profile.sustained.unaffected:
            return np.ones(np.shape(rows))
        return np.asarray(np.interp(np.log(rows), *self._clock))

    def _hardware(self, dtype: str, *, attention: bool = False) -> Hardware:
        # Attention computes in bf16 whatever the cache holds, unless the device has fp8 tensor cores.
        peaks = self.profile.datasheet.flops_per_s
        wanted = dtype if COMPUTE_DTYPE.get(dtype) in peaks or not attention else "bf16"
        if COMPUTE_DTYPE.get(wanted) not in peaks:
            have = ", ".join(sorted(peaks))
            raise Unsupported(f"{self.profile.name} has no {wanted} tensor cores; it has: {have}")
        return Hardware.of(self.profile.datasheet, wanted)

    def _correction(self, kind: str, key: str, coordinates: Any) -> Any:
        found = self._grid(kind, key)
        return np.exp(found.log_factor(*coordinates)) if found else 1.0

    def _grid(self, kind: str, key: str) -> LogGrid | None:
        if (kind, key) not in self._grids:
            grid = self.operator(kind, key).residual
            self._grids[kind, key] = LogGrid.of(grid) if grid else None
        return self._grids[kind, key]

    def _find_own_experts(self, layer: MoeLayer) -> tuple[LogGrid, float] | None:
        """The correction of the model that the experts belong to, where it was measured, and how they are split."""
        shapes = self.operator("moe", layer.key).shapes
        for name in shapes.percent if shapes else ():
            hidden, width, topk, experts = map(int, name.split("x"))
            cuts, rest = divmod(width, layer.inter)
            if not rest and (hidden, topk, experts) == (layer.hidden, layer.topk, layer.experts):
                assert shapes is not None, "it has names"
                return LogGrid.of(shapes.grid(name)), layer.ep / cuts
        return None

    def _table(self, kind: str, key: str) -> CollectiveTable:
        if (kind, key) not in self._tables:
            points = self.operator(kind, key).points
            if points is None:
                raise Unsupported(f"{self.profile.name}: {kind} {key} has no points")
            self._tables[kind, key] = CollectiveTable(points)
        return self._tables[kind, key]

    def _moe_shape(self, tokens: Any, layer: MoeLayer) -> moe.MoeShape:
        count = np.maximum(np.asarray(tokens, dtype=float), 1.0)
        load = fullest_device(count, layer.experts, layer.topk, layer.ep, layer.routing_exponent)
        matrices = 3.0 if layer.gated else 2.0
        sizes = (float(layer.hidden), float(layer.inter), float(layer.topk), float(layer.experts), float(layer.ep))
        return moe.MoeShape(count, *sizes, matrices, load.active, load.rows)
