"""Training what `qjax.quantize_model` made of models that nobody here wrote."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

import qjax
from qjax import training
from qjax.layers import nnx as layers
from qjax.layers.linen import to_params
from qjax.layers.nnx import wrapped
from qjax.training import shadow
from tests.layers import cases, foreign
from tests.layers.foreign import MODEL, SPEC, same, x
from tests.layers.test_replace_linen import Model

RANK, ALPHA = 2, 6
TOKENS = foreign.tokens(2, 3)
# Sums over the whole model, back and forth.
TOLERANCE = 10 * foreign.FLOAT32


def loss_of(y):
    return (y.astype(jnp.float32) ** 2).mean()


@functools.cache
def by_nnx() -> nnx.Module:
    return qjax.quantize_model(foreign.transformer(), SPEC, TOKENS, report=[].append)


@functools.cache
def by_linen() -> tuple:
    variables = {"params": jax.jit(Model().init)(jax.random.key(0), TOKENS)["params"]}
    return qjax.quantize_model(Model(), SPEC, TOKENS, variables=variables)


@nnx.jit
def gradient_of_nnx(model: nnx.Module, *inputs) -> tuple:
    """The loss, and its gradient by the integer weights."""

    def loss(shadows, model):
        return loss_of(training.nnx.with_shadows(model, shadows)(*inputs))

    zeros = shadow.zeros(training.nnx.kernels(model))
    return nnx.value_and_grad(loss)(zeros, model)


def matrices_of_nnx(model: nnx.Module, dense: nnx.State) -> dict:
    """What belongs to a dense model, as the matrices that are packed in another."""
    flat = {path: leaf.get_raw_value() for path, leaf in nnx.to_flat_state(dense)}
    return {
        "/".join(map(str, (*path, name))): wrapped.form_of(module, name).matrix(
            flat[(*path, name)]
        )
        for path, module in nnx.iter_modules(model)
        for name in wrapped.packed_weights(module)
    }


def named(kernels: dict) -> dict:
    """By the paths of weights in place of those of their layers."""
    whole = {"w", "up", "down", "input_embedding"}
    is_named = lambda path: path.rpartition("/")[2] in whole and path != "up"  # noqa: E731
    return {p if is_named(p) else f"{p}/kernel": w for p, w in kernels.items()}


def adapters(shapes: dict, key: int = 3) -> dict:
    """Adapters that are not zero, for each shape."""
    draw = cases.rng(key)

    def pair(shape):
        *stack, k, n = shape
        a = draw.normal(size=(*stack, k, RANK)) / 8
        b = draw.normal(size=(*stack, RANK, n)) / 8
        return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}

    return {path: pair(shape) for path, shape in shapes.items()}


class TestNnx:
    @pytest.mark.slow
    def test_every_weight_has_a_shadow(self):
        model = by_nnx()
        dense = foreign.dequantized(model, foreign.transformer())
        gradient = nnx.jit(nnx.grad(lambda model: loss_of(model(TOKENS))))(dense)
        wanted = matrices_of_nnx(model, gradient)

        found = named(gradient_of_nnx(model, TOKENS)[1])
        assert found.keys() == wanted.keys()
        assert {"attention/query/kernel", "q/w", "embedder/input_embedding",
                "experts/up", "up/kernel"} <= found.keys()  # fmt: skip
        for path in found:
            same(found[path], wanted[path], TOLERANCE)
        assert not any(hasattr(m, wrapped.BESIDE) for _, m in nnx.iter_modules(model))

    def test_steps_lower_the_loss(self):
        model = nnx.MultiHeadAttention(4, MODEL, decode=False, rngs=nnx.Rngs(0))
        model, inputs = qjax.quantize_model(model, SPEC), x(2, 3, MODEL)
        optimizer = training.diode_mix(1e-2)

        @nnx.jit
        def step(model, state, residual):
            def loss(shadows, model):
                y = training.nnx.with_shadows(model, shadows)(inputs)
                return ((y - 1) ** 2).mean()

            kernels = training.nnx.kernels(model)
            value, gradient = nnx.value_and_grad(loss)(shadow.zeros(kernels), model)
            updates, state = optimizer.update(gradient, state)
            kernels, residual = training.apply_with_residual(kernels, updates, residual)
            training.nnx.load_kernels(model, kernels)
            return state, residual, value

        before = training.nnx.kernels(model)
        residual = shadow.zeros(before)
        state, losses = optimizer.init(residual), []
        for _ in range(10):
            state, residual, value = step(model, state, residual)
            losses.append(float(value))
        assert losses[-1] < losses[0]
        after = training.nnx.kernels(model)
        for path in before:
            assert (after[path].numpy() != before[path].numpy()).any(), path

    def test_adapters_beside_every_weight(self):
        model = by_nnx()
        adapted = training.nnx.add_lora(model, RANK, alpha=ALPHA, rngs=nnx.Rngs(0))
        run = nnx.jit(lambda model: model(TOKENS))
        y = run(model)
        same(run(adapted), y)  # b starts at zero
        kernels = named(training.nnx.kernels(model))
        drawn = adapters({path: w.shape for path, w in kernels.items()})
        state = nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))
        assert len(state) == 2 * len(kernels)
        for names, variable in state:
            kept = [str(n) for n in names[:-1] if n not in (wrapped.BESIDE, 0)]
            path = "/".join(kept)
            pair = drawn[path if path in drawn else f"{path}/kernel"]
            assert variable.shape == pair[names[-1]].shape
            variable.set_value(pair[names[-1]])
        dense = foreign.dequantized(model, foreign.transformer())
        flat = dict(nnx.to_flat_state(nnx.state(dense)))
        for path, module in nnx.iter_modules(model):
            for name in wrapped.packed_weights(module):
                pair = drawn["/".join(map(str, (*path, name)))]
                delta = ALPHA / RANK * jnp.matmul(pair["a"], pair["b"])
                held = interpreted(delta, wrapped.form_of(module, name))
                variable = flat[(*path, name)]
                variable.set_value(variable[...] + held)
        wanted = run(dense)
        same(run(adapted), wanted, TOLERANCE)
        assert cases.error(y, wanted) > 1e-2

    @pytest.mark.usefixtures("optax_promotion")
    def test_only_adapters_are_trained_and_merged(self):
        model = nnx.MultiHeadAttention(4, MODEL, decode=False, rngs=nnx.Rngs(0))
        model = qjax.quantize_model(model, SPEC)
        inputs = x(2, 3, MODEL)
        adapted = training.nnx.add_lora(
            model, RANK, where=lambda path: path in ("value", "out"), rngs=nnx.Rngs(0)
        )
        assert type(adapted.query) is type(model.query)
        assert not hasattr(adapted.query, wrapped.BESIDE)
        optimizer = nnx.Optimizer(adapted, optax.adam(1e-1), wrt=nnx.LoRAParam)
        before = jax.tree.map(jnp.copy, nnx.state(adapted, nnx.Not(nnx.LoRAParam)))

        @nnx.jit
        def step(model, optimizer):
            wrt = nnx.DiffState(0, nnx.LoRAParam)
            loss = lambda model: ((model(inputs) - 1) ** 2).mean()  # noqa: E731
            value, gradient = nnx.value_and_grad(loss, argnums=wrt)(model)
            optimizer.update(model, gradient)
            return value

        losses = [float(step(adapted, optimizer)) for _ in range(5)]
        assert losses[-1] < losses[0]
        chex.assert_trees_all_equal(nnx.state(adapted, nnx.Not(nnx.LoRAParam)), before)
        merged = training.nnx.merge_lora(adapted)
        assert not nnx.to_flat_state(nnx.state(merged, nnx.LoRAParam))
        y, base = adapted(inputs), model(inputs)
        # As near as 4 bits take it, and nearer than without the adapters.
        distance = lambda other: float(((other - y) ** 2).mean())  # noqa: E731
        assert distance(merged(inputs)) < 0.5 * distance(base)
        assert hasattr(adapted.value, wrapped.BESIDE)

    def test_a_shared_weight_is_one(self):
        class Tied(nnx.Module):
            def __init__(self):
                self.one = foreign.Einsum("BTD,DF->BTF", (MODEL, MODEL), nnx.Rngs(0))
                self.two = foreign.Einsum("BTD,DF->BTF", (MODEL, MODEL), nnx.Rngs(1))
                self.two.w = self.one.w

            def __call__(self, x):
                return self.two(jnp.tanh(self.one(x)))

        model, inputs = qjax.quantize_model(Tied(), SPEC), x(2, 3, MODEL)
        (path,) = kernels = training.nnx.kernels(model)
        assert path == "one/w"
        w = qjax.dequantize(kernels[path])

        def dense(w):
            y = jnp.tanh(jnp.matmul(inputs, w, precision="highest"))
            return loss_of(jnp.matmul(y, w, precision="highest"))

        found = gradient_of_nnx(model, inputs)[1]
        same(found[path], jax.grad(dense)(w))
        adapted = training.nnx.add_lora(model, RANK, rngs=nnx.Rngs(0))
        assert len(nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))) == 2
        merged = training.nnx.merge_lora(adapted)
        assert list(training.nnx.kernels(merged)) == ["one/w"]
        same(merged(inputs), model(inputs))

    def test_modules_with_several_weights(self):
        class Several(nnx.Module):
            def __init__(self):
                self.kernel = nnx.Param(x(MODEL, MODEL))
                self.embedding = nnx.Param(x(MODEL, MODEL))

            def __call__(self, x):
                return x @ self.kernel[...] + x @ self.embedding[...].T

        model = qjax.quantize_model(nnx.List([Several()]), SPEC, method="__len__")
        assert sorted(training.nnx.kernels(model)) == ["0/embedding", "0/kernel"]
        picked = training.nnx.add_lora(
            model, RANK, where=lambda path: path == "0/kernel", rngs=nnx.Rngs(0)
        )
        assert wrapped.beside(picked[0], "kernel")
        assert not wrapped.beside(picked[0], "embedding")

    def test_a_scan_over_layers(self):
        class Layer(nnx.Module):
            def __init__(self, rngs):
                self.up = nnx.Linear(MODEL, MODEL, rngs=rngs)
                self.down = nnx.LinearGeneral(MODEL, MODEL, rngs=rngs)

            def __call__(self, x):
                return x + self.down(jnp.tanh(self.up(x)))

        class Stack(nnx.Module):
            def __init__(self):
                keys = nnx.split_rngs(splits=2)
                self.layers = keys(nnx.vmap(Layer))(nnx.Rngs(0))

            def __call__(self, x):
                @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
                def run(x, layer):
                    return nnx.remat(lambda layer, x: layer(x))(layer, x)

                return run(x, self.layers)

        model, inputs = qjax.quantize_model(Stack(), SPEC), x(3, MODEL)
        kernels = training.nnx.kernels(model)
        # Its stack is read in place, not by itself.
        assert type(model.layers.up) is not layers.Linear
        assert {path: w.shape for path, w in kernels.items()} == dict.fromkeys(
            ("layers/up", "layers/down"), (2, MODEL, MODEL)
        )

        def dense(weights):
            y = inputs
            pairs = zip(weights["layers/up"], weights["layers/down"], strict=True)
            for up, down in pairs:
                h = jnp.tanh(jnp.matmul(y, up, precision="highest"))
                y = y + jnp.matmul(h, down, precision="highest")
            return loss_of(y)

        found = gradient_of_nnx(model, inputs)[1]
        wanted = jax.grad(dense)(
            {path: qjax.dequantize(w) for path, w in kernels.items()}
        )
        for path in wanted:
            same(found[path], wanted[path], TOLERANCE)
        adapted = training.nnx.add_lora(model, RANK, rngs=nnx.Rngs(0))
        same(nnx.jit(lambda model: model(inputs))(adapted), model(inputs))

    def test_weights_that_are_dense_while_they_run(self):
        class Unusual(nnx.Module):
            """Looks at values, and reads the weight of another module."""

            def __init__(self):
                self.w = nnx.Param(x(MODEL, MODEL))
                self.inner = foreign.Einsum("BD,DF->BF", (MODEL, MODEL), nnx.Rngs(0))

            def __call__(self, x):
                y = x @ self.w[...]
                return y * int(y.sum() != 0) + x @ self.inner.w[...]

        model, inputs = qjax.quantize_model(Unusual(), SPEC), x(3, MODEL)
        adapted = training.nnx.add_lora(model, RANK, rngs=nnx.Rngs(0))
        dense = 0
        for path, weight in training.nnx.kernels(model).items():
            pair = adapters({path: weight.shape})[path]
            module = adapted if path == "w" else adapted.inner
            (beside,) = wrapped.beside(module, "w")
            beside.a[...], beside.b[...] = pair["a"], pair["b"]
            dense += training.lora.merge(weight, **pair)
        with pytest.warns(UserWarning, match="is (run on|made) dense"):
            found = adapted(inputs)
        same(found, inputs @ dense)

    def test_paths_that_are_not_there(self, refuses):
        model = by_nnx()
        with refuses("shadows has ['q/v'], which are no packed weights of the model"):
            training.nnx.with_shadows(model, {"q/v": jnp.zeros((MODEL, MODEL))})
        with refuses("where picks none of the packed weights: ['"):
            training.nnx.add_lora(model, 2, where=lambda _: False, rngs=nnx.Rngs(0))
        with refuses("rank=0 must be at least 1."):
            training.nnx.add_lora(model, 0, rngs=nnx.Rngs(0))


def interpreted(matrix, form):
    """A matrix as the dense weight that it is packed of."""
    order = (*form.stack, *form.rows, *form.columns)
    shape = [form.shape[axis] for axis in order]
    outer = matrix.ndim - len(form.stack) - 2
    axes = (*range(outer), *(outer + int(axis) for axis in np.argsort(order)))
    return matrix.reshape(*matrix.shape[:outer], *shape).transpose(axes)


def by_path(tree: dict) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


class TestLinen:
    @pytest.mark.slow
    def test_every_weight_has_a_shadow(self):
        module, variables = by_linen()
        params = foreign.dequantized_params(module, variables)
        dense = lambda params: loss_of(Model().apply({"params": params}, TOKENS))  # noqa: E731
        wanted = by_path(jax.jit(jax.grad(dense))(params))
        apply = training.linen.shadowed(module.apply)

        @jax.jit
        def gradient(variables):
            def loss(shadows):
                return loss_of(apply({**variables, "shadow": shadows}, TOKENS))

            return jax.grad(loss)(shadow.zeros(to_params(variables)))

        found = by_path(gradient(variables))
        for path, (form, _) in module.packed_forms.items():
            same(found.pop(path), form.matrix(wanted[path]), TOLERANCE)
        assert set(found.values()) == {None}

    def test_adapters_beside_every_weight(self):
        module, variables = by_linen()
        apply = training.linen.adapted(module.apply, alpha=ALPHA)
        given = training.linen.add_lora(variables, RANK, jax.random.key(0))
        y = jax.jit(module.apply)(variables, TOKENS)
        same(jax.jit(apply)(given, TOKENS), y)  # b starts at zero
        shapes = {
            path: w.shape
            for path, w in by_path(to_params(variables)).items()
            if isinstance(w, qjax.QTensor)
        }
        drawn = adapters(shapes)
        tree = traverse_util.unflatten_dict(drawn, sep="/")
        chex.assert_trees_all_equal_shapes(tree, given["lora"])
        params = by_path(foreign.dequantized_params(module, variables))
        for path, (form, _) in module.packed_forms.items():
            delta = ALPHA / RANK * jnp.matmul(drawn[path]["a"], drawn[path]["b"])
            params[path] = params[path] + interpreted(delta, form)
        dense = {"params": traverse_util.unflatten_dict(params, sep="/")}
        wanted = jax.jit(Model().apply)(dense, TOKENS)
        same(jax.jit(apply)({**given, "lora": tree}, TOKENS), wanted, TOLERANCE)
        assert cases.error(y, wanted) > 1e-2

    def test_steps_lower_the_loss(self):
        model, inputs = nn.MultiHeadDotProductAttention(4), x(2, 3, MODEL)
        variables = model.init(jax.random.key(0), inputs)
        model, variables = qjax.quantize_model(model, SPEC, inputs, variables=variables)
        optimizer, apply = (
            training.diode_mix(1e-2),
            training.linen.shadowed(model.apply),
        )

        @jax.jit
        def step(variables, state, residual):
            def loss(shadows):
                y = apply({**variables, "shadow": shadows}, inputs)
                return ((y - 1) ** 2).mean()

            kernels = to_params(variables)
            value, gradient = jax.value_and_grad(loss)(shadow.zeros(kernels))
            updates, state = optimizer.update(gradient, state)
            kernels, residual = training.apply_with_residual(kernels, updates, residual)
            return (
                training.linen.with_kernels(variables, kernels),
                state,
                residual,
                value,
            )

        residual = shadow.zeros(to_params(variables))
        held, losses = (variables, optimizer.init(residual), residual), []
        for _ in range(10):
            *held, value = step(*held)
            losses.append(float(value))
        assert losses[-1] < losses[0]

    def test_adapters_are_trained_and_merged(self):
        model, inputs = nn.MultiHeadDotProductAttention(4), x(2, 3, MODEL)
        variables = model.init(jax.random.key(0), inputs)
        model, variables = qjax.quantize_model(model, SPEC, inputs, variables=variables)
        apply = training.linen.adapted(model.apply, alpha=ALPHA)
        variables = training.linen.add_lora(
            variables,
            RANK,
            jax.random.key(1),
            where=lambda path: path in ("value", "out"),
        )
        assert sorted(variables["lora"]) == ["out", "value"]

        @jax.jit
        def step(adapters):
            def loss(adapters):
                return (
                    (apply({**variables, "lora": adapters}, inputs) - 1) ** 2
                ).mean()

            value, gradient = jax.value_and_grad(loss)(adapters)
            return jax.tree.map(lambda a, g: a - 0.1 * g, adapters, gradient), value

        trained, losses = variables["lora"], []
        for _ in range(5):
            trained, value = step(trained)
            losses.append(float(value))
        assert losses[-1] < losses[0]
        given = {**variables, "lora": trained}
        merged = training.linen.merge_lora(given, alpha=ALPHA)
        assert "lora" not in merged
        y, base = apply(given, inputs), model.apply(merged | variables, inputs)
        distance = lambda other: float(((other - y) ** 2).mean())  # noqa: E731
        assert distance(model.apply(merged, inputs)) < 0.5 * distance(base)

    def test_shadows_of_adapted_models(self):
        model, inputs = nn.Dense(MODEL), x(3, MODEL)
        variables = model.init(jax.random.key(0), inputs)
        model, variables = qjax.quantize_model(model, SPEC, inputs, variables=variables)
        mine, layer = training.linen, qjax.layers.linen.Dense(MODEL)
        given = mine.add_lora(variables, RANK, jax.random.key(0))
        zeros = shadow.zeros(to_params(variables))

        def gradient(apply, variables):
            def loss(shadows):
                return loss_of(apply({**variables, "shadow": shadows}, inputs))

            return jax.jit(jax.grad(loss))(zeros)

        wanted = gradient(mine.shadowed(model.apply), variables)["kernel"]
        # Adapters start as nothing, and each shadow counts once.
        for apply in (model.apply, layer.apply):
            for both in (
                mine.shadowed(mine.adapted(apply)),
                mine.adapted(mine.shadowed(apply)),
            ):
                same(gradient(both, given)["kernel"], wanted)

    def test_paths_that_are_not_there(self, refuses):
        module, variables = by_linen()
        zeros = jnp.zeros((MODEL, MODEL))
        wrong = {**variables, "shadow": {"Foreign_0": {"v": zeros}}}
        with refuses(
            "variables['shadow'] has ['Foreign_0/v'], which are no packed weights"
        ):
            training.linen.shadowed(module.apply)(wrong, TOKENS)
        given = training.linen.add_lora(variables, RANK, jax.random.key(0))
        with refuses("variables['lora'] is there already"):
            training.linen.add_lora(given, RANK, jax.random.key(0))
        with refuses("where picks none of the packed weights: ['"):
            training.linen.add_lora(
                variables, RANK, jax.random.key(0), where=lambda _: False
            )
        with refuses("rank=0 must be at least 1."):
            training.linen.add_lora(variables, 0, jax.random.key(0))
