"""The toy worlds of two papers, from training to scores, with the methods that the papers propose for them."""

from __future__ import annotations

from pathlib import Path

import torch
from worlds import Example, accuracy, fitted, half_moons, network, two_circles

from hf_influence import attribute, collect
from hf_influence.evaluation import mislabel_detection
from hf_influence.points import collect_at, continued_sgd

SEEDS = range(10)
HIDDEN = ["layers.0.*", "layers.2.*"]


def moons(seed: int, folder: Path) -> dict[str, float]:
    """Gradients of the last layer, outliers among them, and the same network trained once more without a tenth.

    The paper's: two hidden layers with ReLUs, gradients of the last. In its authors' code only: Adam on all points at
    once, 25 of the 250 dropped. Ours: widths (theirs are 2, with which 10 of 30 draws end at chance), rate, epochs and
    weight decay. It is the weight decay that lets wrong labels move the boundary without being learnt by heart.
    """
    train, test, wrong = half_moons(seed)

    def trained(data: list[Example]) -> torch.nn.Module:
        return fitted(network(16, 16, seed=seed), data, epochs=200, learning_rate=0.05, weight_decay=0.012)

    model = trained(train)
    store = collect(model, train, folder, modules="trainable", skip=HIDDEN)
    out = {"before": accuracy(model, test)}
    for method in ("outlier_iforest", "outlier_l1", "outlier_l2", "loss", "random"):
        flagged = set(attribute(store, method).lowest(25))
        agree = [(i in flagged) == is_wrong for i, is_wrong in enumerate(wrong)]
        out[f"{method} detection"] = sum(agree) / len(agree)
        kept = [row for i, row in enumerate(train) if i not in flagged]
        out[f"{method} gain"] = accuracy(trained(kept), test) - out["before"]
    return out


def test_trimming_outlier_gradients_mends_the_half_moons(tmp_path: Path) -> None:
    """In the paper, on one draw: forest 96% and 90 -> 96% of the test set, length 98% and 90 -> 87%.

    Here, over ten draws that had no part in choosing the setting: forest 94.3 ± 1.7% and 95.2 -> 99.4% (+4.1 ± 1.0),
    length (L1, L2) 96 ± 2% and +4.5 ± 0.8. The plain loss does as well, 97.1 ± 0.6% and +4.6 ± 0.6; a random tenth 83%
    and -0.2 ± 0.6. With wrong labels anywhere on the moons this network loses 0.2 points, and the best gain found at a
    detection of 94% was 1.7; with them as loosely grouped as the authors', 2.2. On the authors' draw and network, over
    20 seeds of the forest: 94.6 ± 0.8% and 90 -> 92 to 96%, L1 98% and 90 -> 87%.
    """
    worlds = [moons(seed, tmp_path / str(seed)) for seed in SEEDS]
    figures = {name: torch.tensor([world[name] for world in worlds], dtype=torch.float64) for name in worlds[0]}
    mean = {name: float(values.mean()) for name, values in figures.items()}
    print({name: f"{values.mean():.3f} ± {values.std():.3f}" for name, values in figures.items()})
    assert mean["outlier_iforest detection"] >= 0.94
    assert mean["outlier_iforest gain"] >= 0.04
    assert min(mean["outlier_l1 detection"], mean["outlier_l2 detection"]) >= 0.94
    assert min(mean["outlier_l1 gain"], mean["outlier_l2 gain"]) >= 0.04
    assert abs(mean["random gain"]) <= 0.01


def circles(seed: int, folder: Path) -> dict[str, float]:
    """How well the self-influence of each kind tells the ten points inside from the others, as AUC."""
    data, odd = two_circles(seed)
    model = fitted(network(200, seed=seed), data, epochs=500, learning_rate=0.03)
    assert accuracy(model, data) == 1  # the ten have been learnt, so their losses alone do not tell
    store = collect(model, data, folder, modules="trainable")
    members = continued_sgd(
        model, data, n=8, steps=200, learning_rate=0.2, batch_size=16, seed=seed, folder=folder / "members"
    )
    collect_at(model, {"train": data}, folder, members, rows=False, modules="trainable")
    methods = ("self_gex", "self_gex_lin", "self_ip", "self_datainf", "self_fisher")
    return {method: mislabel_detection(attribute(store, method), odd).auc for method in methods}


def test_the_geometric_ensemble_finds_the_centre_of_the_two_circles(tmp_path: Path) -> None:
    """As in the paper, where what is bilinear in the gradients mixes the ten points with the others."""
    worlds = [circles(seed, tmp_path / str(seed)) for seed in range(3)]
    mean = {method: sum(world[method] for world in worlds) / len(worlds) for method in worlds[0]}
    print({method: f"{auc:.3f}" for method, auc in mean.items()})
    assert min(world["self_gex"] for world in worlds) >= 0.99
    assert max(mean[method] for method in ("self_ip", "self_datainf", "self_fisher")) < 0.95
