"""Step curves against losses whose change along a line is known in closed form."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.errors import BatchError, LayerError
from fisher_lab.curvature.step_curve import (
    CHOOSING,
    JUDGING,
    OWN,
    BatchSums,
    MeanChange,
    Point,
    SearchResult,
    StepCurve,
    StepCurves,
    mean_change,
    moved_along,
    search,
    step_curves,
)

WEIGHT = torch.tensor([[0.7, -1.3, 0.4]], dtype=torch.float64)
TRUTH = torch.tensor([[1.5, -0.5, 0.1]], dtype=torch.float64)


def linear() -> nn.Linear:
    """A model with a squared error: its loss along a line is a parabola."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(WEIGHT)
    return model


def square(outputs, batch):
    return (outputs[:, 0] - batch[1]).square()


def data(sizes, seed=0):
    """Batches of several sizes of a noisy linear function."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for n in sizes:
        x = torch.randn(n, 3, generator=rng, dtype=torch.float64)
        noise = torch.randn(n, generator=rng, dtype=torch.float64)
        made.append((x, x @ TRUTH[0] + 0.5 * noise))
    return made


HELDOUT, FEW = data([5, 9, 4, 8, 7, 6, 11, 3]), data([20, 30], seed=1)


def parabolas(batches, d):
    """``c1, c2`` of each batch with change of the summed loss ``c1 t + c2 t^2`` at ``w - t d``."""
    found = []
    for x, y in batches:
        residual, along = (x @ WEIGHT[0] - y).numpy(), (x @ d[0]).numpy()
        found.append((-2 * float(residual @ along), float(along @ along)))
    return np.array(found)


def gradient(batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return (2 * (x @ WEIGHT[0] - y) @ x / len(x))[None]


def newton(batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return torch.linalg.solve(x.T @ x / len(x), (x @ WEIGHT[0] - y) @ x / len(x))[None]


def curves_of(directions, heldout=None, **more: Any):
    heldout = HELDOUT if heldout is None else heldout
    named = {name: {"weight": d} for name, d in directions.items()}
    return step_curves(linear(), named, heldout, FEW, loss_fn=square, **more)


@pytest.mark.parametrize("start", [None, 1e-7, 1e-3, 0.4, 30.0, 1e7])
def test_the_step_is_the_lowest_of_the_half_that_chooses_wherever_the_search_begins(start):
    directions = {"newton": newton(FEW), "gradient": gradient(FEW)}
    starts = None if start is None else dict.fromkeys(directions, start)
    found = curves_of(directions, starts=starts)
    for name, d in directions.items():
        curve = found.curves[name]
        c1, c2 = parabolas(HELDOUT[0::2], d).sum(axis=0)
        assert curve.edge == ""
        assert curve.length == pytest.approx(-c1 / (2 * c2), rel=1e-6)
        assert curve.norm == pytest.approx(float(d.norm()))


def test_changes_and_standard_errors_are_those_of_the_batches():
    d = gradient(FEW)
    curve = curves_of({"gradient": d}).curves["gradient"]
    sets = {CHOOSING: HELDOUT[0::2], JUDGING: HELDOUT[1::2], OWN: FEW}
    assert len(curve.points) >= 4
    for point in curve.points:
        assert (JUDGING in point.changes) == (point.length == curve.length)
        for name in point.changes:
            batches = sets[name]
            coefficients = parabolas(batches, d)
            changes = coefficients[:, 0] * point.length + coefficients[:, 1] * point.length**2
            np.testing.assert_allclose(point.changes[name], changes, rtol=1e-9, atol=1e-9)
            labels = np.array([len(y) for _, y in batches])
            estimate = curve.change(name, point.length)
            ratio = changes.sum() / labels.sum()
            assert estimate.mean == pytest.approx(ratio, rel=1e-8, abs=1e-12)
            residual = changes - ratio * labels
            n = len(labels)
            variance = residual @ residual / (n - 1) / n / labels.mean() ** 2
            assert estimate.se == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-12)


def test_with_batches_of_one_size_the_interval_is_students():
    rng = np.random.default_rng(0)
    changes = rng.normal(-3.0, 1.0, size=9)
    estimate = mean_change(changes * 7, np.full(9, 7.0))
    assert estimate.se == pytest.approx(stats.sem(changes))
    low, high = stats.t.interval(0.95, 8, loc=changes.mean(), scale=stats.sem(changes))
    assert estimate.interval() == pytest.approx((low, high))
    assert estimate.interval(0.5)[1] < high


def test_intervals_of_batches_of_unlike_sizes_cover_the_mean():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        labels = rng.integers(300, 700, size=12).astype(float)
        changes = rng.normal(-0.01 * labels, 0.3 * np.sqrt(labels))
        low, high = mean_change(changes, labels).interval()
        inside += low <= -0.01 <= high
    assert 0.93 <= inside / 2000 <= 0.97


def test_batches_without_labels_do_not_count_and_one_batch_has_no_error():
    estimate = mean_change(np.array([2.0, 0.0, 4.0]), np.array([1.0, 0.0, 1.0]))
    assert (estimate.mean, estimate.n) == (3.0, 2)
    one = mean_change(np.array([2.0, 0.0]), np.array([4.0, 0.0]))
    assert one.mean == 0.5
    assert math.isnan(one.se)
    assert math.isnan(one.interval()[0])


def test_with_one_heldout_batch_nothing_judges():
    found = curves_of({"gradient": gradient(FEW)}, HELDOUT[:1])
    curve = found.curves["gradient"]
    assert curve.change(CHOOSING).mean < 0
    assert math.isnan(curve.change(JUDGING).mean)
    assert not found.lead().certain


def test_a_direction_that_only_leads_up_gets_no_step():
    found = curves_of({"up": -gradient(HELDOUT[0::2]), "zero": torch.zeros(1, 3).double()})
    for curve in found.curves.values():
        assert (curve.length, curve.edge) == (0.0, "zero")
        assert curve.change(JUDGING) == MeanChange(0.0, 0.0, 4)
    assert len(found.curves["up"].points) < 20


def test_a_loss_that_falls_for_ever_is_said_to():
    batches = [(x, torch.zeros(len(x)).double()) for x, _ in HELDOUT]
    named = {"down": {"weight": torch.ones(1, 3).double()}}

    def falling(outputs, batch):
        return outputs[:, 0] * 0 - (WEIGHT[0, 0] - model.weight[0, 0])

    model = linear()
    curve = step_curves(model, named, batches, loss_fn=falling).curves["down"]
    assert curve.edge == "longest"
    assert curve.length == curve.points[-1].length


@pytest.mark.parametrize("start", [1e-9, 1.0, 1e9])
def test_values_that_are_not_finite_are_too_far(start):
    def value(t):
        return math.nan if t > 2.9 else -t

    found = search(value, start, refinements=8)
    assert found.edge == ""
    assert 2.4 < found.length <= 2.9


def test_a_search_that_begins_where_the_function_is_flat_goes_on():
    """At 1e-12 nothing can be seen; at 1e12 the function is far up, and straight."""

    def value(t):
        return math.floor(1e7 * (math.hypot(1.0, t - 2.0) - math.hypot(1.0, 2.0))) / 1e7

    for start in (1e-12, 1e12):
        found = search(value, start, scale=1.0, refinements=4)
        assert found.edge == ""
        assert found.length == pytest.approx(2.0, abs=0.02)
    assert search(lambda t: 1e-3 * t, 5.0, scale=1.0) == SearchResult(0.0, "zero")


# ---- the model is left as it was -----------------------------------------------------------------


def test_parameters_are_put_back_exactly_also_when_a_pass_fails():
    model, calls = linear(), []
    with torch.no_grad():
        model.weight.mul_(1 / 3)
    before = model.weight.detach().clone()

    def failing(outputs, batch):
        calls.append(None)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return square(outputs, batch)

    with pytest.raises(KeyboardInterrupt):
        step_curves(model, {"g": {"weight": gradient(FEW)}}, HELDOUT, loss_fn=failing)
    assert torch.equal(model.weight, before)
    step_curves(model, {"g": {"weight": gradient(FEW)}}, HELDOUT, loss_fn=square)
    assert torch.equal(model.weight, before)
    assert model.weight.requires_grad
    assert model.weight.grad is None


def test_dropout_is_off_and_the_mode_stays():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    model.train()
    model[0].eval()
    named = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    found = [
        step_curves(model, {"any": named}, HELDOUT, loss_fn=square).curves["any"] for _ in range(2)
    ]
    assert [m.training for m in model] == [False, True, True]
    assert found[0].length == found[1].length
    model.eval()
    alike = step_curves(model, {"any": named}, HELDOUT, loss_fn=square).curves["any"]
    np.testing.assert_array_equal(alike.points[0].changes[OWN], found[0].points[0].changes[OWN])
    assert alike.change(JUDGING) == found[0].change(JUDGING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_rounding_leaves_of_a_step_is_said(dtype):
    model = nn.Linear(64, 4).to(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    direction = {n: torch.ones(p.shape, dtype=torch.float64) for n, p in before.items()}
    with moved_along(model, direction) as move:
        assert move(1.0) == pytest.approx(1.0, abs=0.05)
        part = move(1e-7)  # under the last digit of nearly every bfloat16 weight
        assert part < 0.7 if dtype == torch.bfloat16 else part > 0.9
        moved = torch.cat([(before[n] - p).double().flatten() for n, p in model.named_parameters()])
        assert part == pytest.approx(float(moved.detach().sum()) / (1e-7 * len(moved)), abs=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_scalars_and_large_parameters_move_in_blocks():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.table = nn.Parameter(torch.randn(300, 7, 3).transpose(0, 2))

    model = Odd()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    expected = {n: p.detach() - 0.25 * direction[n] for n, p in model.named_parameters()}
    with moved_along(model, direction) as move:
        move(9.0)
        move(0.25)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])


@pytest.mark.parametrize(
    ("direction", "words"),
    [({"bias": torch.zeros(1)}, "no such parameter"), ({"weight": torch.zeros(3)}, r"\(1, 3\)")],
)
def test_a_direction_of_another_model_is_refused(direction, words):
    with pytest.raises(LayerError, match=words):
        step_curves(linear(), {"g": direction}, HELDOUT, loss_fn=square)


def test_without_a_label_nothing_can_be_chosen():
    with pytest.raises(BatchError, match="no label counts"):
        step_curves(linear(), {}, [None, HELDOUT[0]], loss_fn=square)


def test_ranks_add_their_parts_of_every_batch():
    """The other rank is played by its sums: it has the second half of every batch but one."""

    class Two(Alone):
        size = 2
        other: ClassVar[list] = []

        def all_gather_objects(self, value):
            copy = linear()
            with torch.no_grad():
                copy.weight.copy_(model.weight)
            rows = []
            for part in self.other[: len(value)]:
                loss = square(copy(part[0]), part).sum()
                rows.append((float(loss), float(len(part[1]))))
            return [value, rows]

    model = linear()
    batches = HELDOUT[:4]
    Two.other = [(x[2:], y[2:]) for x, y in batches[0::2]]
    mine = [(x[:2], y[:2]) for x, y in batches[0::2]]
    heldout = [x for one in mine for x in (one, None)]  # nothing judges

    class OnlyChoosing(Two):
        def all_gather_objects(self, value):
            return [value] if all(n == 0 for _, n in value) else super().all_gather_objects(value)

    d = gradient(FEW)
    named = {"g": {"weight": d}}
    together = step_curves(model, named, heldout, loss_fn=square, ranks=OnlyChoosing())
    c1, c2 = parabolas(batches[0::2], d).sum(axis=0)
    assert together.curves["g"].length == pytest.approx(-c1 / (2 * c2), rel=1e-6)


# ---- which direction is ahead --------------------------------------------------------------------


def made(changes, labels):
    """Curves with one length each, from the judged and choosing changes of every batch."""
    curves = {}
    for name, (choosing, judging) in changes.items():
        point = Point(1.0, 1.0, {CHOOSING: choosing, JUDGING: judging})
        curves[name] = StepCurve(1.0, 1.0, "", (point,), {CHOOSING: labels, JUDGING: labels})
    sums = BatchSums(np.zeros(len(labels)), labels)
    return StepCurves(curves, {CHOOSING: sums, JUDGING: sums})


def test_the_lead_is_over_the_closest_rival_and_paired():
    rng, labels = np.random.default_rng(0), np.full(10, 4.0)
    hard = 40 * rng.normal(size=10)  # what all directions share of a batch
    noise = rng.normal(size=(3, 10))
    means = {"a": -8.0, "b": -4.0, "c": 0.0}
    changes = {
        name: (np.full(10, mean), hard + mean + noise[i])
        for i, (name, mean) in enumerate(means.items())
    }
    lead = made(changes, labels).lead()
    assert (lead.first, lead.rival, lead.certain) == ("a", "b", True)
    differences = (changes["b"][1] - changes["a"][1]) / 4
    assert lead.margin.mean == pytest.approx(differences.mean())
    assert lead.margin.se == pytest.approx(stats.sem(differences))
    assert made({"a": changes["a"]}, labels).lead().rival == ""


def test_directions_that_are_equal_rarely_seem_ahead():
    rng, labels, certain = np.random.default_rng(1), np.full(8, 4.0), 0
    for _ in range(1000):
        changes = {n: (rng.normal(size=8), rng.normal(size=8)) for n in "abc"}
        certain += made(changes, labels).lead().certain
    assert certain / 1000 <= 0.035  # one side of 95 %, and of every rival
