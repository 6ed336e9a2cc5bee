"""Whole models: what is trained in them, under which transformation, and resumed."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import qjax
from qjax import training
from qjax.layers import linen
from qjax.layers import nnx as by_nnx
from qjax.layers.linen import Dense, to_params, to_variables
from qjax.layers.nnx import Linear
from qjax.training import shadow
from qjax.training.linen import LoRA, shadowed, with_kernels
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

X, Y = cases.inputs(rows=16), cases.rng(9).normal(size=(16, K)).astype(np.float32)


class MLP(nn.Module):
    """A linen model, perhaps with a layer that is computed again in the backward."""

    dense: type[nn.Module] = Dense

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(self.dense(N, name="up")(x))
        return x + self.dense(K, use_bias=False, name="down")(h)


class Model(nnx.Module):
    """Its nnx twin."""

    def __init__(self, params: dict):
        self.up = Linear.from_qtensor(params["up"]["kernel"], params["up"]["bias"])
        self.down = Linear.from_qtensor(params["down"]["kernel"])

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


def params(name: str = "mixed") -> dict:
    return {
        "up": {"kernel": cases.kernel(name), "bias": cases.bias()},
        "down": {"kernel": qjax.quantize(cases.dense(N, K), 8, None)},
    }


def loss_of(y):
    return ((y - jnp.asarray(Y)) ** 2).mean()


def dense_gradients(tree: dict) -> dict:
    """Of the dense weights without input scale, by way of the dequantized model."""
    weights = {
        name: qjax.dequantize(tree[name]["kernel"], jnp.float32) for name in tree
    }

    def loss(weights):
        product = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
        h = nn.gelu(product(X, weights["up"]) + tree["up"]["bias"][None])
        return loss_of(X + product(h, weights["down"]))

    return jax.grad(loss)(weights)


def dense_loss(tree: dict) -> float:
    """The loss of the dequantized model in float64, adapters beside its weights."""

    def weight(layer: dict) -> np.ndarray:
        low = np.asarray(layer["a"], np.float64) @ np.asarray(layer["b"], np.float64)
        return np.asarray(qjax.dequantize(layer["kernel"], jnp.float32)) + low

    x = np.asarray(X, np.float64)
    h = x @ weight(tree["up"]) + np.asarray(tree["up"]["bias"])
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return float(((x + h @ weight(tree["down"]) - Y) ** 2).mean())


@pytest.mark.parametrize("name", ["4bit", "mixed", "codebook", "float-zero"])
def test_gradients_are_differences_of_the_dequantized_model(name):
    tree = params(name)
    for i, layer in enumerate(tree.values()):
        k, n = layer["kernel"].shape
        layer["a"] = jnp.asarray(cases.rng(i).normal(size=(k, 3)), jnp.float32) / 10
        layer["b"] = jnp.asarray(cases.rng(i + 5).normal(size=(3, n)), jnp.float32) / 10

    def loss(tree):
        def product(x, layer):
            low = jnp.matmul(x, layer["a"], precision="highest")
            wide = jnp.matmul(low, layer["b"], precision="highest")
            return qjax.matmul(x, layer["kernel"]) + wide

        h = nn.gelu(product(X, tree["up"]) + tree["up"]["bias"][None])
        return loss_of(X + product(h, tree["down"]))

    gradients = jax.jit(jax.grad(loss, allow_int=True))(tree)
    leaves, structure = jax.tree.flatten(tree)
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        if gradient.dtype == jax.dtypes.float0:
            continue
        direction = cases.rng(20 + i).normal(size=gradient.shape)
        # The weights are rounded to float32, and the loss is curved: at this step,
        # either changes the difference by less than 1e-3 of it.
        step = 1e-2 * np.abs(leaves[i]).max() * direction / np.abs(direction).max()
        sides = [
            dense_loss(
                structure.unflatten(
                    [
                        *leaves[:i],
                        leaves[i] + sign * step.astype("f4"),
                        *leaves[i + 1 :],
                    ]
                )
            )
            for sign in (1, -1)
        ]
        expected = (sides[0] - sides[1]) / 2
        size = np.linalg.norm(gradient) * np.linalg.norm(step)
        assert abs((np.asarray(gradient) * step).sum() - expected) < 1e-3 * size, i


class TestShadows:
    @pytest.mark.parametrize("dense", [Dense, nn.remat(Dense)], ids=["", "remat"])
    def test_linen(self, dense):
        variables = to_variables(params())
        apply = shadowed(MLP(dense).apply)

        @jax.jit
        def step(variables):
            def loss(shadows):
                return loss_of(apply({**variables, "shadow": shadows}, X))

            return jax.value_and_grad(loss)(shadow.zeros(to_params(variables)))

        value, found = step(variables)
        wanted = dense_gradients(params())
        for name, gradient in wanted.items():
            assert cases.error(found[name]["kernel"], gradient) < 1e-4
        # Without the collection, and without the wrapper, the model is the same.
        plain = jax.jit(MLP().apply)(variables, X)
        # XLA may sum the loss of the one in another order.
        chex.assert_trees_all_close(value, jax.jit(loss_of)(plain), rtol=1e-6)

    @pytest.mark.parametrize("collections", [("shadow",), ()])
    def test_linen_scan(self, collections):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.gelu(Dense(K, name="dense")(x)), None

        pair = jnp.stack([cases.dense(K, K), -cases.dense(K, K)])
        kernels = qjax.quantize(pair, 4, GROUP)
        stacked = {"dense": {"kernel": kernels, "bias": jnp.zeros((2, K))}}
        variables = to_variables(stacked)
        axes = dict.fromkeys(("params", "quantized", *collections), 0)
        model = nn.scan(
            Step, length=2, variable_axes=axes, split_rngs={"params": True}
        )()

        def loss(shadows):
            y, _ = shadowed(model.apply)({**variables, "shadow": shadows}, X, None)
            return loss_of(y)

        def dense_loss(weights):
            y = X
            for w in weights:
                y = nn.gelu(jnp.matmul(y, w, precision="highest"))
            return loss_of(y)

        found = jax.jit(jax.grad(loss))(shadow.zeros(stacked))["dense"]["kernel"]
        wanted = jax.grad(dense_loss)(qjax.dequantize(kernels))
        assert cases.error(found, wanted) < 1e-4

    def test_nnx(self):
        model = Model(params())

        @nnx.jit
        def step(model):
            def loss(shadows):
                return loss_of(training.nnx.with_shadows(model, shadows)(X))

            return jax.grad(loss)(shadow.zeros(training.nnx.kernels(model)))

        found = step(model)
        for name, gradient in dense_gradients(params()).items():
            assert cases.error(found[name], gradient) < 1e-4
        assert isinstance(model.up, Linear)

    @pytest.mark.parametrize("name", ["general", "einsum", "experts"])
    def test_every_product_has_a_shadow(self, name):
        # Products with a kernel of many axes, of stacks, and of experts.
        if name == "experts":
            w = jax.tree.map(lambda *a: jnp.stack(a), *map(cases.kernel, ["4bit"] * 3))
            x, more = X, (jnp.array([5, 0, 9]),)
            twins = by_nnx.Experts.from_qtensor(w), linen.Experts(3, N, use_bias=False)
        elif name == "general":
            w, more = cases.kernel("float-zero"), ()
            x, sizes = X.reshape(-1, 4, K // 4), ((4, K // 4), (N // 8, 8))
            twins = (
                by_nnx.LinearGeneral.from_qtensor(w, *sizes, axis=(-2, -1)),
                linen.DenseGeneral(sizes[1], axis=(-2, -1), use_bias=False),
            )
        else:
            w = jax.tree.map(lambda *a: jnp.stack(a), *map(cases.kernel, ["mixed"] * 2))
            x, more = X.reshape(-1, 2, K), ()
            equation = (2, K, N), "BED,EDF->BEF"
            twins = (
                by_nnx.Einsum.from_qtensor(equation[1], equation[0], w),
                linen.Einsum(*equation, use_bias=False),
            )
        dense = qjax.dequantize(w, jnp.float32)
        variables = to_variables({"kernel": w})
        of_y = jnp.asarray(
            cases.rng(5).normal(size=twins[0](x, *more).shape), jnp.float32
        )

        def product(dense):
            if name == "experts":
                return jax.lax.ragged_dot(x, dense, *more, precision="highest")
            if name == "einsum":
                return jnp.einsum("bed,edf->bef", x, dense, precision="highest")
            return jnp.matmul(x.reshape(-1, K), dense, precision="highest")

        wanted = jax.grad(lambda d: (product(d).reshape(of_y.shape) * of_y).sum())(
            dense
        )
        if w.input_scale is not None:
            wanted = wanted * w.input_scale[..., None]
        apply = shadowed(twins[1].apply)

        def by_linen(shadows):
            return (apply({**variables, "shadow": shadows}, x, *more) * of_y).sum()

        def by_twin(shadows):
            layer = training.nnx.with_shadows(twins[0], shadows)
            return (layer(x, *more) * of_y).sum()

        found = jax.jit(jax.grad(by_linen))(shadow.zeros({"kernel": w}))["kernel"]
        twin = jax.jit(jax.grad(by_twin))(shadow.zeros({"": w}))[""]
        assert cases.error(found, wanted) < 1e-5
        chex.assert_trees_all_equal(found, twin)

    def test_calls_by_name(self):
        w = jax.tree.map(lambda *a: jnp.stack(a), *map(cases.kernel, ["4bit"] * 3))
        layer = linen.Experts(3, N, use_bias=False)
        twin = by_nnx.Experts.from_qtensor(w)
        variables, sizes = to_variables({"kernel": w}), jnp.array([5, 0, 9])

        def by_linen(zeros, *args, **kwargs):
            given = {**variables, "shadow": {"kernel": zeros}}
            return shadowed(layer.apply)(given, *args, **kwargs).sum()

        def by_twin(zeros, *args, **kwargs):
            return training.nnx.with_shadows(twin, {"": zeros})(*args, **kwargs).sum()

        zeros = shadow.zeros(w)
        for loss in (by_linen, by_twin):
            wanted = jax.grad(loss)(zeros, X, sizes)
            found = jax.grad(loss)(zeros, group_sizes=sizes, inputs=X)
            chex.assert_trees_all_equal(found, wanted)

    def test_twins_take_the_same_steps(self):
        optimizer = training.diode_mix(0.01)
        variables, model = to_variables(params("4bit")), Model(params("4bit"))
        apply = shadowed(MLP().apply)

        @jax.jit
        def linen_step(variables, state):
            kernels = to_params(variables)

            def loss(shadows):
                return loss_of(apply({**variables, "shadow": shadows}, X))

            value, gradient = jax.value_and_grad(loss)(shadow.zeros(kernels))
            updates, state = optimizer.update(gradient, state)
            kernels = training.apply_updates(kernels, updates)
            return with_kernels(variables, kernels), state, value

        @nnx.jit
        def nnx_step(model, state):
            kernels = training.nnx.kernels(model)

            def loss(shadows):
                return loss_of(training.nnx.with_shadows(model, shadows)(X))

            value, gradient = jax.value_and_grad(loss)(shadow.zeros(kernels))
            updates, state = optimizer.update(gradient, state)
            kernels = training.apply_updates(kernels, updates)
            training.nnx.load_kernels(model, kernels)
            return state, value

        linen_state = optimizer.init(shadow.zeros(to_params(variables)))
        nnx_state = optimizer.init(shadow.zeros(training.nnx.kernels(model)))
        losses = []
        for _ in range(4):
            variables, linen_state, value = linen_step(variables, linen_state)
            nnx_state, other = nnx_step(model, nnx_state)
            losses.append(float(value))
            assert float(other) == pytest.approx(float(value), rel=1e-6)
        assert losses[-1] < losses[0]
        found = to_params(variables)
        assert (found["up"]["kernel"].numpy() != cases.kernel("4bit").numpy()).any()
        for name in ("up", "down"):
            theirs = getattr(model, name).kernel
            chex.assert_trees_all_equal(found[name]["kernel"], theirs)

    def test_embeddings_have_shadows(self):
        table, tokens = cases.kernel("float-zero"), jnp.array([0, 3, -1, 3])
        twin, layer = by_nnx.Embed.from_qtensor(table), linen.Embed(N, K)
        variables = to_variables({"embedding": table})
        dense = qjax.dequantize(table, jnp.float32)
        zeros = shadow.zeros(table)

        def wanted(table):
            scores = jnp.matmul(X, table, precision="highest")
            return (table.T[tokens] ** 2).sum() + (scores**2).sum()

        def by_linen(zeros):
            given = {**variables, "shadow": {"embedding": zeros}}
            apply = shadowed(layer.apply)
            scores = apply(given, query=X, method="attend")
            return (apply(given, tokens) ** 2).sum() + (scores**2).sum()

        def by_twin(zeros):
            model = training.nnx.with_shadows(twin, {"": zeros})
            return (model(tokens) ** 2).sum() + (model.attend(query=X) ** 2).sum()

        found = jax.jit(jax.grad(by_linen))(zeros)
        assert cases.error(found, jax.grad(wanted)(dense)) < 1e-5
        chex.assert_trees_all_equal(jax.jit(jax.grad(by_twin))(zeros), found)
        assert list(training.nnx.kernels(twin)) == [""]

    def test_layers_that_are_not_there(self, refuses):
        wrong = {"up": {"kernle": jnp.zeros((K, N))}}
        message = "variables['shadow'] has ['up/kernle'], which are no packed weights"
        with refuses(f"{message} of the model; it has ['up/kernel', 'down/kernel']"):
            shadowed(MLP().apply)({**to_variables(params()), "shadow": wrong}, X)
        model = Model(params())
        with refuses("shadows has ['gate'], which are no packed weights of the model"):
            training.nnx.with_shadows(model, {"gate": jnp.zeros((K, N))})
        with refuses("kernels has ['gate'], which are no packed weights"):
            training.nnx.load_kernels(model, {"gate": cases.kernel("4bit")})
        with refuses("must have the format of the layer's own"):
            training.nnx.load_kernels(model, {"up": cases.kernel("4bit")})
        other = qjax.quantize(cases.dense(K, N), 8, None)
        with refuses("must have the format of the layer's own"):
            training.nnx.load_kernels(model, {"down": other})


@pytest.mark.parametrize("package", [training.nnx, training.linen, training.lora])
def test_all_is_all(package):
    for name in package.__all__:
        assert getattr(package, name).__doc__
    if package is not training.lora:  # a module, which imports what it is made of
        visible = {
            name
            for name, value in vars(package).items()
            if not name.startswith("_") and not inspect.ismodule(value)
        }
        assert visible == set(package.__all__)


@pytest.mark.parametrize("name", ["float-zero", "mixed"])
def test_scales_and_zeros_get_the_gradients_of_the_dequantized_model(name):
    tree = params(name)
    variables = to_variables(tree)

    def loss(floats):
        # Under remat, and summed over microbatches.
        apply = jax.checkpoint(MLP().apply)
        rows = (X.reshape(4, 4, K), jnp.asarray(Y).reshape(4, 4, K))

        def one(total, batch):
            x, y = batch
            found = apply({**variables, "params": floats}, x)
            return total + ((found - y) ** 2).mean() / 4, None

        return jax.lax.scan(one, 0.0, rows)[0]

    def wanted(floats):
        whole = to_params({**variables, "params": floats})
        h = jnp.matmul(X, qjax.dequantize(whole["up"]["kernel"]), precision="highest")
        h = nn.gelu(h + whole["up"]["bias"][None])
        w = qjax.dequantize(whole["down"]["kernel"])
        return loss_of(X + jnp.matmul(h, w, precision="highest"))

    found = jax.jit(jax.grad(loss))(variables["params"])
    exact = jax.jit(jax.grad(wanted))(variables["params"])
    assert jax.tree.structure(found) == jax.tree.structure(exact)
    for one, other in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        assert cases.error(one, other) < 1e-4


@pytest.mark.usefixtures("optax_promotion")
class TestScales:
    """They are ordinary parameters: optax trains them beside frozen words."""

    def test_accumulated_and_masked(self):
        variables = to_variables(params("float-zero"))
        start = variables["params"]
        mask = {
            "up": {"kernel": {"scale": True, "zero": True}, "bias": False},
            "down": {"kernel": {"scale": False}},
        }
        inverse = jax.tree.map(lambda is_trained: not is_trained, mask)
        optimizer = optax.MultiSteps(
            optax.chain(
                optax.masked(optax.adam(0.01), mask),
                optax.masked(optax.set_to_zero(), inverse),
            ),
            2,
        )

        @jax.jit
        def step(floats, state, rows):
            def loss(floats):
                y = MLP().apply({**variables, "params": floats}, X[rows])
                return ((y - jnp.asarray(Y)[rows]) ** 2).mean()

            value, gradient = jax.value_and_grad(loss)(floats)
            updates, state = optimizer.update(gradient, state, floats)
            return optax.apply_updates(floats, updates), state, value

        floats, state, losses = start, optimizer.init(start), []
        for i in range(12):
            before = floats
            rows = jnp.arange(8) + 8 * (i % 2)
            floats, state, value = step(floats, state, rows)
            losses.append(float(value))
            if i % 2 == 0:
                chex.assert_trees_all_equal(floats, before)
        assert sum(losses[-2:]) < sum(losses[:2])
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), floats, start)
        assert changed == mask
        # Two moments for what is trained, one sum for all: nothing for words.
        trained = sum(leaf.size for leaf in jax.tree.leaves(start["up"]["kernel"]))
        every = sum(leaf.size for leaf in jax.tree.leaves(start))
        held = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert sum(held) == 2 * trained + every

    def test_nnx(self):
        model = Model(params("float-zero"))
        words = jax.tree.map(jnp.copy, model.up.kernel.words)
        optimizer = nnx.Optimizer(model, optax.adam(1e-4), wrt=qjax.layers.nnx.Scale)
        wrt = nnx.DiffState(0, qjax.layers.nnx.Scale)

        @nnx.jit
        def step(model, optimizer):
            loss = lambda model: loss_of(nnx.remat(Model.__call__)(model, X))  # noqa: E731
            value, gradient = nnx.value_and_grad(loss, argnums=wrt)(model)
            optimizer.update(model, gradient)
            return value

        losses = [float(step(model, optimizer)) for _ in range(5)]
        assert losses == sorted(losses, reverse=True)
        chex.assert_trees_all_equal(model.up.kernel.words, words)
        chex.assert_trees_all_equal(model.up.bias[...], cases.bias())


def test_lora_under_remat_and_accumulated():
    class Adapted(nn.Module):
        lora: type[nn.Module] = LoRA

        @nn.compact
        def __call__(self, x):
            h = nn.gelu(self.lora(Dense(N, name="up"), 4)(x))
            return x + self.lora(Dense(K, use_bias=False, name="down"), 4)(h)

    base, rngs = to_variables(params()), {"params": jax.random.key(0)}
    _, made = Adapted().apply(base, X, rngs=rngs, mutable=["lora"])
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, made["lora"])

    def gradient(model, batches):
        def loss(adapters):
            def one(total, batch):
                y = model.apply({**base, "lora": adapters}, batch[0])
                return total + ((y - batch[1]) ** 2).sum(), None

            return jax.lax.scan(one, 0.0, batches)[0]

        return jax.jit(jax.grad(loss))(adapters)

    whole = gradient(Adapted(), (X[None], jnp.asarray(Y)[None]))
    parts = (X.reshape(4, 4, K), jnp.asarray(Y).reshape(4, 4, K))
    found = gradient(Adapted(nn.remat(LoRA)), parts)
    for one, other in zip(*map(jax.tree.leaves, (found, whole)), strict=True):
        assert cases.error(one, other) < 1e-5


class TestResuming:
    """Saved by orbax after some steps and restored: the same bits follow."""

    def save_and_restore(self, folder, state):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "state", state)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            return checkpointer.restore(folder / "state", abstract)

    def test_weights(self, tmp_path):
        optimizer = training.diode_mix(
            0.02, galore=training.GaLore(rank=8, update_proj_gap=2, scale=1.0)
        )

        @jax.jit
        def step(state):
            kernels, moments, residual, key = (
                state[name] for name in ("kernels", "optimizer", "residual", "key")
            )
            key, draw = jax.random.split(key)

            def loss(shadows):
                h = nn.gelu(shadow.matmul(X, kernels["up"], shadows["up"]))
                return loss_of(X + shadow.matmul(h, kernels["down"], shadows["down"]))

            gradient = jax.grad(loss)(shadow.zeros(kernels))
            updates, moments = optimizer.update(gradient, moments)
            down = training.apply_stochastically(
                kernels["down"], updates["down"], jax.random.wrap_key_data(draw)
            )
            up, rest = training.apply_with_residual(
                kernels["up"], updates["up"], residual
            )
            return {
                "kernels": {"up": up, "down": down},
                "optimizer": moments,
                "residual": rest,
                "key": key,
            }

        kernels = {name: tree["kernel"] for name, tree in params().items()}
        state = {
            "kernels": kernels,
            "optimizer": optimizer.init(shadow.zeros(kernels)),
            "residual": shadow.zeros(kernels["up"]),
            "key": jax.random.key_data(jax.random.key(0)),
        }
        for _ in range(3):
            state = step(state)
        restored = self.save_and_restore(tmp_path, state)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        chex.assert_trees_all_equal(restored, state)
        for _ in range(3):
            state, restored = step(state), step(restored)
        chex.assert_trees_all_equal(restored, state)
        assert (state["kernels"]["up"].numpy() != kernels["up"].numpy()).any()

    @pytest.mark.usefixtures("optax_promotion")
    def test_adapters(self, tmp_path):
        def made(seed):
            model = training.nnx.add_lora(Model(params()), 4, rngs=nnx.Rngs(seed))
            return model, nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer):
            wrt = nnx.DiffState(0, nnx.LoRAParam)
            loss = lambda model: loss_of(model(X))  # noqa: E731
            optimizer.update(model, nnx.grad(loss, argnums=wrt)(model))

        model, optimizer = made(0)
        for _ in range(2):
            step(model, optimizer)
        # The base is read from its own checkpoint; adapters and moments are saved.
        state = {
            "adapters": nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)),
            "optimizer": nnx.to_pure_dict(nnx.state(optimizer)),
        }
        restored = self.save_and_restore(tmp_path, state)
        again, other = made(1)
        for node, held, pure in [
            (again, nnx.state(again, nnx.LoRAParam), restored["adapters"]),
            (other, nnx.state(other), restored["optimizer"]),
        ]:
            nnx.replace_by_pure_dict(held, pure)
            nnx.update(node, held)
        for _ in range(2):
            step(model, optimizer)
            step(again, other)
        chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))
        chex.assert_trees_all_equal(nnx.state(other), nnx.state(optimizer))
