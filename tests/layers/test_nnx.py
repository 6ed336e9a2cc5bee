"""`qjax.layers.nnx.Linear`: construction, loading, and every nnx transformation."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import optax
import pytest
from flax import nnx

import qjax
from qjax import ops
from qjax.formats.tiles import Tiles
from qjax.layers import nnx as ours
from qjax.layers.nnx import Linear, Quantized, Scale
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

KERNEL_INIT = nnx.initializers.lecun_normal()


def layer(name: str = "4bit", dtype: str = "float32", **options) -> Linear:
    return Linear.from_qtensor(cases.kernel(name, dtype), cases.bias(dtype), **options)


class Block(nnx.Module):
    """Two layers of unlike formats with something between them."""

    def __init__(self):
        self.up = Linear(K, N, group_size=GROUP)
        self.down = Linear(N, K, bits=8, group_size=None, use_bias=False)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


@nnx.jit
def run(module, x):
    return module(x)


@pytest.mark.on_cpu
def test_empty_layer_gives_its_bias_and_holds_no_dense_array():
    empty = Linear(K, N, bits=3, group_size=GROUP, param_dtype=jnp.bfloat16)
    assert empty.kernel.dtype == jnp.bfloat16
    assert empty.kernel.nbytes < K * N * 3 / 8 + 3 * 3 * N + 1
    chex.assert_trees_all_equal(
        run(empty, cases.inputs("bfloat16")), jnp.zeros((5, N), jnp.bfloat16)
    )


def test_an_empty_layer_never_forms_the_dense_kernel():
    made = jax.make_jaxpr(lambda: nnx.state(Linear(K, N, group_size=GROUP)))()
    (words,) = qjax.prepare(cases.kernel("4bit")).words
    assert (words.shape, words.dtype) in [(v.shape, v.dtype) for v in made.out_avals]
    assert f"[{K},{N}]" not in str(made)


def test_kernel_init_is_rounded_to_nearest():
    options = {"bits": 4, "group_size": GROUP, "param_dtype": jnp.float16}
    ours = Linear(K, N, kernel_init=KERNEL_INIT, rngs=nnx.Rngs(3), **options)
    theirs = nnx.Linear(
        K, N, kernel_init=KERNEL_INIT, param_dtype=jnp.float16, rngs=nnx.Rngs(3)
    )
    expected = qjax.quantize(theirs.kernel[...], 4, GROUP)
    chex.assert_trees_all_equal(ours.kernel, qjax.prepare(expected))


def test_from_kernel_is_quantize():
    made = Linear.from_kernel(cases.dense(), bits=3, group_size=GROUP, symmetric=True)
    expected = qjax.prepare(cases.kernel("3bit-symmetric"))
    chex.assert_trees_all_equal(made.kernel, expected)
    assert made.bias is None
    assert (made.in_features, made.out_features, made.use_bias) == (K, N, False)


@pytest.mark.parametrize("name", ["act-order", "mixed", "codebook"])
def test_load_takes_any_format(name):
    model = Linear(K, N, group_size=GROUP)
    model.load(cases.kernel(name), cases.bias())
    expected = run(layer(name), cases.inputs())
    chex.assert_trees_all_equal(run(model, cases.inputs()), expected)


def test_load_keeps_the_bias_unless_given_one():
    model = layer("4bit")
    model.load(cases.kernel("2bit"))
    chex.assert_trees_all_equal(model.bias[...], cases.bias())


def test_load_fills_an_abstract_model():
    model = nnx.eval_shape(Block)
    assert isinstance(model.up.kernel.scale, jax.ShapeDtypeStruct)
    down = qjax.prepare(qjax.quantize(cases.dense(N, K), 8, None))
    model.up.load(cases.kernel("mixed"), cases.bias())
    model.down.load(down)
    x = cases.inputs()
    expected = x + qjax.matmul(nnx.gelu(layer("mixed")(x)), down)
    chex.assert_trees_all_close(run(model, x), expected, rtol=1e-5, atol=1e-5)


def test_variables_are_words_and_scales():
    state = nnx.state(layer("mixed"))
    assert type(state["packed"]["scale"]) is Scale
    assert type(state["packed"]["order"]) is Quantized
    assert [type(v) for v in state["packed"]["words"].values()] == [Quantized] * 3
    assert set(nnx.state(layer("codebook"), Scale)["packed"]) == {
        "scale",
        "codebook",
        "input_scale",
    }


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("name", ["3bit", "mixed", "codebook"])
def test_matches_flax_with_the_dequantized_kernel(name, dtype):
    ours, x = layer(name, dtype), cases.inputs(dtype)
    wanted = cases.product(x, cases.kernel(name, dtype), cases.bias(dtype))
    theirs = nnx.Linear(K, N, param_dtype=dtype, rngs=nnx.Rngs(0))
    theirs.kernel[...] = qjax.dequantize(cases.kernel(name, dtype), jnp.dtype(dtype))
    theirs.bias[...] = cases.bias(dtype)
    found = run(ours, x)
    assert found.dtype == dtype
    # float32: summation order only. 16 bits: ours rounds no weight, Flax's rounds each.
    limit = 1e-5 if dtype == "float32" else 1.5 * cases.error(run(theirs, x), wanted)
    assert cases.error(found, wanted) <= limit


@pytest.mark.parametrize("name", ["mixed", "codebook", "float-zero"])
def test_gradients(name):
    ours, x, reference = layer(name), cases.inputs(), cases.kernel(name)

    def dense_loss(x, kernel, bias):
        y = jnp.matmul(x, qjax.dequantize(kernel, jnp.float32), precision="highest")
        return jnp.sin(y + bias[None]).sum()

    @nnx.jit
    def found(layer, x):
        def loss(layer, x):
            return jnp.sin(layer(x)).sum()

        wrt = nnx.DiffState(0, nnx.Param)
        return nnx.grad(loss, argnums=(wrt, 1))(layer, x)

    gradient = jax.grad(dense_loss, argnums=(0, 1, 2), allow_int=True)
    dx, dkernel, dbias = jax.jit(gradient)(x, reference, cases.bias())
    state, input_gradient = found(ours, x)
    for leaf, value in state["packed"].items():
        wanted = getattr(dkernel, leaf)
        assert cases.error(value[...], wanted) < 1e-4, leaf
    assert cases.error(state["bias"][...], dbias) < 1e-5
    assert cases.error(input_gradient, dx) < 1e-5
    floats = [leaf for leaf in jax.tree.leaves(reference) if leaf.dtype == jnp.float32]
    assert len(state["packed"]) == len(floats)


@pytest.mark.usefixtures("optax_promotion")
def test_optimizer_trains_scales_and_holds_nothing_for_words():
    model = layer("float-zero")
    before = nnx.as_pure(nnx.clone(model).packed)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    moments = nnx.as_pure(nnx.state(optimizer))["opt_state"][0]["mu"]
    assert set(moments) == {"bias", "packed"}
    assert set(moments["packed"]) == {"scale", "zero"}

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: (model(x) ** 2).mean()  # noqa: E731
        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer, cases.inputs())) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    chex.assert_trees_all_equal(model.kernel.words, before.words)
    assert (model.kernel.scale != before.scale).any()
    assert (model.kernel.zero != before.zero).any()


@pytest.mark.usefixtures("optax_promotion")
def test_lora_leaves_scales_alone():
    base = layer("4bit")
    before = nnx.clone(base).kernel
    model = nnx.LoRA(K, 2, N, base_module=base, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    x = cases.inputs()

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        gradient = nnx.grad(lambda model: (model(x) ** 2).mean(), argnums=wrt)(model)
        optimizer.update(model, gradient)
        return gradient

    assert set(step(model, optimizer)) == {"lora_a", "lora_b"}
    assert (model.lora_b[...] != 0).any()
    chex.assert_trees_all_equal(base.kernel, before)


def test_jit_grad_and_functional_jax():
    model, x = layer("3bit"), cases.inputs()
    graphdef, params, quantized = nnx.split(model, nnx.Param, Quantized)

    @jax.jit
    def forward(params, x):
        return nnx.merge(graphdef, params, quantized)(x)

    chex.assert_trees_all_equal(forward(params, x), run(model, x))
    grads = jax.jit(jax.grad(lambda params: forward(params, x).sum()))(params)
    chex.assert_trees_all_equal_shapes(grads, params)


def test_equal_layers_share_one_compilation():
    traces = []

    @nnx.jit
    def count(model, x):
        traces.append(x)
        return model(x)

    for kernel in (cases.kernel("4bit"), qjax.quantize(-cases.dense(), 4, GROUP)):
        count(Linear.from_qtensor(kernel), cases.inputs())
    assert len(traces) == 1


def test_vmap_and_scan_over_stacked_layers():
    kernels = jnp.stack([cases.dense(K, K), -cases.dense(K, K)])
    biases = jnp.zeros((2, K))
    stacked = Linear.from_kernel(kernels, biases, bits=4, group_size=GROUP)
    x = cases.inputs()
    single = [
        Linear.from_kernel(w, b, bits=4, group_size=GROUP)
        for w, b in zip(kernels, biases, strict=True)
    ]
    each = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(0, None)))(stacked, x)
    expected = jnp.stack([run(m, x) for m in single])
    chex.assert_trees_all_close(each, expected, atol=1e-5)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer, x):
        return layer(x)

    expected = run(single[1], run(single[0], x))
    chex.assert_trees_all_close(through(stacked, x), expected, atol=1e-5)


def test_layers_are_made_under_vmap():
    @nnx.jit
    @nnx.vmap
    def make(key):
        options = {"group_size": GROUP, "kernel_init": KERNEL_INIT}
        return Linear(K, N, rngs=nnx.Rngs(key), **options)

    assert make(jax.random.split(jax.random.key(0), 3)).kernel.shape == (3, K, N)


def test_representation_names_shape_bits_and_layout():
    assert f"kernel={qjax.prepare(cases.kernel('3bit'))!r}" in repr(layer("3bit"))
    assert "Scale: 120" in repr(layer("3bit"))
    assert "kernel=QTensor(40x96, 8 bits, group column" in repr(Block())


def test_display_and_tabulate(capsys):
    nnx.display(layer("3bit"))
    assert "3 bits" in capsys.readouterr().out
    assert "Quantized" in nnx.tabulate(layer("3bit"), cases.inputs())


def test_implementation_is_that_of_matmul():
    named = layer("4bit", implementation="xla_int8")
    expected = qjax.matmul(cases.inputs(), named.kernel, implementation="xla_int8")
    chex.assert_trees_all_equal(named(cases.inputs()), expected + cases.bias()[None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(100, N, group_size=None), "in_features=100 must be a multiple"),
        (lambda: Linear(K, N), "in_features=96 must be a multiple of group_size=128"),
        (
            lambda: Linear(K, N, group_size=0),
            "group_size=0 must be a positive integer or None",
        ),
        (lambda: Linear(K, N, bits=9), "bits=9"),
        (lambda: Linear(K, N, bits=1, group_size=GROUP), "bits=1"),
        (
            lambda: Linear(K, N, group_size=GROUP, param_dtype=jnp.int8),
            "param_dtype=int8",
        ),
        (lambda: Linear(K, N, group_size=GROUP, kernel_init=KERNEL_INIT), "rngs=None"),
        (
            lambda: Linear(K, N, group_size=GROUP, bias_init=KERNEL_INIT),
            "rngs=None",
        ),
        (
            lambda: Linear(
                K,
                N,
                group_size=GROUP,
                kernel_init=lambda key, shape, dtype: jnp.zeros(shape[::-1], dtype),
                rngs=nnx.Rngs(0),
            ),
            r"kernel_init gave .* of shape \(40, 96\)",
        ),
        (
            lambda: Linear(N, K, kernel_init=cases.kernel("4bit")),
            r"kernel.shape=\(96, 40\) must be \(40, 96\), .* transposed",
        ),
        (
            lambda: Linear.from_qtensor(cases.kernel("4bit"), jnp.zeros(K)),
            r"bias.shape=\(96,\) must be \(40,\)",
        ),
        (
            lambda: Linear(K, N, group_size="32"),
            "group_size='32' must be a positive integer or None",
        ),
        (
            lambda: Linear.from_kernel(cases.dense().T, bits=3, group_size=None),
            "must be a multiple of 32",
        ),
        (
            lambda: layer("4bit").load(qjax.quantize(jnp.ones((64, N)), 4, 64)),
            r"kernel.shape=\(64, 40\) must be \(96, 40\)",
        ),
        (
            lambda: layer("4bit").load(cases.kernel("4bit"), jnp.zeros((1, N))),
            r"bias.shape=\(1, 40\)",
        ),
        (
            lambda: Linear.from_qtensor(cases.kernel("4bit")).load(
                cases.kernel("4bit"), cases.bias()
            ),
            "use_bias=False",
        ),
        (
            lambda: Linear(
                K,
                N,
                group_size=GROUP,
                kernel_init=nnx.with_partitioning(KERNEL_INIT, (None, "model")),
                rngs=nnx.Rngs(0),
            ),
            r"kernel_init gave VariableMetadata .* array in a box",
        ),
        (
            lambda: layer("4bit")(jnp.ones((2, N))),
            r"x.shape=\(2, 40\) must end in k=96",
        ),
    ],
)
def test_invalid_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda w: layer("4bit").load(w),
        lambda w: Linear(K, N, kernel_init=w),
        Linear.from_qtensor,
        lambda w: ours.LinearGeneral.from_qtensor(w, K, N),
        lambda w: ours.Einsum.from_qtensor("bd,df->bf", (K, N), w),
        lambda w: ours.Experts.from_qtensor(w[None]),
        ours.Embed.from_qtensor,
        lambda w: ours.Embed(N, K, group_size=GROUP).load(w),
        lambda w: ours.MBWQLinear(K, N).load(w),
    ],
)
def test_dense_weights_are_refused(make):
    with pytest.raises(TypeError) as caught:
        make(cases.dense())
    # Annotations that are checked at run time refuse it first.
    if not isinstance(caught.value, jaxtyping.TypeCheckError):
        assert "must be a QTensor; qjax.quantize makes one" in str(caught.value)


CALLS = {
    "linear": lambda layer: layer(cases.inputs("float32")),
    "embed": lambda layer: layer(jnp.arange(4)),
    "attend": lambda layer: layer.attend(jnp.ones((2, N))),
    "experts": lambda layer: layer(cases.inputs("float32"), jnp.array([2, 3])),
}


class TestArraysOfAnotherDevice:
    """Words of the layout that another kind of device reads, under the same names."""

    @pytest.fixture
    def pair(self, monkeypatch):
        def make(name):
            if name == "linear":
                return layer()
            if name == "experts":
                kernels = [cases.kernel("4bit", "float32")] * 2
                return ours.Experts.from_qtensor(qjax.stack(kernels))
            return ours.Embed(K, N, group_size=None, rngs=nnx.Rngs(0))

        def both(name):
            monkeypatch.setattr(ops, "_has_kernels", lambda words: False)
            here = make(name)
            with monkeypatch.context() as patch:
                patch.setattr(ops, "_has_kernels", lambda words: True)
                return here, make(name)

        return both

    @pytest.mark.parametrize("to_gpu", [False, True], ids=["to a CPU", "to a GPU"])
    @pytest.mark.parametrize("call", CALLS)
    def test_are_refused(self, call, to_gpu, pair, refuses):
        here, there = pair(call)[:: -1 if to_gpu else 1]
        nnx.update(here, nnx.state(there))
        layout = "Tiles()" if to_gpu else "Stream()"
        for one in (CALLS[call], nnx.jit(CALLS[call])):
            with refuses(f"which are no words of {layout}: words.dtype="):
                one(here)
        if call == "linear":
            for function in (qjax.codes, qjax.dequantize, qjax.prepare, qjax.flatten):
                with refuses("move its weights as QTensors: by qjax.flatten and"):
                    function(here.kernel)

    @pytest.mark.parametrize("call", ["linear", "experts"])
    def test_weights_are_moved(self, call, pair):
        here, there = pair(call)
        expected = CALLS[call](here)
        moved = qjax.unflatten(*qjax.flatten(there.kernel))
        assert moved.layout == Tiles()
        again = type(here).from_qtensor(moved, here.bias)
        assert again.kernel.layout == here.kernel.layout
        chex.assert_trees_all_equal(CALLS[call](again), expected)
