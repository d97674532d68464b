"""python -m trainer queries, against an endpoint of the tests' own."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from tests.checkpoints import write_dense
from tests.conftest import ROOT, TINY
from tests.language_model import Reply, serving
from trainer.cli import main
from trainer.config import ConfigError, load_config
from trainer.data.beir import read_search_set
from trainer.data.loading import load_data
from trainer.queries import endpoint as endpoint_module
from trainer.queries.answers import read_answer
from trainer.queries.check import COPY, LANGUAGE, LONG, fault, is_copied, longest_run
from trainer.queries.command import make_queries
from trainer.queries.endpoint import Patience
from trainer.queries.journal import NAME as JOURNAL
from trainer.queries.language import tell
from trainer.queries.passages import Passage, choose, read_corpus
from trainer.queries.prompt import Prompt
from trainer.queries.request import Request
from trainer.queries.write import divide

ANIMALS = ["rev", "ulv", "bjørn", "gaupe", "elg", "hjort", "rådyr", "mår", "ekorn", "hare"]
ANIMALS += ["bever", "grevling", "oter", "ørn", "ugle", "hauk", "spurv", "ravn", "laks", "ørret"]
QUICK = Patience(timeout=5, retries=3, first=0.01, longest=0.02)


def text_of(animal):
    return f"Les her om hvor en {animal} bor, hva den gjør, og noe om hvordan den lever uten mye mat om vinteren i fjellet."


def animal_of(prompt):
    return next(animal for animal in ANIMALS if f"hvor en {animal} bor" in prompt)


def queries_about(animal):
    return {"questions": [f"Hva spiser {animal} ikke om vinteren?"], "keywords": [f"{animal} bosted"]}


def well(prompt):
    return Reply(json.dumps(queries_about(animal_of(prompt))))


@pytest.fixture(autouse=True)
def without_keys(monkeypatch, tmp_path):
    for name in ("LLM_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "pages.jsonl"
    rows = [{"_id": f"p{n}", "title": animal.title(), "text": text_of(animal)} for n, animal in enumerate(ANIMALS)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def made(corpus, url, **settings):
    """The lines that a run printed."""
    lines = []
    settings = {"questions": 1, "keywords": 1, "found_in": 3, "patience": QUICK} | settings
    make_queries(Request(corpus, url, settings.pop("model", "m"), lines.append, **settings))
    return lines


def rows_of(name, folder="models/queries/pages"):
    with open(f"{folder}/{name}", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def reasons():
    return {
        row["text"] if isinstance(row["text"], str) else str(row["text"]): row["reason"]
        for row in rows_of("refused.jsonl")
    }


def manifest(folder="models/queries/pages"):
    return json.loads(open(f"{folder}/queries.json", encoding="utf-8").read())


# ------------------------------------------------------------------------------------------- what comes out
def test_a_config_trains_on_the_folder_as_the_printed_lines_say(corpus, tmp_path):
    with serving(well) as llm:
        lines = made(corpus, llm.url)
    assert len(llm.prompts) == 20
    printed = "\n".join(lines[lines.index("datasets:") :])
    assert yaml.safe_load(printed) == {"datasets": {"pages": {"source": "models/queries/pages", "language": "nb"}}}
    file = tmp_path / "mine.yaml"
    file.write_text(TINY.replace("datasets:\n  quickstart: {}\n", printed + "\n"))
    data = load_data(load_config(file).config)
    (table,) = data.train.values()
    train = read_search_set(tmp_path / "models/queries/pages", "train", "pages")
    assert len(table) == len(train.queries) == manifest()["queries"]["train"]["queries"]
    assert [search.name for search in data.search] == ["pages"]


def test_no_passage_has_queries_in_both_splits_and_every_query_is_in_one(corpus, tmp_path):
    with serving(well) as llm:
        made(corpus, llm.url, dev_share=0.3)
    folder = tmp_path / "models/queries/pages"
    train, dev = (read_search_set(folder, split, "pages") for split in ("train", "dev"))
    sides = [{passage for grades in split.relevant.values() for passage in grades} for split in (train, dev)]
    assert len(sides[0]) + len(sides[1]) == 20
    assert 0 < len(sides[1]) < 12
    assert sides[0].isdisjoint(sides[1])
    assert len(train.queries) + len(dev.queries) == 40
    for query, grades in (train.relevant | dev.relevant).items():
        (passage,) = grades
        assert query in (f"{passage}-q1", f"{passage}-k1")


def test_the_manifest_says_what_was_done_and_no_key(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", "sk-secret-1")
    with serving(well) as llm:
        lines = made(corpus, llm.url, passages=4)
    assert {headers["authorization"] for headers in llm.headers} == {"Bearer sk-secret-1"}
    assert manifest()["tokens"] == {"read": 400, "written": 80, "answers_not_counted": 0}
    assert manifest()["cost"] is None
    assert manifest()["endpoint"] == llm.url.removeprefix("http://").removesuffix("/v1")
    assert manifest()["passages"]["answered"] == 4
    assert not any("cost" in line for line in lines)
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any("sk-secret-1" in text for text in [*written, *lines])


def test_the_key_of_openai_is_taken_where_there_is_no_other_and_never_that_of_the_hub(corpus, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(well) as llm:
        made(corpus, llm.url, passages=1)
        assert "authorization" not in llm.headers[0]
        monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
        made(corpus, llm.url, passages=2)
        assert llm.headers[1]["authorization"] == "Bearer sk-openai"


def test_a_local_endpoint_is_asked_though_the_hub_is_offline(corpus):
    from huggingface_hub import constants

    assert constants.is_offline_mode()
    with serving(well) as llm:
        made(corpus, llm.url, passages=1)
    assert llm.paths == ["/v1/chat/completions"]
    assert llm.models == ["m"]


@pytest.mark.parametrize(
    ("given", "posted"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat/completions"),
        ("https://h/x/chat/completions?api-version=2", "https://h/x/chat/completions?api-version=2"),
    ],
)
def test_the_address_is_that_of_openais_clients(given, posted):
    from huggingface_hub.inference._providers.hf_inference import _build_chat_completion_url

    assert endpoint_module._address(given) == posted
    assert _build_chat_completion_url(posted) == posted


# ------------------------------------------------------------------------------------------- the corpus
def test_passages_that_are_short_or_copies_or_foreign_are_passed_over_and_counted(tmp_path):
    file = tmp_path / "odd.jsonl"
    english = "This is the text of a page that was written by people who have no Norwegian at all."
    rows = [text_of("rev"), text_of("rev"), "Kort.", english, "x y z " * 10]
    file.write_text("".join(json.dumps({"_id": n, "text": text}) + "\n" for n, text in enumerate(rows)))
    chosen = choose(read_corpus(file), None, 42, 10, None)
    assert [passage.language for passage in chosen.passages] == ["nb"]
    assert sorted(chosen.passed_over.values()) == [1, 1, 1, 1]
    assert len(choose(read_corpus(file), None, 42, 1, "da").passages) == 4


def test_a_language_column_is_believed_and_norwegian_without_its_form_is_told(tmp_path):
    nynorsk = "Kva er det ho ikkje veit om dei som ligg i skogen når det vert vinter i fjellet?"
    rows = {"id": ["a", "b", "c", "d"], "text": [nynorsk, text_of("rev"), nynorsk, text_of("elg")]}
    pq.write_table(pa.table(rows | {"language": ["no", "da", None, "fi"]}), tmp_path / "c.parquet")
    chosen = choose(read_corpus(tmp_path / "c.parquet"), None, 0, 5, None)
    assert {passage.id: passage.language for passage in chosen.passages if passage.id == "b"} == {"b": "da"}
    assert sorted(passage.language for passage in chosen.passages) == ["da", "nn"]
    assert sum(chosen.passed_over.values()) == 2


def test_a_larger_sample_holds_the_smaller_one(corpus):
    read = read_corpus(corpus)
    few, more = ({p.id for p in choose(read, count, 7, 1, None).passages} for count in (5, 9))
    assert (len(few), len(more)) == (5, 9)
    assert few < more
    assert few != {p.id for p in choose(read, 5, 8, 1, None).passages}


def test_a_folder_in_beir_layout_is_a_corpus_too_and_is_not_written_into(corpus, folder):
    assert len(read_corpus(folder).records) == 4
    with pytest.raises(ConfigError, match="holds a corpus already"):
        _ = Request(folder, "http://h/v1", "m", print, output=folder).folder


def test_a_passage_stays_in_its_split_when_further_ones_are_asked_about(corpus):
    read = read_corpus(corpus)

    def dev(count):
        from trainer.queries.check import Query

        passages = choose(read, count, 42, 1, None).passages
        splits = divide([Query(passage, "question", 1, passage.id) for passage in passages], 0.3, 42)
        return {query.passage.id for query in splits["dev"]}, {query.passage.id for query in splits["train"]}

    (few, few_train), (more, more_train) = dev(12), dev(20)
    assert few
    assert few <= more
    assert few_train <= more_train


# ------------------------------------------------------------------------------------------- language and checks
@pytest.mark.parametrize(("language", "column"), [("nn", "question"), ("da", "question"), ("sv", "question")])
def test_no_question_of_the_embedded_data_is_taken_for_another_language(language, column):
    lines = (ROOT / "trainer/data/quickstart/sister_languages.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row[column] for row in map(json.loads, lines) if row["language"] == language]
    passage = Passage(0, "p", "", "", language)
    assert len(texts) > 200
    assert [text for text in texts if fault(text, "question", passage) == LANGUAGE] == []
    told = [tell(" ".join(texts[n : n + 5])) for n in range(0, len(texts) - 5, 5)]
    assert set(told) <= {language, None}
    assert told.count(language) > 0.8 * len(told)


@pytest.mark.parametrize(
    ("language", "own", "other"),
    [
        ("nb", "Hva er det bjørnen ikke spiser?", "Kva er det bjørnen ikkje et?"),
        ("nn", "Kva er det bjørnen ikkje et?", "Vad äter björnen inte?"),
        ("da", "Hvad er det bjørnen ikke spiser?", "Hva er det bjørnen ikke spiser?"),
        ("sv", "Vad äter björnen inte?", "What does the bear not eat?"),
    ],
)
def test_a_question_in_another_language_is_refused(language, own, other):
    passage = Passage(0, "p", "", "", language)
    assert fault(own, "question", passage) is None
    assert fault(other, "question", passage) == LANGUAGE
    assert fault("NATO Washington 1949", "keywords", passage) is None


def test_eight_words_in_a_row_or_most_of_a_sentence_are_copied():
    text = "En to tre fire fem seks sju åtte ni ti elleve tolv tretten fjorten femten. Mjøsa er Norges største innsjø."
    passage = Passage(0, "p", "Om Mjøsa", text, "nb")
    assert is_copied("hva er tre fire fem seks sju åtte ni ti", passage)
    assert not is_copied("hva er tre fire fem seks sju åtte ni og ti", passage)
    assert is_copied("Mjøsa er Norges største innsjø", passage)
    assert not is_copied("Norges største innsjø", passage)
    assert fault("mjøsa " * 41, "question", passage) == LONG


def test_the_longest_run_is_that_of_difflib():
    from difflib import SequenceMatcher

    one, other = list("abcabdcabcd"), list("bcabcdabca")
    expected = SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size
    assert longest_run(one, other) == expected


def test_each_refused_query_is_kept_with_its_reason_and_counted(corpus):
    copied = " ".join(text_of("ulv").split()[:9])
    answers = {
        "rev": {"questions": ["Hva spiser rev ikke?", "Hva spiser rev ikke om natta?"], "keywords": ["rev bosted"]},
        "ulv": {"questions": [copied], "keywords": ["Rev  bosted"]},
        "bjørn": {"questions": ["Vad äter björnen inte på vintern?"], "keywords": [" "]},
        "gaupe": {"questions": ["ord " * 41], "keywords": ["kvantefysikk kurs"]},
        "elg": {"questions": [7], "keywords": ["a\u001bb"]},
    }
    with serving(
        lambda prompt: Reply(json.dumps(answers.get(animal_of(prompt)) or queries_about(animal_of(prompt))))
    ) as llm:
        lines = made(corpus, llm.url)
    assert reasons() == {
        "Hva spiser rev ikke om natta?": "more than were asked for",
        copied: COPY,
        "Rev bosted": "the same as another",
        "Vad äter björnen inte på vintern?": LANGUAGE,
        "": "without a word",
        "ord " * 40 + "ord": LONG,
        "kvantefysikk kurs": "passage not found again",
        "7": "not text, or with control characters",
        "a\x1bb": "not text, or with control characters",
    }
    (line,) = [line for line in lines if line.startswith("refused")]
    assert "9: " in line
    assert "refused.jsonl" in line
    assert sum(manifest()["refused"].values()) == 9


def test_a_query_is_kept_when_its_passage_is_among_the_first(tmp_path):
    """The first passage says `laks` three times in as many words as the second says it once."""
    file = tmp_path / "two.jsonl"
    texts = [
        "laks laks laks er det som hun ikke spiser uten mye salt",
        "laks er noe av det hun ikke spiser uten mye salt",
    ]
    texts += [text_of(animal) for animal in ANIMALS[:4]]
    file.write_text("".join(json.dumps({"_id": n, "text": text}) + "\n" for n, text in enumerate(texts)))

    def answer(prompt):
        return Reply(json.dumps({"keywords": ["laks"] if texts[1] in prompt else ["laks salt hun", "sjiraff"]}))

    with serving(answer) as llm:
        made(file, llm.url, found_in=1, keywords=2)
        refused = [(row["passage"], row["text"]) for row in rows_of("refused.jsonl", "models/queries/two")]
        assert ("1", "laks") in refused
        assert ("0", "sjiraff") in refused
        assert [row["text"] for row in rows_of("queries.jsonl", "models/queries/two")] == ["laks salt hun"]
        made(file, llm.url, found_in=2, keywords=2)
    assert {row["text"] for row in rows_of("queries.jsonl", "models/queries/two")} == {"laks salt hun", "laks"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"questions": ["a"], "keywords": ["b"]}', [("question", "a"), ("keywords", "b")]),
        ('Her er svaret:\n```json\n{"questions": ["a"]}\n```\nHåper det hjelper {smil}!', [("question", "a")]),
        ('<think>{"questions": ["draft"]}</think> {"questions": ["a"]}', [("question", "a")]),
        ('{"questions": ["a", ', None),
        ('{"questions": "a"}', None),
        ("[1, 2]", None),
        ("", None),
        ("{" * 5000, None),
    ],
)
def test_json_is_read_whatever_stands_around_it(text, expected):
    assert read_answer(text) == expected


def test_half_a_json_is_refused_once_and_not_asked_about_again(corpus):
    with serving(lambda prompt: Reply('{"questions": ["Hva er ')) as llm:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"no query passed the checks\. .*refused\.jsonl"):
                made(corpus, llm.url, passages=3)
    assert len(llm.prompts) == 3
    assert [row["reason"] for row in rows_of("refused.jsonl")] == [
        "no JSON with questions or keywords in the answer"
    ] * 3


def test_with_a_dense_model_a_query_is_kept_that_either_finds(corpus, tmp_path):
    dense = write_dense(tmp_path)
    answer = {"questions": ["kvantefysikk kurs"], "keywords": []}
    with serving(
        lambda prompt: Reply(json.dumps(answer if animal_of(prompt) == "ørret" else queries_about(animal_of(prompt))))
    ) as llm:
        made(corpus, llm.url, found_in=19)
        assert "kvantefysikk kurs" in reasons()
        made(corpus, llm.url, found_in=20, dense=str(dense))
    assert reasons() == {}
    assert manifest()["settings"]["dense"].endswith("dense@local")
    assert len(llm.prompts) == 20


# ------------------------------------------------------------------------------------------- the prompt
def test_a_prompt_of_ones_own_is_filled_once(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text('{language} {questions}/{keywords} {title}: {passage} {"questions": []}')
    passage = Passage(0, "p", "T", "om {title} og {questions}", "nn")
    filled = Prompt.read(file, 3, 2).fill(passage)
    assert filled == 'Norwegian nynorsk (norsk nynorsk) 3/2 T: om {title} og {questions} {"questions": []}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{passage} {questions} {keywords}", "placeholder {language} is missing"),
        ("{pasage} {language} {questions} {keywords}", "unknown placeholder {pasage}. Did you mean 'passage'?"),
    ],
)
def test_a_prompt_without_its_placeholders_is_one_line(tmp_path, text, said):
    file = tmp_path / "p.txt"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        Prompt.read(file, 1, 1)
    assert said in error.value.message


def test_the_projects_own_prompt_asks_for_the_language_and_the_numbers():
    filled = Prompt.read(None, 3, 2).fill(Passage(0, "p", "Tittel", "Teksten.", "sv"))
    for part in ("Swedish (svenska)", "3 questions", "2 keyword queries", "Tittel", "Teksten.", '{"questions": ["…"]'):
        assert part in filled


# ------------------------------------------------------------------------------------------- what goes wrong
def failing_first(times, reply):
    """Fails so often for each passage, then answers well."""
    seen = {}

    def answer(prompt):
        seen[prompt] = seen.get(prompt, 0) + 1
        return reply if seen[prompt] <= times else well(prompt)

    return answer


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=429, headers={"Retry-After": "0.01"}),
        Reply(status=500),
        Reply(status=503, body=b"[]"),
        Reply(content="x" * 500, cut=True),
        Reply(body=b'{"choices": [{"mess'),
        Reply(body=b'{"choices": []}'),
    ],
    ids=["429", "500", "503", "cut", "half", "empty"],
)
def test_what_may_pass_is_asked_again(corpus, reply):
    with serving(failing_first(2, reply)) as llm:
        lines = made(corpus, llm.url, passages=2)
    assert len(llm.prompts) == 6
    assert "2 passages answered now" in "\n".join(lines)


def test_a_late_answer_is_asked_for_again(corpus):
    with serving(failing_first(1, Reply(delay=0.4))) as llm:
        made(corpus, llm.url, passages=1, patience=Patience(timeout=0.1, retries=1, first=0.01))
    assert len(llm.prompts) == 2


def test_retry_after_is_respected_and_backoff_doubles():
    assert endpoint_module._retry_after({"retry-after": "7"}) == 7
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < endpoint_module._retry_after({"retry-after": later}) <= 30
    assert endpoint_module._retry_after({"retry-after": "soon"}) is None
    patience = Patience(first=1, longest=60)
    for retry, most in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
        waits = {patience.before(retry, None) for _ in range(20)}
        assert most / 2 <= min(waits) <= max(waits) <= most
        assert len(waits) > 1
    assert patience.before(0, 7) == 7
    assert patience.before(0, 10**6) == patience.longest_asked_for


def test_retry_after_is_waited_for(corpus):
    with serving(failing_first(1, Reply(status=429, headers={"Retry-After": "0.3"}))) as llm:
        made(corpus, llm.url, passages=1)
    first, second = llm.times
    assert second - first >= 0.3


def test_a_passage_that_still_fails_is_counted_and_the_run_goes_on(corpus):
    def answer(prompt):
        return {"rev": Reply(status=500), "ulv": Reply(status=400, body=b'{"error": {"message": "too long"}}')}.get(
            animal_of(prompt), well(prompt)
        )

    with serving(answer) as llm:
        lines = made(corpus, llm.url)
        assert len(llm.prompts) == 18 + (1 + QUICK.retries) + 1
        (line,) = [line for line in lines if line.startswith("asked")]
        assert "18 passages answered now; 2 failed" in line
        assert "1 HTTP 500" in line
        assert "1 HTTP 400: too long" in line
        llm.answer = well
        assert "2 passages answered now" in "\n".join(made(corpus, llm.url))
    assert len(llm.prompts) == 23 + 2


@pytest.mark.parametrize(
    ("status", "said"), [(401, "the key is not accepted"), (403, "the key may not"), (404, "no such model")]
)
def test_a_bad_key_or_model_stops_at_once_with_one_line(corpus, monkeypatch, status, said):
    monkeypatch.setenv("LLM_API_KEY", "sk-secret-1")
    body = json.dumps({"error": {"message": "Incorrect API key provided: sk-secret-1"}}).encode()
    with serving(lambda prompt: Reply(status=status, body=body)) as llm:
        arguments = ["queries", str(corpus), "--llm", llm.url, "--model", "m", "--concurrency", "2"]
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert len(llm.prompts) <= 3
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert said in line
    assert "sk-secret-1" not in result.output


def test_what_an_endpoint_says_is_told_without_the_key(corpus, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", "sk-secret-1")
    body = json.dumps({"error": "no credit for sk-secret-1"}).encode()
    with serving(lambda prompt: Reply(status=402, body=body) if animal_of(prompt) == "rev" else well(prompt)) as llm:
        said = "\n".join(made(corpus, llm.url))
    assert "HTTP 402" in said
    assert "sk-secret-1" not in said


def test_an_endpoint_that_is_down_stops_after_ten_passages(corpus):
    patience = Patience(retries=0)
    with pytest.raises(ConfigError, match=r"10 passages in a row without an answer \(no connection\)"):
        made(corpus, "http://127.0.0.1:9/v1", patience=patience)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pages.jsonl", "--llm", "localhost:11434", "--model", "m"], "write an address as http://localhost:11434/v1"),
        (["pages.jsonl", "--llm", "http://u:p@h/v1", "--model", "m"], "a key does not belong into the address"),
        (["nothing.jsonl", "--llm", "http://h/v1", "--model", "m"], "there is no file or folder nothing.jsonl"),
        (["", "--llm", "http://h/v1", "--model", "m"], "CORPUS is not given"),
        (["pages.jsonl", "--llm", "", "--model", "m"], "LLM is not given"),
        (["pages.jsonl", "--llm", "http://h/v1", "--model", "m", "--spend", "1"], "--spend needs --price-in"),
        (["pages.jsonl", "--llm", "http://h/v1", "--model", "m", "--language", "fi"], "--language fi: it is one of nb"),
        (["pages.jsonl", "--llm", "http://h/v1", "--model", "m", "--shortest", "99"], "no passage can be asked about"),
    ],
)
def test_a_mistake_is_one_line(corpus, arguments, said):
    result = CliRunner().invoke(main, ["queries", *arguments])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert said in line


# ------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("concurrency", [1, 3])
def test_never_more_requests_are_under_way_than_allowed(corpus, concurrency):
    def slowly(prompt):
        reply = well(prompt)
        reply.delay = 0.02
        return reply

    with serving(slowly) as llm:
        made(corpus, llm.url, concurrency=concurrency)
    assert llm.most == concurrency


def test_a_spending_limit_stops_asking_and_a_higher_one_goes_on(corpus):
    from trainer.queries.ask import Limits

    with serving(well) as llm:  # 100 and 20 tokens: 0.1 + 0.04 of money for a passage
        lines = made(corpus, llm.url, concurrency=1, limits=Limits(1000, 2000, spend=0.5))
        assert len(llm.prompts) == 4
        assert "Warning: 0.56 of --spend 0.50 is spent: 16 passages were not asked about" in "\n".join(lines)
        assert manifest()["cost"] == pytest.approx(0.56)
        made(corpus, llm.url, concurrency=1, limits=Limits(1000, 2000, spend=0.5))
        assert len(llm.prompts) == 4
        made(corpus, llm.url, concurrency=1, limits=Limits(tokens=600))
        assert len(llm.prompts) == 5
        made(corpus, llm.url)
    assert len(llm.prompts) == 20


def test_a_limit_cannot_be_kept_where_the_endpoint_does_not_count(corpus):
    from trainer.queries.ask import Limits

    with serving(lambda prompt: Reply(json.dumps(queries_about(animal_of(prompt))), usage=None)) as llm:
        with pytest.raises(ConfigError, match="does not say how many tokens"):
            made(corpus, llm.url, concurrency=1, limits=Limits(tokens=600))
        assert len(llm.prompts) == 1
        lines = made(corpus, llm.url, limits=Limits(1, 2))
    assert "did not count those of 20 answers" in "\n".join(lines)
    assert manifest()["cost"] is None


# ------------------------------------------------------------------------------------------- again
def test_the_same_command_asks_nothing_twice_and_writes_the_same(corpus, tmp_path):
    def files():
        folder = tmp_path / "models/queries/pages"
        return {file: file.read_bytes() for file in folder.rglob("*") if file.suffix in (".jsonl", ".tsv")}

    with serving(well) as llm:
        made(corpus, llm.url, concurrency=4)
        before = files()
        lines = made(corpus, llm.url, concurrency=2)
    assert len(llm.prompts) == 20
    assert files() == before
    assert len(before) == 6
    assert "20 passages are answered in" in "\n".join(lines)


def test_a_torn_last_line_is_asked_again_and_no_other(corpus, tmp_path):
    journal = tmp_path / "models/queries/pages" / JOURNAL
    with serving(well) as llm:
        made(corpus, llm.url)
        whole = journal.read_bytes()
        journal.write_bytes(whole[:-30])
        made(corpus, llm.url)
        assert len(llm.prompts) == 21
        assert len(journal.read_bytes().splitlines()) == 20
        lines = whole.splitlines(keepends=True)
        journal.write_bytes(b"".join([lines[0][:20] + b"\n", *lines[1:]]))
        with pytest.raises(ConfigError, match=r"answers\.jsonl:1: not an answer"):
            made(corpus, llm.url)


def test_another_model_or_prompt_asks_anew_and_does_not_mix(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("{language} {questions} {keywords} {passage}")
    with serving(well) as llm:
        made(corpus, llm.url, passages=3)
        lines = made(corpus, llm.url, passages=3, model="n")
        assert len(llm.prompts) == 6
        assert "3 answers there are to another prompt, model or passage, and are left out" in "\n".join(lines)
        assert manifest()["tokens"]["read"] == 300
        made(corpus, llm.url, passages=3, prompt=other)
    assert len(llm.prompts) == 9
    assert len(rows_of("queries.jsonl")) == 6


def test_two_runs_do_not_share_a_folder(corpus, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from trainer.runs.lock import only_one_in\n"
        "with only_one_in(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(60)"
    )
    folder = tmp_path / "models/queries/pages"
    command = [sys.executable, "-c", code, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match="is being worked in by process"):
                made(corpus, "http://127.0.0.1:9/v1")
        finally:
            holder.kill()


def test_ctrl_c_says_how_to_go_on_and_keeps_what_was_answered(corpus, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    lines = []
    with serving(well) as llm:
        monkeypatch.setattr("trainer.queries.ask.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_queries(Request(corpus, llm.url, "m", lines.append, questions=1, keywords=1, concurrency=3))
        assert lines[-1].startswith("stopped")
        assert "The same command goes on" in lines[-1]
        monkeypatch.undo()
        monkeypatch.chdir(corpus.parent)
        made(corpus, llm.url)
    assert len(llm.prompts) == 20


@pytest.mark.slow
def test_a_killed_run_goes_on_without_asking_twice(corpus, tmp_path):
    def slowly(prompt):
        reply = well(prompt)
        reply.delay = 0.2
        return reply

    journal = tmp_path / "models/queries/pages" / JOURNAL
    with serving(slowly) as llm:
        command = [sys.executable, "-m", "trainer", "queries", str(corpus), "--llm", llm.url, "--model", "m"]
        command += ["--questions", "1", "--keywords", "1", "--concurrency", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as run:
            while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
                time.sleep(0.02)
                assert run.poll() is None
            run.send_signal(signal.SIGKILL)
        kept = journal.read_bytes().count(b"\n")
        asked_before = len(llm.prompts)
        assert not (tmp_path / "models/queries/pages/queries.jsonl").exists()
        made(corpus, llm.url, concurrency=4)
    assert 5 <= kept <= asked_before <= kept + 1  # one was under way
    assert len(llm.prompts) - asked_before == 20 - kept
