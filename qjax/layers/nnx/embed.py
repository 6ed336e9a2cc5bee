"""`Embed`: a quantized table, of which only the rows asked for are dequantized."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, DTypeLike, Float, Integer, Num

from qjax import ops, rtn
from qjax.layers import dense, embedding
from qjax.layers.nnx.packed import Packed, drawing
from qjax.tensor import QTensor, check_packed


class Embed(Packed):
    """A table of embeddings; quantized.

    The table is stored as a `QTensor` ``[features, num_embeddings]``, the transpose of
    Flax's: a lookup reads the words of its own rows and dequantizes those, and `attend`
    multiplies by the same tensor. A checkpoint's ``[vocabulary, features]`` tensor,
    read as the weight of an output layer, has that form already.

    Example:
      >>> from qjax.layers.nnx import Embed
      >>> table = jax.random.normal(jax.random.key(0), (1000, 128))
      >>> layer = Embed.from_embedding(table, bits=4, group_size=32)
      >>> layer.embedding.shape, layer.embedding.nbytes < table.nbytes / 6
      ((128, 1000), True)
      >>> rows = layer(jnp.array([[3, 1, 4]]))
      >>> bool((rows[0, 0] == qjax.dequantize(layer.embedding)[:, 3]).all())
      True
      >>> layer.attend(rows).shape
      (1, 3, 1000)

      An empty one, for `load`.

      >>> layer = Embed(num_embeddings=1000, features=128, group_size=32)
      >>> layer.load(qjax.quantize(table.T, bits=3, group_size=64))

    Args:
      num_embeddings: Number of rows.
      features: Size of a row.
      bits: As in `Linear`.
      group_size: Features of a row that share a scale; None for all of them
        (default: 128).
      symmetric: As in `Linear`.
      dtype: Dtype of the rows and of `attend` (default: None, that of the scales for
        rows, and inferred from query and scales for `attend`).
      param_dtype: Dtype of new scales (default: float32).
      embedding_init: Draws a dense table ``[num_embeddings, features]``, which is
        rounded to nearest. None leaves the layer empty, for `load`. A `QTensor` is
        taken, and ``bits``, ``group_size`` and ``symmetric`` are not looked at
        (default: None).
      implementation: As in `qjax.matmul`, for `attend` (default: None).
      rngs: As in `Linear`.

    Raises:
      ValueError: If ``features`` is no multiple of ``group_size`` or does not fill
        whole words, a table has another shape, or ``rngs`` is missing.

    Attributes:
      embedding: The table as a `QTensor` of arrays, ``[features, num_embeddings]``.
      packed: The same `QTensor`, but each array a Variable, `Quantized` or `Scale`.
    """

    _weight = "embedding"
    _axes = embedding.AXES

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Initializer | QTensor | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation
        self._make(
            embedding_init,
            drawing(rngs, embedding_init=embedding_init),
            (features, num_embeddings),
            embedding.start,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            param_dtype=param_dtype,
        )

    @classmethod
    def from_qtensor(
        cls,
        embedding: QTensor,
        *,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Embed":
        """Makes a layer of a quantized table: any format, act-order, mixed widths.

        Args:
          embedding: ``[features, num_embeddings]``, or a stack of them for `nnx.vmap`.
            It is prepared for this device once, here.
          dtype: Dtype of the rows and of `attend`.
          implementation: As in `qjax.matmul`, for `attend`.

        Returns:
          The layer.

        Raises:
          TypeError: If the table is no `QTensor`.
        """
        check_packed(embedding, cls._weight)
        features, num_embeddings = embedding.shape[-2:]
        return cls(
            num_embeddings,
            features,
            dtype=dtype,
            param_dtype=embedding.dtype,
            embedding_init=embedding,
            implementation=implementation,
        )

    @classmethod
    def from_embedding(
        cls,
        embedding: Float[Array, "num_embeddings features"],
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Embed":
        """Makes a layer of a dense table, rounded to nearest by `qjax.quantize`.

        Args:
          embedding: ``[num_embeddings, features]`` as in `nnx.Embed`.
          bits: Width of a code, 2 to 8.
          group_size: Features of a row that share a scale; None for all of them.
          symmetric: Whether zero is the middle code, so that none is stored.
          dtype: Dtype of the rows and of `attend`.
          implementation: As in `qjax.matmul`, for `attend`.

        Returns:
          The layer; its scales have the dtype of ``embedding``.

        Raises:
          ValueError: As `qjax.quantize` of the transposed table.
        """
        table = rtn.quantize(embedding.T, bits, group_size, symmetric)
        return cls.from_qtensor(table, dtype=dtype, implementation=implementation)

    @property
    def embedding(self) -> QTensor:
        """The table, put together of the values of its Variables."""
        return nnx.as_pure(self.packed)

    def load(self, embedding: QTensor) -> None:
        """Replaces the table by another of the same shape, whatever its format.

        Args:
          embedding: The new table. It is prepared for this device once, here.

        Raises:
          TypeError: If it is no `QTensor`.
          ValueError: If its shape differs.
        """
        shape, name, axes = self.embedding.shape, self._weight, self._axes
        dense.check_shapes(embedding, None, shape, name=name, axes=axes)
        self._fill(ops.prepare(embedding))

    def __call__(
        self, inputs: Integer[Array | np.ndarray, "*batch"]
    ) -> Float[Array, "..."]:
        """Looks up rows.

        Args:
          inputs: Integers. As in Flax, negative ones count from the end, others that
            have no row give NaN, and a table of one row gives that row.

        Returns:
          ``[..., features]`` in ``dtype``, each row rounded as `qjax.dequantize` does.

        Raises:
          ValueError: If ``inputs`` are no integers.
          NotImplementedError: If the words of the table's layout hold several rows.
        """
        return embedding.lookup(self.embedding, inputs, self.dtype)

    def factored(
        self,
        a: Float[Array, "features rank"],
        b: Float[Array, "rank num_embeddings"] | None,
        inputs: Integer[Array | np.ndarray, "*batch"],
    ) -> Float[Array, "..."]:
        """As in `Linear`; the rows are those of ``(a @ b).T``."""
        return embedding.factored(a, b, inputs)

    def attend(self, query: Num[Array, "*batch features"]) -> Float[Array, "..."]:
        """Multiplies by the transposed table, as for logits.

        Args:
          query: ``[..., features]``.

        Returns:
          ``[..., num_embeddings]``.

        Raises:
          ValueError: If ``query`` does not end in ``features``.
        """
        return dense.apply(
            query,
            self.embedding,
            None,
            dtype=self.dtype,
            implementation=self.implementation,
        )
