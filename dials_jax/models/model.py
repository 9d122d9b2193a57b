"""A model: its configuration, its parameters and the mesh that they are placed on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import digests, sharding, trees
from dials_jax.compiling import Timed, batch_invariant, require_32_bits, timed_jit
from dials_jax.config import MeshConfig, ModelConfig, shown, typed
from dials_jax.errors import InputError, require
from dials_jax.keys import fold_in_each, seed_key, threefry_key
from dials_jax.models import transformer
from dials_jax.models.invariance import require_invariant
from dials_jax.nn import fusing
from dials_jax.nn.eight_bits import weights_kind, without_scales
from dials_jax.nn.kernels.implementation import check_kernel_choice
from dials_jax.nn.modules import form_of
from dials_jax.nn.policy import Policy, check_policy
from dials_jax.nn.stack import Executor

IDS = "give token ids, as a tokenizer's encode does"


class Output(NamedTuple):
    """The outputs of one forward pass.

    Attributes:
      logits: at position i they predict token i, or token i + 1 in a causal model. Of an MDLM
        (`config.subs`) as they are: `transformer.apply_subs` rules [MASK] out.
      gates: True where a layer ran.
    """

    logits: Float[Array, "B T V"]
    gates: Bool[Array, "L B"]

    def __repr__(self) -> str:
        logits = f"{jnp.shape(self.logits)} {jnp.result_type(self.logits)}"
        return f"Output(logits {logits}, gates {jnp.shape(self.gates)})"


class Model:
    """A language model, masked diffusion or causal, with its weights.

    Attributes:
      config: shape and special tokens.
      params: nested dict of arrays, placed on `mesh`; `params["layers"]` stacked or a tuple.
      path: the folder that it was loaded from; empty for a model made in memory.
      weights: in which 8 bits those of layers and head are, "fp8" or "int8"; None: in none.
      batch_invariant: a sequence's result is bitwise the same in any batch; see `load`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: trees.Params,
        mesh: Mesh | MeshConfig | None = None,
        path: str = "",
        quantised_from: str = "",
        batch_invariant: bool = False,
    ):
        """Args: quantised_from: of weights in 8 bits, the fingerprint that they had before."""
        require_32_bits()
        check_kernel_choice()
        self.config = config
        self.mesh = sharding.as_mesh(mesh)
        self.batch_invariant = batch_invariant
        if batch_invariant:
            require_invariant(config, self.mesh)
        self.params = jax.device_put(params, sharding.param_shardings(params, self.mesh))
        self.path, self._quantised_from = path, quantised_from
        self.weights = weights_kind(self.params)

    def __repr__(self) -> str:
        cfg, count = self.config, self.num_parameters
        mesh = " x ".join(f"{name} {n}" for name, n in self.mesh.shape.items() if n > 1)
        facts = [
            cfg.model_type,
            f"{cfg.num_layers} layers of width {cfg.d_model}",
            f"{count / 1e6:,.4g} M parameters",
            cfg.dtype,
            *([f"weights in {self.weights}"] if self.weights else []),
            *(["batch-invariant"] if self.batch_invariant else []),
            *([mesh] if mesh else []),
            *([shown(self.path)] if self.path else []),
        ]
        return f"Model({', '.join(facts)})"

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights in any layout or dtype. In 8 bits they are others, and earlier
        versions, which left the head as it was, called theirs -fp8 or -int8."""
        own = self.source_fingerprint
        return f"{own}-{self.weights}-head" if self.weights else own

    @cached_property
    def source_fingerprint(self) -> str:
        """That of the weights before they were quantised, if they were; routers store it."""
        if self._quantised_from:
            return self._quantised_from
        fused = form_of(self.params).fused
        plain = partial(fusing.unfuse, cfg=self.config, parts=fused) if fused else lambda x: x
        return digests.fingerprint(self.params, plain)

    @property
    def num_parameters(self) -> int:
        return trees.count_parameters(without_scales(self.params))

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @cached_property
    def inference_params(self) -> trees.Params:
        """The parameters that compiled functions get: see `transformer.prepare_for_inference`."""
        with self.context():
            return transformer.prepare_for_inference(self.config, self.params)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What the model's programs are traced, compiled and run in: its mesh, and its mode."""
        with jax.set_mesh(self.mesh), batch_invariant(self.batch_invariant):
            yield

    @typed
    def apply(
        self,
        tokens: Int[ArrayLike, "B T"],
        valid: Bool[ArrayLike, "B T"] | None = None,
        policy: Policy | None = None,
        *,
        time: Float[ArrayLike, "..."] | float | None = None,
        step: int = 0,
        key: jax.Array | None = None,
        executor: Executor = "auto",
    ) -> Output:
        """One forward pass.

        Within a function that is transformed (`jax.jit`, `grad`, `vmap`) it is a part of that: the
        same operations, without a program of their own, on the mesh that the caller has set
        (`jax.set_mesh(model.mesh)`). Gradients, also to `params` of a `Model` that is made there,
        need `executor="select"` where a policy's gates are floats.

        Args:
          valid: False at padding. None: no padding.
          policy: which layers run; None runs all.
          time: of denoising, t in (0, 1], one or one per sequence; None: 0. Read by models with
            `time_conditioning` only.
          step: denoising step, for random policies.
          key: for random policies; one key, or one per sequence. None is the key of seed 0.

        Raises: InputError for sequences of several lengths, more tokens than learned positions, and
          tokens outside the vocabulary (of arrays on the host; no other is fetched).
        """
        if not isinstance(tokens, jax.Array):
            tokens = as_ids(tokens, "sequence")
        require(jnp.issubdtype(tokens.dtype, jnp.integer), f"tokens are of {tokens.dtype}; {IDS}")
        valid = None if valid is None else as_valid(valid)
        check_policy(policy)
        check_shapes(self.config, np.shape(tokens), valid)
        if not isinstance(tokens, jax.Array) and not isinstance(valid, jax.Array):
            check_vocabulary(self.config, tokens, valid, "sequence")
        num_sequences = np.shape(tokens)[0]
        keys = sequence_keys(key, num_sequences)
        if time is not None:
            time = jnp.broadcast_to(as_time(time, num_sequences), num_sequences)
        batch = tokens.astype(jnp.int32), valid, time, keys
        if _is_traced((self.params, batch, policy, step)):
            require(
                not self.batch_invariant,
                "a batch-invariant model is that in programs of its own only; call it outside of "
                "jax.jit, or load it without batch_invariant",
            )
            sharding.require_axes(jax.sharding.get_abstract_mesh())
            static = {"cfg": self.config, "executor": executor}
            batch = jax.tree.map(jnp.asarray, batch)
            return forward(self.params, *batch, jnp.asarray(step), policy, **static)
        batch = self.place_sequences(batch)
        out, _ = self.run(forward_program, *batch, jnp.asarray(step), policy, executor=executor)
        return Output(out.logits[:num_sequences], out.gates[:, :num_sequences])

    def run(self, fn: Timed, *args: Any, **static: Any) -> tuple[Any, float]:
        """Runs a compiled function of (params, ...) in this model's context."""
        with self.context():
            return fn(self.inference_params, *args, cfg=self.config, **static)

    def place_sequences(self, batch: PyTree, multiple: int = 1) -> PyTree:
        """Splits sequences over the mesh; repeats the last one until they divide evenly.

        Args:
          multiple: pad to a multiple of this, rounded up to what the mesh divides. So the last,
            smaller batch has the shape of the others and needs no new program.
        """
        multiple += -multiple % sharding.num_batch_shards(self.mesh)

        def one(x):
            numpy = jnp if isinstance(x, jax.Array) else np  # on the host it compiles nothing
            x = numpy.asarray(x)
            extra = -x.shape[0] % multiple
            if extra:
                x = numpy.concatenate([x, numpy.broadcast_to(x[-1:], (extra, *x.shape[1:]))])
            return sharding.place_sequences(x, self.mesh)

        return jax.tree.map(one, batch)


def as_ids(sequences: Any, what: str) -> np.ndarray:
    """Sequences of token ids as one array.

    Args:
      what: the name of a sequence in messages.

    Raises: InputError for sequences of several lengths, and for anything but integers.
    """
    try:
        ids = np.asarray(sequences)
    except ValueError as error:
        raise InputError(
            f"{what}s differ in length; pad them on the left and give valid=, False at padding"
        ) from error
    integers = ids.size == 0 or np.issubdtype(ids.dtype, np.integer)
    require(integers, f"{what}s are of {ids.dtype}; {IDS}")
    require(not _hold_truths(sequences), f"{what}s hold True or False; {IDS}")
    return ids.astype(np.int32) if ids.size == 0 else ids


def _hold_truths(numbers: Any) -> bool:
    """Whether lists of numbers hold True or False, which numpy would read as 1 and 0."""
    if not isinstance(numbers, list | tuple):
        return False
    kinds = set(map(type, numbers))
    if kinds & {list, tuple}:
        return any(map(_hold_truths, numbers))
    return bool(kinds & {bool, np.bool_})


def as_valid(valid: Any) -> np.ndarray | jax.Array:
    """Where tokens are real, as one array of booleans; an array on the device stays there.

    Raises: InputError for sequences of several lengths, and for other values than true and false.
    """
    if isinstance(valid, jax.Array):
        return valid.astype(bool)
    try:
        found = np.asarray(valid)
    except ValueError as error:
        raise InputError("sequences of valid differ in length; give one value per token") from error
    require(
        found.size == 0 or (found.dtype.kind in "biuf" and bool(np.isin(found, (0, 1)).all())),
        "valid holds other values than True and False; give True where a token is real",
    )
    return found.astype(bool)


def as_time(time: Any, num_sequences: int) -> np.ndarray | jax.Array:
    """Times of denoising; an array on the device stays there.

    Raises: InputError for other shapes than one, or one per sequence, and for times outside [0, 1].
    """
    if not isinstance(time, jax.Array):
        try:
            time = np.asarray(time, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"time={shown(time)} is no number; give t in (0, 1]") from error
        require(bool(((time >= 0) & (time <= 1)).all()), f"time={time} must lie in [0, 1]")
    require(
        time.shape in ((), (1,), (num_sequences,)),
        f"time has shape {time.shape} for {num_sequences} sequences; give one, or one per sequence",
    )
    return time.astype(np.float32)


def check_shapes(
    cfg: ModelConfig,
    shape: tuple[int, ...],
    valid: Bool[ArrayLike, "B T"] | None,
    what: str = "tokens",
) -> None:
    """Raises: InputError for tokens or `valid` of wrong shapes, or of more positions than the
    model has."""
    require(len(shape) == 2, f"{what} have shape {shape}; give [batch, length]")
    require(
        valid is None or np.shape(valid) == shape,
        f"valid has shape {np.shape(valid)} and {what} {shape}; they must agree",
    )
    require(
        cfg.rope_theta is not None or shape[1] <= cfg.max_length,
        f"{shape[1]} tokens are more than the model's {cfg.max_length} positions; shorten them",
    )


def check_vocabulary(
    cfg: ModelConfig,
    tokens: Int[np.ndarray, "B T"],
    valid: Bool[ArrayLike, "B T"] | None,
    what: str,
    numbers: Sequence[int] | None = None,
) -> None:
    """Raises: InputError for a token outside the vocabulary; padding may be anything.

    Args:
      numbers: of the sequences, in messages; None: from 0.
    """
    present = True if valid is None else np.asarray(valid, bool)
    outside = np.argwhere(((tokens < 0) | (tokens >= cfg.vocab_size)) & present)
    for place, position in outside[:1]:
        number = place if numbers is None else numbers[place]
        raise InputError(
            f"{what} {number} has token {tokens[place, position]}, outside the vocabulary of "
            f"{cfg.vocab_size}; use the model's own tokenizer"
        )


def sequence_keys(key: jax.Array | None, num_sequences: int) -> jax.Array:
    """One threefry key per sequence. A single key is folded with the sequence's number; None is the
    key of seed 0."""
    key = seed_key(0) if key is None else key
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    require(typed, "the key is none of jax.random.key; make it with that, and several by split")
    require(key.ndim <= 1, f"keys have shape {key.shape}; give one key, or one for each sequence")
    if key.ndim == 1:
        if key.shape[0] != num_sequences:
            raise InputError(
                f"{key.shape[0]} keys for {num_sequences} sequences; give one key, or one for each"
            )
        return threefry_key(key)
    key = threefry_key(key)
    return fold_in_each(key, np.arange(num_sequences))


def require_model(model: Any) -> None:
    """Raises: InputError for what is no `Model`."""
    require(isinstance(model, Model), f"model={shown(model)} is no model; give what `load` returns")


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def forward(params, tokens, valid, time, sequence_keys, step, policy, *, cfg, executor) -> Output:
    out = transformer.run_layers(
        cfg, params, tokens, valid, policy,
        time=time, step=step, sequence_keys=sequence_keys, executor=executor,
    )  # fmt: skip
    return Output(transformer.predict_logits(cfg, params, out.h, valid, time), out.gates)


forward_program = timed_jit("cfg", "executor")(forward)
