"""What is trained is declared, kept, and all that changes."""

import pytest
import torch
from torch import nn

from edt_former.train.trainable import Audit, TrainableSet


def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.ModuleDict(
        {
            "frozen": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            "trained": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        }
    )
    network["frozen"].requires_grad_(False).eval()
    return network


def names(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters() if name.startswith("trained.")}


def step(network: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(4, 3)
    network["trained"](network["frozen"](x)).square().sum().backward()
    optimizer.step()


def test_a_declared_step_passes_with_its_own_statistics():
    network = model()
    TrainableSet.of(network).check(names(network))
    audit = Audit(network, names(network))
    step(network)
    audit.check(network)


def test_statistics_of_a_frozen_norm_are_seen():
    network = model()
    audit = Audit(network, names(network))
    network["frozen"].train()
    step(network)
    with pytest.raises(RuntimeError, match=r"not trained: frozen\.1\.running_mean, "):
        audit.check(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_changed_bit_of_a_frozen_weight_is_seen(dtype):
    network = model().to(dtype)
    audit = Audit(network, names(network))
    with torch.no_grad():
        weight = network["frozen"][0].weight
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0, dtype=dtype))
    with pytest.raises(RuntimeError, match=r"changed what is not trained: frozen\.0\.weight"):
        audit.check(network)


def test_values_that_change_places_are_seen():
    network = model()
    audit = Audit(network, names(network))
    with torch.no_grad():
        weight = network["frozen"][0].weight
        weight[0, :2] = weight[0, :2].flip(0).clone()
    with pytest.raises(RuntimeError, match=r"frozen\.0\.weight"):
        audit.check(network)


def test_what_is_not_declared_is_refused():
    network = model()
    with pytest.raises(ValueError, match=r"declared, but frozen: frozen\.0\.bias; not declared: t"):
        TrainableSet.of(network).check({"frozen.0.bias"})


def test_a_run_that_comes_back_trains_the_same(tmp_path):
    network = model()
    TrainableSet.of(network).keep(tmp_path)
    TrainableSet.of(network).keep(tmp_path)
    network["frozen"][0].requires_grad_(True)
    with pytest.raises(ValueError, match="trained 18 values, now it would train 30: frozen"):
        TrainableSet.of(network).keep(tmp_path)
