# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""A folder that may leave the house: plain weights, the report that was measured on them, a receipt, one signature.

``python -m monai_unlearn verify FOLDER --public_key KEY`` checks one, offline, wherever it was copied to.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .audit.durability import removable
from .audit.report import SCHEMA as REPORT_SCHEMA
from .checkpoint import (
    file_digest,
    hold_folder,
    load_weights,
    read_safetensors,
    read_weights,
    save_weights,
    weights_digest,
    write_json,
    write_text,
)

RELEASE, RECEIPT = "monai_unlearn.release/1", "monai_unlearn.receipt/1"
MODEL, SIGNATURE = "unlearned.pt", "model.sig"
MEASURED = "Measured behaviour of the model with this sha256 on the stated sets; no proof that nothing is left"
REVERSIBLE = "REVERSIBLE: whoever also holds the original takes the adapter off again; this is suppression"
UNREACHABLE = (
    "backups, archives and copies outside of the run's folder",
    "models derived from the original: ensembles, exports, distilled and fine-tuned ones",
    "caches of other programs that were not named",
    "blocks of deleted files that the storage has not overwritten yet",
)
MAX_REQUESTS = 10
SCORES = ("mean_iou", "accuracy", "mean_dice", "balanced_accuracy", "loss", "ece")


class ReleaseError(ValueError):
    """A release cannot be made, or is not what it says; the message names the file, the reason and the remedy."""


# finalise -------------------------------------------------------------------------------------------------------------


def finalise(
    output_dir: str | Path,
    network: nn.Module,
    original: str | Path,
    unlearned: str | Path | None = None,
    release_dir: str | Path | None = None,
    sign: bool = True,
    with_adapter: bool = False,
    descendants: Sequence[str] = (),
    review_days: int = 365,
) -> Path:
    """Make ``release/`` of an audited run: nothing in it gives the original back, and it appears by one rename.

    Weights go through a plain network and are written anew, so that nothing but its tensors ships: no optimizer state,
    no teacher, no checkpoint. ``release.json`` lists every file with its sha256 and the line of descent,
    ``receipt.json`` what was asked, done, measured and not tested, ``model_card.md`` the same for readers, and
    ``model.sig`` signs all of them (OpenSSF model signing with a key; the file ``MONAI_UNLEARN_SIGNING_KEY`` names,
    else ``private/signing_key.pem``, made when missing; its public half is ``signing_public.pem`` in the run's folder).

    Args:
        output_dir: of a run that was audited.
        network: a plain network; its weights do not matter.
        original: file of the original's weights; read only.
        unlearned: file of the unlearned weights; None takes ``models/unlearned.pt``.
        release_dir: where to; None takes ``release`` in the run's folder.
        sign: whether to sign; needs the extra ``release``.
        with_adapter: ship the removable adapter as well; the receipt then begins with REVERSIBLE.
        descendants: what else was made from the original and where it is, for the receipt.
        review_days: after so many days the evidence should be looked at again.

    Returns:
        The folder. One that is there already and holds the same is left as it is.

    Raises:
        ReleaseError: when report, manifest and weights do not belong together, a file would give the original back, or
            another release lies there.
        CheckpointError: when weights cannot be read, do not fit or are not finite, or another process works there.
    """
    folder = Path(output_dir)
    target = Path(release_dir) if release_dir else folder / "release"
    report, manifest = _read_json(folder / "report.json"), _read_json(folder / "manifest.json")
    file = Path(unlearned) if unlearned else folder / "models" / MODEL
    hold_folder(folder)
    load_weights(network, file)
    digests = {"unlearned": weights_digest(network.state_dict()), "original": weights_digest(read_weights(original))}
    _refuse_mismatch(report, manifest, digests, file, folder)
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(stale)
    if target.exists():
        problems = [] if (target / "release.json").is_file() else ["release.json is missing"]
        found = {} if problems else _read_json(target / "release.json")
        if not problems and found.get("model", {}).get("weights_sha256") == digests["unlearned"]:
            verify(target)
            return target
        raise ReleaseError(f"{target} holds another release; move it away, or name another --release_dir.")
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        save_weights(network, staging / MODEL)
        for name in ("report.json", "report.html", "manifest.json"):
            write_text((folder / name).read_text(encoding="utf-8"), staging / name)
        if with_adapter:
            _copy_adapter(folder / "models" / "adapter", staging / "adapter")
        lineage = extended_lineage(_lineage_of(original), report, manifest, digests)
        receipt = _receipt(report, manifest, digests, lineage, with_adapter, descendants, review_days, folder)
        write_json(receipt, staging / "receipt.json")
        write_text(_model_card(report, receipt), staging / "model_card.md")
        files = {name: file_digest(staging / name) for name in _names(staging)}
        write_json(
            {
                "schema": RELEASE,
                "reversible": with_adapter,
                "model": {"file": MODEL, "sha256": files[MODEL], "weights_sha256": digests["unlearned"],
                          "parameters": sum(p.numel() for p in network.parameters())},
                "files": files,
                "lineage": lineage,
                "retrain_due": retrain_due(lineage, report["limits"]),
                "signed": bool(sign),
            },
            staging / "release.json",
        )  # fmt: skip
        _refuse_original_inside(staging, read_weights(original), read_weights(staging / MODEL))
        if sign:
            _sign(staging, folder)
        os.chmod(staging, 0o755)
        os.rename(staging, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReleaseError(f"there is no {path}; run the bundle to its end, or its run id audit, first.") from error
    except ValueError as error:
        raise ReleaseError(f"{path} is no JSON ({error}); make it anew.") from error


def _refuse_mismatch(
    report: Mapping[str, Any], manifest: Mapping[str, Any], digests: Mapping[str, str], file: Path, folder: Path
) -> None:
    """Refuse what was not measured on these very weights, or would show or give back what is to be forgotten."""
    if report.get("schema") != REPORT_SCHEMA or "weights" not in report:
        raise ReleaseError(f"{folder / 'report.json'} does not say which weights it measured; audit again.")
    for name, digest in digests.items():
        if report["weights"].get(name) != digest:
            raise ReleaseError(f"the report was measured on other weights of the {name} model than given; audit again.")
    if (report["request"], report["splits"]) != (manifest["request"], manifest["counts"]):
        raise ReleaseError(f"report and manifest in {folder} speak of different requests; run again.")
    if digests["unlearned"] == digests["original"]:
        raise ReleaseError(f"{file} holds the original's weights; there is nothing to release.")
    if report["shows_forget"]:
        raise ReleaseError("the report shows pictures of forgotten cases; audit again without --show_forget.")


def _refuse_original_inside(folder: Path, original: Mapping[str, Tensor], unlearned: Mapping[str, Tensor]) -> None:
    """Refuse to ship any tensor of the original that unlearning has changed; tensors of 64 bytes and more count."""
    moved = [name for name, value in original.items() if not torch.equal(value, unlearned[name])]
    if not moved:
        raise ReleaseError("unlearning changed no tensor; there is nothing to release.")
    needles = {name: _bytes(original[name]) for name in moved if original[name].nbytes >= 64}
    for name in _names(folder):
        content = (folder / name).read_bytes()
        for tensor, needle in needles.items():
            if needle in content:
                raise ReleaseError(f"{name} holds the original's {tensor}; it must not ship.")


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _copy_adapter(source: Path, target: Path) -> None:
    files = sorted(source.glob("adapter_*"))
    if not files:
        raise ReleaseError(f"there is no adapter in {source}; this method has none, release without it.")
    target.mkdir()
    for file in files:
        if file.suffix == ".safetensors":
            read_safetensors(file)
        shutil.copyfile(file, target / file.name)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# line of descent ------------------------------------------------------------------------------------------------------


def _lineage_of(original: str | Path) -> list[dict[str, Any]]:
    """The requests that the original itself has been through: those of the release it was taken from, else none."""
    path = Path(original).parent / "release.json"
    if not path.is_file():
        return []
    release = _read_json(path)
    if release.get("schema") != RELEASE or release.get("model", {}).get("sha256") != file_digest(original):
        return []
    verify(path.parent)
    return list(release["lineage"])


def entry_digest(entry: Mapping[str, Any]) -> str:
    """sha256 of one entry of a line of descent; the next one holds it."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def extended_lineage(
    lineage: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    manifest: Mapping[str, Any],
    digests: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The requests so far and this one, each with the sha256 of the one before it.

    Args:
        lineage: the requests so far, oldest first.
        report: of this request.
        manifest: of this request.
        digests: of the weights ``original`` and ``unlearned``.
    """
    scores = report["scores"]
    main = "mean_iou" if "mean_iou" in scores["original"]["holdout"] else "accuracy"
    return [
        *map(dict, lineage),
        {
            "request": report["request"],
            "job": report["job"],
            "forgotten": report["splits"]["forget"],
            "parent": digests["original"],
            "child": digests["unlearned"],
            "verdict": report["verdict"],
            "holdout": {
                "root": manifest["roots"]["holdout"],
                "before": scores["original"]["holdout"][main],
                "after": scores["unlearned"]["holdout"][main],
            },
            "previous": entry_digest(lineage[-1]) if lineage else None,
        },
    ]


def retrain_due(lineage: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> list[str]:
    """Why the model should be trained anew instead of unlearning once more; empty where nothing says so.

    A verdict of FAIL on the last request, ten requests in a row (a convention), or unseen cases that lost more than the
    request's limit ``utility`` since the last model that was trained, where the holdout stayed the same.

    Args:
        lineage: of the release, oldest first.
        limits: those of the last request.
    """
    reasons = []
    if lineage[-1]["verdict"] == "FAIL":
        reasons.append("the last request failed its audit")
    if len(lineage) >= MAX_REQUESTS:
        reasons.append(f"{len(lineage)} requests were carried out since the model was trained")
    same = [entry for entry in lineage if entry["holdout"]["root"] == lineage[-1]["holdout"]["root"]]
    lost = same[0]["holdout"]["before"] - same[-1]["holdout"]["after"]
    if lost > limits["utility"]:
        reasons.append(f"unseen cases lost {lost:.3f} in {len(same)} requests, more than {limits['utility']}")
    return reasons


# receipt --------------------------------------------------------------------------------------------------------------


def _receipt(
    report: Mapping[str, Any],
    manifest: Mapping[str, Any],
    digests: Mapping[str, str],
    lineage: Sequence[Mapping[str, Any]],
    with_adapter: bool,
    descendants: Sequence[str],
    review_days: int,
    folder: Path,
) -> dict[str, Any]:
    today = datetime.date.today()
    purged = folder / "private" / "purged.json"
    return {
        "statement": REVERSIBLE if with_adapter else MEASURED,
        "schema": RECEIPT,
        "issued": today.isoformat(),
        "review_after": (today + datetime.timedelta(days=review_days)).isoformat(),
        "asked": {key: manifest[key] for key in ("request", "request_hmac", "job", "selector", "unit", "limits",
                                                 "counts", "groups")},
        "forgotten": {"algorithm": "HMAC-SHA256 under the site's key, first 12 hexadecimal digits",
                      "pseudonyms": manifest["forget"], "roots": manifest["roots"]},
        "parent": digests["original"],
        "child": digests["unlearned"],
        "lineage": [entry_digest(entry) for entry in lineage],
        "done": {"settings": report.get("settings"), "stop": report["stop"], "cost": report["cost"],
                 "environment": report["environment"]},
        "measured": {
            "data": report["data"],
            "tier": report["tier"],
            "scores": {model: {split: {key: row[key] for key in (*SCORES, "ci", "n") if key in row}
                               for split, row in splits.items()} for model, splits in report["scores"].items()},
            "expected_unseen": report["expected_unseen"],
            "completeness": report["completeness"],
            "membership": report["membership"],
            "verdict": report["verdict"],
            "reasons": report["reasons"],
        },
        "not_tested": report["not_tested"],
        "purged": json.loads(purged.read_text(encoding="utf-8")) if purged.is_file() else None,
        "not_reached": list(UNREACHABLE),
        "descendants": list(descendants) or None,
    }  # fmt: skip


def _model_card(report: Mapping[str, Any], receipt: Mapping[str, Any]) -> str:
    """What a reader of the model's card has to know, in Markdown."""
    keys = [key for key in SCORES if any(key in row for row in report["scores"]["unlearned"].values())]
    models = [name for name in ("original", "unlearned", "retrained") if name in report["scores"]]
    lines = [
        "# Changes to this model",
        "",
        f"{receipt['statement']}.",
        "",
        f"Request `{report['request']}` ({report['job']}), {receipt['issued']}: {report['splits']['forget']} of "
        f"{report['splits']['forget'] + report['splits']['retain']} training cases were to be forgotten. "
        f"Verdict of the audit (tier {report['tier']}): **{report['verdict']}**. {report['reasons'][0]}",
        "",
        "| model | cases | n | " + " | ".join(key.replace("_", " ") for key in keys) + " |",
        "|---|---|---|" + "---|" * len(keys),
    ]
    for model in models:
        for split, row in report["scores"][model].items():
            values = " | ".join(f"{row[key]:.3f}" if row.get(key) is not None else "" for key in keys)
            lines.append(f"| {model} | {split} | {row['n']} | {values} |")
    if report["subgroups"]:
        lines += ["", "Unseen cases by group, unlearned minus original:", "", "| group | n | change |", "|---|---|---|"]
        lines += [
            f"| {row['column']}: {row['value']} | {row['n']} | {row['change']:+.3f} |" for row in report["subgroups"]
        ]
    lines += ["", "Not tested: " + "; ".join(receipt["not_tested"]) + ".", ""]
    lines += ["Not reached: " + "; ".join(receipt["not_reached"]) + ".", ""]
    lines += [f"Look at the evidence again after {receipt['review_after']}. Research software; not for diagnosis.", ""]
    return "\n".join(lines)


# signature ------------------------------------------------------------------------------------------------------------


def _signing() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise ReleaseError(
            "signing needs the extra release: pip install 'monai_unlearn[release]'; --sign 0 does without a signature."
        ) from error
    return model_signing


def _sign(staging: Path, folder: Path) -> None:
    """Sign all files of a folder with the site's key; an elliptic-curve key is made when none is there."""
    tool = _signing()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    named = os.environ.get("MONAI_UNLEARN_SIGNING_KEY")
    path = Path(named) if named else folder / "private" / "signing_key.pem"
    if not path.is_file():
        if named:
            raise ReleaseError(f"MONAI_UNLEARN_SIGNING_KEY names {named}, and there is no such file.")
        made = ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(made.decode(), path, mode=0o600)
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        hashing = tool.hashing.Config().set_ignored_paths(paths=[staging / SIGNATURE])
        tool.signing.Config().use_elliptic_key_signer(private_key=path).set_hashing_config(hashing).sign(
            staging, staging / SIGNATURE
        )
    except (TypeError, ValueError) as error:
        raise ReleaseError(f"{path} is no elliptic-curve key without a password: {error}") from error
    with (staging / SIGNATURE).open("rb") as file:
        os.fsync(file.fileno())
    _flush(staging)
    write_text(public.decode(), folder / "signing_public.pem")


# verify ---------------------------------------------------------------------------------------------------------------


def verify(release_dir: str | Path, public_key: str | Path | None = None) -> dict[str, Any]:
    """Check a release, offline: sha256 of every file, what report, receipt and weights say of each other, signature.

    Args:
        release_dir: the folder.
        public_key: PEM file of whoever should have signed it; without it no signature is checked.

    Returns:
        ``model`` (sha256), ``files`` (how many), ``signature`` ("checked", "not checked" or "none"), ``statement``,
        ``verdict`` and ``retrain_due``.

    Raises:
        ReleaseError: naming what differs, is missing or left over.
        CheckpointError: when the weights cannot be read or are not finite.
    """
    folder = Path(release_dir)
    release = _read_json(folder / "release.json")
    if release.get("schema") != RELEASE:
        raise ReleaseError(f"{folder} is no release: its release.json has the schema {release.get('schema')!r}.")
    signed = (folder / SIGNATURE).is_file()
    if public_key is not None:
        _check_signature(folder, Path(public_key), signed)
    try:
        _check_files(folder, release)
        _check_content(folder, release)
    except (KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"{folder}: a file of the release lacks what it should hold ({error}).") from error
    receipt = _read_json(folder / "receipt.json")
    return {
        "model": release["model"]["sha256"],
        "files": len(release["files"]),
        "signature": "checked" if public_key else "not checked" if signed else "none",
        "statement": receipt["statement"],
        "verdict": receipt["measured"]["verdict"],
        "retrain_due": release["retrain_due"],
    }


def _check_files(folder: Path, release: Mapping[str, Any]) -> None:
    listed = release["files"]
    expected = {*listed, "release.json", *([SIGNATURE] if release["signed"] else [])}
    found = set(_names(folder))
    for what, names in (("missing", expected - found), ("not listed", found - expected)):
        if names:
            raise ReleaseError(f"{folder}: files are {what}: {', '.join(sorted(names)[:5])}.")
    linked = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()]
    changed = [name for name, digest in listed.items() if file_digest(folder / name) != digest]
    if linked or changed:
        raise ReleaseError(f"{folder}: changed since the release: {', '.join(sorted([*linked, *changed])[:5])}.")


def _check_content(folder: Path, release: Mapping[str, Any]) -> None:
    report, manifest, receipt = (_read_json(folder / f"{name}.json") for name in ("report", "manifest", "receipt"))
    state = read_weights(folder / MODEL)
    digest, lineage = weights_digest(state), release["lineage"]
    checks = {
        "the weights are not those of release.json": release["model"]["weights_sha256"] == digest,
        "the report was measured on other weights": report["weights"]["unlearned"] == digest,
        "the receipt speaks of other weights": receipt["child"] == digest,
        "the weights are the parent's": receipt["parent"] != digest,
        "the weights hold adapters": not removable(state),
        "the receipt's scores are not the report's": receipt["measured"]["verdict"] == report["verdict"]
        and all(report["scores"][model][split].get(key) == value for model, splits in
                receipt["measured"]["scores"].items() for split, row in splits.items() for key, value in row.items()),
        "report and manifest speak of different requests": report["request"] == manifest["request"]
        and report["splits"] == manifest["counts"],
        "the receipt names other cases than the manifest": receipt["forgotten"]["pseudonyms"] == manifest["forget"],
        "the line of descent is broken": [entry_digest(entry) for entry in lineage] == receipt["lineage"]
        and [entry["previous"] for entry in lineage] == [None, *receipt["lineage"][:-1]]
        and lineage[-1]["child"] == digest,
        "an adapter ships that the receipt does not call reversible": (folder / "adapter").exists()
        == release["reversible"] == (receipt["statement"] == REVERSIBLE),
    }  # fmt: skip
    for problem, holds in checks.items():
        if not holds:
            raise ReleaseError(f"{folder}: {problem}.")


def _check_signature(folder: Path, public_key: Path, signed: bool) -> None:
    if not public_key.is_file():
        raise ReleaseError(f"there is no key {public_key}.")
    if not signed:
        raise ReleaseError(f"{folder} holds no signature {SIGNATURE}.")
    tool = _signing()
    try:
        hashing = tool.hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
        tool.verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(hashing).verify(
            folder, folder / SIGNATURE
        )
    except Exception as error:  # the library raises many kinds; each means that the signature does not hold
        reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise ReleaseError(f"{folder}: the signature does not hold ({reason[:200]}).") from error
