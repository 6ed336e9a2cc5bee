"""Quantized models in pickles: classes that are made at run time, found again."""

import pickle
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from flax import nnx

import qjax
from tests.layers import foreign
from tests.layers.foreign import MODEL, SPEC, same, x

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    layers = [
        foreign.Einsum("BTD,DF->BTF", (MODEL, MODEL), nnx.Rngs(0)),
        nnx.Linear(MODEL, 8, rngs=nnx.Rngs(0)),
    ]
    return qjax.quantize_model(nnx.Sequential(*layers), SPEC)


class Table(nn.Module):
    """A linen model whose attributes pickle takes: Flax's initializers are local."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(foreign.VOCABULARY, MODEL)(tokens)


@pytest.fixture(scope="module")
def linen():
    tokens = foreign.tokens(2, 3)
    variables = Table().init(jax.random.key(0), tokens)
    return *qjax.quantize_model(Table(), SPEC, tokens, variables=variables), tokens


def test_models_and_graphdefs(model):
    again = pickle.loads(pickle.dumps(model))
    assert type(again.layers[0]) is type(model.layers[0])
    assert isinstance(again.layers[0], foreign.Einsum)
    inputs = x(1, 3, MODEL)
    same(again(inputs), model(inputs), 0)
    graphdef, state = nnx.split(model)
    merged = nnx.merge(pickle.loads(pickle.dumps(graphdef)), state)
    same(merged(inputs), model(inputs), 0)


def test_linen_modules(linen):
    module, variables, tokens = linen
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module)
    assert again == module
    same(again.apply(variables, tokens), module.apply(variables, tokens), 0)


def test_a_class_derived_from_one_has_its_own_name(model):
    class Local(type(model.layers[0])):
        pass

    with pytest.raises((pickle.PicklingError, AttributeError), match="Local"):
        pickle.dumps(Local)


ELSEWHERE = """
import pickle, sys
from flax import nnx
with open(sys.argv[1], "rb") as file:
    model, graphdef, module, forms = pickle.load(file)
assert nnx.graphdef(model) == graphdef
assert type(model.layers[0]).__name__ == "Einsum"
assert type(module).packed_forms == forms
"""


def test_another_process(model, linen, tmp_path):
    module, *_ = linen
    file = tmp_path / "model.pickle"
    saved = (model, nnx.graphdef(model), module, type(module).packed_forms)
    file.write_bytes(pickle.dumps(saved))
    subprocess.run([sys.executable, "-c", ELSEWHERE, file], cwd=ROOT, check=True)
