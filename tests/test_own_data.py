"""Own dialogues and completions: two CSV files to a trained model, and what is wrong with a file in one sentence."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from persodpo import stages
from persodpo.cli import app
from persodpo.config import Profile, load_profile, with_overrides
from persodpo.doctor import diagnose
from persodpo.errors import PersodpoError
from persodpo.files import DATA, PROJECT
from persodpo.reproduce import notebook_files, reproduce
from persodpo.runfolder import RunFolder
from persodpo.stages.generate import asked_scope

HEAD = "dialogue_id,split,personas,context\n"
TALK = 'd1,train,"[""I like art."", ""I have a dog.""]",User1: Hello?\n'
HELD = "d2,valid,I sing.,User1: Hi?\n"
ASKED = "dialogue_id,model,completion\n"
GOOD = 'd1,a,"{""response"": ""Hello, you like art.""}"\n'

#: What makes the commands of docs/your-data.md quick.
QUICK = {
    "policy.small.vocabulary": 400, "policy.small.hidden_size": 32,
    "policy.small.steps": 10, "training.epochs": 0.5, "training.health_tokens": 4,
    "scoring.accept_failed_probes": "[coherence, c_score, ue_score, persona_distance]",
}  # fmt: skip


def own(folder: Path, dialogues: str | bytes, completions: str | bytes, **changes: object) -> Profile:
    """Return the miniature on two files of these contents."""
    settings: dict[str, object] = {"home": folder}
    for section, content in (("dialogues", dialogues), ("generation", completions)):
        path = folder / f"{section}.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        settings[f"{section}.source"] = path
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return load_profile("mini", [f"{key}={value}" for key, value in settings.items()])


def test_the_examples_profile_can_be_read():
    assert load_profile(DATA / "example" / "mine.yaml").dialogues.source == "data/example/dialogues.csv"


@pytest.mark.slow
def test_the_commands_of_the_page_give_trained_models(tmp_path, monkeypatch):
    """docs/your-data.md, both blocks, on a copy of the example's profile that is quick."""
    monkeypatch.chdir(tmp_path)  # notebooks, too, run elsewhere than in the project's root
    changes = QUICK | {"home": tmp_path}
    profile = load_profile(DATA / "example" / "mine.yaml", [f"{key}={value}" for key, value in changes.items()])
    blocks = re.findall(r"```bash\n(.*?)```", (PROJECT / "docs" / "your-data.md").read_text(), re.DOTALL)
    first, then = ([shlex.split(line, comments=True) for line in block.splitlines()] for block in blocks)
    assert first[0] == ["cp", "data/example/mine.yaml", "mine.yaml"]
    Path("mine.yaml").write_text(profile.to_yaml())
    shown = [_invoke(words) for words in first[1:]]
    run = RunFolder(profile)
    assert run.root == tmp_path / "runs" / "mine"
    completions = pd.read_csv(DATA / "example" / "completions.csv")
    assert sorted(run.read("responses")["completion"]) == sorted(completions["completion"])
    assert run.read("scores")["quality"].notna().all()
    pairs = run.read("pairs/perso")
    assert set(pairs["chosen_model"]) <= set(completions["model"])
    assert "length alone predicts" in shown[2]
    assert (run.root / "training" / "perso" / "model.safetensors").is_file()
    shown = [_invoke(words) for words in then[:-1]]
    assert (run.root / "evaluation" / "paired_differences.md").is_file()
    other = RunFolder(load_profile("wide.yaml"))
    wide = other.read("pairs/perso")
    counts = dict(zip(("kept", "added", "dropped", "flipped"), _against(shown[2], "perso"), strict=True))
    assert counts["kept"] + counts["added"] + counts["flipped"] == len(wide)
    assert counts["kept"] + counts["dropped"] + counts["flipped"] == len(pairs)
    assert counts["dropped"] > 0
    assert (other.root / "training" / "perso" / "model.safetensors").is_file()
    assert len(run.read("pairs/perso")) == len(pairs), "another name leaves the first run alone"
    assert then[-1][1] == "reproduce"
    assert len(list(reproduce("mine.yaml"))) == len(notebook_files())
    _plain_answers_have_no_simple_pairs(run, tmp_path / "plain.csv")


def _invoke(words: list[str]) -> str:
    """Run a command of the page; what it prints goes to the file after ``>``, if there is one."""
    end = words.index(">") if ">" in words else len(words)
    done = CliRunner().invoke(app, words[1:end], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if end < len(words):
        Path(words[-1]).write_text(done.stdout)
    return done.stdout


def _against(shown: str, name: str) -> list[int]:
    """Return the counts of a line of `persodpo pairs --against`."""
    (line,) = (line for line in shown.splitlines() if line.startswith(f"pairs/{name} against mine: "))
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) [a-z]+(?:, |$)", line)]


def _plain_answers_have_no_simple_pairs(run: RunFolder, path: Path) -> None:
    read = run.read("responses").query("outcome == 'ok'")
    read[["dialogue_id", "model", "response"]].to_csv(path, index=False)
    plain = [f"generation.source={path}", "name=plain"]
    with pytest.raises(PersodpoError, match=r"where no model ever fails, leave simple out of pairs\.sets"):
        stages.make(with_overrides(run.profile, plain), "pairs")
    assert stages.make(with_overrides(run.profile, [*plain, "pairs.sets=[perso]"]), "pairs")[-1].rows["pairs/perso"]


def test_half_an_emoji_is_read_as_unknown(tmp_path):
    profile = own(tmp_path, HEAD + 'd1,train,"[""I like \\ud83d dogs.""]",User1: x\n' + HELD, ASKED + GOOD)
    stages.make(profile, "dialogues")
    assert RunFolder(profile).read("dialogues")["personas"][0] == ["I like \ufffd dogs."]


def test_a_long_text_is_read(tmp_path):
    long = "word " * 30_000
    profile = own(tmp_path, HEAD + TALK, ASKED + GOOD + f'd1,b,"{{""response"": ""{long}""}}"\n')
    stages.make(profile, "generate")
    assert RunFolder(profile).read("responses")["response"].str.len().max() == len(long)


def test_a_blank_completion_is_a_failed_answer_and_counted(tmp_path):
    profile = own(tmp_path, HEAD + TALK + HELD, ASKED + GOOD + "d1,b,  \nd1,c,no JSON\n")
    *_, report = stages.make(profile, "generate")
    table = RunFolder(profile).read("responses").set_index("model")
    assert table["outcome"].to_dict() == {"a": "ok", "b": "empty", "c": "no_json"}
    assert report.notes == ("outcomes: ok 1, empty 1, no_json 1; 2 hold no answer at all and enter no pair",)


def test_a_table_that_is_missing_is_made_by_a_profile_that_can_be_named(tmp_path):
    profile = own(tmp_path, HEAD + TALK + HELD, ASKED + GOOD, name="mine")
    stages.make(profile, "generate")
    with pytest.raises(PersodpoError, match=r"`persodpo score --profile .*mine/profile\.yaml`") as raised:
        RunFolder(profile).read("scores")
    named = str(raised.value).split("--profile ")[1].split("`")[0]
    assert load_profile(named) == profile


def test_the_example_is_read(tmp_path):
    dialogues, completions = ((DATA / "example" / f"{name}.csv").read_text() for name in ("dialogues", "completions"))
    profile = own(tmp_path, dialogues, completions)
    stages.make(profile, "generate")
    run = RunFolder(profile)
    assert run.read("dialogues")["split"].value_counts().to_dict() == {"train": 320, "valid": 20}
    assert (run.read("dialogues")["personas"].map(len) == 5).all()
    outcomes = run.read("responses").groupby("model")["outcome"].agg(lambda found: (found == "ok").sum())
    assert outcomes.to_dict() == {"attentive": 80, "hasty": 36, "impersonal": 80, "repetitive": 80}


def test_files_of_a_spreadsheet_are_read(tmp_path):
    """A byte order mark, line ends of Windows, personas one a line, columns in any order and further ones."""
    head = "note,context,personas,split,dialogue_id,reference\r\n"
    dialogues = f'{head}x,"User1: Hé,\r\nwell?","I sing.\r\n\r\nI cook.",train,d1,User2: Ja\r\n'
    profile = own(tmp_path, b"\xef\xbb\xbf" + dialogues.encode(), ASKED + GOOD)
    stages.make(profile, "generate")
    row = RunFolder(profile).read("dialogues").iloc[0]
    assert (list(row["personas"]), row["context"], row["reference"]) == (
        ["I sing.", "I cook."],
        "User1: Hé,\nwell?",
        "Ja",
    )
    response = RunFolder(profile).read("responses").iloc[0]
    assert (response["model"], response["response"], response["outcome"]) == ("a", "Hello, you like art.", "ok")
    assert any(finding.state == "ok" and "1 responses" in finding.sentence for finding in diagnose(profile))


def test_plain_answers_need_no_json(tmp_path):
    profile = own(tmp_path, HEAD + TALK + HELD, 'dialogue_id,model,response\nd1,a,Hello {you}.\nd1,b,"Say ""no""."\n')
    stages.make(profile, "generate")
    table = RunFolder(profile).read("responses")
    assert table["response"].tolist() == ["Hello {you}.", 'Say "no".']
    assert [json.loads(text)["response"] for text in table["completion"]] == table["response"].tolist()
    assert RunFolder(profile).read("dialogues")["reference"].tolist() == [None, None]


def test_a_changed_file_is_read_again(tmp_path):
    profile = own(tmp_path, HEAD + TALK, ASKED + GOOD)
    assert not stages.make(profile, "generate")[-1].skipped
    assert all(report.skipped for report in stages.make(profile, "generate"))
    with Path(profile.generation.source).open("a") as file:
        file.write(GOOD.replace("d1,a", "d1,b"))
    assert stages.make(profile, "generate")[-1].rows == {"responses": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dialogue_id,split,context\nd1,train,x\n", "line 1: column personas must be there once, not dialogue_id, split"),
        ("", "line 1: column dialogue_id, split, personas, context must be there once"),
        ((HEAD + HELD).replace(",", ";"), "once, not dialogue_id;split;personas;context; name dialogue_id, split"),
        ((HEAD + TALK).encode("utf-16"), "line 1 or after: not UTF-8; save the file as CSV in UTF-8"),
        ((HEAD + TALK + "d3,train,J’ai faim.,x\n").encode("cp1252"), "not UTF-8"),
        ("dialogue_id,split,personas,context,split\n" + HELD, "line 1: column split must be there once"),
        (HEAD, "has no row below its column names"),
        (HEAD + HELD, "has no dialogue of the train split"),
        (HEAD + TALK + TALK, "line 3: d1 is in line 2 already; keep one of the two"),
        (HEAD + 'd1,train,"I\nsing.",User1: x\n' + "d2,test,I sing.,User1: x\n", "line 4: split is 'test'; write train"),
        (HEAD + TALK + "d2,valid,I sing.\n", "line 3: 3 fields for 4 columns; put double quotes"),
        (HEAD + TALK + "d2,valid,,User1: Hi?\n", "line 3: personas is empty; fill it in"),
        (HEAD + TALK + "d2,valid,I sing.,Hi?\n", "line 3: a turn of context begins with 'Hi?'; begin each with 'User1: '"),
        (HEAD + TALK + '"d2",valid,I sing.,"User1: Hi?\nUser2: Hi."\n', "line 3: the last turn of context is User2's"),
        (HEAD + TALK + '"d2",valid,I sing.,"User1: Hi?\nUser2:Hi."\n', "line 3: a turn of context begins with 'User2:Hi.'"),
        (HEAD + TALK + '"d2",valid,I sing.,"User1: Hi?\nuser2: Hi"\n', "line 3: a turn of context begins with 'user2: Hi'"),
        (HEAD + "d1,train,['I sing.'],User1: x\n", "line 2: personas are no JSON list of sentences; write"),
        (HEAD + "d1,train,\"[\"\"I sing.\"\", 7]\",User1: x\n", "line 2: personas are no JSON list"),
        (HEAD + "d1,train,[],User1: x\n", "line 2: personas are no JSON list"),
        (HEAD + f"d1,train,{100_000 * '['},User1: x\n", "line 2: personas are no JSON list"),
        (HEAD + TALK + 'd2,valid,"I sing.,x\n', "line 3: unexpected end of data; put each text between double quotes"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_dialogues_is_one_sentence(tmp_path, content, words):
    profile = own(tmp_path, content, ASKED + GOOD)
    with pytest.raises(PersodpoError, match=re.escape(words)) as caught:
        stages.make(profile, "dialogues")
    assert profile.dialogues.source in str(caught.value)
    assert any(words in finding.sentence for finding in diagnose(profile) if finding.state == "missing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dialogue_id,completion\nd1,x\n", "line 1: column model must be there once"),
        (ASKED, "has no row below its column names"),
        (ASKED + GOOD + GOOD, "line 3: d1, a is in line 2 already; keep one of the two"),
        (ASKED + GOOD + "d9,a,x\n", "line 3: there is no dialogue 'd9'; add it to the dialogues"),
        (ASKED + GOOD + "d2,a,x\n", "line 3: dialogue 'd2' is held out (split valid)"),
        ("dialogue_id,model,response\nd1,a,Hi.\nd1,b,  \n", "line 3: response is empty; fill it in or remove the line"),
        (ASKED + "d1,a,Hello.\n", "if these are plain answers, name the column response"),
        (ASKED + GOOD.replace('d1,a,"', 'd1,a,"x"'), "put each text between double quotes"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_completions_is_one_sentence(tmp_path, content, words):
    profile = own(tmp_path, HEAD + TALK + HELD, content)
    with pytest.raises(PersodpoError, match=re.escape(words)) as caught:
        stages.make(profile, "generate")
    assert profile.generation.source in str(caught.value)


def test_files_that_are_not_there_or_not_named(tmp_path):
    profile = own(tmp_path, HEAD + TALK, ASKED + GOOD, generation__source=tmp_path / "none.csv")
    with pytest.raises(PersodpoError, match=r"none\.csv is not there; name the CSV file of your completions"):
        stages.make(profile, "generate")
    with pytest.raises(PersodpoError, match=r"none\.csv is not there; name the CSV file of your dialogues"):
        stages.make(own(tmp_path, HEAD + TALK, ASKED, dialogues__source=tmp_path / "none.csv"), "dialogues")
    for name in ("minature", tmp_path):
        with pytest.raises(PersodpoError, match=r"train_focus\.json is not there; dialogues\.source is miniature, "):
            stages.make(own(tmp_path, HEAD + TALK, ASKED, dialogues__source=name), "dialogues")
    with pytest.raises(PersodpoError, match=r"generation: source must be models, published, or a file"):
        load_profile("mini", ["generation.source=csv"])
    with pytest.raises(PersodpoError, match=r"asks no model"):
        asked_scope(own(tmp_path, HEAD, ASKED), (), (), 3)


def test_dialogues_without_references_or_earlier_turns_teach_no_scorer_of_coherence(tmp_path):
    rows = "".join(f"d{n},train,I like thing {n}.,User1: Hello {n}?\n" for n in range(12))
    profile = own(tmp_path, HEAD + rows, ASKED + GOOD)
    with pytest.raises(PersodpoError, match=r"there are no replies; name real checkpoints"):
        stages.make(profile, "score")
