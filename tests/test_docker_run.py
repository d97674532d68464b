"""What docker/run decides and says, with a docker command that only pretends: no engine is needed here."""

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_shipped_configs import NAMES
from trainer.runs.run import lock_hash

# All that docker/run calls besides docker, nvidia-smi and sudo.
TOOLS = ("bash", "sh", "env", "make", "uname", "id", "git", "sed", "awk", "cut", "cat", "df", "ls", "mkdir", "basename")
TOOLS += ("dirname", "sha256sum", "seq")

PRETEND = """#!/bin/sh
case "$1 $2" in
  "version "*) {version} ;;
  "compose version"|"buildx version") exit 0 ;;
  "image inspect") echo sha256:0123 ;;
  "buildx build") exit {build} ;;
  "info "*) echo / ;;
  "compose "*)
    case "$*" in
      *" show "*) printf 'hardware:\\n  device: {device}\\n' ;;
      *) ( printf '%s\\037' docker "$@"; echo ) >> ran ;;
    esac ;;
  "run --rm") exit {gpus} ;;
  "wait "*) echo {ended} ;;
  "logs "*|"rm "*|"image prune") ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A checkout's files that docker/run reads, a virtual environment that is this one, and a PATH of our own."""
    for name in ("docker", "compose.yaml", "Makefile", "configs", "trainer"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".ok").touch()
    (tmp_path / "bin").mkdir()
    return tmp_path


def pretend(project, version="echo 20.10", device="cpu", build=0, gpus=None, ended=0):
    """A docker command; `gpus` is how a container with the GPUs ends, None for a machine without one."""
    command = project / "bin" / "docker"
    command.write_text(PRETEND.format(version=version, device=device, build=build, gpus=gpus or 0, ended=ended))
    command.chmod(0o755)
    write_df(project, free_kib=10**8)
    if gpus is not None:
        driver = project / "bin" / "nvidia-smi"
        driver.write_text("#!/bin/sh\n")
        driver.chmod(0o755)


def write_df(project, free_kib):
    """A df whose disk has so much space, whatever this machine's has."""
    df = project / "bin" / "df"
    df.write_text(f"#!/bin/sh\necho header\necho /dev/x 100 99 {free_kib} 100% /\n")
    df.chmod(0o755)


def ran(project):
    """The compose commands that were run, and forget them."""
    return [" ".join(words) for words in words_of(project)]


def words_of(project):
    """The same, each as the words it was called with."""
    file = project / "ran"
    lines = file.read_text().splitlines()
    file.unlink()
    return [line.split("\x1f")[:-1] for line in lines]


def run(project, *arguments, user=None, **environment):
    # without the real docker and nvidia-smi: only what a shell script needs
    tools = project / "tools"
    tools.mkdir(exist_ok=True)
    for tool in TOOLS:
        if not (tools / tool).exists() and shutil.which(tool):
            (tools / tool).symlink_to(shutil.which(tool))
    command = [*(["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []), "docker/run"]
    return subprocess.run(
        [*command, *arguments],
        cwd=project,
        env={"PATH": f"{project}/bin:{tools}", "HOME": str(project), "CONFIG": "quickstart"} | environment,
        executable=shutil.which(command[0]) if user else None,
        capture_output=True,
        text=True,
        timeout=60,
    )


def one_line_of(result):
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert "unbound variable" not in result.stderr
    return errors[0]


# ------------------------------------------------------------------------------------------- where
def test_without_an_engine_the_host_is_used_and_said(project):
    result = run(project, "trainer", "show", "quickstart", "--plain")
    assert "runtime   host (auto: Docker is not installed)" in result.stderr
    assert yaml.safe_load(result.stdout)["hardware"]["device"] == "cpu"


def test_with_an_engine_a_container_is_used_and_said(project):
    pretend(project)
    result = run(project, "trainer", "check", "quickstart")
    assert "runtime   docker (auto: an engine answers; RUNTIME=host uses .venv)" in result.stderr
    (command,) = ran(project)
    assert command.endswith("--entrypoint python -m trainer train check quickstart")


def test_runtime_host_leaves_an_engine_alone(project):
    pretend(project)
    result = run(project, "trainer", "show", "quickstart", "--plain", RUNTIME="host")
    assert "runtime   host (RUNTIME says so)" in result.stderr
    assert yaml.safe_load(result.stdout)


def test_runtime_docker_without_an_engine_is_one_line(project):
    assert "RUNTIME=docker, but Docker is not installed" in one_line_of(
        run(project, "trainer", "check", RUNTIME="docker")
    )


def test_an_engine_that_does_not_answer_is_one_line(project):
    pretend(project, version='echo "Cannot connect to the Docker daemon" >&2; exit 1')
    assert "no Docker engine answers: start it" in one_line_of(run(project, "trainer", "check", RUNTIME="docker"))


def test_an_engine_without_permission_is_one_line_with_the_remedy(project):
    pretend(project, version='echo "permission denied while trying to connect to the socket" >&2; exit 1')
    said = one_line_of(run(project, "trainer", "check", RUNTIME="docker"))
    assert "sudo usermod -aG docker" in said


def test_an_unknown_runtime_is_one_line(project):
    assert "RUNTIME is auto, docker or host, not podman" in one_line_of(
        run(project, "trainer", "check", RUNTIME="podman")
    )


# ------------------------------------------------------------------------------------------- what
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_the_cpu_image_trains_configs_of_the_cpu(project, device):
    pretend(project, device=device)
    result = run(project, "trainer", "train", "quickstart", "--set", "training.seed=1", PROCS="2")
    assert f"image     nordsparse:cpu (hardware.device is {device})" in result.stderr
    assert result.returncode == 0
    (command,) = ran(project)
    assert "compose.cuda.yaml" not in command
    assert command.endswith(" train quickstart --set training.seed=1 --processes 2")


def test_the_cuda_image_trains_configs_of_the_gpu(project):
    pretend(project, device="cuda", gpus=0)
    result = run(
        project, "trainer", "train", "splade_h100", CONFIG="splade_h100", PROCS="8", NODES="2", RENDEZVOUS="a:1"
    )
    assert "image     nordsparse:cuda (hardware.device is cuda)" in result.stderr
    (command,) = ran(project)
    assert "--file docker/compose.machines.yaml --file docker/compose.cuda.yaml" in command
    assert command.endswith(" train splade_h100 --processes 8 --nodes 2 --rendezvous a:1")


@pytest.mark.parametrize("arguments", [("trainer", "train", "splade_h100"), ("evaluate", "run", "quickstart")])
def test_a_driver_without_the_container_toolkit_is_one_line(project, arguments):
    pretend(project, device="cuda", gpus=125)
    assert "install the NVIDIA Container Toolkit" in one_line_of(run(project, *arguments, CONFIG="splade_h100"))
    assert not (project / "ran").exists()


def test_a_machine_with_a_gpu_shows_and_trains_configs_of_the_cpu_without_it(project):
    pretend(project, device="cpu", gpus=125)
    run(project, "trainer", "train", "quickstart")
    run(project, "trainer", "check", "quickstart")
    assert not [command for command in ran(project) if "compose.cuda.yaml" in command]


def test_several_nodes_on_one_machine_do_not_share_its_gpus(project):
    pretend(project, device="cuda", gpus=0)
    said = one_line_of(run(project, "trainer", "train", "splade_h100", CONFIG="splade_h100", NODES="2"))
    assert "Say PROCS=number of GPUs" in said


def test_training_ends_as_its_container(project):
    pretend(project, ended=143)
    assert run(project, "trainer", "train", "quickstart").returncode == 143
    pretend(project, ended=1)
    assert run(project, "trainer", "train", "quickstart", NODES="2").returncode == 1


def test_two_nodes_meet_at_the_first(project):
    pretend(project)
    run(project, "trainer", "train", "quickstart", NODES="2", COMPOSE_PROJECT_NAME="p")
    first, second = ran(project)
    assert "--name p-node-1 " in first
    assert "--name p-node-2 " in second
    assert first.endswith("--nodes 2 --rendezvous p-node-1:29500")


def test_named_paths_outside_the_mounted_folders_go_into_the_container_read_only(project):
    pretend(project)
    (project / "elsewhere").mkdir()
    for file in ("mine.yaml", "corpus.jsonl"):
        (project / "elsewhere" / file).touch()
    run(project, "trainer", "train", "elsewhere/mine.yaml", CONFIG="elsewhere/mine.yaml")
    run(project, "evaluate", "run", "quickstart", "--tasks", f"norwegian {project}/elsewhere:no configs")
    training, evaluation = ran(project)
    assert f"--volume {project}/elsewhere:/app/elsewhere:ro train elsewhere/mine.yaml" in training
    assert f"--volume {project}/elsewhere:{project}/elsewhere:ro evaluate run" in evaluation


def test_pin_alone_may_write_beside_the_config(project):
    pretend(project)
    (project / "elsewhere").mkdir()
    (project / "elsewhere/mine.yaml").touch()
    run(project, "trainer", "pin", "elsewhere/mine.yaml", "--trust")
    run(project, "trainer", "check", "elsewhere/mine.yaml")
    pin, check = ran(project)
    assert "--file compose.yaml --file docker/compose.pin.yaml " in pin
    assert f"--volume {project}/elsewhere:/app/elsewhere:rw " in pin
    assert pin.endswith("train pin elsewhere/mine.yaml --trust")
    assert "compose.pin.yaml" not in check
    assert ":rw" not in check
    services = yaml.safe_load((ROOT / "docker/compose.pin.yaml").read_text())["services"]
    (configs,) = services["train"]["volumes"]
    everywhere = yaml.safe_load((ROOT / "compose.yaml").read_text())["x-job"]["volumes"]
    assert configs | {"read_only": True} == everywhere[0]  # compose lays one over the other by its target


def test_output_that_would_be_gone_with_the_container_is_refused(project):
    pretend(project)
    said = one_line_of(run(project, "trainer", "export", "quickstart", "--to", "lucene", "--output", "/tmp/here"))
    assert "a container writes to models/ alone" in said
    run(project, "trainer", "export", "quickstart", "--to", "lucene", "--output", "models/here")
    assert len(ran(project)) == 1


def test_a_config_of_the_gpu_without_one_is_one_line(project):
    pretend(project, device="cuda")
    said = one_line_of(run(project, "trainer", "train", "splade_h100", CONFIG="splade_h100"))
    assert "CONFIG=splade_h100 needs an NVIDIA GPU" in said
    assert 'SET="hardware.device=cpu' in said


def test_a_config_of_the_mac_is_sent_to_the_host(project):
    pretend(project, device="mps")
    assert "Set RUNTIME=host" in one_line_of(run(project, "trainer", "train", "splade", CONFIG="splade"))


def test_the_key_of_an_endpoint_goes_by_its_name_into_the_container_of_queries_alone(project):
    pretend(project)
    command = ("trainer", "queries", "data/pages.jsonl", "--llm", "https://models.example/v1", "--model", "m")
    run(project, *command, LLM_API_KEY="sk-secret")
    run(project, *command)
    run(project, "trainer", "train", "quickstart", LLM_API_KEY="sk-secret")
    queries, without, training = ran(project)
    assert " --env LLM_API_KEY --entrypoint python -m trainer train queries data/pages.jsonl" in queries
    assert "OPENAI_API_KEY" not in queries
    assert "API_KEY" not in without + training
    assert "sk-secret" not in queries + training
    assert "compose.machines.yaml" not in queries


@pytest.mark.parametrize("host", ["localhost:11434", "localhost", "127.0.0.1:8000", "[::1]:80"])
def test_an_endpoint_of_this_machine_is_seen_from_the_container(project, host):
    pretend(project)
    run(project, "trainer", "queries", "data/pages.jsonl", "--llm", f"http://{host}/v1", "--model", "m")
    (command,) = ran(project)
    assert "--file docker/compose.machines.yaml run " in command


def test_each_command_runs_in_its_service(project):
    pretend(project)
    for arguments, ends in {
        ("evaluate", "run", "quickstart"): "evaluate run quickstart",
        ("trainer", "publish", "quickstart", "--dry-run"): "publish quickstart --dry-run",
    }.items():
        run(project, *arguments)
        assert ran(project)[0].endswith(ends)


def test_prove_runs_where_a_training_may_take_its_time_to_stop_and_writes_the_page(project):
    pretend(project, gpus=0)
    result = run(project, "evaluate", "prove", "--only", "splade_h100", COMPOSE_PROJECT_NAME="p")
    assert result.returncode == 0, result.stderr
    (command,) = ran(project)
    assert "--file docker/compose.cuda.yaml run --detach --name p-train-" in command
    assert command.endswith(
        f"--volume {project}/docs:/app/docs --entrypoint python -m evaluate train prove --only splade_h100"
    )


def test_prove_with_several_processes_is_one_line(project):
    pretend(project)
    assert "make prove uses one GPU" in one_line_of(run(project, "evaluate", "prove", PROCS="8"))


def made(project, *arguments):
    """The words that a make target hands to docker/run."""
    stub = project / "bin" / "words"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    stub.chmod(0o755)
    return subprocess.run(
        ["make", f"RUN={stub}", *arguments], cwd=project, capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]


def test_make_maps_every_config_to_docker_run(project):
    for name in NAMES:
        assert made(project, "train", f"CONFIG={name}") == ["trainer", "train", name]
        assert made(project, "resume", f"CONFIG={name}") == ["trainer", "train", name, "--resume"]


@pytest.mark.skipif(not os.path.exists("/proc/self/comm"), reason="only Linux tells a process's name there")
def test_no_shell_stands_between_make_and_docker_run(project):
    """make hands on a signal, as of a scheduler that stops a job, to its own child alone."""
    (project / "docker" / "run").write_text("#!/bin/sh\ncat /proc/$PPID/comm\n")
    targets = ("train", "resume", "check", "show", "eval", "bm25")
    for target in (*targets, "prove", "publish", "export", "queries", "tensorboard", "images"):
        command = ["make", target, "SET=a=1", "TASKS=b", "CORPUS=c"]
        assert subprocess.run(command, cwd=project, capture_output=True, text=True).stdout == "make\n", target


# ------------------------------------------------------------------------------------------- quoting
ODD = 'Ola\'s data, "new" [a b]/c;d &e'


@pytest.mark.parametrize("target,command", [("train", "train"), ("check", "check"), ("show", "show")])
def test_make_hands_on_set_as_it_was_typed(project, target, command):
    text = f"model_card.model_name='x  y' datasets.x.mine.range=[10, 100] evaluation.search={ODD}"
    words = made(project, target, f"CONFIG={ODD}.yaml", f"SET={text}")
    assert words == ["trainer", command, f"{ODD}.yaml", "--set", text]


def test_make_hands_on_every_path_as_one_word(project):
    paths = {name: f"{ODD} {name}" for name in ("TASKS", "BASELINE", "DENSE", "CORPUS", "QUERIES", "OUTPUT", "MODEL")}

    def options(*names):
        return [word for name in names for word in (f"--{name.lower()}", paths[name])]

    given = [f"{name}={path}" for name, path in paths.items()]
    words = made(project, "eval", *given)
    assert words == [
        "evaluate",
        "run",
        *(w for n in ("MODEL", "TASKS", "BASELINE", "DENSE") for w in (f"--{n.lower()}", paths[n])),
    ]
    words = made(project, "export", "CONFIG=c", "TO=lucene", *given)
    assert words[2:5] == ["c", "--to", "lucene"]
    assert words[5:] == options("CORPUS", "QUERIES", "OUTPUT")
    words = made(project, "queries", *given, f"LLM={ODD}", "ARGS=--passages 5")
    assert words[:3] == ["trainer", "queries", paths["CORPUS"]]
    assert words[3:] == ["--llm", ODD, *options("MODEL", "OUTPUT"), "--passages", "5"]
    assert made(project, "bm25", *given) == ["evaluate", "bm25", "--tasks", paths["TASKS"]]
    assert made(project, "publish", "CONFIG=c", f"REPO={ODD}")[2:] == ["c", "--repo", ODD]
    assert made(project, "prove", f"ONLY={ODD}", f"TASKS={ODD}", f"SET={ODD}", "DRY_RUN=1") == [
        *("evaluate", "prove", "--only", ODD, "--tasks", ODD, "--set", ODD, "--dry-run")
    ]
    assert made(project, "prove", "DRY_RUN=0") == ["evaluate", "prove"]


def test_the_makefile_uses_nothing_that_make_3_81_lacks():
    text = (ROOT / "Makefile").read_text()
    newer = r"\$\((file|guile|let|intcmp) |^\.(ONESHELL|RECIPEPREFIX|EXTRA_PREREQS)|::=|!=|^(undefine|private|load)\b"
    code = "\n".join(line for line in text.splitlines() if not line.startswith(("\t", "#")))
    assert re.findall(newer, code, re.MULTILINE) == []
    assert re.findall(newer, "X != date\n.ONESHELL:\nY ::= 1\n$(file <x)", re.MULTILINE)


def test_a_config_is_read_with_every_value_of_set_on_the_host(project):
    text = 'model_card.model_name="Our \'model\'" hardware.device=cpu model_card.tags=[a b, "c=d e.f=g"]'
    result = subprocess.run(
        ["make", "-s", "show", "RUNTIME=host", f"SET={text}"],
        cwd=project, env=os.environ | {"PYTHONPATH": str(project)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = yaml.safe_load(result.stdout)
    assert found["model_card"]["model_name"] == "Our 'model'"
    assert found["model_card"]["tags"] == ["a b", "c=d e.f=g"]
    assert found["hardware"]["device"] == "cpu"


def test_set_reaches_a_container_as_one_word(project):
    pretend(project)
    text = "training.max_steps=50 model_card.tags=[10, 100] model_card.model_name='a  b'"
    run(project, "trainer", "train", "quickstart", "--set", text, SET=text)
    (command,) = words_of(project)
    assert command[-3:] == ["quickstart", "--set", text]


def test_paths_with_blanks_commas_and_apostrophes_go_into_the_container(project):
    pretend(project)
    for name in ("our search", "Ola's set, new", "plain"):
        (project / "else where" / name).mkdir(parents=True)
    (project / "else where" / "my corpus.jsonl").touch()
    outside = f"{project}/else where/Ola's set, new"
    run(
        project,
        "evaluate",
        "run",
        "quickstart",
        "--tasks",
        f"norwegian else where/our search:no,{outside}:da  else where/plain",
    )
    run(project, "trainer", "export", "quickstart", "--corpus", "else where/my corpus.jsonl")
    evaluation, export = words_of(project)
    mounts = [word for before, word in itertools.pairwise(evaluation) if before == "--volume"]
    assert mounts == [
        f"{project}/else where/our search:/app/else where/our search:ro",
        f"{outside}:{outside}:ro",
        f"{project}/else where/plain:/app/else where/plain:ro",
    ]
    assert f"{project}/else where/my corpus.jsonl:/app/else where/my corpus.jsonl:ro" in export
    assert export[-2:] == ["--corpus", "else where/my corpus.jsonl"]


def test_a_pattern_in_an_argument_is_no_list_of_files_and_the_command_is_no_folder(project):
    pretend(project)
    (project / "one").mkdir()
    run(project, "trainer", "check", "quickstart", "--set", "datasets.a.source=*")
    run(project, "evaluate", "run", "quickstart", "--tasks", "* o*")
    assert [command.count("--volume") for command in words_of(project)] == [0, 0]


def test_a_path_that_docker_cannot_mount_is_one_line(project):
    pretend(project)
    (project / "a:b").mkdir()
    said = one_line_of(run(project, "evaluate", "run", "quickstart", "--tasks", "./a:b", RUNTIME="docker"))
    assert "its name has a colon. Rename it, or set RUNTIME=host" in said


# ------------------------------------------------------------------------------------------- what goes wrong
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs another user to be")
def test_a_folder_of_someone_else_is_one_line_with_the_remedy(project):
    pretend(project)
    (project / "models").mkdir()
    for folder in (project, *project.parents[:3]):
        folder.chmod(0o755)
    said = one_line_of(run(project, "trainer", "check", "quickstart", user=12345, RUNTIME="docker"))
    assert "models/ belongs to root, and you may not write there: sudo chown -R 12345:12345 models" in said


def test_a_taken_port_is_one_line_with_another(project):
    pretend(project)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = one_line_of(run(project, "tensorboard", PORT=str(port), RUNTIME="docker"))
    assert f"port {port} of 127.0.0.1 is taken" in said
    assert f"PORT={port + 1}" in said


def test_an_image_that_cannot_be_built_is_one_line(project):
    pretend(project, build=1)
    assert "nordsparse:cpu could not be built" in one_line_of(run(project, "trainer", "check", RUNTIME="docker"))


def test_a_full_disk_of_the_engine_is_one_line_with_the_remedy(project):
    pretend(project, build=1)
    write_df(project, free_kib=1024)
    said = one_line_of(run(project, "trainer", "check", RUNTIME="docker"))
    assert "the disk of the Docker engine is full (0 GiB left in /): docker system prune" in said


def test_the_label_of_an_image_and_run_json_name_the_same_lock(project):
    printed = subprocess.run(
        ["bash", "-c", "eval \"$(sed -n '/^lock_hash()/,/^}/p' docker/run)\"; lock_hash cpu; lock_hash cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert lock_hash() in printed.stdout.split()
    assert len(set(printed.stdout.split())) == 2
