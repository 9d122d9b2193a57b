"""Shape of a model, of its routers and of the mesh they live on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from dials_jax.config.typed import Typed, require_positive
from dials_jax.errors import require

Dtype = Literal["bfloat16", "float16", "float32"]
WeightDtype = Literal["bfloat16", "float32"]  # models are stored and loaded in one of these
EightBits = Literal["fp8", "int8"]  # weights in 8 bits: see nn/eight_bits.py
Layout = Literal["auto", "stacked", "unrolled", "fused"]  # of the parameters of layers
Votes = Literal["hard", "soft"]  # what routers count at inference: see `Routed`
DTYPES = get_args(Dtype)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Typed):
    """Shape of one transformer. Numbers that change the maths have no default."""

    RENAMED: ClassVar[dict[str, str]] = {"bias": "mlp_bias", "shift": "right_shift"}

    model_type: str = "llada"
    vocab_size: int  # rows of the embedding and of the head
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int  # hidden width of the MLP
    max_length: int  # positions the model was trained for
    rope_theta: float | None  # base of the rotary angles; None: learned positions, embedded
    norm_eps: float
    qkv_bias: bool = False  # biases on the query, key and value projections
    o_bias: bool = False  # a bias on the projection out of attention
    mlp_bias: bool = False  # biases on all projections of the MLP
    head_bias: bool = False  # a bias on the head
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False  # a bias in every layer norm
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu: its tanh approximation, without a gate
    cond_dim: int = 0  # width of the vector that modulates the layers (adaLN); 0: nothing does
    time_conditioning: bool = False  # it depends on the time t; otherwise it is a learned constant
    qk_norm: bool = False  # RMS norms of queries and keys, each head by itself, before they turn
    causal: bool = False  # a token sees itself and what is to its left only
    # Block-causal: a token sees its own block of this many positions, and the blocks to its left.
    block_length: int | None = None
    right_shift: bool = False  # the head predicts token i + 1 at i (Dream); `apply` undoes it
    subs: bool = False  # [MASK] is never predicted, whatever its logit (MDLM)
    mask_id: int | None  # id of [MASK]; None for a causal model that has none
    eos_id: int | None  # end of text; None for a causal model that has none
    pad_id: int
    eot_id: int | None = None  # end of turn, where the tokenizer has one
    dtype: Dtype = "bfloat16"  # activations; norms, softmax, angles and logits stay float32

    def __post_init__(self):
        super().__post_init__()
        sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        rotary = () if self.rope_theta is None else ("rope_theta",)
        require_positive(self, *sizes, "d_ff", "max_length", "norm_eps", *rotary)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(
            not rotary or self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even for rotary halves",
        )
        require(self.cond_dim >= 0, f"cond_dim={self.cond_dim} must not be negative")
        require(
            self.norm == "layer" or not (self.norm_bias or self.cond_dim),
            "norm_bias and cond_dim are for layer norms; set norm='layer'",
        )
        require(
            self.cond_dim > 0 or not self.time_conditioning,
            "time_conditioning=True needs the width of the conditioning; set cond_dim",
        )
        for name in ("mask_id", "eos_id", "pad_id", "eot_id"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < self.vocab_size,
                f"{name}={value} is outside the vocabulary of {self.vocab_size} tokens",
            )
            require(
                value is not None or self.causal or name == "eot_id",
                f"{name} is missing; only a causal model can do without",
            )
        require(
            self.block_length is None or (self.block_length > 0 and not self.causal),
            f"block_length={self.block_length} must be positive, without causal=True beside it",
        )
        require(
            not (self.causal and self.right_shift),
            "right_shift=True is for models that fill in [MASK]; a causal model predicts the next "
            "token",
        )

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Stored settings of version 0.1, where None for o_bias and head_bias meant: as `bias`."""
        biased = values.get("bias")
        values = super().upgraded(values)
        if biased is not None:
            for name in ("o_bias", "head_bias"):
                values[name] = biased if values.get(name) is None else values[name]
        return values

    def require_mask(self) -> None:
        """Raises: InputError for a model whose [MASK] nothing here fills in."""
        require(
            not self.causal,
            f"a causal model ({self.model_type}) fills in no [MASK]; give a masked diffusion model",
        )
        require(
            self.block_length is None,
            f"a block-causal model ({self.model_type}) generates by BlockDiffusion; likelihoods, "
            "filling masks and training of block diffusion are not here",
        )


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Typed):
    """One DIALS router before every layer (DIALS, section 3.2)."""

    RENAMED: ClassVar[dict[str, str]] = {"threshold": "skip_threshold"}

    d_hidden: int = 512
    depth: int = 2  # linear layers: in, depth - 2 of d_hidden, out (4 in DIALS, Figure 6)
    skip_threshold: float = 0.1  # tau: skip a layer when a larger share of masked tokens votes so
    votes: Votes = "hard"  # at inference; soft: the mean probability of a vote to skip meets tau
    temperature: float = 1.0  # of the Gumbel-softmax
    # The noise of training falls linearly from 1 to 0 over this many steps; None: it stays 1.
    anneal_steps: int | None = None
    execute_bias: float = 3.0  # first bias of the vote to execute; sigmoid(-3) = 4.7 % skip

    def __post_init__(self):
        super().__post_init__()
        require(
            0 <= self.skip_threshold < 1,
            f"skip_threshold={self.skip_threshold} must lie in [0, 1)",
        )
        require_positive(self, "d_hidden", "temperature")
        require(
            self.anneal_steps is None or self.anneal_steps > 0,
            f"anneal_steps={self.anneal_steps} must be positive, or None",
        )
        require(self.depth >= 2, f"depth={self.depth} linear layers: a router has at least 2")


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Typed):
    """Devices along each mesh axis. One axis may be -1: it takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.tensor)
        require(sizes.count(-1) <= 1, f"mesh {sizes}: at most one axis may be -1")
        require(all(s == -1 or s > 0 for s in sizes), f"mesh {sizes}: sizes are positive or -1")
