# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What unlearning costs beside retraining, fine-tuning and the published loops, measured side by side; resumable.

    python benchmarks/speed.py --sections steps growth precision --dataset_dir "$MONAI_UNLEARN_DATA/isic2018_seg"
    python benchmarks/speed.py                                # prints the tables of the rows there are

*steps*: one sample of a training step. *growth*: one epoch of unlearning on drawn images, with everything that it
caches, as sets, images and networks grow, and on several processes. *precision*: a training step in bfloat16, with
``channels_last``, and compiled. *run*: whole runs of the bundle isic_unlearn with original, references and retrained
model given (``--models``, a folder with the weights of an earlier run), so that they differ in the unlearning alone.
*gpu*: larger images and batches, and with ``--dataset_dir`` whole runs of a larger network, where there is a GPU.

The published loop of Erase to Retain is written anew here from its description: it calls its teacher for every
retained sample of every epoch. That of the perturbed sign gradients stands in ``boundary_search.py``. Operations are
counted by torch, seconds are the fastest of three on this machine.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.networks.nets import DenseNet121, FlexibleUNet, SwinUNETR, UNet
from rows import ROOT, append, costs, finished, markdown, run, share
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from monai_unlearn import (
    AcrossProcesses,
    AutocastInferer,
    DistillationLoss,
    ForgetRetainSampler,
    FrozenTrunk,
    KeepTrunk,
    MemoryDataset,
    PrepareUnlearning,
    ReseedEachEpoch,
    UnlearningLoss,
    cache_outputs,
    make_student,
    process_rank,
    seeded,
    to_background,
)
from monai_unlearn.bundle import end_processes, start_processes
from monai_unlearn.data import store_key
from monai_unlearn.engines import saved_bytes

ROWS = Path(__file__).with_suffix(".csv")
BUNDLE = "isic_unlearn"


def unet(width: int = 16) -> nn.Module:
    """The network of isic_unlearn, or a wider one."""
    return UNet(2, 3, 1, tuple(width * 2**i for i in range(5)), (2, 2, 2, 2), num_res_units=2, norm="batch")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # network, sample, batch
    "UNet": (unet, (3, 96, 128), 16),
    "FlexibleUNet, resnet34": (lambda: FlexibleUNet(3, 1, "resnet34", pretrained=False), (3, 128, 192), 8),
    "SwinUNETR": (lambda: SwinUNETR(1, 2, feature_size=24, spatial_dims=2), (1, 128, 128), 4),
    "DenseNet-121": (lambda: DenseNet121(2, 3, 9), (3, 64, 64), 16),
}
PUBLISHED = "Erase to Retain, published loop"
RUNS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "fine-tuning": (("fine_tune",), {}),
    "deletion (default)": ((), {}),
    "deletion, lean": (("lean",), {}),
    "deletion, 3 kept for 1": ((), {"retain_per_forget": 3}),
    "deletion, 2 kept for 1": ((), {"retain_per_forget": 2}),
    "deletion, 1 kept for 1": ((), {"retain_per_forget": 1}),
    PUBLISHED: (("erase_to_retain_paper",), {"learning_rate": 1e-3}),
    "Erase to Retain": (("erase_to_retain",), {"unlearn_epochs": 15}),
    "Erase to Retain, decoder": (("erase_to_retain",), {"unlearn_epochs": 15, "lora_scope": "decoder"}),
    "Erase to Retain, decoder, each once, as long as the loop": (
        ("erase_to_retain",),
        {"unlearn_epochs": 15, "lora_scope": "decoder", "unlearn_phase#sampler#num_forget": 2, "stop_at_reference": 0,
         "restore_epochs": 0},
    ),
    "Erase to Retain, decoder, 3 kept for 1": (
        ("erase_to_retain",), {"unlearn_epochs": 15, "lora_scope": "decoder", "retain_per_forget": 3},
    ),
}  # fmt: skip


GPU_SETTING = "isic_unlearn, resnet34, 256 x 256"
GPU_OPTIONS: dict[str, object] = {"spatial_size": [256, 256], "relearn_steps": 0, "forget_fraction": 0.1}
GPU_RUNS = {  # with the overlay flexible_unet: a ResNet-34 as encoder
    **{name: RUNS[name] for name in ("deletion (default)", "fine-tuning", PUBLISHED)},
    "perturbed sign gradients, voxels": (("boundary_margin",), {}),
}


def fastest(step: Callable[[], Any], device: torch.device, repeat: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    best = float("inf")
    for place in range(repeat + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if place:
            best = min(best, time.perf_counter() - start)
    return best


def counted(step: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def one_pass(
    network: nn.Module, image: Tensor, trunk: FrozenTrunk | None = None, features: list[Tensor] | None = None
) -> None:
    """Forwards and backwards, with the frozen part played back where it is given."""
    with nullcontext() if trunk is None or features is None else trunk.played_back(network, features):
        network(image).square().mean().backward()


def steps_of(build: Callable[[], nn.Module], size: tuple[int, ...], batch: int, device: torch.device) -> Iterator[dict]:
    """A batch of each kind of training step."""
    network = seeded(build, 0).to(device).eval()
    image = torch.rand(batch, *size, device=device)
    with torch.no_grad():
        output = network(image)
    everything = copy.deepcopy(network).requires_grad_(True)
    adapted = make_student(network, "all").to(device)
    decoder = make_student(network, "decoder").to(device)
    trunk = FrozenTrunk(decoder, image[:2])
    features = trunk.record(decoder, image)

    def trained(student: nn.Module, teacher: nn.Module | None = None) -> None:
        target = output
        if teacher is not None:
            with torch.no_grad():
                target = teacher(image)
        (student(image) - target).square().mean().backward()

    def played_back() -> None:
        with trunk.played_back(decoder, features):
            trained(decoder)

    kinds: dict[str, tuple[Callable[[], Any], nn.Module, FrozenTrunk | None]] = {
        "training, all weights": (lambda: trained(everything), everything, None),
        "Erase to Retain, published step": (lambda: trained(adapted, network), adapted, None),
        "adapters, teacher kept": (lambda: trained(adapted), adapted, None),
        "adapters in the decoder, teacher kept": (lambda: trained(decoder), decoder, None),
        "the same, frozen part kept": (played_back, decoder, trunk),
    }
    for name, (step, student, kept) in kinds.items():
        yield {
            "row": name, "flops": counted(step) / batch, "seconds": fastest(step, device) / batch,
            "memory": saved_bytes(student, image, kept) / batch,
        }  # fmt: skip


def epoch(
    forget: int, retain: int, size: tuple[int, int] = (96, 128), width: int = 16, per_forget: float | None = 3,
    device: torch.device | None = None,
) -> dict:  # fmt: skip
    """One epoch of unlearning on drawn images, in the decoder, with the passes that fill the caches."""
    device = device or torch.device("cpu")
    items = [{"image": str(place), "label": "", "forget": place < forget} for place in range(forget + retain)]

    def draw(item: dict) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(item["image"]))
        image = torch.rand(3, *size, generator=generator)
        return {"image": image, "label": (image[:1] > 0.5).float()}

    original = seeded(lambda: unet(width), 0).to(device).eval()
    student = make_student(original, "decoder").to(device)
    sampler = ForgetRetainSampler([item["forget"] for item in items], 4, 12, retain_per_forget=per_forget)
    shown, store = [items[place] for place in sampler.shown(1)], {}
    passes = {"images": 0}

    def count(engine: Any) -> None:
        passes["images"] += len(engine.state.batch["image"])

    def work() -> None:
        passes["images"] = 0
        taught = MemoryDataset([item for item in shown if not item["forget"]], draw, store)
        labels = {store_key(item): torch.zeros(1, *size) for item in items if item["forget"]}
        targets = {"teacher": cache_outputs(original, taught, device), "forget_label": labels}
        data = MemoryDataset(items, draw, store, ["forget"], targets)
        loss = UnlearningLoss(DiceCELoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss(), DistillationLoss(), 0.3)
        trainer = SupervisedTrainer(
            device=device, max_epochs=1, network=student, loss_function=loss, decollate=False,
            train_data_loader=DataLoader(data, batch_sampler=copy.copy(sampler), num_workers=0),
            optimizer=torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-3),
            prepare_batch=PrepareUnlearning(to_background),
            train_handlers=[AcrossProcesses(student), ReseedEachEpoch(0), KeepTrunk(student)],
        )  # fmt: skip
        trainer.add_event_handler(Events.ITERATION_COMPLETED, count)
        trainer.run()

    flops = counted(work)
    return {"flops": flops, "seconds": fastest(work, device, 1), "memory": "", "images": passes["images"]}


def growth() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What grows, how the row is called, and the arguments of :func:`epoch`."""
    for forget in (8, 16, 32, 64):
        yield "forget set", str(forget), {"forget": forget, "retain": 768}
    for retain in (96, 192, 384, 768, 1536):
        yield "retained set", str(retain), {"forget": 16, "retain": retain}
        yield "retained set, all shown", f"{retain} all", {"forget": 16, "retain": retain, "per_forget": None}
    for side in (64, 128, 256, 512):
        yield "image", f"{side} x {side}", {"forget": 8, "retain": 32, "size": (side, side)}
    for width in (8, 16, 32, 64):
        yield "network", f"width {width}", {"forget": 8, "retain": 32, "width": width}


def on_processes(number: int) -> dict:
    """The same epoch on several processes of this machine, one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}", f"--master_port={port}",
               __file__, "--as_process"]  # fmt: skip
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seconds, images = done.stdout.split()[-2:]
    return {"flops": "", "seconds": float(seconds), "memory": "", "images": int(images) * number}


def precision_of(device: torch.device, cache: Path) -> Iterator[dict]:
    """A training step of the network, set up in several ways; ``cache``, an empty folder, is for what is compiled."""
    image = torch.rand(16, 3, 96, 128, device=device)

    def setting(name: str, channels_last: bool, dtype: str, compiled: bool) -> dict:
        network, given = seeded(unet, 0).to(device).train(), image
        if channels_last:
            network, given = network.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
        inferer = AutocastInferer(dtype=dtype)
        if compiled:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / name)
            network.compile()

        def step() -> None:
            inferer(given, network).square().mean().backward()

        start = time.perf_counter()
        step()
        first = time.perf_counter() - start
        return {"row": name, "flops": "", "seconds": fastest(step, device) / len(image), "memory": "", "first": first}

    yield setting("float32", False, "float32", False)
    yield setting("float32, channels last", True, "float32", False)
    yield setting("bfloat16, channels last", True, "bfloat16", False)
    yield setting("float32, channels last, compiled", True, "float32", True)
    yield setting("bfloat16, channels last, compiled", True, "bfloat16", True)


def gpu_rows(device: torch.device, side: int, batch: int) -> Iterator[dict]:
    """Seconds and memory of a full step and of one with the frozen part kept; what does not fit has no numbers."""
    network = seeded(NETWORKS["FlexibleUNet, resnet34"][0], 0).to(device).eval()
    image = torch.rand(batch, 3, side, side, device=device)
    decoder, everything = make_student(network, "decoder").to(device), copy.deepcopy(network)
    trunk = FrozenTrunk(decoder, torch.rand(2, 3, side, side, device=device))
    everything.requires_grad_(True)

    def kept() -> Callable[[], None]:
        return partial(one_pass, decoder, image, trunk, trunk.record(decoder, image))

    for name, prepare in (("all weights", lambda: partial(one_pass, everything, image)), ("decoder, kept", kept)):
        torch.cuda.reset_peak_memory_stats()
        row = {"row": f"{side} {batch} {name}"}
        try:
            step = prepare()
            flops, seconds = counted(step), fastest(step, device)
        except torch.OutOfMemoryError:
            yield row
            continue
        yield row | {"flops": flops / batch, "seconds": seconds / batch, "share": flops / seconds,
                     "memory": torch.cuda.max_memory_allocated()}  # fmt: skip


def run_row(report: dict, models: Path) -> dict:
    """Cost and quality of a whole run beside the retrained model whose record lies in ``models``."""
    row = costs(report, ("seconds", "flops"))
    row["retrain_flops"] = json.loads((models / "retrained.json").read_text())["flops"]
    for model in ("original", "unlearned", "retrained"):
        for split in ("forget", "retain", "holdout"):
            row[f"{model}_{split}"] = report["scores"][model][split]["mean_iou"]
    row["agreement"] = report["agreement"]["unlearned"]["forget"]
    row["auc"] = report["membership"]["unlearned"]["calibrated"]["auc"]
    return row | {"verdict": report["verdict"]}


COLUMNS = ("section", "setting", "row", "flops", "seconds", "memory", "images", "first", "share", "threads", "device",
           *(f"{part}_{unit}" for unit in ("seconds", "flops") for part in ("cache", "reference", "train", "retrain")),
           *(f"{m}_{s}" for m in ("original", "unlearned", "retrained") for s in ("forget", "retain", "holdout")),
           "agreement", "auc", "verdict")  # fmt: skip


def spent(row: dict) -> tuple[float, float]:
    """FLOPs and seconds of a run, what it keeps included; its references are given."""
    flops, seconds = (sum(float(row[f"{part}_{unit}"]) for part in ("cache", "train")) for unit in ("flops", "seconds"))
    return flops, seconds


def ratio(unit: str, row: dict, base: dict) -> str:
    """A row's value in the base's, ``–`` where one of them was not measured."""
    return f"{float(row[unit]) / float(base[unit]):.3f}" if row[unit] and base[unit] else "–"


def tables(rows: list[dict]) -> Iterator[str]:
    """Every section as a table of ratios."""

    def section(name: str) -> dict[str, list[dict]]:
        found: dict[str, list[dict]] = {}
        for row in rows:
            if row["section"] == name:
                found.setdefault(row["setting"], []).append(row)
        return found

    for setting, members in section("steps").items():
        base = members[0]
        lines = [["step of one sample", "GFLOP", "FLOPs, share", "seconds, share", "kept for the backward pass, share"]]
        for row in members:
            shares = [ratio(unit, row, base) for unit in ("flops", "seconds", "memory")]
            lines.append([row["row"], f"{float(row['flops']) / 1e9:.3f}", *shares])
        yield f"{setting}\n\n{markdown(lines)}"
    for setting, members in section("growth").items():
        lines = [[setting, "images in the epoch", "TFLOP", "TFLOP, first = 1", "seconds, first = 1"]]
        for row in members:
            flops = f"{float(row['flops']) / 1e12:.3f}" if row["flops"] else "–"
            lines.append([row["row"], row["images"], flops,
                          *(ratio(unit, row, members[0]) for unit in ("flops", "seconds"))])  # fmt: skip
        yield markdown(lines)
    for setting, members in section("precision").items():
        lines = [
            ["a training step", "ms for one sample", "share", "first step, seconds", "gained back after, steps of 16"]
        ]
        base = members[0]
        for row in members:
            gain = 16 * (float(base["seconds"]) - float(row["seconds"]))
            late = (float(row["first"]) - float(base["first"])) / gain if gain > 0 else float("nan")
            gained = "–" if row is base or gain <= 0 else "at once" if late < 1 else f"{late:.0f}"
            lines.append([row["row"], f"{1000 * float(row['seconds']):.2f}", ratio("seconds", row, base),
                          f"{float(row['first']):.1f}", gained])  # fmt: skip
        yield f"{setting}\n\n{markdown(lines)}"
    for setting, members in section("run").items():
        lines = [["run", "TFLOP", "share of the retrain", "seconds", "published loop / this, TFLOP", "seconds",
                  "forget", "retain", "holdout", "agreement with the retrained on forget", "AUC",
                  "verdict"]]  # fmt: skip
        published = next((spent(row) for row in members if row["row"] == PUBLISHED), None)
        for row in members:
            flops, seconds = spent(row)
            whole = [f"{flops / 1e12:.2f}", f"{share(row, 'flops', ('cache', 'train')):.3f}", f"{seconds:.0f}"]
            whole += ["", ""] if published is None else [f"{published[0] / flops:.1f}", f"{published[1] / seconds:.1f}"]
            scores = [row[f"unlearned_{split}"] for split in ("forget", "retain", "holdout")]
            scores += [row["agreement"], row["auc"]]
            lines.append([row["row"], *whole, *(f"{float(value):.3f}" for value in scores), row["verdict"]])
        for model in ("original", "retrained"):
            scores = [members[0][f"{model}_{split}"] for split in ("forget", "retain", "holdout")]
            lines.append([model, *[""] * 5, *(f"{float(value):.3f}" for value in scores), "", "", ""])
        yield f"{setting}\n\n{markdown(lines)}"
    for setting, members in section("gpu").items():
        lines = [[setting, "ms for one sample", "TFLOP/s", "peak GiB"]]
        for row in members:
            found = ["does not fit", "–", "–"]
            if row["seconds"]:
                found = [f"{1000 * float(row['seconds']):.3f}", f"{float(row['share']) / 1e12:.2f}",
                         f"{float(row['memory']) / 2**30:.2f}"]  # fmt: skip
            lines.append([row["row"], *found])
        yield markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("steps", "growth", "precision", "run", "gpu")
    parser.add_argument("--sections", nargs="+", choices=names, default=[])
    parser.add_argument("--dataset_dir", help="ISIC 2018 pairs, for the section run")
    parser.add_argument("--models", type=Path, help="folder with original, reference, judge and retrained model")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output")
    parser.add_argument("--as_process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_process:
        row = epoch(64, 192, device=start_processes())
        if process_rank() == 0:
            print(row["seconds"], row["images"])
        end_processes()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def done(section: str, setting: str, name: str) -> bool:
        return (section, setting, name) in {(row["section"], row["setting"], row["row"]) for row in finished(ROWS)}

    def missing(section: str, setting: str, name: str) -> bool:
        return section in arguments.sections and not done(section, setting, name)

    def keep(section: str, setting: str, row: dict) -> None:
        found = {
            "section": section,
            "setting": setting,
            "threads": torch.get_num_threads(),
            "device": device.type,
            **row,
        }
        append(ROWS, {name: found.get(name, "") for name in COLUMNS})

    for name, (build, size, batch) in NETWORKS.items():
        setting = f"{name}, {' x '.join(map(str, size[1:]))}, batch {batch}"
        if missing("steps", setting, "the same, frozen part kept"):
            for row in steps_of(build, size, batch, device):
                keep("steps", setting, row)
    for setting, name, options in growth():
        if missing("growth", setting, name):
            keep("growth", setting, {"row": name, **epoch(**options, device=device)})
    for number in (1, 2):
        if missing("growth", "processes", f"{number} processes"):
            keep("growth", "processes", {"row": f"{number} processes", **on_processes(number)})
    if missing("precision", "UNet, 96 x 128, batch 16", "float32"):
        with tempfile.TemporaryDirectory() as cache:
            for row in precision_of(device, Path(cache)):
                keep("precision", "UNet, 96 x 128, batch 16", row)
    if arguments.dataset_dir and arguments.models:
        files = {name: str((arguments.models / f"{name}.pt").resolve()) for name in ("original", "reference", "judge",
                                                                                    "retrained")}  # fmt: skip
        given = {"original_model": files["original"], "retrained_model": files["retrained"], "forget_fraction": 0.1,
                 "holdout_fold": 4,
                 "reference_models": str([files["reference"], files["judge"]]), "relearn_steps": 0}  # fmt: skip
        for name, (overlays, options) in RUNS.items():
            if missing("run", "isic_unlearn, 96 x 128", name):
                folder = arguments.output_dir / "".join(one if one.isalnum() else "_" for one in name)
                report = run(BUNDLE, overlays, arguments.dataset_dir, folder, **given, **options)
                keep("run", "isic_unlearn, 96 x 128", {"row": name, **run_row(report, arguments.models)})
    if device.type == "cuda" and "gpu" in arguments.sections:
        for side, batch in itertools.product((128, 256, 512), (1, 8, 32, 128)):
            setting = f"{side} x {side}, batch {batch}"
            if not done("gpu", setting, f"{side} {batch} decoder, kept"):
                for row in gpu_rows(device, side, batch):
                    keep("gpu", setting, row)
        for name, (overlays, options) in GPU_RUNS.items():
            if arguments.dataset_dir and not done("run", GPU_SETTING, name):
                folder = arguments.output_dir / "resnet34"  # original, references and retrained model are shared
                overlays, options = ("flexible_unet", *overlays), GPU_OPTIONS | options
                report = run(BUNDLE, overlays, arguments.dataset_dir, folder, **options)
                keep("run", GPU_SETTING, {"row": name, **run_row(report, folder / "models")})
    for text in tables(finished(ROWS)):
        print(f"\n{text}")


if __name__ == "__main__":
    main()
