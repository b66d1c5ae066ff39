# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""What one of several processes does in the tests of ``monai_unlearn.distributed``; started by them as a program.

python gloo.py RANK PROCESSES FOLDER
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from torch import nn
from toy import draw, small_unet

from monai_unlearn import (
    DistillationLoss,
    ForgetRetainSampler,
    KeepTrunk,
    MemoryDataset,
    PrepareUnlearning,
    ReseedEachEpoch,
    StopAtReference,
    UnlearningLoss,
    cache_outputs,
    make_student,
    to_background,
)
from monai_unlearn.audit import SplitEvaluator
from monai_unlearn.audit.scores import score_cases
from monai_unlearn.distributed import AcrossProcesses, process_rank
from monai_unlearn.engines import run_phase


def unlearn(number: int, path: Path, scope: str = "full") -> dict:
    """Forget some of 13 drawn samples, scored after each epoch, and write the weights.

    In a part of the network the teacher's outputs and what lies before that part are kept.
    """
    items = [{"image": str(i), "label": "m", "forget": i < number, "sha256": f"s{i}"} for i in range(13)]
    teacher, looked = small_unet(), []
    teacher.register_forward_hook(lambda _, images, __: looked.append(len(images[0])))
    kept = {} if scope == "full" else {"teacher": cache_outputs(teacher, MemoryDataset(items, draw), batch_size=4)}
    data = MemoryDataset(items, draw, extra=["forget"], targets=kept)
    torch.manual_seed(0)
    student = make_student(small_unet(), scope)
    trunk = KeepTrunk(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loss = UnlearningLoss(DiceCELoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss(), DistillationLoss(), 0.5)
    halves = {"forget": MemoryDataset(items[:number], draw), "retain": MemoryDataset(items[number:], draw)}
    stop = StopAtReference(SplitEvaluator(student, halves, limit=5), 0.0, student, resolution=0.01, retain_budget=1.0)
    trainer = SupervisedTrainer(
        device="cpu", max_epochs=2, network=student, optimizer=optimizer, loss_function=loss, decollate=False,
        train_data_loader=DataLoader(data, batch_sampler=ForgetRetainSampler(data.forget, 2, 5), num_workers=0),
        prepare_batch=PrepareUnlearning(to_background, None if kept else teacher),
        train_handlers=[AcrossProcesses(student), ReseedEachEpoch(0), stop, trunk],
    )  # fmt: skip
    record = run_phase(trainer, path, "f")
    scores = score_cases(student, MemoryDataset(items, draw))
    return {"images": record["images"], "history": stop.history, "iou": scores["iou"].tolist(),
            "threads": torch.get_num_threads(), "looked": sum(looked), "trunk": trunk.scored}  # fmt: skip


def main(rank: int, processes: int, folder: Path) -> None:
    """All sizes of the forget set, one after the other."""
    torch.set_num_threads(1)
    if processes > 1:
        store = dist.FileStore(str(folder / "store"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    found: dict[object, Any] = {
        number: unlearn(number, folder / str(number) / "models" / "unlearned.pt") for number in (1, 2, 3, 7)
    }
    found["decoder"] = unlearn(3, folder / "decoder" / "models" / "unlearned.pt", "decoder")
    if processes > 1:
        network = nn.Conv2d(1, 1, 1)
        nn.init.constant_(network.weight, process_rank())
        try:
            AcrossProcesses(network)._start(SimpleNamespace(loss_function=None))
        except RuntimeError as error:
            found["refused"] = str(error)
        dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
