"""`Embed`: a quantized table, of which only the rows asked for are dequantized."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jaxtyping import Array, DTypeLike, Float, Integer, Num

from qjax.layers import dense, embedding
from qjax.layers.linen.variables import weight
from qjax.tensor import QTensor


class Embed(nn.Module):
    """A table of embeddings; quantized.

    The table is stored as a `QTensor` ``[features, num_embeddings]``, the transpose of
    Flax's: a lookup reads the words of its own rows and dequantizes those, and `attend`
    multiplies by the same tensor. A checkpoint's ``[vocabulary, features]`` tensor,
    read as the weight of an output layer, has that form already.

    Example:
      >>> from qjax.layers.linen import Embed, to_variables
      >>> table = jax.random.normal(jax.random.key(0), (1000, 64))
      >>> quantized = qjax.quantize(table.T, bits=4, group_size=32)
      >>> variables = to_variables({"embedding": quantized})
      >>> layer = Embed(num_embeddings=1000, features=64)
      >>> rows = layer.apply(variables, jnp.array([[3, 1, 4]]))
      >>> rows.shape
      (1, 3, 64)
      >>> bool((rows[0, 0] == qjax.dequantize(quantized)[:, 3]).all())
      True
      >>> layer.apply(variables, rows, method="attend").shape
      (1, 3, 1000)

    Attributes:
      num_embeddings: Number of rows.
      features: Size of a row.
      bits: As in `Dense`.
      group_size: Features of a row that share a scale; None for all of them
        (default: 128).
      symmetric: As in `Dense`.
      dtype: Dtype of the rows and of `attend` (default: None, that of the scales for
        rows, and inferred from query and scales for `attend`).
      param_dtype: Dtype of new scales (default: float32).
      embedding_init: Draws a dense table ``[num_embeddings, features]``, which is
        rounded to nearest. None makes all scales zero and forms no dense table
        (default: None).
      implementation: As in `qjax.matmul`, for `attend` (default: None).
    """

    num_embeddings: int
    features: int
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    embedding_init: Initializer | None = None
    implementation: str | None = None

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
          ValueError: If ``inputs`` are no integers, or the variables hold no quantized
            table or one of another shape.
          NotImplementedError: If the words of the table's layout hold several rows.
        """
        return embedding.lookup(self._table(), inputs, self.dtype)

    @nn.nowrap
    def factored(
        self,
        a: Float[Array, "features rank"],
        b: Float[Array, "rank num_embeddings"] | None,
        inputs: Integer[Array | np.ndarray, "*batch"],
    ) -> Float[Array, "..."]:
        """As in `Dense`; the rows are those of ``(a @ b).T``."""
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
            self._table(),
            None,
            dtype=self.dtype,
            implementation=self.implementation,
        )

    # Not in `setup`, which Flax also tries without variables, before it lifts a module.
    @nn.compact
    def _table(self) -> QTensor:
        shape = (self.features, self.num_embeddings)
        start = dense.starting(self, self.embedding_init, shape, embedding.start)
        return weight(self, start, shape, "embedding", embedding.AXES)
