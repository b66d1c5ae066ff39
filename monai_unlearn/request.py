# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
"""Who is forgotten: a deletion request, resolved against a data list.

A data-list item is a dict with at least ``image`` (a path). Its id is ``image_id``, else the stem of the image's file
name. Items that share a value of ``patient_id``, ``group`` or ``lesion_id`` belong to one group; every other key is
metadata that a rule can ask for.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
import operator
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

Item = dict[str, Any]

JOBS = ("deletion", "suppression", "revision")
SELECTORS = ("ids", "groups", "rule", "class", "fraction")
GROUP_KEYS = ("patient_id", "group", "lesion_id")
LIMITS = {"forget": 0.02, "utility": 0.02, "retain": 0.04, "membership": 0.05}
ENOUGH_PATIENTS = 8  # of one kind among the unseen, to be compared with
NEAR_DUPLICATE_BITS = 4  # of the 64 bits of the perceptual hash


class RequestError(ValueError):
    """The request cannot be carried out as it stands; the message says why and what to change."""


def refuse_expressions(value: Any, name: str) -> None:
    """Refuse text that MONAI's configuration parser would evaluate instead of reading.

    Args:
        value: anything; lists and dicts are searched through.
        name: what the value is called in the message.

    Raises:
        RequestError: when a string in it begins with ``$``, ``@`` or ``%``.
    """
    if isinstance(value, str) and value[:1] in ("$", "@", "%"):
        raise RequestError(
            f"{name} begins with {value[0]!r}: MONAI would evaluate it. Give the plain value; an id that really "
            "begins with such a sign has to be renamed in the data list."
        )
    if isinstance(value, Mapping):
        for key, entry in value.items():
            refuse_expressions(key, f"a key of {name}")
            refuse_expressions(entry, f"{name}: {key}")
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            refuse_expressions(entry, f"a value of {name}")


@dataclass(frozen=True)
class DeletionRequest:
    """What is asked for, before it meets any data.

    Args:
        selector: exactly one of ``{"ids": [...]}``, ``{"groups": [...]}``, ``{"rule": "age_approx >= 70"}``,
            ``{"class": "melanoma"}`` and ``{"fraction": 0.1, "seed": 0}``.
        job: ``deletion`` (rows of the training list), ``suppression`` (a class) or ``revision`` (a device, a site).
        id: the request's own number or name; it appears in the report.
        reason: free text; kept in ``private/`` only.
        unit: ``group`` (whole patients) or ``image``. None takes ``group`` for ids, groups and fractions and ``image``
            for rules and classes.
        on_split_group: for unit ``image``, what becomes of a group with images on both sides: ``include`` forgets all
            of it, ``exclude`` keeps all of it. None leaves the sides as they are, which only suppression allows.
        missing: what an item without the metadata a rule asks for does: ``skip`` (does not match), ``match``, or
            ``refuse`` (the request is refused).
        limits: acceptance limits fixed beforehand, see :data:`LIMITS`; all are absolute differences of scores.

    Raises:
        RequestError: on an unknown job, selector, unit, policy or limit.
    """

    selector: Mapping[str, Any]
    job: str = "deletion"
    id: str = "unnamed"
    reason: str = ""
    unit: str | None = None
    on_split_group: str | None = None
    missing: str = "skip"
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("job", self.job, JOBS),
            ("unit", self.unit, (None, "group", "image")),
            ("on_split_group", self.on_split_group, (None, "include", "exclude")),
            ("missing", self.missing, ("match", "skip", "refuse")),
        ):
            if not isinstance(value, (str, NoneType)) or value not in allowed:
                raise RequestError(f"the request's {name} must be one of {allowed}, got {value!r}.")
        if not isinstance(self.selector, Mapping):
            raise RequestError(
                f"the request's selector must be a mapping such as {{ids: [...]}}, got {self.selector!r}."
            )
        refuse_expressions(self.selector, "the request's selector")
        kinds = [name for name in SELECTORS if name in self.selector]
        if len(kinds) != 1:
            raise RequestError(
                f"the request's selector must hold exactly one of {SELECTORS}, got {sorted(map(str, self.selector))}."
            )
        unknown = set(self.selector) - {*kinds, *(["seed"] if kinds == ["fraction"] else [])}
        if unknown:
            raise RequestError(f"the request's selector has keys it does not know: {sorted(map(str, unknown))}.")
        self._check_value(kinds[0], self.selector[kinds[0]])
        if not isinstance(self.limits, Mapping):
            raise RequestError(f"the request's limits must be a mapping such as {{forget: 0.02}}, got {self.limits!r}.")
        for name, limit in self.limits.items():
            if name not in LIMITS:
                raise RequestError(f"the request's limit {name!r} is unknown; there are {sorted(LIMITS)}.")
            if not isinstance(limit, (int, float)) or not 0 < limit < 1:
                raise RequestError(f"the request's limit {name!r} must lie between 0 and 1, got {limit!r}.")

    def _check_value(self, kind: str, value: Any) -> None:
        if kind == "fraction":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise RequestError(f"the fraction to forget must lie between 0 and 1, got {value!r}.")
            if not isinstance(self.selector.get("seed", 0), int):
                raise RequestError(f"the request's seed must be a whole number, got {self.selector['seed']!r}.")
            return
        many = kind in ("ids", "groups")
        entries = list(value) if many and isinstance(value, (list, tuple, set, frozenset)) else [value]
        if not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in entries):
            wanted = "names, such as [a, b]" if many else "one text"
            raise RequestError(f"the request's {kind} must be {wanted}, got {value!r}.")

    @property
    def kind(self) -> str:
        """Which of :data:`SELECTORS` the request uses."""
        return next(name for name in SELECTORS if name in self.selector)

    @property
    def by_group(self) -> bool:
        """Whether whole groups are forgotten."""
        return (self.unit or ("image" if self.kind in ("rule", "class") else "group")) == "group"

    @property
    def limits_in_force(self) -> dict[str, float]:
        """The acceptance limits, with the defaults where the request names none."""
        return {**LIMITS, **self.limits}


def read_request(path: str | Path) -> DeletionRequest:
    """Read a request file, YAML or JSON, as data.

    Raises:
        RequestError: when the file is missing, does not parse or holds keys that a request does not have.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"the request file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"the request file {path} is not YAML or JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(f"the request file {path} must hold keys such as id, job and selector.")
    known = list(DeletionRequest.__dataclass_fields__)
    for key in content:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            raise RequestError(
                f"the request file {path} has an unknown key {key!r}" + (f"; {near[0]}?" if near else ".")
            )
    if "selector" not in content:
        raise RequestError(f"the request file {path} has no selector; give exactly one of {SELECTORS}.")
    content["id"] = str(content.get("id", "unnamed"))
    return DeletionRequest(**content)


def make_request(
    forget_request: str | Path | None = None,
    forget_ids: str | int | Iterable[str | int] | None = None,
    forget_fraction: float | None = None,
    job: str | None = None,
    seed: int = 0,
    default_fraction: float | None = None,
) -> DeletionRequest:
    """The request behind the three keys of a bundle, of which exactly one may be given.

    Args:
        forget_request: path of a request file.
        forget_ids: ids of images (each stands for its whole group), a list or text separated by commas.
        forget_fraction: share of the training images, drawn by ``seed`` in whole groups.
        job: the job; the request file's own wins when both agree.
        seed: draws the fraction.
        default_fraction: used when none of the three is given; None refuses instead.

    Raises:
        RequestError: when none or several are given, or the job contradicts the request file's.
    """
    if isinstance(forget_ids, str):
        forget_ids = [part.strip() for part in forget_ids.split(",") if part.strip()]
    elif isinstance(forget_ids, (int, float)):
        forget_ids = [forget_ids]
    options = {"forget_request": forget_request, "forget_ids": forget_ids, "forget_fraction": forget_fraction}
    given = [name for name, value in options.items() if value not in (None, "", [], ())]
    if len(given) > 1:
        raise RequestError(f"give exactly one of {', '.join(options)}; {' and '.join(given)} are given.")
    if not given and default_fraction is None:
        raise RequestError(
            "nothing says who is to be forgotten. Give --forget_request FILE, --forget_ids \"['ID', ...]\" or "
            "--forget_fraction 0.1; a random forget set is the default on the phantom data set only."
        )
    if forget_request:
        request = read_request(forget_request)
        if job is not None and job != request.job:
            raise RequestError(f"--job {job} contradicts the request file, which says {request.job}; leave one out.")
        return request
    if forget_ids:
        return DeletionRequest({"ids": [str(one) for one in forget_ids]}, job=job or "deletion", id="forget_ids")
    fraction = float(forget_fraction or default_fraction or 0)
    return DeletionRequest({"fraction": fraction, "seed": seed}, job=job or "deletion", id="forget_fraction")


# rules on metadata ----------------------------------------------------------------------------------------------------

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, options: value in options,
    ast.NotIn: lambda value, options: value not in options,
}


NOT_KNOWN = frozenset(("", "unknown", "n/a", "na", "nan", "none", "null"))  # words for a missing value


class Rule:
    """A condition on metadata columns, such as ``diagnosis == "melanoma" and age_approx >= 70``.

    The text is parsed, never evaluated: comparisons of a column with a constant (``== != < <= > >= in not in``) joined
    by ``and``, ``or``, ``not`` and parentheses. A missing value makes a comparison unknown, in three-valued logic; so
    does *unknown*, *n/a* and the like in its place, unless the rule asks for that very word.

    Args:
        text: the rule.

    Raises:
        RequestError: when the text is anything else.

    Example:
        >>> rule = Rule('diagnosis == "melanoma" and age_approx >= 70')
        >>> rule({"diagnosis": "melanoma", "age_approx": "75"}), rule({"diagnosis": "melanoma", "age_approx": ""})
        (True, None)
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self.tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise RequestError(f'the rule {text!r} cannot be read; write it as diagnosis == "melanoma".') from error
        self.columns = sorted(self._check(self.tree))

    def _check(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.BoolOp):
            return set().union(*(self._check(value) for value in node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self._check(node.operand)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
            self._constant(node.comparators[0])
            if type(node.ops[0]) in _COMPARE:
                return {node.left.id}
        raise RequestError(
            f"the rule {self.text!r} may only compare columns with constants, joined by and, or, not; "
            f"{ast.unparse(node)!r} is something else."
        )

    def _constant(self, node: ast.expr) -> Any:
        try:
            value = ast.literal_eval(node)
        except ValueError as error:
            raise RequestError(
                f"the rule {self.text!r} compares with {ast.unparse(node)!r}, which is no constant; put text in quotes."
            ) from error
        flat = value if isinstance(value, (list, tuple, set)) else [value]
        if any(isinstance(one, bool) or not isinstance(one, (str, int, float)) for one in flat):
            raise RequestError(f"the rule {self.text!r} may compare with text and numbers only.")
        return value

    def __call__(self, item: Mapping[str, Any]) -> bool | None:
        """True or False, or None where missing metadata leaves it open."""
        return self._evaluate(self.tree, item)

    def _evaluate(self, node: ast.expr, item: Mapping[str, Any]) -> bool | None:
        if isinstance(node, ast.BoolOp):
            values = [self._evaluate(value, item) for value in node.values]
            decisive = isinstance(node.op, ast.Or)
            return decisive if decisive in values else None if None in values else not decisive
        if isinstance(node, ast.UnaryOp):
            operand = self._evaluate(node.operand, item)
            return None if operand is None else not operand
        assert isinstance(node, ast.Compare) and isinstance(node.left, ast.Name)  # _check let nothing else through
        column, other = node.left.id, self._constant(node.comparators[0])
        value = item.get(column)
        named = other if isinstance(other, (list, tuple, set)) else (other,)
        if value is None or (str(value).strip().lower() in NOT_KNOWN and value not in named):
            return None
        numeric = isinstance(next(iter(other), "") if isinstance(other, (list, tuple, set)) else other, (int, float))
        try:
            value = float(value) if numeric else str(value)
            return _COMPARE[type(node.ops[0])](value, other)
        except (ValueError, TypeError) as error:
            raise RequestError(
                f"the rule {self.text!r} cannot compare {column} = {value!r} with {other!r}; "
                "numbers stand without quotes, text in quotes."
            ) from error


# resolving ------------------------------------------------------------------------------------------------------------


def item_id(item: Mapping[str, Any]) -> str:
    """The id of a data-list item: its ``image_id``, else the stem of its image's file name."""
    return (
        str(item["image_id"]) if item.get("image_id") not in (None, "") else Path(str(item["image"])).name.split(".")[0]
    )


def groups_of(items: Sequence[Item]) -> list[str]:
    """The group of each item: items that share a patient, a group or a lesion, directly or through others, are one.

    Returns:
        For each item the smallest id of its group's items.
    """
    parent = list(range(len(items)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, item in enumerate(items):
        for key in GROUP_KEYS:
            if item.get(key) not in (None, ""):
                other = first.setdefault((key, str(item[key])), index)
                parent[root(index)] = root(other)
    names: dict[int, str] = {}
    for index, item in enumerate(items):
        top = root(index)
        names[top] = min(names.get(top, item_id(item)), item_id(item))
    return [names[root(index)] for index in range(len(items))]


@dataclass(frozen=True)
class Resolution:
    """A request that has met a data list.

    Attributes:
        request: what was asked for.
        training: the training items in the data list's order, each with a boolean ``forget`` and its ``group``.
        holdout: the items never trained on; with a rule or class each has a boolean ``alike`` (it meets it).
        warnings: what a person should look at before going on.
        facts: counts for the manifest: groups closed over, missing values, split groups, cases set apart.
        tuning: unseen items set apart for a search for settings; in none of the splits.
    """

    request: DeletionRequest
    training: list[Item]
    holdout: list[Item]
    warnings: list[str]
    facts: dict[str, int]
    tuning: list[Item] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, list[Item]]:
        """``forget``, ``retain``, ``holdout``; for rules and classes ``holdout_alike`` and ``holdout_other`` too."""
        splits = {
            "forget": [item for item in self.training if item["forget"]],
            "retain": [item for item in self.training if not item["forget"]],
            "holdout": list(self.holdout),
        }
        if self.request.kind in ("rule", "class"):
            splits["holdout_alike"] = [item for item in self.holdout if item["alike"]]
            splits["holdout_other"] = [item for item in self.holdout if not item["alike"]]
        return splits

    @property
    def unseen_alike(self) -> str:
        """The split that the forget set is compared with by an attack: unseen cases of its kind.

        ``holdout_alike`` where it has enough patients: a rule or a class sets the forget set apart from the rest of the
        unseen cases whether or not a model has seen it.
        """
        return self._enough("holdout_alike")

    @property
    def unseen_other(self) -> str:
        """The split on which a reference's lag behind the original is read off: unseen cases of a kind both know.

        ``holdout_other`` where it has enough patients: of a device or class that is forgotten as a whole the original
        knows more than a model can know that never saw it.
        """
        return self._enough("holdout_other")

    def _enough(self, split: str) -> str:
        groups = {str(item["group"]) for item in self.splits.get(split, ())}
        return split if len(groups) >= ENOUGH_PATIENTS else "holdout"

    def set_apart(self, share: float, seed: int = 0) -> Resolution:
        """The same with a share of the unseen groups out of the holdout, for a search for settings.

        Args:
            share: in [0, 1).
            seed: of the draw.

        Raises:
            RequestError: when the share lies elsewhere, or one of both parts gets no case.
        """
        if not 0 <= share < 1:
            raise RequestError(f"tuning_share must lie in [0, 1), got {share}.")
        groups = sorted({str(item["group"]) for item in self.holdout})
        number = round(share * len(groups))
        if not share:
            return self
        if not 0 < number < len(groups):
            raise RequestError(f"tuning_share {share} of {len(groups)} unseen groups leaves one of both parts empty.")
        chosen = set(random.Random(seed).sample(groups, number))
        apart = [item for item in self.holdout if str(item["group"]) in chosen]
        holdout = [item for item in self.holdout if str(item["group"]) not in chosen]
        facts = {**self.facts, "set_apart_for_tuning": len(apart)}
        return replace(self, holdout=holdout, tuning=apart, facts=facts)

    @property
    def digest(self) -> str:
        """sha256 over each item's content and side, independent of names and order."""
        lines = sorted(
            f"{name}:{item.get('sha256') or item_id(item)}:{item.get('label_sha256', '')}"
            for name in ("forget", "retain", "holdout")
            for item in self.splits[name]
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def resolve(
    request: DeletionRequest,
    training: Sequence[Item],
    holdout: Sequence[Item] = (),
    class_key: str = "diagnosis",
    known_pairs: Iterable[tuple[str, str]] = (),
    structures: Sequence[str] = (),
) -> Resolution:
    """Mark the items a request means, close over groups, and refuse what would go wrong silently.

    Args:
        request: who is to be forgotten.
        training: the items the original model was trained on.
        holdout: the items it never saw.
        class_key: the metadata column that ``{"class": ...}`` means.
        known_pairs: ids of images known to show the same lesion; a pair across the two sides is warned about.
        structures: what a segmentation marks in every case. A class that is one of them is meant in all of them, and
            nothing is retained.

    Returns:
        Copies of the items with their flags; what came in stays as it was.

    Raises:
        RequestError: on unknown ids or columns, ids or groups in the holdout, duplicate ids, an empty or a total
            forget set, groups or byte-identical images on both sides.
    """
    training, holdout = [dict(item) for item in training], [dict(item) for item in holdout]
    everything = training + holdout
    if not training:
        raise RequestError("the data list has no training items.")
    duplicates = [name for name, count in Counter(map(item_id, everything)).items() if count > 1]
    if duplicates:
        raise RequestError(f"the data list holds {_some(duplicates)} more than once; each id must stand there once.")
    for item, group in zip(everything, groups_of(everything)):
        item["group"] = group
    facts: Counter[str] = Counter()
    if request.kind == "ids":
        chosen = _named(request.selector["ids"], training, holdout, lambda item: {item_id(item)}, "ids")
    elif request.kind == "groups":
        keys = lambda item: {str(item[key]) for key in GROUP_KEYS if item.get(key) not in (None, "")}  # noqa: E731
        chosen = _named(request.selector["groups"], training, holdout, keys, "groups")
    elif request.kind == "class" and structures:
        chosen = [_means_structure(request, structures)] * len(training)
        for item in holdout:
            item["alike"] = True
    elif request.kind == "fraction":
        chosen = _fraction(training, float(request.selector["fraction"]), int(request.selector.get("seed", 0)), request)
    else:
        matches = _matcher(request, everything, class_key)
        chosen = [matches(item, facts) for item in training]
        for item in holdout:
            item["alike"] = matches(item, Counter())
    for item, forget in zip(training, chosen):
        item["forget"] = forget
    _close_groups(request, training, facts)

    number = sum(item["forget"] for item in training)
    if number == 0:
        raise RequestError("the request matches no training item, so there is nothing to forget; look at the selector.")
    if number == len(training) and not (request.kind == "class" and structures):
        raise RequestError("the request matches every training item; forgetting all of them means training afresh.")
    resolution = Resolution(request, training, holdout, [], facts)
    _refuse_leaks(resolution)
    resolution.warnings.extend(_duplicate_warnings(resolution, known_pairs))
    if facts["missing_metadata"]:
        resolution.warnings.append(
            f"{facts['missing_metadata']} training items lack the metadata the rule asks for; "
            f"they {'match' if request.missing == 'match' else 'do not match'} (missing: {request.missing})."
        )
    return resolution


def _means_structure(request: DeletionRequest, structures: Sequence[str]) -> bool:
    name = str(request.selector["class"])
    if name not in structures:
        raise RequestError(f"the model marks no {name!r}; it marks {', '.join(structures)}.")
    if request.job != "suppression":
        raise RequestError(f"{name!r} stands in every case, so it can be suppressed and not deleted: job: suppression.")
    return True


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, sorted(names)[:most])) + more


def _named(
    wanted: Any, training: list[Item], holdout: list[Item], names: Callable[[Item], set[str]], what: str
) -> list[bool]:
    wanted_names = {str(one) for one in ([wanted] if isinstance(wanted, (str, int)) else wanted)}
    if not wanted_names:
        raise RequestError(f"the request's list of {what} is empty, so there is nothing to forget.")
    held_out = wanted_names & set(chain.from_iterable(names(item) for item in holdout))
    if held_out:
        raise RequestError(
            f"{what} {_some(list(held_out))} lie in the holdout, which the model was never trained on: there is "
            "nothing to forget in them. Take them out of the request, or correct the split."
        )
    known = set(chain.from_iterable(names(item) for item in training))
    unknown = wanted_names - known
    if unknown:
        near = get_close_matches(min(unknown), sorted(known), n=1, cutoff=0.75)
        raise RequestError(
            f"{what} {_some(list(unknown))} are not in the data list" + (f"; did you mean {near[0]}?" if near else ".")
        )
    return [bool(names(item) & wanted_names) for item in training]


def _fraction(training: list[Item], fraction: float, seed: int, request: DeletionRequest) -> list[bool]:
    units = defaultdict(list)
    for item in training:
        units[item["group"] if request.by_group else item_id(item)].append(item_id(item))
    order = sorted(units)
    random.Random(seed).shuffle(order)
    chosen: set[str] = set()
    for unit in order:
        if len(chosen) >= fraction * len(training):
            break
        chosen.update(units[unit])
    return [item_id(item) in chosen for item in training]


def _matcher(request: DeletionRequest, items: list[Item], class_key: str) -> Callable[[Item, Counter[str]], bool]:
    if request.kind == "rule":
        rule = Rule(str(request.selector["rule"]))
    else:
        rule = Rule(f"{class_key} == {str(request.selector['class'])!r}")
    columns = set(chain.from_iterable(items))
    for column in rule.columns:
        if column not in columns:
            near = get_close_matches(column, sorted(columns), n=1)
            raise RequestError(
                f"the data list has no column {column!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )

    def matches(item: Item, facts: Counter[str]) -> bool:
        value = rule(item)
        if value is None:
            facts["missing_metadata"] += 1
            if request.missing == "refuse":
                raise RequestError(
                    f"item {item_id(item)} lacks the metadata that {rule.text!r} asks for (missing: refuse). "
                    "Complete it, or set missing to skip or match."
                )
            return request.missing == "match"
        return value

    return matches


def _close_groups(request: DeletionRequest, training: list[Item], facts: Counter[str]) -> None:
    sides: dict[str, set[bool]] = defaultdict(set)
    for item in training:
        sides[item["group"]].add(item["forget"])
    split = sorted(group for group, values in sides.items() if len(values) == 2)
    if not split:
        return
    facts["split_groups"] = len(split)
    if request.by_group or request.on_split_group == "include":
        forget = True
    elif request.on_split_group == "exclude":
        forget = False
    elif request.job == "suppression" or request.kind not in ("rule", "class"):
        return  # a class is suppressed in its own images only; ids and fractions by image were asked for as such
    else:
        raise RequestError(
            f"{len(split)} groups ({_some(split)}) have images on both sides of the rule. For {request.job} say what "
            "becomes of them: on_split_group: include (forget the whole group) or exclude (keep the whole group)."
        )
    for item in training:
        if item["group"] in split and item["forget"] != forget:
            item["forget"] = forget
            facts["added_by_group" if forget else "kept_by_group"] += 1


def _refuse_leaks(resolution: Resolution) -> None:
    splits = resolution.splits
    forget_groups = {item["group"] for item in splits["forget"]}
    shared = sorted(forget_groups & {item["group"] for item in splits["holdout"]})
    if shared:
        raise RequestError(
            f"groups {_some(shared)} lie in the forget set and in the holdout, so the holdout would not be unseen. "
            "Move the whole group to one side of the split."
        )
    contents = {item["sha256"]: item for item in splits["forget"] if "sha256" in item}
    twins = [(contents[item["sha256"]], item) for name in ("retain", "holdout") for item in splits[name]
             if item.get("sha256") in contents]  # fmt: skip
    if twins:
        pairs = [f"{item_id(one)} = {item_id(other)}" for one, other in twins]
        raise RequestError(
            f"byte-identical images lie on both sides: {_some(pairs)}. What stays would teach what is to be "
            "forgotten: name both in the request, or remove one from the data list."
        )


def _duplicate_warnings(resolution: Resolution, known_pairs: Iterable[tuple[str, str]]) -> list[str]:
    splits = resolution.splits
    forget = {item_id(item) for item in splits["forget"]}
    others = {item_id(item) for name in ("retain", "holdout") for item in splits[name]}
    warnings = []
    known = [pair for pair in known_pairs if len(forget & set(pair)) == 1 and len(others & set(pair)) == 1]
    if known:
        warnings.append(
            f"{len(known)} known near-duplicate pairs lie on both sides: {_some([' ~ '.join(p) for p in known])}."
        )
    near = [
        f"{item_id(one)} ~ {item_id(other)}"
        for one in splits["forget"]
        for name in ("retain", "holdout")
        for other in splits[name]
        if "phash" in one and "phash" in other and (one["phash"] ^ other["phash"]).bit_count() <= NEAR_DUPLICATE_BITS
    ]
    if near:
        warnings.append(f"{len(near)} pairs on the two sides look alike (perceptual hash): {_some(near)}.")
    return warnings


# evidence of who was meant --------------------------------------------------------------------------------------------


def pseudonym(key: bytes, name: str) -> str:
    """HMAC-SHA256 of an id under the site's key, first 12 hexadecimal digits."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:12]


def merkle_root(leaves: Sequence[str]) -> str:
    """Root of the binary tree of sha256 over sorted leaves (RFC 6962: leaves and nodes are told apart by a prefix).

    Args:
        leaves: any texts, in any order.

    Returns:
        64 hexadecimal digits; that of nothing is the sha256 of nothing.
    """
    level = [hashlib.sha256(b"\x00" + leaf.encode()).digest() for leaf in sorted(leaves)]
    if not level:
        return hashlib.sha256(b"").hexdigest()
    while len(level) > 1:  # an odd one moves up as it is
        pairs = [level[first : first + 2] for first in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\x01" + pair[0] + pair[1]).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0].hex()


def manifest(resolution: Resolution, key: bytes) -> dict[str, Any]:
    """What was resolved, without any id or file name.

    Args:
        resolution: the resolved request.
        key: the site's key; whoever does not hold it cannot tell who was meant.

    Returns:
        Counts, the sorted pseudonyms of the forget set, the Merkle roots over pseudonyms of id and content before
        (``training``) and after (``retain``) and of the holdout, and the sha256 of the content, ready for JSON.
    """
    splits = resolution.splits
    request = resolution.request
    asked = json.dumps([request.selector, request.reason], sort_keys=True, default=str)
    return {
        "schema": "monai_unlearn.manifest/1",
        "request": request.id,
        "request_hmac": pseudonym(key, asked),
        "job": request.job,
        "selector": request.kind,
        "unit": "group" if request.by_group else "image",
        "limits": request.limits_in_force,
        "counts": {name: len(items) for name, items in splits.items()},
        "groups": {name: len({item["group"] for item in items}) for name, items in splits.items()},
        "facts": dict(sorted(resolution.facts.items())),
        "warnings": len(resolution.warnings),
        "forget": sorted(pseudonym(key, item_id(item)) for item in splits["forget"]),
        "roots": {
            name: merkle_root([pseudonym(key, f"{item_id(item)}:{item.get('sha256', '')}") for item in items])
            for name, items in (
                ("training", resolution.training),
                ("retain", splits["retain"]),
                ("holdout", resolution.holdout),
            )
        },
        "content_sha256": resolution.digest,
    }


def published_split(number: int, fraction: float = 0.1, seed: int = 0) -> list[int]:
    """The forget indices of Erase to Retain's released split, over sorted file names (arXiv 2511.16574).

    ``random_split(items, [N - F, F])`` with a generator seeded 0 and F = int(0.10 N), one image a unit.

    Args:
        number: N, the number of items.
        fraction: share to forget.
        seed: of the generator.

    Returns:
        Sorted indices.
    """
    import torch  # the only function of this module that needs it

    forget = int(fraction * number)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    return sorted(order[number - forget :].tolist())
