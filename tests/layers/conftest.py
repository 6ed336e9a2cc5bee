"""What the tests of both layers need."""

import jax
import pytest


@pytest.fixture
def optax_promotion():
    """Adam divides a float by an int32, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
