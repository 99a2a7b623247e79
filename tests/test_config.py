"""Settings: what is accepted, what is refused, and what a refusal says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from typer.testing import CliRunner

from persodpo.cli import app
from persodpo.config import PROFILES, Profile, load_profile, profile_names, with_overrides
from persodpo.corrections import CORRECTIONS, WITHOUT_ASKING, Correction
from persodpo.errors import PersodpoError
from persodpo.profile_text import read_yaml, resolve
from persodpo.release.audit import mended_findings

SECRET = "sk-canary/9d+1Z=="  # noqa: S105 - made up


def refusal(*overrides: str, profile: str | Path = "release") -> str:
    """Return the one sentence that a profile is refused with."""
    with pytest.raises(PersodpoError) as refused:
        load_profile(profile, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def leaves(settings: dict, before: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= leaves(value, f"{before}{key}.") if isinstance(value, dict) and value else {before + key: value}
    return found


def fields_of(section: type[BaseModel]) -> Iterator[str]:
    """Yield every setting that a profile can hold, those of the entries of lists once."""
    for name, field in section.model_fields.items():
        inner = list(sections_in(field.annotation))
        yield from (f"{name}.{each}" for one in inner for each in fields_of(one)) if inner else [name]


def sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


@pytest.mark.parametrize("name", profile_names())
def test_a_printed_profile_is_the_same_profile(name, tmp_path):
    shown = CliRunner().invoke(app, ["profile", "-p", name], catch_exceptions=False).stdout
    copy = tmp_path / "copy.yaml"
    copy.write_text(shown)
    assert load_profile(copy) == load_profile(name)
    for path in leaves(load_profile(name).model_dump(mode="json")):
        key = path.rsplit(".", maxsplit=1)[-1]
        assert re.search(rf"^ *(- )?{key}:.*  # \S", shown, re.MULTILINE), path
    assert all(f"#   {correction}: {text}\n" in shown for correction, text in CORRECTIONS.items())


def test_there_are_few_settings_and_a_profile_says_only_what_differs():
    assert len(list(fields_of(Profile))) <= 80
    for name in profile_names():
        lines = [line for line in (PROFILES / f"{name}.yaml").read_text().splitlines() if not line.startswith("#")]
        assert len(lines) <= 100
        assert load_profile(name).name == name


def test_a_short_profile_has_the_defaults_and_its_file_s_name(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("generation: {models: [gpt-4-turbo], source: published}\npairs: {low_quantile: 0.3}\n")
    profile = load_profile(mine)
    assert (profile.name, profile.pairs.low_quantile, profile.pairs.high_quantile) == ("mine", 0.3, 0.6)
    assert profile.corrections == ("A10b", "A10c")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pairs.low_quantil=0.3", ["pairs.low_quantil: ", "did you mean pairs.low_quantile?"]),
        ("scorin.weights=1", ["scorin: ", "did you mean scoring?"]),
        ("low_quantile=1", ["low_quantile: ", "did you mean pairs.low_quantile?"]),
        ("zzz=1", ["zzz: ", "`persodpo profile`"]),
        ("seed.x=1", ["seed: ", "integer"]),
        ("generation.backends=[{model: a, base_url: http://a/v1, api_keyenv: A}]",
         ["generation.backends.0.openai.api_keyenv: ", "did you mean generation.backends.openai.api_key_env?"]),
        ("corrections=[A2]", ["corrections.0: ", "'A10a'", "'A18'"]),
        ("scoring.weights.coherence=0.5", ["scoring.weights: ", "sum to 1", "1.36", "{coherence: 0.367647,"]),
        ("scoring.weights.coherence=-0.1", ["scoring.weights.coherence: ", "greater than or equal to 0"]),
        ("pairs.low_quantile=0.9", ["low_quantile (0.9)", "high_quantile (0.6)"]),
        ("dialogues.train_size=many", ["dialogues.train_size: ", "integer"]),
        ("generation.backends=[{model: a}]", ["generation.backends.0: ", "either base_url"]),
        ("generation.backends=[{model: a, base_url: http://a/v1, weights: b}]", ["generation.backends.0: ", "either"]),
        (f"policy.model=models/{'x' * 300}", ["policy.model: ", "no file can be called so"]),
        ("generation.source=focus", ["generation: ", "models, published, or a file"]),
        ("generation.backends=[{model: a, weights: b, served: true, stop_at_json: true}]", ["model a is served"]),
        ("generation.models=[]", ["generation: ", "at least one model"]),
        ("generation.models=[a, a]", ["generation.models: ", "'a' stands twice"]),
        ("pairs.sets=[perso, perso]", ["pairs.sets: ", "'perso' stands twice"]),
        ("name=../x", ["name: ", "pattern"]),
        ("pairs.low_quantile", ["section.key=value"]),
        ("=1", ["section.key=value"]),
        ("prompts.template=", ["prompts.template: ", "empty"]),
        ("home= ", ["home: ", "empty"]),
        ("generation.backends=[{model: a, base_url: localhost}]", ["base_url of model a must read like http"]),
        ("generation.backends=[{model: a, base_url: http://a/v1, api_key_env: 0a1b2c3d4e}]",
         ["generation.backends.0.openai.api_key_env: ", "pattern"]),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_path_and_remedy(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prompts.template=my: file", "my: file"),
        ("generation.source=/data/run #1/x.csv", "/data/run #1/x.csv"),
        ("name=007", "007"),
        ("name=2024-01-01", "2024-01-01"),
        ("name=null", "null"),
        ("policy.model=[a]", "[a]"),
        ("prompts.template='quoted'", "'quoted'"),
        ("prompts.template=a=b", "a=b"),
        ("prompts.template=yes", "yes"),
        ("generation.budget_usd=null", None),
        ("generation.budget_usd=", None),
    ],
)
def test_texts_are_taken_whole(override, value, tmp_path):
    changed = load_profile("release", [override])
    key = override.partition("=")[0]
    assert leaves(changed.model_dump(mode="json"))[key] == value
    copy = tmp_path / "copy.yaml"
    copy.write_text(changed.to_yaml())
    assert load_profile(copy) == changed


@settings(max_examples=50)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])).filter(
        lambda text: text.strip() and "\0" not in text and not text.startswith("~/")
    )
)
def test_any_text_comes_back_from_a_printed_profile(text):
    profile = load_profile("release", [f"prompts.template={text}"])
    assert profile.prompts.template == text
    assert resolve(Profile, read_yaml(profile.to_yaml(), "here")) == profile


@pytest.mark.parametrize(
    ("override", "value"),
    [("seed=010", 10), ("seed=08", 8), ("training.learning_rate=1e-6", 1e-6), ("training.scale_weights=no", False),
     ("generation.models=[no, on, 2024-01-01, 010]", ("no", "on", "2024-01-01", "010")), ("pairs.sets=[perso]", ("perso",))],
)  # fmt: skip
def test_values_are_typed_as_they_stand(override, value):
    found = with_overrides(load_profile("mini", ["generation.source=published"]), [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("text", ["\xa0edges\xa0", "line\x85feed", "hf_models/Qwen2-0.5B", "a/b@v1"])
def test_odd_texts_come_back_and_are_no_secrets(text):
    profile = load_profile("release", [f"policy.model={text}"])
    assert profile.policy.model == text
    assert resolve(Profile, read_yaml(profile.to_yaml(), "here")) == profile


ODD = {
    "an alias": "a: &x [1]\npairs: *x\n",
    "a bomb": "a: &a [x]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)),
    "a tag": "seed: !!int x\n",
    "an object": "!!python/object:os.system {}\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "a key that is a list": "[a]: 2\n",
    "a key that is empty": "? \n: 2\n",
    "a date": "seed: 2024-99-99\n",
    "not a number": "training: {beta: .nan}\n",
    "too large a number": "training: {beta: 1e999}\n",
    "many digits": "seed: " + "9" * 5_000 + "\n",
    "many brackets": "seed: " + "[" * 2_000 + "]" * 2_000 + "\n",
    "many braces": "a: " + "{a: " * 2_000 + "1" + "}" * 2_000 + "\n",
    "a tab": "pairs:\n\tlow_quantile: 0.3\n",
    "a control character": "name: \x01\n",
    "no closing bracket": "pairs: [\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a list": "- 1\n",
    "nothing": "",
    "a section that is none": "pairs: 3\n",
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_odd_files_and_values_end_in_one_sentence(content, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(content + ("generation: {models: [a], source: published}\n" if content.endswith("\n") else ""))
    assert len(refusal(profile=path)) < 700
    assert len(refusal(f"pairs={content}")) < 700


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: ü\n".encode("latin-1"))
    (tmp_path / "utf16.yaml").write_bytes("seed: 1\n".encode("utf-16"))
    for name, word in (("latin.yaml", "UTF-8"), ("utf16.yaml", "UTF-8"), ("", "directory"), ("none.yaml", "release")):
        assert word in refusal(profile=tmp_path / name), name
    assert "release" in refusal(profile="nonesuch")
    refusal(profile="x" * 5_000)
    refusal(profile="x\0y")


@pytest.mark.parametrize(
    ("override", "path"),
    [
        (f"name={SECRET}", "name"),
        (f"policy.model=models/{SECRET}", "policy.model"),
        ("generation.source=https://me:pass@example.org/x.csv", "generation.source"),
        ("generation.models=[hf_abcdefghijklmnopqrst]", "generation.models"),
        (f"zzz={SECRET}", "zzz"),
        (f"{SECRET}=1", "key"),
        ("generation.backends=[{model: a, base_url: http://a/v1, api_key: %s}]" % SECRET,  # noqa: UP031
         "generation.backends"),
        (f"generation.backends=[{{model: a, base_url: 'https://a/v1?api_key={SECRET}'}}]",
         "generation.backends"),
    ],
)  # fmt: skip
def test_secrets_are_refused_and_never_repeated(override, path, tmp_path):
    settings = [f"home={tmp_path}"]
    done = CliRunner().invoke(app, ["dialogues", *(word for one in [*settings, override] for word in ("--set", one))])
    assert isinstance(done.exception, PersodpoError)
    message = str(done.exception)
    assert path in message
    assert "environment variable" in message
    assert not any(secret in message for secret in (SECRET, "pass@", "hf_"))
    assert list(tmp_path.iterdir()) == []


def test_a_value_is_never_repeated_whatever_is_wrong_with_it(tmp_path):
    odd = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
    mine = tmp_path / "mine.yaml"
    for text in (
        f"seed: {odd}",
        f"pairs: [{odd}",
        f"dialogues: {{source: {odd}}}",
        f"a: &x {odd}",
        f"pairs: {{sets: [{odd}]}}",
    ):
        mine.write_text(text)
        assert odd not in refusal(profile=mine), text
    assert odd not in refusal(f"seed={odd}")
    assert odd not in refusal(odd)


def test_digest_follows_results_not_places():
    base = load_profile("release")
    assert load_profile("release", ["home=/elsewhere", "scoring.ray_workers=2"]).digest() == base.digest()
    assert load_profile("release", ["pairs.high_quantile=0.7"]).digest() != base.digest()


def test_corrections_are_the_audit_s_and_switch_one_by_one():
    assert set(get_args(Correction)) == set(CORRECTIONS) >= set(WITHOUT_ASKING) == {*mended_findings(), "B1", "B2"}
    assert load_profile("mini", ["corrections=all"]).corrections == tuple(CORRECTIONS)
    profile = load_profile("mini", ["corrections=[A18, A4]"])
    assert [name for name in CORRECTIONS if profile.corrects(name)] == ["A4", "A18"]
    assert (profile.reading, load_profile("mini").reading) == ("strict", "as_released")
    assert profile.switches("A3", "A4") == {"A3": False, "A4": True}
    assert profile.with_corrections("A1", "A4").corrections == ("A1", "A4", "A18")
    other = load_profile("mini", ["corrections=[A4, A18]"])
    assert (other, other.digest()) == (profile, profile.digest())


def test_one_seed_is_behind_everything():
    settings = leaves(load_profile("mini").model_dump(mode="json"))
    assert [path for path in settings if "seed" in path] == ["seed", "evaluation.seeds"]
    assert load_profile("mini", ["seed=45"]).seed == 45
    assert json.loads(json.dumps(settings))["seed"] == 44
