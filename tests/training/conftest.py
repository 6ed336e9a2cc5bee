"""What several tests of training need."""

import jax
import pytest


@pytest.fixture
def optax_promotion():
    """Optax multiplies bools by integers, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
