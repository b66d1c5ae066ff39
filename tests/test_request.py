# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import random

import pytest

from monai_unlearn.request import (
    DeletionRequest,
    RequestError,
    Rule,
    groups_of,
    item_id,
    make_request,
    manifest,
    published_split,
    read_request,
    refuse_expressions,
    resolve,
)


def items(number, start=0, per_patient=2, **columns):
    return [
        {
            "image": f"/data/I{i}.jpg",
            "image_id": f"I{i}",
            "patient_id": f"P{i // per_patient}",
            "sha256": f"s{i}",
            **columns,
        }
        for i in range(start, start + number)
    ]


TRAIN, HOLDOUT = items(10), items(4, start=10)


def forgotten(request, train=TRAIN, holdout=HOLDOUT, **kwargs):
    return [item_id(item) for item in resolve(request, train, holdout, **kwargs).splits["forget"]]


def test_an_id_stands_for_its_whole_patient():
    assert forgotten(DeletionRequest({"ids": ["I2"]})) == ["I2", "I3"]


def test_one_image_alone_is_forgotten_when_the_unit_is_the_image():
    assert forgotten(DeletionRequest({"ids": ["I2"]}, unit="image")) == ["I2"]


def test_a_bare_number_is_an_id():
    train = [{"image": "/d/1102.jpg"}, {"image": "/d/1103.jpg"}]
    assert forgotten(DeletionRequest({"ids": [1102]}), train, []) == ["1102"]
    assert make_request(forget_ids=1102).selector == {"ids": ["1102"]}
    assert make_request(forget_ids="a, b").selector == {"ids": ["a", "b"]}


def test_groups_are_closed_over_patients_and_lesions_together():
    linked = [
        {"image": "a", "patient_id": "p"},
        {"image": "b", "patient_id": "p", "lesion_id": "l"},
        {"image": "c", "lesion_id": "l"},
        {"image": "d", "lesion_id": ""},
    ]
    assert groups_of(linked) == ["a", "a", "a", "d"]


def test_groups_can_be_named():
    assert forgotten(DeletionRequest({"groups": ["P1", "P3"]})) == ["I2", "I3", "I6", "I7"]


def test_the_items_that_came_in_stay_as_they_were():
    before = json.dumps(TRAIN)
    resolve(DeletionRequest({"ids": ["I2"]}), TRAIN, HOLDOUT)
    assert json.dumps(TRAIN) == before


def test_a_fraction_takes_whole_groups_until_it_is_reached_and_ignores_the_order_of_the_list():
    request = DeletionRequest({"fraction": 0.3, "seed": 4})
    first = forgotten(request)
    shuffled = TRAIN[:]
    random.Random(1).shuffle(shuffled)
    assert sorted(forgotten(request, shuffled)) == first
    assert len(first) == 4  # 3 of 10 are reached by two whole patients
    other = DeletionRequest({"fraction": 0.3, "seed": 5})
    assert forgotten(other) != first


def test_a_class_marks_holdout_items_that_are_alike():
    train = items(4, per_patient=1, diagnosis="nevus") + items(2, start=4, per_patient=1, diagnosis="melanoma")
    holdout = items(1, start=100, diagnosis="melanoma") + items(1, start=200, diagnosis="nevus")
    splits = resolve(DeletionRequest({"class": "melanoma"}, job="suppression"), train, holdout).splits
    assert {name: len(rows) for name, rows in splits.items()} == {
        "forget": 2, "retain": 4, "holdout": 2, "holdout_alike": 1, "holdout_other": 1}  # fmt: skip


@pytest.mark.parametrize(("policy", "expected"), [("include", ["I0", "I1", "I4", "I5"]), ("exclude", ["I4", "I5"])])
def test_groups_on_both_sides_of_a_rule_have_to_be_settled(policy, expected):
    ages = {"I0": "80", "I1": "60", "I4": "75", "I5": "71"}
    train = [{**item, "age_approx": ages.get(item_id(item), "30")} for item in TRAIN]
    rule = {"rule": "age_approx >= 70"}
    assert forgotten(DeletionRequest(rule, on_split_group=policy), train, []) == expected
    with pytest.raises(RequestError, match="1 groups .* both sides.*on_split_group"):
        forgotten(DeletionRequest(rule), train, [])


def test_missing_metadata_does_not_match_unless_asked_and_is_counted():
    train = [{**item, "sex": "" if i < 2 else "male"} for i, item in enumerate(items(6, per_patient=1))]
    resolution = resolve(DeletionRequest({"rule": 'sex != "female"'}, unit="image", missing="match"), [
        *train[:5], {**train[5], "sex": "female"}])  # fmt: skip
    assert resolution.facts["missing_metadata"] == 2
    assert len(resolution.splits["forget"]) == 5
    train[5]["sex"] = "female"
    resolution = resolve(DeletionRequest({"rule": 'sex != "female"'}), train)
    assert len(resolution.splits["forget"]) == 3
    assert "2 training items lack the metadata" in resolution.warnings[0]
    with pytest.raises(RequestError, match="lacks the metadata"):
        resolve(DeletionRequest({"rule": 'sex == "male"'}, missing="refuse"), train)


@pytest.mark.parametrize(
    ("rule", "item", "expected"),
    [
        ('diagnosis == "melanoma"', {"diagnosis": "melanoma"}, True),
        ("age >= 70", {"age": "69.5"}, False),
        ("age >= 70 and not sex == 'male'", {"age": 71, "sex": "female"}, True),
        ("age >= 70 or sex == 'male'", {"age": "", "sex": "male"}, True),
        ("age >= 70 or sex == 'male'", {"age": "", "sex": "female"}, None),
        ("age >= 70 and sex == 'male'", {"age": None, "sex": "female"}, False),
        ("age >= 70", {"age": "Unknown"}, None),
        ("age >= 70 or sex == 'male'", {"age": "n/a", "sex": "male"}, True),
        ("sex != 'male'", {"sex": "unknown"}, None),
        ("sex == 'unknown'", {"sex": "unknown"}, True),
        ("sex in ['unknown', 'male']", {"sex": "unknown"}, True),
        ("device in ['a', 'b']", {"device": "b"}, True),
        ("device not in ['a', 'b']", {"device": "b"}, False),
        ("fold == -1", {"fold": "-1"}, True),
    ],
)
def test_rules_follow_three_valued_logic(rule, item, expected):
    assert Rule(rule)(item) is expected


@pytest.mark.parametrize(
    "rule",
    [
        "__import__('os').system('touch canary')",
        "age",
        "age + 1 == 2",
        "age == other",
        "1 == age",
        "0 < age < 5",
        "open('x') == 1",
        "age == True",
        "age ==",
        "[x for x in (1,)] == 1",
        "(" * 300 + "age == 1" + ")" * 300,
    ],
)
def test_anything_else_than_a_comparison_is_no_rule(rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="the rule"):
        Rule(rule)({"age": "1"})
    assert not list(tmp_path.iterdir())


def test_a_rule_names_a_column_it_cannot_find_or_compare():
    with pytest.raises(RequestError, match="no column 'diagnosys'; did you mean 'diagnosis'"):
        forgotten(DeletionRequest({"rule": "diagnosys == 'x'"}), items(3, diagnosis="x"), [])
    with pytest.raises(RequestError, match="cannot compare age = 'old' with 70"):
        Rule("age > 70")({"age": "old"})


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"ids": ["I10"]}, "lie in the holdout"),
        ({"groups": ["P5"]}, "lie in the holdout"),
        ({"ids": ["I99x"]}, "not in the data list"),
        ({"ids": ["I22"]}, "not in the data list"),
        ({"ids": []}, "empty"),
        ({"ids": [f"I{i}" for i in range(10)]}, "every training item"),
        ({"rule": "patient_id == 'nobody'"}, "matches no training item"),
    ],
)
def test_a_request_that_would_go_wrong_is_refused(selector, message):
    with pytest.raises(RequestError, match=message):
        forgotten(DeletionRequest(selector))


def test_the_nearest_id_is_named():
    with pytest.raises(RequestError, match="did you mean ISIC_0000013"):
        forgotten(DeletionRequest({"ids": ["ISIC_000013"]}), [{"image": "ISIC_0000013.jpg"}, {"image": "x.jpg"}], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selector": {"ids": ["a"], "fraction": 0.1}}, "exactly one"),
        ({"selector": {}}, "exactly one"),
        ({"selector": {"ids": ["a"], "seed": 1}}, "keys it does not know"),
        ({"selector": {"fraction": 1.5}}, "between 0 and 1"),
        ({"selector": {"ids": ["$__import__('os')"]}}, "begins with '\\$'"),
        ({"selector": {"ids": ["a"]}, "job": "erasure"}, "job must be one of"),
        ({"selector": {"ids": ["a"]}, "unit": "eye"}, "unit must be one of"),
        ({"selector": {"ids": ["a"]}, "limits": {"forgett": 0.1}}, "limit 'forgett' is unknown"),
        ({"selector": {"ids": ["a"]}, "limits": {"forget": 2}}, "between 0 and 1"),
        ({"selector": "ids"}, "must be a mapping"),
    ],
)
def test_a_request_that_says_nothing_clear_is_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        DeletionRequest(**arguments)


@pytest.mark.parametrize("value", ["$x", "@network", "%file", ["a", "$x"], {"k": ["@x"]}, {"$k": 1}])
def test_values_that_monai_would_evaluate_are_refused(value):
    with pytest.raises(RequestError, match="MONAI would evaluate it"):
        refuse_expressions(value, "forget_ids")
    refuse_expressions("a$b", "forget_ids")


def test_exactly_one_way_of_saying_who_may_be_used(tmp_path):
    with pytest.raises(RequestError, match="forget_ids and forget_fraction are given"):
        make_request(forget_ids=["a"], forget_fraction=0.1)
    with pytest.raises(RequestError, match="nothing says who"):
        make_request()
    assert make_request(default_fraction=0.1, seed=3).selector == {"fraction": 0.1, "seed": 3}


def test_a_request_file_is_read_as_data(tmp_path):
    path = tmp_path / "request.yaml"
    path.write_text("id: 7\njob: revision\nselector: {rule: 'device == \"handheld\"'}\non_split_group: include\n")
    request = make_request(forget_request=path)
    assert (request.id, request.job, request.kind, request.by_group) == ("7", "revision", "rule", False)
    with pytest.raises(RequestError, match="contradicts the request file"):
        make_request(forget_request=path, job="deletion")
    for text, message in (
        ("selector: !!python/object/apply:os.system ['touch canary']", "not YAML"),
        ("selektor: {ids: [a]}", "unknown key 'selektor'; selector"),
        ("job: deletion", "no selector"),
        ("- a", "must hold keys"),
    ):
        path.write_text(text)
        with pytest.raises(RequestError, match=message):
            read_request(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_request(tmp_path / "missing.yaml")
    assert not (tmp_path / "canary").exists()


def test_duplicate_ids_are_refused():
    with pytest.raises(RequestError, match="I1 more than once"):
        forgotten(DeletionRequest({"ids": ["I0"]}), [*TRAIN, TRAIN[1]], [])


def test_a_patient_in_forget_set_and_holdout_is_refused():
    leak = [{**HOLDOUT[0], "patient_id": "P1"}]
    with pytest.raises(RequestError, match="forget set and in the holdout"):
        forgotten(DeletionRequest({"ids": ["I2"]}), TRAIN, leak)


@pytest.mark.parametrize("side", ["retain", "holdout"])
def test_a_byte_identical_image_on_the_other_side_is_refused(side):
    twin = {"image": "t.jpg", "image_id": "T", "sha256": "s2"}
    train, holdout = ([*TRAIN, twin], HOLDOUT) if side == "retain" else (TRAIN, [*HOLDOUT, twin])
    with pytest.raises(RequestError, match="byte-identical.*I2 = T"):
        forgotten(DeletionRequest({"ids": ["I2"]}), train, holdout)


def test_look_alikes_and_known_pairs_are_warned_about():
    train = [{**item, "phash": random.Random(i).getrandbits(64)} for i, item in enumerate(TRAIN)]
    train[8]["phash"] = train[2]["phash"] ^ 0b101  # two of the 64 bits differ
    warnings = resolve(DeletionRequest({"ids": ["I2"]}), train, [], known_pairs=[("I3", "I9"), ("I2", "I3")]).warnings
    assert warnings == [
        "1 known near-duplicate pairs lie on both sides: I3 ~ I9.",
        "1 pairs on the two sides look alike (perceptual hash): I2 ~ I8.",
    ]


def test_the_manifest_names_nobody_and_does_not_depend_on_the_order():
    request = DeletionRequest({"ids": ["I2"]}, reason="Mrs Canary withdrew consent", id="r1")
    first = manifest(resolve(request, TRAIN, HOLDOUT), b"k" * 16)
    again = manifest(resolve(request, TRAIN[::-1], HOLDOUT), b"k" * 16)
    assert first == again
    text = json.dumps(first)
    assert not any(word in text for word in ("I2", "P1", "Canary", ".jpg"))
    assert first["counts"] == {"forget": 2, "retain": 8, "holdout": 4}
    assert manifest(resolve(request, TRAIN, HOLDOUT), b"x" * 16)["forget"] != first["forget"]


def test_the_content_hash_sees_a_changed_image_and_a_changed_side():
    request = DeletionRequest({"ids": ["I2"]})
    digest = resolve(request, TRAIN, HOLDOUT).digest
    changed = [{**item, "sha256": "other"} if item_id(item) == "I5" else item for item in TRAIN]
    assert resolve(request, changed, HOLDOUT).digest != digest
    assert resolve(DeletionRequest({"ids": ["I4"]}), TRAIN, HOLDOUT).digest != digest


@pytest.mark.parametrize(("number", "prefix"), [(2594, "83d83371d3bb"), (2239, "92c816f6da98")])
def test_the_published_split_has_the_published_hash(number, prefix):
    chosen = ",".join(map(str, published_split(number)))
    assert hashlib.sha1(chosen.encode()).hexdigest().startswith(prefix)


def test_cases_set_apart_for_tuning_are_whole_groups_and_in_no_split():
    resolution = resolve(DeletionRequest({"ids": ["I2"]}), TRAIN, items(20, start=10))
    assert resolution.set_apart(0) is resolution and resolution.tuning == []
    found = resolution.set_apart(0.3, seed=1)
    groups = [{item["group"] for item in part} for part in (found.tuning, found.holdout, resolution.holdout)]
    assert len(groups[0]) == 3 and not groups[0] & groups[1] and groups[0] | groups[1] == groups[2]
    assert not {item_id(item) for item in found.tuning} & {item_id(i) for part in found.splits.values() for i in part}
    assert found.facts["set_apart_for_tuning"] == 6 and "set_apart_for_tuning" not in resolution.facts
    assert resolution.set_apart(0.3, seed=1).tuning == found.tuning != resolution.set_apart(0.3, seed=2).tuning
    for share in (-0.1, 1.0, 0.01, 0.99):
        with pytest.raises(RequestError, match="tuning_share"):
            resolution.set_apart(share)
