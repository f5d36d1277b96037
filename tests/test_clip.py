"""Every rule against a reference, in real fits of small models."""

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import numbers_of, presets_of, refuse
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from app.clip import AdaptiveClip, Clip, NormClip, PercentileClip, ValueClip
from app.conf.clip.schema import AdaptiveClip as AdaptiveSchema
from app.conf.clip.schema import NormClip as NormSchema
from app.conf.clip.schema import PercentileClip as PercentileSchema
from app.conf.clip.schema import ValueClip as ValueSchema

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|treespec).*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(LightningModule):
    """Two layers; the loss of batch `b` is scaled by `scales[b]`."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(18, 2)
        self.scales = scales

    def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.body(batch)).square().mean() * self.scales[batch_idx]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        data = torch.randn(len(self.scales), 1, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(list(data), batch_size=1)


class Manual(Net):
    """The same under manual optimization: body and head have an optimizer each."""

    def __init__(self, *scales: float) -> None:
        super().__init__(*scales)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.body, self.head)]


class Watch(Callback):
    """The gradients of each step, by parameter name: what the callbacks before it have left."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.seen.append(
            {
                name: param.grad.clone().to_dense()
                for name, param in pl_module.named_parameters()
                if param.grad is not None and id(param) in mine
            }
        )


QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def fit(model: Net, *callbacks: Callback, **options: Any) -> Trainer:
    options = QUIET | options if options else {"barebones": True}
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **options)
    trainer.fit(model)
    return trainer


def norm(**changes: Any) -> NormClip:
    return NormClip(**{"max_norm": 1e-3, "norm_type": 2.0, "nonfinite": "skip", **changes})


def value(**changes: Any) -> ValueClip:
    return ValueClip(**{"max_value": 1e-4, "nonfinite": "skip", **changes})


def adaptive(**changes: Any) -> AdaptiveClip:
    numbers = {"clip_factor": 1e-3, "eps": 1e-3, "exclude_head": False, "exclude": []}
    return AdaptiveClip(**{**numbers, "nonfinite": "skip", **changes})


def percentile(**changes: Any) -> PercentileClip:
    return PercentileClip(**{"percentile": 30.0, "history": None, "nonfinite": "skip", **changes})


def of_preset(preset: str, **changes: Any) -> Clip:
    """A rule with the numbers of its file."""
    rule: Clip = instantiate({**numbers_of("clip", preset), **changes})
    return rule


RULES = [norm, value, adaptive, percentile]
EVERY = [pytest.param(partial(of_preset, name), id=name) for name in presets_of("clip")]


def total(grads: dict[str, Tensor], p: float = 2.0) -> float:
    return torch.cat([g.flatten() for g in grads.values()]).norm(p).item()


def by_torch(clip: Callable[[list[nn.Parameter]], Any], grads: dict[str, Tensor]) -> list[Tensor]:
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for param, grad in zip(params, grads.values(), strict=True):
        param.grad = grad.clone()
    clip(params)
    return [p.grad for p in params if p.grad is not None]


def close(grads: dict[str, Tensor], reference: list[Tensor]) -> None:
    torch.testing.assert_close(list(grads.values()), reference)


# Each rule against its reference


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("model", [Net, Manual])
def test_norm_is_torchs(model: type[Net], norm_type: float) -> None:
    before, after, rule = Watch(), Watch(), norm(norm_type=norm_type)
    fit(model(1.0, 100.0), before, rule, after)
    for was, now in zip(before.seen, after.seen, strict=True):
        close(now, by_torch(lambda ps: nn.utils.clip_grad_norm_(ps, 1e-3, norm_type), was))
        assert total(now, norm_type) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("model", [Net, Manual])
def test_value_is_torchs(model: type[Net]) -> None:
    before, after, rule = Watch(), Watch(), value()
    fit(model(1.0, 100.0), before, rule, after)
    for was, now in zip(before.seen, after.seen, strict=True):
        close(now, by_torch(lambda ps: nn.utils.clip_grad_value_(ps, 1e-4), was))
        assert total(now, math.inf) == pytest.approx(1e-4)


def paper(weight: Tensor, grad: Tensor, clip_factor: float, eps: float) -> Tensor:
    """Equation 3 of arXiv 2102.06171, unit by unit."""
    rows = zip(weight, grad, strict=True) if weight.ndim > 1 else [(weight, grad)]
    result = []
    for w, g in rows:
        bound = clip_factor * max(w.norm().item(), eps)
        result.append(g * (bound / g.norm()) if g.norm() > bound else g)
    return torch.stack(result) if weight.ndim > 1 else result[0]


class Weights(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


@pytest.mark.parametrize(
    ("changes", "left_alone"),
    [
        ({}, []),
        ({"exclude_head": True}, ["head.*"]),
        ({"exclude": ["*.bias"]}, ["*.bias"]),
        ({"exclude": ["body.*"], "exclude_head": True}, ["*"]),
    ],
)
def test_clip_adaptive_is_the_papers_loop(changes: dict[str, Any], left_alone: list[str]) -> None:
    before, weights, after, rule = Watch(), Weights(), Watch(), adaptive(**changes)
    model = Net(0.01, 1.0, 100.0)
    nn.init.zeros_(model.body[0].bias)
    fit(model, before, weights, rule, after)
    clipped = 0
    for was, weight, now in zip(before.seen, weights.seen, after.seen, strict=True):
        reference = [
            g if any(fnmatchcase(n, p) for p in left_alone) else paper(weight[n], g, 1e-3, 1e-3)
            for n, g in was.items()
        ]
        close(now, reference)
        clipped += not all(map(torch.equal, was.values(), now.values()))
    found = rule.step_metrics()
    assert found["grad_norm"] == pytest.approx(np.mean([total(g) for g in before.seen]))
    assert found["clipped_share"] == pytest.approx(clipped / 3)
    assert (clipped == 0) == (left_alone == ["*"])


@pytest.mark.parametrize("history", [None, 3])
@pytest.mark.parametrize("q", [10.0, 62.5, 100.0])
def test_clip_adaptive_by_percentile_is_numpys(q: float, history: int | None) -> None:
    before, after, rule = Watch(), Watch(), percentile(percentile=q, history=history)
    fit(Net(1.0, 5.0, 0.1, 2.0, 2.0, 9.0, 1.0), before, rule, after)
    norms = [total(grads) for grads in before.seen]
    for step, now in enumerate(after.seen):
        start = 0 if history is None else max(0, step + 1 - history)
        bound = np.percentile(norms[start : step + 1], q)
        assert total(now) == pytest.approx(min(norms[step], bound), rel=1e-4)


@pytest.mark.parametrize("make", [norm, value, adaptive])
def test_gradients_within_the_bound_are_not_touched(make: Callable[..., Clip]) -> None:
    bound = {norm: "max_norm", value: "max_value", adaptive: "clip_factor"}[make]
    before, after, rule = Watch(), Watch(), make(**{bound: 1e6})
    fit(Net(1.0, 2.0), before, rule, after)
    for was, now in zip(before.seen, after.seen, strict=True):
        assert all(map(torch.equal, was.values(), now.values()))
    assert rule.step_metrics()["clipped_share"] == 0


@pytest.mark.parametrize("make", RULES)
def test_parameters_without_gradients_and_of_several_types_are_fine(
    make: Callable[..., Clip],
) -> None:
    class Mixed(Net):
        def __init__(self, *scales: float) -> None:
            super().__init__(*scales)
            self.body[0].bias.requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(3))
            self.gain = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))

        def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().loss(batch, batch_idx) * self.gain

    after, rule = Watch(), make()
    fit(Mixed(1.0, 100.0), rule, after)
    assert set(after.seen[0]) == {"gain", "body.0.weight", "head.weight", "head.bias"}
    assert rule.step_metrics()["clipped_share"] > 0


class Sparse(Net):
    def __init__(self, *scales: float) -> None:
        super().__init__(*scales)
        self.table = nn.Embedding(5, 8, sparse=True)

    def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().loss(batch + self.table(torch.tensor([[1], [3], [1]])).sum(0), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [norm, value])
def test_sparse_gradients_are_clipped_as_dense_ones(make: Callable[..., Clip]) -> None:
    after, rule = Watch(), make()
    fit(Sparse(100.0), rule, after)
    (now,) = after.seen
    assert total(now, 2.0 if make is norm else math.inf) == pytest.approx(
        1e-3 if make is norm else 1e-4, rel=1e-2
    )


def test_adaptive_refuses_a_sparse_gradient_unless_it_is_left_alone() -> None:
    with pytest.raises(ValueError, match="clip=adaptive must") as caught:
        fit(Sparse(1.0), adaptive())
    assert str(caught.value) == (
        "clip=adaptive must have dense gradients, got a sparse one of a parameter of shape (5, 8); "
        "name that parameter in clip.exclude"
    )
    fit(Sparse(1.0), adaptive(exclude=["table.*"]))


# Manual optimization


@pytest.mark.parametrize("make", EVERY)
def test_each_optimizer_is_clipped_and_reported_by_itself(make: Callable[..., Clip]) -> None:
    before, rule = Watch(), make()
    fit(Manual(1.0, 3.0), before, rule)
    found = rule.step_metrics()
    assert set(found) == {"grad_norm/0", "clipped_share/0", "grad_norm/1", "clipped_share/1"}
    for position in (0, 1):
        norms = [total(grads) for grads in before.seen[position::2]]
        assert found[f"grad_norm/{position}"] == pytest.approx(np.mean(norms))


class Scaled(Manual):
    """One SGD step with lr 1, so that the weights' change is the gradient that was applied."""

    def __init__(self, automatic: bool, fused: bool) -> None:
        super().__init__(8.0)
        self.automatic_optimization = automatic
        self.fused = fused

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch, batch_idx)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0, fused=self.fused)


def scaled(model: Net, *callbacks: Callback) -> Trainer:
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    return fit(model, *callbacks, plugins=[plugin])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("automatic", [False, True])
def test_clip_manual_applies_the_norm_asked_for_under_a_gradient_scaler(
    automatic: bool, fused: bool
) -> None:
    model, rule = Scaled(automatic, fused), norm(max_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaled(model, rule)
    pairs = zip(before, model.parameters(), strict=True)
    applied = torch.cat([(was - now).flatten() for was, now in pairs])
    assert applied.norm().item() == pytest.approx(1.0, rel=1e-3)
    found = rule.step_metrics()
    assert found["grad_norm"] > 1
    assert found["clipped_share"] == 1


# Norms that are not finite


class Snapshot(Callback):
    """Weights and optimizer state after each batch."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        states = [s for o in trainer.optimizers for s in o.state.values()]
        values = [v for s in states for v in s.values() if isinstance(v, Tensor)]
        self.seen.append([t.detach().clone() for t in [*pl_module.parameters(), *values]])


@pytest.mark.parametrize("scale", [math.nan, math.inf])
@pytest.mark.parametrize("make", EVERY)
def test_clip_norm_lost_a_skipped_step_changes_no_weight_and_no_optimizer_state(
    make: Callable[..., Clip], scale: float
) -> None:
    after, rule = Snapshot(), make()
    fit(Net(1.0, scale, 1.0), rule, after)
    first, skipped, third = after.seen
    assert len(first) > len(list(Net().parameters()))
    assert all(map(torch.equal, first, skipped))
    assert not any(map(torch.equal, skipped, third))
    found = rule.step_metrics()
    assert found["skipped_steps"] == 1
    assert 0 < found["grad_norm"] < math.inf
    assert rule.step_metrics() == {}


@pytest.mark.parametrize("make", EVERY)
def test_clip_norm_lost_an_error_says_where(make: Callable[..., Clip]) -> None:
    with pytest.raises(FloatingPointError) as caught:
        fit(Net(1.0, math.nan), make(nonfinite="error"))
    assert str(caught.value) == (
        "the gradient norm must be finite, got nan at optimizer step 1, first in body.0.weight, "
        "body.0.bias, head.weight; to skip such steps use clip.nonfinite=skip"
    )


class Hole(Net):
    """A NaN in one element of the first gradient."""

    def on_after_backward(self) -> None:
        self.head.weight.grad[0, 0] = math.nan


@pytest.mark.parametrize("make", EVERY)
def test_clip_norm_lost_non_finite_elements_count_as_zero(make: Callable[..., Clip]) -> None:
    before, after, rule = Watch(), Watch(), make(nonfinite="clip")
    fit(Hole(100.0), before, rule, after)
    (was,), (now,) = before.seen, after.seen
    reference = Watch()
    was["head.weight"][0, 0] = 0.0

    class Filled(Net):
        def on_after_backward(self) -> None:
            for name, param in self.named_parameters():
                param.grad = was[name].clone()

    fit(Filled(1.0), make(), reference)
    close(now, list(reference.seen[0].values()))
    assert rule.step_metrics() == {"clipped_share": 1.0}


def test_a_norm_that_overflows_without_a_non_finite_element_is_not_finite_either() -> None:
    class Huge(Net):
        def on_after_backward(self) -> None:
            for param in self.parameters():
                param.grad = torch.full_like(param, 1e30)

    with pytest.raises(FloatingPointError, match=r"got inf at .* first in the sum over all elem"):
        fit(Huge(1.0), norm(nonfinite="error"))
    rule = norm(nonfinite="clip")
    fit(Huge(1.0), rule)
    assert rule.step_metrics() == {"skipped_steps": 1.0}


@pytest.mark.parametrize("nonfinite", ["skip", "error", "clip"])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_a_non_finite_step_is_the_scalers(
    nonfinite: str, fused: bool
) -> None:
    class Overflow(Scaled):
        def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().loss(batch, batch_idx) * math.inf

    model, rule = Overflow(False, fused), percentile(nonfinite=nonfinite)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = scaled(model, rule)
    assert all(map(torch.equal, before, model.parameters()))
    assert rule.step_metrics() == {"skipped_steps": 1.0}
    assert rule.state_dict()["norms"] == {}
    assert trainer.precision_plugin.scaler.get_scale() == 512.0


# Models with their own configure_gradient_clipping


class Own(Net):
    def __init__(self, *scales: float) -> None:
        super().__init__(*scales)
        self.given: list[Any] = []
        self.norms: list[float] = []

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.given.append((gradient_clip_val, gradient_clip_algorithm))
        self.norms.append(total({n: p.grad for n, p in self.named_parameters()}))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


@pytest.mark.parametrize(
    ("rule", "given"), [(norm(), (1e-3, "norm")), (value(), (1e-4, "value"))], ids=["norm", "value"]
)
def test_an_override_gets_the_value_as_from_lightning_and_clips(rule: Clip, given: Any) -> None:
    model = Own(100.0, 100.0)
    before = Watch()
    trainer = fit(model, before, rule)
    assert model.given == [given] * 2
    assert model.norms == pytest.approx([total(g) for g in before.seen])
    assert rule.step_metrics()["clipped_share"] == 1
    assert trainer.gradient_clip_val is None
    assert trainer.gradient_clip_algorithm is None


@pytest.mark.parametrize(
    "rule", [norm(norm_type=1.0), adaptive(), percentile()], ids=["norm 1", "agc", "auto"]
)
def test_an_override_runs_after_the_rules_lightning_does_not_have(rule: Clip) -> None:
    model = Own(1.0, 100.0)
    before = Watch()
    fit(model, before, rule)
    assert model.given == [(None, None)] * 2
    assert model.norms[1] < total(before.seen[1])


def test_a_failed_fit_leaves_nothing_on_the_trainer() -> None:
    class Fails(Own):
        def on_train_start(self) -> None:
            assert self.trainer.gradient_clip_val == 1e-3
            raise KeyError("stop")

    trainer = Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[norm()])
    with pytest.raises(KeyError, match="stop"):
        trainer.fit(Fails(1.0))
    assert trainer.gradient_clip_val is None


def test_lightnings_own_clipping_beside_it_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_clip_val") as caught:
        fit(Net(1.0), norm(), gradient_clip_val=0.5)
    assert str(caught.value) == (
        "trainer.gradient_clip_val must be null beside a clip preset, got 0.5; "
        "to clip by Lightning alone use clip=none"
    )


# What is kept and reported


def test_history_survives_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def train(epochs: int, **resume: Any) -> tuple[Net, PercentileClip, Trainer]:
        model, rule = Manual(1.0, 5.0, math.nan, 2.0), percentile(history=5)
        trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[rule], **QUIET)
        trainer.fit(model, **resume)
        return model, rule, trainer

    straight, whole, _ = train(2)
    train(1)[2].save_checkpoint(tmp_path / "half.ckpt")
    resumed, rest, _ = train(2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.state_dict() == whole.state_dict()
    assert [len(norms) for norms in rest.state_dict()["norms"].values()] == [5, 5]
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))


def test_state_belongs_to_one_fit() -> None:
    rule = percentile()
    fit(Net(1.0, 2.0, 3.0), rule)
    fit(Net(1.0), rule)
    assert [len(norms) for norms in rule.state_dict()["norms"].values()] == [1]
    assert rule.step_metrics()["clipped_share"] == 0


def test_clip_norm_lost_the_norm_is_reported_since_the_last_call() -> None:
    class Each(Callback):
        def __init__(self) -> None:
            self.found: list[dict[str, float]] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.found.append(rule.step_metrics())

    before, rule, each = Watch(), norm(max_norm=1.0), Each()
    fit(Net(0.01, 100.0), before, rule, each)
    assert [f["grad_norm"] for f in each.found] == pytest.approx([total(g) for g in before.seen])
    assert [f["clipped_share"] for f in each.found] == [0.0, 1.0]


# What is refused


def test_clip_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm") as caught:
        refuse("clip", NormSchema(max_norm=-1.0, norm_type=2.0, nonfinite="skip"))
    assert str(caught.value) == (
        "clip.max_norm must be > 0, got -1.0; to switch clipping off use clip=none"
    )


OFF = "to switch clipping off use clip=none"


@pytest.mark.parametrize(
    ("schema", "good", "bad", "text"),
    [
        (NormSchema, {"norm_type": 2.0}, {"max_norm": math.nan}, f"be > 0, got nan; {OFF}"),
        (
            NormSchema,
            {"max_norm": 1.0},
            {"norm_type": 0.0},
            "be > 0, got 0.0; type clip.norm_type=2",
        ),
        (ValueSchema, {}, {"max_value": 0.0}, f"be > 0, got 0.0; {OFF}"),
        (
            AdaptiveSchema,
            {"eps": 1e-3, "exclude_head": True, "exclude": []},
            {"clip_factor": -0.1},
            f"be > 0, got -0.1; {OFF}",
        ),
        (
            AdaptiveSchema,
            {"clip_factor": 0.1, "exclude_head": True, "exclude": []},
            {"eps": 0.0},
            "be > 0, got 0.0; type clip.eps=1e-3",
        ),
        (
            PercentileSchema,
            {"history": None},
            {"percentile": 0.0},
            f"be in (0, 100], got 0.0; {OFF}",
        ),
        (
            PercentileSchema,
            {"history": None},
            {"percentile": 101.0},
            f"be in (0, 100], got 101.0; {OFF}",
        ),
        (
            PercentileSchema,
            {"percentile": 10.0},
            {"history": 1},
            "be >= 2 or null, got 1; to keep every step type clip.history=null",
        ),
    ],
)
def test_a_number_out_of_range_is_refused(
    schema: Any, good: dict[str, Any], bad: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        refuse("clip", schema(**good, **bad, nonfinite="skip"))
    assert str(caught.value) == f"clip.{next(iter(bad))} must {text}"


def test_adaptive_refuses_what_cannot_act() -> None:
    with pytest.raises(ValueError, match="exclude") as caught:
        fit(Net(1.0), adaptive(exclude=["haed.*"]))
    assert str(caught.value) == (
        "clip.exclude must match parameter names, got haed.*; "
        "the names are body.0.weight, body.0.bias, head.weight, head.bias"
    )

    frozen = Net(1.0)
    frozen.body[0].weight.requires_grad_(False)
    frozen.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="exclude_head") as caught:
        fit(frozen, adaptive(exclude_head=True))
    assert str(caught.value) == (
        "clip.exclude_head must find a module with a trainable matrix, got none in Net; "
        "type clip.exclude_head=false"
    )
