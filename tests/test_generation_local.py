"""Models of this machine: the same texts as one at a time, batches, times, adapters, chats, sampling, faults."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import answers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from talker import PLACES, SETTINGS, make_talker, question, reply
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from persodpo.config import TransformersModel
from persodpo.generation import local
from persodpo.generation.ask import generate, generate_all
from persodpo.generation.local import TransformersBackend, is_closed
from persodpo.generation.requests import Job, Request, folder_digest
from persodpo.generation.store import Store
from persodpo.training.policy import load_policy

pytestmark = pytest.mark.usefixtures("one_thread")
MESSAGES = ({"role": "user", "content": question("Rome")},)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "model")


def backend(weights: Path | str, **changes) -> TransformersBackend:
    settings = {"model": "talker", "weights": str(weights), "batch_size": 8, **changes}
    return TransformersBackend(TransformersModel(**settings), weights, load_policy)


def ask(prompt, name: str = "", tokens: int = 30, **changes) -> Request:
    fields = {"temperature": 0.0, "seed": None, "template": "t", **changes}
    return Request(name or str(prompt), prompt, tokens, **fields)


def questions(count: int = 40) -> list[Request]:
    return [ask(question(PLACES[n % 8], n % 5), name=str(n)) for n in range(count)]


def released_way(weights: Path, asked: list[Request]) -> list[str]:
    """One prompt at a time through transformers' own pipeline, greedily."""
    model, tokenizer = load_policy(weights)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, do_sample=False, return_full_text=False)
    return [write(one.prompt, max_new_tokens=one.max_new_tokens)[0]["generated_text"] for one in asked]


def copied(talker: Path, folder: Path, template: str = "") -> Path:
    """Return a copy of the model, perhaps with a chat template."""
    shutil.copytree(talker, folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_batches_say_what_one_at_a_time_says(talker: Path, store: Store) -> None:
    asked = [*questions(), *(ask(question(place), tokens=5) for place in PLACES)]
    via = backend(talker)
    summary = generate(asked, via, store)
    found = answers(store, asked, via)
    assert [answer.completion for answer in found] == released_way(talker, asked)
    assert found[3].completion == reply(PLACES[3])
    assert (found[3].finish_reason, found[-1].finish_reason) == ("stop", "length")
    assert (summary.outcomes, summary.truncated) == (Counter(ok=40, truncated=8), 8)
    tokenizer = load_policy(talker)[1]
    for request, answer in zip(asked, found, strict=True):
        assert answer.prompt_tokens == len(tokenizer(request.prompt)["input_ids"])
        assert answer.completion_tokens == len(tokenizer(answer.completion)["input_ids"])


def test_modes_are_different_measurements(talker: Path, store: Store) -> None:
    asked = questions(20)
    together, alone = backend(talker), backend(talker, batch_size=1)
    generate(asked, together, store)
    assert generate(asked, alone, store).answered == 20
    assert {answer.batch_size for answer in answers(store, asked, alone)} == {1}
    sizes = [answer.batch_size for answer in answers(store, asked, together)]
    assert max(sizes) == 8
    assert sum(1 / size for size in sizes) == pytest.approx(3)  # 8 + 8 + 4
    for answer in answers(store, asked, alone) + answers(store, asked, together):
        assert answer.latency > 0
        assert answer.hardware.endswith("1 threads, float32")
    assert generate(asked, alone, store).skipped == generate(asked, backend(talker, batch_size=4), store).skipped == 20


def test_prompts_of_like_length_are_answered_together(talker: Path, store: Store, monkeypatch) -> None:
    batches = []
    decode = local.Decoder.answer

    def watched(self, requests):
        batches.append([request.prompt_bytes for request in requests])
        return decode(self, requests)

    monkeypatch.setattr(local.Decoder, "answer", watched)
    asked = questions(40)
    generate(asked, backend(talker), store)
    longest_first = sorted((request.prompt_bytes for request in asked), reverse=True)
    assert [sorted(batch, reverse=True) for batch in batches] == [longest_first[n : n + 8] for n in range(0, 40, 8)]


def test_nothing_is_loaded_where_nothing_is_to_be_asked(talker: Path, store: Store, monkeypatch) -> None:
    generate(questions(), backend(talker), store)
    via = TransformersBackend(backend(talker).settings, talker, lambda *_, **__: pytest.fail("loaded"))
    assert generate(questions(), via, store).skipped == 40


def test_other_weights_are_another_model(talker: Path, store: Store, tmp_path: Path) -> None:
    generate(questions(4), backend(talker), store)
    other = copied(talker, tmp_path / "other")
    assert generate(questions(4), backend(other), store).skipped == 4
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert generate(questions(4), backend(other), store).answered == 4


def test_a_folder_of_adapters_is_known_by_its_base_too(talker: Path, store: Store, tmp_path: Path) -> None:
    base, folder = copied(talker, tmp_path / "base"), tmp_path / "arm@45"
    get_peft_model(load_policy(base)[0], LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)
    load_policy(base)[1].save_pretrained(folder)
    generate(questions(2), backend(folder), store)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert generate(questions(2), backend(folder), store).answered == 2


def test_a_folder_is_known_by_its_files_whatever_else_lies_there(talker: Path, tmp_path: Path) -> None:
    known = folder_digest(talker)
    folder = copied(talker, tmp_path / "odd")
    (folder / "vocab.json").symlink_to("gone.json")
    (folder / "more.json").mkdir()
    assert folder_digest(folder) == known
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert folder_digest(folder) not in {known, None}


def test_a_folder_that_is_not_there_is_not_read_from_the_one_before_the_at(talker: Path, store: Store) -> None:
    summary = generate(questions(2), backend(f"{talker}@45"), store)
    assert "@45 is not there; what follows the @ is a revision" in summary.stopped


@pytest.mark.parametrize("rest", ["", ' {"response": "b"}', "}"])
@pytest.mark.parametrize("before", ["", "Sure: ", '<think>The object is {"response": "..."}.</think>'])
def test_an_answer_is_open_until_its_last_brace(before: str, rest: str) -> None:
    text = before + '{"why": {"response": "}"}, "response": "a {b} \\" c"}'
    assert not any(is_closed(text[:length]) for length in range(len(text)))
    assert is_closed(text + rest)
    assert not is_closed('{"why": "no answer"}')
    assert not is_closed('{"response": ' * 100_000)


def test_completions_stop_at_their_closed_object(talker: Path, store: Store, monkeypatch) -> None:
    """A model whose end token never comes goes on after its object, unless it is stopped."""
    config = local.Decoder._config

    def endless(self, *settings):
        made = config(self, *settings)
        made.eos_token_id = None
        made.suppress_tokens = self._ends
        return made

    monkeypatch.setattr(local.Decoder, "_config", endless)
    stopping, going_on = backend(talker, stop_at_json=True), backend(talker)
    asked = questions(10)
    for via in (stopping, going_on):
        assert generate(asked, via, store).answered == 10
    for request, short, long in zip(
        asked, answers(store, asked, stopping), answers(store, asked, going_on), strict=True
    ):
        assert long.completion.startswith(short.completion)
        assert (short.finish_reason, long.finish_reason) == ("stop", "length")
        assert short.completion == reply(PLACES[int(request.dialogue_id) % 8])
        assert short.completion_tokens < long.completion_tokens == 30


def test_what_a_model_says_of_beams_and_time_cuts_no_answer(talker: Path, store: Store, tmp_path: Path) -> None:
    other = copied(talker, tmp_path / "beams")
    path = other / "generation_config.json"
    odd = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "max_time": 0.001,
           "stop_strings": ["is"], "exponential_decay_length_penalty": [1, 9.0]}  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    asked, via = questions(8), backend(other, stop_at_json=True)
    assert generate(asked, via, store).answered == 8
    assert [one.completion for one in answers(store, asked, via)] == [reply(PLACES[n]) for n in range(8)]


def test_an_end_that_a_model_is_made_to_write_at_its_longest_length_ends_no_answer(
    talker: Path, store: Store, tmp_path: Path
) -> None:
    other = copied(talker, tmp_path / "forced")
    path = other / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"forced_eos_token_id": config["eos_token_id"]}))
    asked, via = [ask(question("Rome"), tokens=5)], backend(other)
    generate(asked, via, store)
    assert answers(store, asked, via)[0].finish_reason == "length"


# Sampling


def test_a_seed_gives_the_same_texts_and_another_seed_others(talker: Path, tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate((7, 7, 8)):
        with Store(tmp_path / f"{number}.sqlite") as store:
            asked = [ask(question(place), temperature=20.0, seed=seed) for place in PLACES]
            generate(asked, backend(talker), store)
            texts.append([answer.completion for answer in answers(store, asked, backend(talker))])
    assert texts[0] == texts[1] != texts[2]


def test_tokens_are_drawn_from_the_whole_softmax(talker: Path) -> None:
    """The model's own generation settings may cut off all but the likeliest tokens; what is asked for is the temperature."""
    decoder = local.Decoder(backend(talker).settings, talker, load_policy)
    decoder._model.generation_config.update(top_k=1, top_p=0.1)
    drawn = decoder.answer([ask(question("Rome"), temperature=20.0, seed=3)])[0]
    assert drawn.completion != reply("Rome")


# Chats, adapters


def test_a_chat_is_written_by_the_tokenizers_own_template(talker: Path, store: Store, tmp_path: Path) -> None:
    via = backend(copied(talker, tmp_path / "chatty", TEMPLATE), format="chat")
    generate([ask(MESSAGES, name="Rome")], via, store)
    assert answers(store, [ask(MESSAGES, name="Rome")], via)[0].completion == reply("Rome")


@pytest.mark.parametrize(
    ("template", "form"),
    [("", "chat"), ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
                      "chat_with_system")],
)  # fmt: skip
def test_a_format_that_the_tokenizer_cannot_write(talker: Path, store: Store, tmp_path: Path, template, form) -> None:
    folder = copied(talker, tmp_path / "m", template)
    messages = ({"role": "system", "content": "x"}, *MESSAGES) if form == "chat_with_system" else MESSAGES
    summary = generate([ask(messages, name="a"), ask(messages, name="b")], backend(folder, format=form), store)
    assert f"cannot write format {form}" in summary.stopped
    assert summary.left == 1  # the two are one prompt
    assert summary.answered == 0


def test_an_adapter_changes_the_answers(talker: Path, store: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load_policy(talker)[0], LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    via = backend(talker, adapter=tmp_path / "adapter")
    generate(questions(4), via, store)
    generate(questions(4), backend(talker), store)
    plain = [answer.completion for answer in answers(store, questions(4), backend(talker))]
    assert [answer.completion for answer in answers(store, questions(4), via)] != plain


def test_adapters_are_read_from_safetensors_only(talker: Path, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"would be unpickled")
    summary = generate(questions(2), backend(talker, adapter=folder), store)
    assert "holds no adapter_model.safetensors" in summary.stopped


def test_a_model_is_not_asked_after_its_own_end_of_text(talker: Path, store: Store, tmp_path: Path) -> None:
    """Some tokenizers append their end of text to whatever they are given."""
    folder = copied(talker, tmp_path / "ending")
    content = json.loads((folder / "tokenizer.json").read_text())
    end = content["added_tokens"][0]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": end["content"], "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end["content"]: {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    via = backend(folder)
    assert load_policy(folder)[1](question("Rome"))["input_ids"][-1] == end["id"]
    generate(questions(8), via, store)
    assert [answer.completion for answer in answers(store, questions(8), via)] == [reply(place) for place in PLACES]


def test_a_model_without_fused_attention_is_asked_all_the_same(talker: Path, store: Store, tmp_path: Path) -> None:
    folder = copied(talker, tmp_path / "bloom")
    tokenizer = load_policy(talker)[1]
    config = AutoConfig.for_model(
        "bloom", vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert load_policy(folder)[0].config._attn_implementation == "eager"
    assert generate(questions(4), backend(folder), store).answered == 4


# Faults


def test_a_prompt_that_is_too_long_fails_alone(talker: Path, store: Store) -> None:
    long = ask(question("Rome", turns=60))
    via = backend(talker)
    summary = generate([*questions(3), long], via, store)
    assert (summary.answered, summary.failed) == (3, {"context_too_long": 1})
    error = answers(store, [long], via)[0].error
    assert f"do not fit the {SETTINGS.max_length} tokens that talker takes" in error


def changed(via: TransformersBackend, change: Callable[[Any, Any], None]) -> TransformersBackend:
    """Return the backend with its model and tokenizer changed as soon as they are loaded."""

    def load(*given, **options):
        model, tokenizer = load_policy(*given, **options)
        change(model, tokenizer)
        return model, tokenizer

    return TransformersBackend(via.settings, via.weights, load)


OF_OSLO = "{% if 'Oslo?' in messages[0].content %}{{ raise_exception('no Oslo') }}{% endif %}" + TEMPLATE
NOT_OF_OSLO = "{% if 'Oslo?' not in messages[0].content %}" + TEMPLATE + "{% endif %}"


@pytest.mark.parametrize("batch_size", [8, 1])
@pytest.mark.parametrize(("template", "says"), [(OF_OSLO, "no Oslo"), (NOT_OF_OSLO, "its template writes nothing")])
def test_a_prompt_that_the_template_cannot_write_fails_alone(
    talker: Path, store: Store, tmp_path: Path, batch_size: int, template: str, says: str
) -> None:
    via = backend(copied(talker, tmp_path / "m", template), format="chat", batch_size=batch_size)
    asked = [ask(({"role": "user", "content": question(place)},), name=place) for place in PLACES]
    summary = generate(asked, via, store)
    assert (summary.answered, summary.failed, summary.stopped) == (7, {"rejected": 1}, None)
    for place, answer in zip(PLACES, answers(store, asked, via), strict=True):
        assert (answer.completion, answer.error) == ((None, says) if place == "Oslo" else (reply(place), None))


def fails_on(word: str) -> Callable[[Any, Any], None]:
    """Let a model fail in a way of its own on prompts that hold a word."""

    def change(model: Any, tokenizer: Any) -> None:
        made = model.generate

        def generate(input_ids, **options):
            if any(word in tokenizer.decode(row) for row in input_ids):
                raise ValueError("probability tensor\ncontains inf")
            return made(input_ids=input_ids, **options)

        model.generate = generate

    return change


def test_a_prompt_that_the_tokenizer_or_the_model_fails_on_fails_alone(talker: Path, store: Store) -> None:
    via = changed(backend(talker), fails_on("Oslo?"))
    asked = [*(ask(question(place)) for place in PLACES), ask("User1: What about \ud83d?\n", name="half")]
    summary = generate(asked, via, store)
    assert (summary.answered, summary.failed, summary.stopped) == (7, {"rejected": 2}, None)
    found = dict(zip([*PLACES, "half"], answers(store, asked, via), strict=True))
    assert found["Oslo"].error == "probability tensor contains inf"
    assert found["half"].error
    assert all(found[place].completion == reply(place) for place in PLACES if place != "Oslo")


def test_a_model_that_fails_on_any_prompt_stops_and_nothing_is_held_against_the_prompts(
    talker: Path, store: Store
) -> None:
    broken = changed(backend(talker, model="broken"), fails_on(""))
    warming = changed(backend(talker, model="warming", batch_size=1), fails_on(""))
    large = changed(
        backend(talker, model="large"), lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    *stopped, good = generate_all([Job(questions(8), via) for via in (broken, warming, large, backend(talker))], store)
    sentences = [summary.stopped for summary in stopped]
    assert sentences[0] == "Model broken cannot go on from its prompts (probability tensor contains inf)."
    assert sentences[1].startswith("Model warming cannot be loaded (probability tensor contains inf); ")
    assert sentences[2].startswith("Model large cannot be loaded (CUDA out of memory.); ")
    assert [summary.left for summary in stopped] == [8, 8, 8]
    assert good.answered == 8


def test_a_model_that_cannot_be_loaded_stops_alone(talker: Path, store: Store, tmp_path: Path) -> None:
    missing, good = backend(tmp_path / "nowhere", model="missing"), backend(talker)
    first, second = generate_all([Job(questions(), missing), Job(questions(), good)], store)
    assert "nowhere' cannot be loaded" in first.stopped
    assert (first.left, second.answered) == (40, 40)


def test_a_batch_that_does_not_fit_the_memory_is_halved(talker: Path, store: Store, monkeypatch) -> None:
    decode = local.Decoder._decode

    def short_of_memory(self, ids, requests):
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
        return decode(self, ids, requests)

    monkeypatch.setattr(local.Decoder, "_decode", short_of_memory)
    via = backend(talker)
    assert generate(questions(20), via, store).answered == 20
    assert {answer.batch_size for answer in answers(store, questions(20), via)} == {2}
    monkeypatch.setattr(
        local.Decoder, "_decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried."))
    )
    stopped = generate([ask("another")], via, store)
    assert "runs out of memory on a single prompt" in stopped.stopped
    assert stopped.left == 1


def test_local_models_take_turns_after_the_endpoints(talker: Path, store: Store, monkeypatch) -> None:
    events = []

    def watched(name):
        method = getattr(local.Decoder, name)

        def call(self, *arguments):
            events.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(local.Decoder, name, call)

    watched("__init__")
    watched("answer")
    jobs = [Job(questions(6), backend(talker, model=name)) for name in ("one", "two")]
    assert [summary.answered for summary in generate_all(jobs, store)] == [6, 6]
    assert events == ["__init__", "answer"] * 2


ENDLESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_generation_local import ask, backend, question
from persodpo.generation import local
from persodpo.generation.ask import generate
from persodpo.generation.store import Store
config = local.Decoder._config
def endless(self, *settings):
    print("decoding", flush=True)
    made = config(self, *settings)
    made.suppress_tokens = self._ends
    return made
local.Decoder._config = endless
load = local.Decoder.__init__
def without_limit(self, *given):
    load(self, *given)
    self._limit = float("inf")
local.Decoder.__init__ = without_limit
with Store(Path(sys.argv[3])) as store:
    generate([ask(question(place), tokens=100_000) for place in ("Rome", "Oslo")], backend(Path(sys.argv[2])), store)
"""


@pytest.mark.slow
def test_an_interrupt_ends_a_batch_and_stores_no_half_answer(talker: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    command = [sys.executable, "-c", ENDLESS, str(Path(__file__).parent), str(talker), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "decoding\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        process.wait(timeout=60)
    assert time.monotonic() - started < 20
    assert process.returncode != 0
    asked = [ask(question(place), tokens=100_000) for place in ("Rome", "Oslo")]
    with Store(path) as store:
        assert answers(store, asked, backend(talker)) == [None, None]
