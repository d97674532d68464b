"""make pin: branches become commits, code is shown and trusted once, and every command reads the answer."""

import hashlib
import shutil

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import constants

import trainer.cli
from tests.conftest import TINY, run_trainer
from tests.hub import Hub
from tests.standins import code_of, write_norbert
from trainer.config import ConfigError, find_config, load_config
from trainer.config.load import CONFIG_DIR, render
from trainer.config.pins import Pin, read_pins, render_pins
from trainer.models.build import fetch_base_model
from trainer.runs.run import Run

NORBERT = "ltg/norbert4-base"
ROWS = "  ours: {source: org/rows, revision: main, columns: {anchor: a, positive: b}}\n"
MODEL = f"model: {{base_model: {NORBERT}, revision: main, architecture: inference-free-splade}}\n"
REST = TINY.partition("training:\n")
CONFIG = MODEL + "".join(REST[1:])
WITH_ROWS = CONFIG.replace("datasets:\n", f"datasets:\n{ROWS}")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """NorBERT4 as it is published, by name."""
    folder = write_norbert(tmp_path_factory.mktemp("norbert4"), "norbert4")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture(scope="module")
def server():
    with Hub() as found:
        yield found


@pytest.fixture
def hub(tmp_path, monkeypatch, server, files):
    """A stand-in hub with NorBERT4 and a data set; and a fresh machine, with one config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.yaml").write_text(WITH_ROWS)
    server.repositories.clear()
    server.requests.clear()
    server.create(NORBERT).commit(files)
    server.create("org/rows").commit({"train.parquet": b"1"})
    for name, value in addresses(server, tmp_path / "cache").items():
        monkeypatch.setattr(constants, name, value)
    return server


def addresses(hub, cache):
    """Where the hub's client looks."""
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    return {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }


def pin(*options, answer=None):
    result = CliRunner().invoke(trainer.cli.main, ["pin", "ours.yaml", *options], input=answer)
    assert result.exit_code == 0, result.output
    return result.output


def fetched(*overrides):
    loaded = load_config(find_config("ours.yaml"), overrides)
    return fetch_base_model(loaded.config, loaded.pin_command)


def refusal(*overrides):
    with pytest.raises(ConfigError) as caught:
        fetched(*overrides)
    return caught.value.format_message()


def move(hub, line="import os  # new\n"):
    """A newer commit of NorBERT4, with a line more in its code. Returns the commit."""
    repository = hub.repositories[NORBERT]
    code = repository.files["modeling_gptbert.py"] + line.encode()
    return repository.commit(repository.files | {"modeling_gptbert.py": code, f"note-{len(line)}.txt": b""})


def code_hashes(files):
    return {name: hashlib.sha256(files[name]).hexdigest() for name in code_of("norbert4")}


# ------------------------------------------------------------------------------------------- the one word
def test_training_stops_with_the_word_to_say_and_goes_on_once_it_was_said(hub, files):
    assert refusal() == (
        f"model.base_model: {NORBERT} comes with Python code of its own, which is not trusted yet. To see it and decide, "
        "run: make pin CONFIG=ours.yaml"
    )
    assert "trust     given, for this commit alone" in pin("--trust")
    base, head = fetched(), hub.repositories[NORBERT].head
    assert base.commit == head
    assert base.code["modeling_gptbert.py"][0] == "soft cap"
    move(hub)
    assert fetched().commit == head


def test_the_word_names_a_shipped_config_and_the_overrides_that_say_which_model(tmp_path):
    assert load_config(CONFIG_DIR / "training_config_splade.yaml").pin_command == "make pin CONFIG=splade"
    overrides = ["model.base_model=org/other", "model.revision=v1", "training.max_steps=2"]
    assert load_config(CONFIG_DIR / "training_config_splade.yaml", overrides).pin_command == (
        "make pin CONFIG=splade SET='model.base_model=org/other model.revision=v1'"
    )
    file = tmp_path / "a b.yaml"
    file.write_text(CONFIG)
    assert load_config(file).pin_command == f"make pin CONFIG='{file}'"


def test_pin_prints_every_commit_the_code_with_its_hashes_and_what_will_be_mended(hub, files):
    said = pin()
    rows = hub.repositories["org/rows"]
    assert f"model     {NORBERT} main → {hub.repositories[NORBERT].head}\n" in said
    assert f"data      org/rows main → {rows.head}\n" in said
    for name, digest in code_hashes(files).items():
        lines = files[name].count(b"\n")
        assert f"code      {name}: {lines} lines, SHA-256 {digest}\n" in said
    assert "            to be mended: soft cap, BOS logit, " in said
    assert f"read      {hub.url}/{NORBERT}/tree/{hub.repositories[NORBERT].head}\n" in said
    assert "lock      pins.yaml: 2 new, 0 changed, 0 as before" in said
    assert "30 * torch.sigmoid" not in said
    assert "\n-        " in pin("--diff")
    assert "30 * torch.sigmoid" in pin("--code")


def test_weights_are_not_downloaded_to_look_at_code(hub):
    pin("--trust")
    assert hub.sent("GET", r"resolve/.*\.py$") == 2
    assert hub.sent("GET", r"resolve/.*\.safetensors$") == 0


# ------------------------------------------------------------------------------------------- the lock file
def test_the_lock_file_is_plain_yaml_and_stays_as_it_is_while_nothing_moves(hub, tmp_path, files):
    pin("--trust")
    text = (tmp_path / "pins.yaml").read_text()
    content = yaml.safe_load(text)
    entry = content["models"][NORBERT]["main"]
    assert entry["commit"] == hub.repositories[NORBERT].head
    assert entry["trusted"] is True
    assert entry["code"] == code_hashes(files)
    assert content["datasets"]["org/rows"]["main"]["commit"] == hub.repositories["org/rows"].head
    assert "lock      pins.yaml: nothing changed" in pin()
    assert (tmp_path / "pins.yaml").read_text() == text


@pytest.mark.parametrize("revision", ["main", "1.0", "refs/convert/parquet", "0x1", "null", "å"])
def test_a_lock_file_reads_back_as_it_was_written(tmp_path, revision):
    digits = Pin(commit="1" * 40, date="2026-01-02", code={"a b.py": "2" * 64, "é: #.py": "3" * 64}, trusted=True)
    power = Pin(commit="1" * 20 + "e" + "1" * 19, date="2026-01-02")
    pins = {("dataset", "org/a", revision): power, ("model", "org/b", revision): digits, ("model", "org/a", "v"): power}
    (tmp_path / "pins.yaml").write_text(render_pins(pins))
    assert read_pins(tmp_path).pins == pins
    assert render_pins(dict(reversed(pins.items()))) == render_pins(pins)


@pytest.mark.parametrize(
    "text, line",
    [
        ("models: {]", "pins.yaml:1: not valid YAML: "),
        (
            "models:\n  org/a:\n    main: {commit: 12, date: x}\n",
            "pins.yaml:3: 'models.org/a.main.commit': input should",
        ),
        ("models:\n  org/a:\n    main: {date: x}\n", "pins.yaml:3: 'models.org/a.main.commit': field required"),
        ("modles: {}\n", "pins.yaml:1: 'modles': extra inputs are not permitted"),
    ],
)
def test_a_malformed_lock_file_is_one_line(tmp_path, monkeypatch, text, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.yaml").write_text(CONFIG)
    (tmp_path / "pins.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(find_config("ours.yaml"))
    assert caught.value.format_message().startswith(line)
    assert caught.value.format_message().endswith(". Put it right, or remove the file and pin anew")


def test_the_pins_of_other_configs_stay(hub, tmp_path):
    other = Pin(commit="1" * 40, date="2026-01-02")
    (tmp_path / "pins.yaml").write_text(render_pins({("model", "org/other", "main"): other}))
    pin("--trust")
    assert read_pins(tmp_path).pins["model", "org/other", "main"] == other
    assert len(read_pins(tmp_path).pins) == 3


def test_nothing_is_written_when_one_source_cannot_be_had(hub, tmp_path):
    del hub.repositories["org/rows"]
    result = CliRunner().invoke(trainer.cli.main, ["pin", "ours.yaml", "--trust"])
    assert result.exit_code == 2
    assert "datasets.ours.source: the hub has no dataset repository org/rows" in result.output
    assert not (tmp_path / "pins.yaml").exists()


# ------------------------------------------------------------------------------------------- what a config becomes
def test_show_names_the_lock_file_as_the_origin_and_its_output_is_a_config(hub, tmp_path):
    pin("--trust")
    lines = (tmp_path / "pins.yaml").read_text().splitlines()
    loaded = load_config(find_config("ours.yaml"))
    shown = render(loaded)
    head = hub.repositories[NORBERT].head
    for key, written in (
        (f"revision: {head}", f"commit: {head}"),
        ("trust_remote_code: true", "trusted: true"),
        (f"revision: {hub.repositories['org/rows'].head}", f"commit: {hub.repositories['org/rows'].head}"),
    ):
        number = 1 + [line.strip() for line in lines].index(written)
        (line,) = [line for line in shown.splitlines() if key in line]
        assert line.endswith(f"# pins.yaml:{number}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/shown.yaml").write_text(shown)
    assert load_config(tmp_path / "elsewhere/shown.yaml").config == loaded.config


def test_trust_in_the_lock_file_is_for_that_model_and_that_commit_alone(hub, files):
    pin("--trust")
    assert load_config(find_config("ours.yaml")).config.model.trust_remote_code
    for override in (f"model.revision={move(hub)}", "model.revision=v2", "model.base_model=org/other"):
        assert not load_config(find_config("ours.yaml"), [override]).config.model.trust_remote_code
    assert "not trusted yet" in refusal(f"model.revision={hub.repositories[NORBERT].head}")
    assert "not trusted yet" in refusal("model.trust_remote_code=false")


def test_a_config_that_trusts_a_branch_gets_its_commit_only_once_the_code_is_trusted(hub, tmp_path):
    (tmp_path / "ours.yaml").write_text(CONFIG.replace("revision: main", "revision: main, trust_remote_code: true"))
    asked = (
        r"ours.yaml:1: 'model.trust_remote_code' .* must be a full commit .* not 'main'. Write one, or run: make pin"
    )
    with pytest.raises(ConfigError, match=asked):
        load_config(find_config("ours.yaml"))
    assert "trust     not given. To give it: make pin CONFIG=ours.yaml TRUST=1" in pin()
    with pytest.raises(ConfigError, match=asked):
        load_config(find_config("ours.yaml"))
    pin("--trust")
    assert fetched().commit == hub.repositories[NORBERT].head


def test_a_commit_in_the_config_is_pinned_by_the_hashes_of_its_code(hub, tmp_path, files):
    head = hub.repositories[NORBERT].head
    trusting = CONFIG.replace("revision: main", f"revision: {head}, trust_remote_code: true")
    (tmp_path / "ours.yaml").write_text(trusting)
    said = pin()
    assert f"model     {NORBERT} at {head}, as the config says\n" in said
    assert "trust     ours.yaml:1 says true\n" in said
    assert load_config(find_config("ours.yaml")).config.model.code_sha256 == code_hashes(files)
    assert fetched().commit == head
    (tmp_path / "ours.yaml").write_text(trusting.replace(", trust_remote_code: true", ""))
    assert "not trusted yet" in refusal()
    pin("--trust")
    assert fetched().commit == head


def test_a_config_that_says_no_goes_before_the_answer(hub, tmp_path):
    (tmp_path / "ours.yaml").write_text(CONFIG.replace("revision: main", "revision: main, trust_remote_code: false"))
    assert "trust     ours.yaml:1 says false, which goes before pins.yaml. Remove it to decide here" in pin("--trust")
    assert "not trusted yet" in refusal()


def test_a_model_without_code_is_pinned_without_a_question(hub, files):
    bare = {name: data for name, data in files.items() if not name.endswith(".py")}
    bare["config.json"] = b'{"model_type": "bert"}'
    head = hub.repositories[NORBERT].commit(bare)
    said = pin("--trust")
    assert "code      none of its own\n" in said
    assert "trust " not in said
    model = load_config(find_config("ours.yaml")).config.model
    assert (model.revision, model.trust_remote_code, model.code_sha256) == (head, False, None)


def test_a_lock_file_beside_a_config_is_not_taken_for_another_config(hub, tmp_path):
    pin("--trust")
    shutil.copy(tmp_path / "ours.yaml", tmp_path / "training_config_pins.yaml")
    assert load_config(tmp_path / "training_config_pins.yaml").name == "pins"


# ------------------------------------------------------------------------------------------- the answer
def test_without_a_terminal_and_without_trust_the_commits_are_pinned_and_the_code_is_not_trusted(hub, tmp_path):
    assert "trust     not given. To give it: make pin CONFIG=ours.yaml TRUST=1" in pin(answer="y\n")
    found = read_pins(tmp_path).pins["model", NORBERT, "main"]
    assert (found.commit, found.trusted) == (hub.repositories[NORBERT].head, False)
    assert "not trusted yet. To see it and decide, run: make pin CONFIG=ours.yaml" in refusal()
    assert "lock      pins.yaml: 0 new, 1 changed, 1 as before" in pin("--trust")
    assert fetched().code


@pytest.mark.parametrize(("answer", "trusted"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_the_user_is_asked_once(hub, tmp_path, monkeypatch, answer, trusted):
    monkeypatch.setattr(trainer.cli, "has_terminal", lambda: True)
    assert pin(answer=answer).count("Trust this code? [y/N]") == 1
    assert read_pins(tmp_path).pins["model", NORBERT, "main"].trusted is trusted
    assert pin(answer="n\n").count("Trust this code?") == (not trusted)


# ------------------------------------------------------------------------------------------- what moves
def test_a_branch_that_moved_is_shown_as_a_diff_and_asked_about_again(hub, tmp_path):
    pin("--trust")
    old, new = hub.repositories[NORBERT].head, move(hub, "import os  # \x1b[2J new\n")
    rows = hub.repositories["org/rows"].head, hub.repositories["org/rows"].commit({"train.parquet": b"2", "b": b""})
    said = pin()
    assert f"model     {NORBERT} main {old} → {new}\n" in said
    assert f"data      org/rows main {rows[0]} → {rows[1]}\n" in said
    assert f"+++ modeling_gptbert.py at {new[:12]}\n" in said
    assert "\n+import os  # \\x1b[2J new\n" in said  # no terminal obeys it
    assert "+++ configuration_gptbert.py" not in said
    assert f"          the pin stays as it was: {old}\n" in said
    assert fetched().commit == old
    assert read_pins(tmp_path).pins["dataset", "org/rows", "main"].commit == rows[1]
    assert "trust     given" in pin("--trust")
    assert fetched().commit == new


def test_a_branch_that_moved_without_its_code_is_asked_about_too(hub):
    pin("--trust")
    repository = hub.repositories[NORBERT]
    repository.commit(repository.files | {"more.txt": b""})
    said = pin()
    assert "changed   no file of code\n" in said
    assert "trust     not given" in said


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_other_code_behind_the_same_commit_is_refused_and_pin_says_so(hub, tmp_path, monkeypatch, change):
    pin("--trust")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))  # another machine, and a mirror
    commit, there = hub.repositories[NORBERT].revisions[-1]
    name = (
        "modeling_gptbert.py" if change == "edited" else "more.py" if change == "added" else "configuration_gptbert.py"
    )
    other = {key: data for key, data in there.items() if (change, key) != ("removed", name)}
    if change != "removed":
        other[name] = there.get(name, b"") + b"import os\n"
    hub.repositories[NORBERT].revisions[-1] = (commit, other)
    message = refusal()
    if change == "removed":
        assert "lacks its code, configuration_gptbert.py" in message
        return
    assert (
        f"{name} is not the code that was pinned: its SHA-256 is {hashlib.sha256(other[name]).hexdigest()[:16]}"
        in message
    )
    assert message.endswith("To see the difference and decide, run: make pin CONFIG=ours.yaml")
    said = pin()
    assert f"changed   {name}: SHA-256 " in said
    assert "but a commit cannot change" in said
    assert f"the pin stays as it was: {commit}" in said
    assert "is not the code that was pinned" in refusal()


def test_code_that_cannot_be_read_or_converted_is_one_line_and_nothing_is_pinned(hub, tmp_path):
    repository = hub.repositories[NORBERT]
    for code, line in (
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"# coding: utf-7\n# +AAo-x = 1\n", "is not text in UTF-8"),
        (b"x = 1\n", "is not a revision that can be converted"),
    ):
        repository.commit(repository.files | {"modeling_gptbert.py": code, line: b""})
        result = CliRunner().invoke(trainer.cli.main, ["pin", "ours.yaml", "--trust"])
        assert result.exit_code == 2
        assert line in result.output.splitlines()[-1]
        assert not (tmp_path / "pins.yaml").exists()


# ------------------------------------------------------------------------------------------- runs
def test_a_run_that_was_pinned_after_its_start_is_resumed_at_the_commit_it_began_with(hub, tmp_path):
    head = hub.repositories[NORBERT].head
    for began, allowed in ((head, True), ("f" * 40, False)):
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
        (tmp_path / "pins.yaml").unlink(missing_ok=True)
        run = Run.create(load_config(find_config("ours.yaml")))
        run.update(base_model={"source": NORBERT, "commit": began})
        pin()
        said = []
        if allowed:
            run.go_on_with(load_config(find_config("ours.yaml")), [], said.append)
            assert f"changed   model.revision: main → {head}" in said
        else:
            with pytest.raises(
                ConfigError, match=r"pins.yaml:\d+: 'model.revision' was main .* A resume cannot change it"
            ):
                run.go_on_with(load_config(find_config("ours.yaml")), [], said.append)


@pytest.mark.slow
def test_one_word_is_enough_to_train_on_a_fresh_machine(hub, tmp_path):
    (tmp_path / "ours.yaml").write_text(CONFIG)
    code = "from huggingface_hub import constants\n"
    code += "".join(f"constants.{name} = {value!r}\n" for name, value in addresses(hub, tmp_path / "cache").items())
    stopped = run_trainer(tmp_path, "train", "ours.yaml", code=code)
    assert stopped.returncode == 2
    assert stopped.stderr.strip().endswith("run: make pin CONFIG=ours.yaml")
    assert run_trainer(tmp_path, "pin", "ours.yaml", "--trust", code=code).returncode == 0
    trained = run_trainer(tmp_path, "train", "ours.yaml", "--set", "training.max_steps=2", code=code)
    assert trained.returncode == 0, trained.stderr
    assert f"from {NORBERT} at {hub.repositories[NORBERT].head}" in trained.stdout
    resumed = load_config(tmp_path / "models/ours/config.yaml").config.model
    assert (resumed.revision, resumed.trust_remote_code) == (hub.repositories[NORBERT].head, True)
