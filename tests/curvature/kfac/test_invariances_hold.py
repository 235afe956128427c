"""Properties over shapes, dtypes, dampings, and tokens that repeat or are short of rank."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import reference
from tests.capturing import POLICIES, engine, random_like
from tests.reference import Damping, Truth

DOUBLE = torch.float64

layers = st.fixed_dictionaries(
    {
        "n_in": st.integers(1, 9),
        "n_out": st.integers(1, 12),
        "tokens": st.integers(1, 25),
        "bias": st.booleans(),
        "dtype": st.sampled_from([torch.float32, DOUBLE]),
        "policy": st.sampled_from(sorted(POLICIES)),
        "repeat": st.integers(1, 3),
        "rank": st.integers(1, 9),
        "scale": st.sampled_from([1e-3, 1.0, 1e2]),
        "seed": st.integers(0, 2**16),
    }
)
lambdas = st.sampled_from([1e-10, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1.0])
dampings = st.builds(Damping, lambdas, lambdas, st.sampled_from([None, 1.0, 7.0, 1e6]))


def collected(layer, damping, **engine_settings):
    """One linear layer with a linear loss, so that every token gradient is at our choice."""
    generator = torch.Generator().manual_seed(layer["seed"])
    engine_settings = {"track_diagonal": False, **engine_settings}

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    rank = min(layer["rank"], layer["n_out"])
    x = normal(layer["tokens"], layer["n_in"]).to(layer["dtype"])
    g = layer["scale"] * normal(layer["tokens"], rank) @ normal(rank, layer["n_out"])
    x = x.repeat(layer["repeat"], 1)
    g = g.to(layer["dtype"]).repeat(layer["repeat"], 1)
    model = nn.Linear(layer["n_in"], layer["n_out"], bias=layer["bias"], dtype=layer["dtype"])
    kfac = engine(layer["policy"], damping, **engine_settings)
    batch = {"x": x, "labels": torch.zeros(len(x), dtype=torch.long)}
    with reference.record(model) as rec, kfac.capture(model):
        loss = (model(x) * g).sum()
    kfac.collect_kfac_factors(model, batch, loss=loss, n_labels=len(x), loss_reduction="sum")
    assert list(kfac.kfac_factors) == [""], "a bare layer is the model and the layer at once"
    return kfac, Truth(model, rec, [batch], labels=len(x)), model


def close(result, expected, bound):
    """The whole gradient within a relative bound, and finite whatever that is."""
    whole = torch.cat([expected[n].flatten() for n in expected])
    found = torch.cat([result[n].double().flatten() for n in expected])
    assert torch.isfinite(found).all()
    assert reference.relative(found, whole) <= bound


def bound_of(layer, damping, factors):
    """The reference itself loses eps * max(m) / lam on either side.

    At small dampings what one side has lost, in directions that are not the gradient's, is
    multiplied by the inverse of the other.
    """
    a = max(float(factors.A.trace()) / damping.A, 1.0)
    g = max(float(factors.G.trace()) / damping.G, 1.0)
    both = 1e-15 * a * g if min(damping.A, damping.G) < 1e-3 else 0.0
    return 1e-13 * max(a, g) + both + (1e-6 if layer["dtype"] is torch.float32 else 1e-11)


@settings(max_examples=90, deadline=None)
@given(layers, dampings)
def test_natural_gradient(layer, damping):
    kfac, truth, model = collected(layer, damping)
    own = truth.own_gradient(truth.labels)
    factors, _ = truth.weight_factors()["weight"]
    for vectors in (own, random_like(own)):
        result = kfac.compute_natural_gradient(vectors, model)
        assert set(result) == set(vectors)
        close(result, truth.natural_gradient(vectors, damping), bound_of(layer, damping, factors))


@settings(max_examples=40, deadline=None)
@given(layers, dampings, st.sampled_from(["bf16", "fp16"]))
def test_natural_gradient_with_sixteen_bits(layer, damping, dtype):
    """Against the dense form of what is stored: rounding changes G, and the algorithm nothing."""
    kfac, truth, model = collected(layer, damping, woodbury_dtype=dtype)
    factors, _ = truth.weight_factors()["weight"]
    (given,) = kfac.kfac_factors.values()
    G = factors.G
    if given.method == "woodbury":
        g = given.G.columns.data.double() * given.G.columns.scale
        fewer = g.shape[0] < layer["n_out"]
        assert given.G.columns.data.itemsize == 2 if fewer else layer["dtype"].itemsize
        G = given.G.weight * g.T @ g
        assert float((G - factors.G).norm()) <= 0.02 * float(factors.G.norm())
    vectors = random_like(truth.own_gradient(truth.labels))
    matrix = vectors["weight"].double()
    if "bias" in vectors:
        matrix = torch.cat([matrix, vectors["bias"].double()[:, None]], dim=1)
    left = reference.power(G, -1, damping.G, damping.kappa)
    expected = left @ matrix @ reference.power(factors.A, -1, damping.A, damping.kappa)
    n = layer["n_in"]
    parts = {"weight": expected[:, :n], **({"bias": expected[:, n]} if "bias" in vectors else {})}
    result = kfac.compute_natural_gradient(vectors, model)
    close(result, parts, bound_of(layer, damping, factors))


@settings(max_examples=40, deadline=None)
@given(layers, dampings)
def test_ekfac(layer, damping):
    kfac, truth, model = collected(layer, damping, ekfac=True)
    own = truth.own_gradient(truth.labels)
    factors, _ = truth.weight_factors()["weight"]
    bound = bound_of(layer, damping, factors) ** 0.5  # its basis moves with the eigenvectors
    for vectors in (own, random_like(own)):
        close(kfac.compute_natural_gradient(vectors, model), truth.ekfac(vectors, damping), bound)


@settings(max_examples=40, deadline=None)
@given(layers, dampings)
def test_product_is_linear_symmetric_and_non_negative(layer, damping):
    kfac, truth, model = collected(dict(layer, dtype=DOUBLE), damping)
    own = truth.own_gradient(truth.labels)
    u, v = random_like(own, 1), random_like(own, 2)

    def product(vectors):
        return kfac.compute_fisher_vector_product(vectors, model)

    def inner(a, b):
        return float(sum((a[n] * b[n]).sum() for n in a))

    fu, fv = product(u), product(v)
    size = (inner(fu, fu) * inner(v, v)) ** 0.5 + (inner(fv, fv) * inner(u, u)) ** 0.5
    assert abs(inner(fu, v) - inner(u, fv)) <= 1e-12 * size
    assert inner(u, fu) >= -1e-12 * size
    both = product({n: 2 * u[n] - 3 * v[n] for n in u})
    for name in u:
        assert (both[name] - 2 * fu[name] + 3 * fv[name]).norm() <= 1e-11 * (
            fu[name].norm() + fv[name].norm()
        )


@settings(max_examples=40, deadline=None)
@given(layers, dampings)
def test_powers_undo_each_other(layer, damping):
    """`G^-1 (G dW A) A^-1 = dW` with the used eigenvalues, clipped or not."""
    kfac, truth, model = collected(dict(layer, dtype=DOUBLE), damping)
    vectors = random_like(truth.own_gradient(truth.labels))
    there = kfac.compute_powered_natural_gradient(vectors, model, 1.0)
    back = kfac.compute_powered_natural_gradient(there, model, -1.0)
    factors, _ = truth.weight_factors()["weight"]
    bound = 1e-13
    for M, lam in ((factors.A, damping.A), (factors.G, damping.G)):
        bound *= 1 + float(M.trace()) / lam
    for name, value in vectors.items():
        assert float((back[name] - value).norm()) <= max(bound, 1e-12) * float(
            sum(v.norm() for v in vectors.values())
        )


@settings(max_examples=25, deadline=None)
@given(layers, dampings, st.integers(2, 4))
def test_repeating_every_token_changes_nothing(layer, damping, times):
    """`A` and `G` are means: a batch twice over has the same factors."""
    results = []
    for repeat in (1, times):
        kfac, truth, model = collected(dict(layer, dtype=DOUBLE, repeat=repeat), damping)
        vectors = random_like(truth.own_gradient(truth.labels))
        results.append(kfac.compute_powered_natural_gradient(vectors, model, 1.0))
    for name, value in results[0].items():
        assert reference.relative(results[1][name], value.double()) < 1e-10
