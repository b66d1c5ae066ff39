# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""How well and how fast the nearest other class is found, against the published one-step search; resumable.

    python benchmarks/boundary_search.py --dataset_dir "$MONAI_UNLEARN_DATA/isic_cls" --output_dir /runs/search
    python benchmarks/boundary_search.py                      # prints the tables of the rows there are

The truth is the class at the smallest ε at which PGD crosses: 20 steps, ε halved down in 8 rounds, every sample by
itself. *Agreement* is over samples whose truth was found. FLOPs are counted for one forget image over a whole run of
unlearning: a label that is kept is searched once, the published loop searches again in each of its 10 passes.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from monai.bundle import ConfigWorkflow
from rows import ROOT, append, finished, markdown, parser_of, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from monai_unlearn import InputDomain, LegacyBoundary, MemoryDataset, PerturbedSignGradient, load_weights
from monai_unlearn.boundary import searching
from monai_unlearn.engines import forward_flops

ROWS = Path(__file__).with_suffix(".csv")
BUNDLE = "isic_classification_unlearn"
NETWORKS = {"resnet34": (), "densenet121": ("densenet121",)}
PASSES = 10  # over the forget set, as published
WRONG = ((0.4914, 0.4822, 0.2265), (0.2023, 0.1994, 0.2010))  # of another data set, as published
DOMAIN = InputDomain.normalised([0.5], [0.5])
SEARCHES = {
    "ours": {},
    "ours, no noise": {"noise": 0.0},
    "ours, γ = 1": {"noise": 1.0},
    "ours, cross-entropy": {"ascent": "cross_entropy"},
    "ours, 5 bisections": {"bisection": 5},
    "runner-up": {"max_steps": 0},
}
ALONE = "ours, one sample at a time"
PUBLISHED, MISTAKEN = "published, one step", "published, with its input range"
METHODS = (*SEARCHES, "boundary shrink", PUBLISHED, MISTAKEN, ALONE)


def nearest(network: nn.Module, image: Tensor, own: Tensor, rounds: int = 8, steps: int = 20) -> Tensor:
    """The class at the smallest ε at which PGD crosses, −1 where it never does; every sample's ε is its own."""
    low, high = torch.zeros(len(image)), torch.full((len(image),), 0.8)
    found = torch.full_like(own, -1)
    bounds, rows = DOMAIN.bounds(image), torch.arange(len(image))
    with searching(network):
        for _ in tqdm(range(rounds), "PGD"):
            epsilon = (low + high) / 2
            reach = (epsilon * 2).view(-1, 1, 1, 1)  # an intensity counts 2 in the input
            at, crossed = image.clone(), torch.zeros(len(image), dtype=torch.bool)
            for _ in range(steps):
                active = rows[~crossed]
                for part in active.split(64) if len(active) else ():
                    point = at[part].requires_grad_()
                    said = network(point)
                    other = said.scatter(1, own[part, None], -torch.inf).amax(1)
                    gradient = torch.autograd.grad((other - said.gather(1, own[part, None])[:, 0]).sum(), point)[0]
                    moved = at[part] + 2.5 / steps * reach[part] * gradient.sign() - image[part]
                    moved = image[part] + moved.clamp(-reach[part], reach[part])
                    at[part] = moved.clamp(bounds.low[part], bounds.high[part])
                    with torch.no_grad():
                        named = network(at[part]).argmax(1)
                    hit = part[named != own[part]]
                    found[hit], crossed[hit] = named[named != own[part]], True
            high, low = torch.where(crossed, epsilon, high), torch.where(crossed, low, epsilon)
    return found


def input_gradient_flops(network: nn.Module, image: Tensor) -> int:
    """Floating-point operations of the backward pass to one sample ``(C, H, W)``, weights left out."""
    with searching(network), FlopCounterMode(display=False) as counter:
        network(image[None].clone().requires_grad_()).sum().backward()
    return counter.get_total_flops() - forward_flops(network, image)


def labels_of(method: str, network: nn.Module, image: Tensor, label: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The labels a method finds, the share of samples that crossed, mean steps and distance, and passes an image."""
    if method in (PUBLISHED, MISTAKEN):
        mean, std = ((0.5,), (0.5,)) if method == PUBLISHED else WRONG
        torch.manual_seed(0)
        legacy = LegacyBoundary(network, mean, std)
        pairs = zip(image.split(64), label.split(64))
        new = torch.cat([legacy(*pair) for pair in pairs]).argmax(1)
        crossed = float((new != label.argmax(1)).float().mean())
        return new, {"crossed": crossed, "steps": 1.0, "distance": 0.1, "forwards": 2.0, "backwards": 1.0}
    if method == "boundary shrink":
        search = PerturbedSignGradient.boundary_shrink(network, DOMAIN)
    else:
        search = PerturbedSignGradient(network, DOMAIN, **SEARCHES.get(method, {}))
    search.batch_size = 1 if method == ALONE else 64
    found = search(image, label)
    crossed = found.route <= 1
    return found.label, {
        "crossed": float(crossed.float().mean()),
        "steps": float(found.steps.float().mean()),
        "distance": float(found.distance[crossed].mean()) if crossed.any() else 0.0,
        "forwards": search.forwards / len(image),
        "backwards": search.backwards / len(image),
    }


def measure(name: str, dataset_dir: str, folder: Path, number: int) -> list[dict]:
    """One row for each method; all on the same images, one after the other."""
    run(BUNDLE, NETWORKS[name], dataset_dir, folder / name, "original", forget_fraction=0.1)
    configs = [ROOT / "bundles" / BUNDLE / "configs" / one for one in
               ("train.json", *(f"methods/{overlay}.json" for overlay in NETWORKS[name]))]  # fmt: skip
    flow = ConfigWorkflow([str(one) for one in configs], workflow_type="train", logging_file=False,
                          dataset_dir=dataset_dir, output_dir=str(folder / name), forget_fraction=0.1)  # fmt: skip
    flow.initialize()
    parsed = flow.parser.get_parsed_content
    network = load_weights(parsed("network_factory")(), folder / name / "models" / "original.pt").eval()
    items = random.Random(0).sample(parsed("resolution").training, number)
    data = MemoryDataset(items, parsed("train#preprocessing"))
    image, label = (torch.stack([data[index][key] for index in range(number)]) for key in ("image", "label"))
    own = label.argmax(1)
    with torch.no_grad():
        known = network(image).argmax(1) == own
    image, label, own = image[known], label[known], own[known]
    truth, rows = nearest(network, image, own), []
    for method in METHODS:
        labels_of(method, network, image[:2], label[:2])  # warm
        start = time.perf_counter()
        new, facts = labels_of(method, network, image, label)
        seconds = time.perf_counter() - start
        flops = facts["forwards"] * forward_flops(network, image[0])
        flops += facts["backwards"] * input_gradient_flops(network, image[0])
        repeated = PASSES if method in (PUBLISHED, MISTAKEN) else 1
        reached = truth >= 0
        rows.append({
            "network": name, "method": method, "images": len(image), "threads": torch.get_num_threads(),
            "agreement": float((new == truth)[reached].float().mean()), **facts,
            "own_again": float((new == own).float().mean()), "truth_found": float(reached.float().mean()),
            "flops_per_image": flops * repeated, "seconds_per_image": seconds / len(image),
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Methods of one network; FLOPs and seconds as multiples of ours."""
    ours = next(row for row in rows if row["method"] == "ours")
    lines = [["", "agreement with the nearest class", "crossed", "own class again", "mean steps", "mean distance",
              "FLOPs for a run, ours = 1", "seconds for one search, ours = 1"]]  # fmt: skip
    for row in rows:
        cells = [f"{float(row[key]):.3f}" for key in ("agreement", "crossed", "own_again", "steps", "distance")]
        ratios = [f"{float(row[key]) / float(ours[key]):.2f}" for key in ("flops_per_image", "seconds_per_image")]
        lines.append([row["method"], *cells, *ratios])
    return markdown(lines)


def main() -> None:
    parser = parser_of(__doc__, "the nine-class folders")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.dataset_dir:
        for name in arguments.networks:
            if name not in {row["network"] for row in finished(ROWS)}:
                for row in measure(name, arguments.dataset_dir, arguments.output_dir, arguments.images):
                    append(ROWS, row)
    for name in NETWORKS:
        rows = [row for row in finished(ROWS) if row["network"] == name]
        if rows:
            print(f"\n{name}, {rows[0]['images']} images\n\n{table(rows)}")


if __name__ == "__main__":
    main()
