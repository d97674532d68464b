"""What the containers promise, in real ones: `make test-docker`. Needs a Docker engine and the base image."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT
from tests.test_distributed import EVEN, losses, write_even_rows
from trainer.runs.run import REQUIREMENTS, lock_hash

pytestmark = pytest.mark.docker

USER = "12345:12345"  # has no entry in the image's /etc/passwd: the hard case
TOKEN = "hf_" + "plantedForTheTests" * 2


def docker(*arguments, **options):
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=900, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


class Project:
    """A fresh clone in a temporary folder, with a compose project of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.name = f"nordsparse-test-{os.getpid()}"
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for file in (ROOT / name for name in files if name):
            if file.is_file():
                target = folder / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
        for wheel in (ROOT / "docker" / "wheels").glob("*.whl"):
            os.link(wheel, folder / "docker" / "wheels" / wheel.name)
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "clone"]):
            subprocess.run([*git, *command], cwd=folder, check=True)
        self.commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        own = USER if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"
        if os.getuid() == 0:
            os.chown(folder / "models", *map(int, own.split(":")))
        self.user = own
        self.environment = os.environ | {
            "COMPOSE_PROJECT_NAME": self.name,
            "CONTAINER_USER": own,
            "RUNTIME": "docker",
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "1",
            "TENSORBOARD_PORT": "0",
        }
        self.environment.pop("HF_HOME", None)

    def start(self, *command, **environment):
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command, **environment):
        process = self.start(*command, **environment)
        out, errors = process.communicate(timeout=1200)
        return subprocess.CompletedProcess(command, process.returncode, out, errors)

    def make(self, *arguments, **environment):
        result = self.run("make", *arguments, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def compose(self, *arguments):
        result = self.run("docker", "compose", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    def python(self, code, service="train"):
        """What this code prints in a container of a service."""
        return self.compose("run", "--rm", "-T", "--entrypoint", "python", service, "-c", code)

    def manifest(self, name="quickstart"):
        return json.loads((self.folder / "models" / name / "run.json").read_text())

    def container(self, service):
        labels = [f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}"]
        filters = [part for label in labels for part in ("--filter", f"label={label}")]
        return docker("ps", "-q", *filters).split()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    project = Project(folder)
    project.make("show")  # builds the image
    yield project
    subprocess.run(
        ["docker", "compose", "--profile", "jobs", "down", "--volumes", "--remove-orphans", "--timeout", "5"],
        cwd=folder,
        env=project.environment,
        capture_output=True,
    )
    left = docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={project.name}").split()
    if left:
        docker("rm", "-f", *left)


@pytest.fixture(scope="module")
def trained(project):
    """TensorBoard, started before there is any run, and then a finished run."""
    project.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "120", "tensorboard")
    project.printed = project.make("train", "SET=training.max_steps=60")
    return project


def wait_for(file, process):
    deadline = time.monotonic() + 180
    while not file.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def names_and_versions(text):
    found = re.findall(r"^([A-Za-z0-9][\w.-]*==[^\s\\]+(?: ; [^\\\n]+)?)", text, re.MULTILINE)
    return {
        re.sub(r"[-_.]+", "-", requirement.name).lower(): str(requirement.specifier).removeprefix("==")
        for requirement in map(Requirement, found)
        if requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"})
    }


# ------------------------------------------------------------------------------------------- the image
def test_the_image_holds_the_locked_versions_and_nothing_else(project):
    installed = names_and_versions(docker("run", "--rm", "--entrypoint", "pip", "nordsparse:cpu", "freeze", "--all"))
    del installed["pip"]
    locked = names_and_versions("".join((REQUIREMENTS / name).read_text() for name in ("base.txt", "torch-cpu.txt")))
    assert len(installed) > 60
    assert installed == locked
    assert not installed.keys() & {"pytest", "ruff", "hypothesis", "pytest-xdist"}


def test_the_image_says_which_commit_and_lock_it_is_of_and_runs_as_an_ordinary_user(project):
    found = json.loads(docker("image", "inspect", "nordsparse:cpu"))[0]["Config"]
    assert found["Labels"]["org.opencontainers.image.revision"] == project.commit
    assert found["Labels"]["nordsparse.lock"] == lock_hash()
    assert found["User"] == "1000:1000"
    assert found["Entrypoint"] == ["python", "-m"]


def test_the_image_has_no_secret_no_compiler_no_cache_and_no_git(project):
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", "nordsparse:cpu")
    assert "pip install" in history
    assert TOKEN not in history + docker("image", "inspect", "nordsparse:cpu")
    look = "find /tmp /root/.cache /cache -type f; command -v gcc git curl; ls -A /app | tr '\\n' ' '"
    left = docker("run", "--rm", "--user", "0", "--entrypoint", "sh", "nordsparse:cpu", "-c", look)
    assert left == "configs data docker evaluate models trainer"


# ------------------------------------------------------------------------------------------- a container
def test_a_container_is_confined(project):
    status = project.python("print(open('/proc/self/status').read())")
    found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert found["Uid"].split() == [project.user.split(":")[0]] * 4
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert found["NoNewPrivs"] == "1"
    for folder, writable in {
        "/app/configs": False,
        "/opt/venv": False,
        "/app": False,
        "/app/models": True,
        "/cache/huggingface": True,
        "/cache/torchinductor": True,
        "/cache/triton": True,
        "/tmp": True,
    }.items():
        code = f"import tempfile; tempfile.TemporaryFile(dir='{folder}'); print('written')"
        result = project.run("docker", "compose", "run", "--rm", "-T", "--entrypoint", "python", "train", "-c", code)
        assert (result.stdout.strip() == "written") == writable, folder


def test_a_token_reaches_a_container_by_environment_or_by_file(project):
    read = "import huggingface_hub; print(huggingface_hub.get_token())"
    assert project.python(read) == TOKEN
    file = project.folder / "data" / "token"
    file.write_text("hf_fromAFile\n")
    file.chmod(0o644)
    environment = project.environment | {"HF_TOKEN_FILE": str(file)}
    environment.pop("HF_TOKEN")
    command = ["docker", "compose", "run", "--rm", "-T", "--entrypoint", "python", "train", "-c", read]
    result = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "hf_fromAFile", result.stderr


def test_compose_is_valid_with_and_without_gpus(project):
    plain = json.loads(project.compose("--profile", "jobs", "config", "--format", "json"))["services"]
    assert set(plain) == {"train", "evaluate", "tensorboard", "publish"}
    assert "deploy" not in plain["train"]
    assert plain["tensorboard"]["ports"][0]["host_ip"] == "127.0.0.1"
    assert "HF_TOKEN" not in plain["tensorboard"].get("environment", {})
    files = ("--file", "compose.yaml", "--file", "docker/compose.cuda.yaml")
    cuda = json.loads(project.compose(*files, "--profile", "jobs", "config", "--format", "json"))["services"]
    for service in ("train", "evaluate", "publish"):
        assert cuda[service]["build"]["target"] == "cuda"
        assert cuda[service]["image"] == "nordsparse:cuda"
        assert cuda[service]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert "deploy" not in cuda["tensorboard"]


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="there is a GPU")
def test_a_config_of_the_gpu_is_one_line_where_there_is_none(project):
    result = project.run("make", "train", "CONFIG=splade_h100")
    assert result.returncode != 0
    assert result.stderr.count("Error: CONFIG=splade_h100 needs an NVIDIA GPU") == 1


# ------------------------------------------------------------------------------------------- a run
def test_a_run_in_a_container_belongs_to_the_caller_and_says_where_it_was_made(trained):
    assert "verdict" in trained.printed
    owners = {
        f"{file.stat().st_uid}:{file.stat().st_gid}" for file in (trained.folder / "models" / "quickstart").rglob("*")
    }
    assert owners == {trained.user}
    manifest = trained.manifest()
    assert manifest["status"] == "finished"
    assert manifest["git_commit"] == trained.commit
    assert manifest["lock"] == lock_hash()
    assert manifest["image"] == docker("image", "inspect", "--format", "{{.Id}}", "nordsparse:cpu")


def test_the_token_is_in_nothing_that_was_written(trained):
    files = [file for file in (trained.folder / "models").rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in trained.printed


def test_evaluate_reads_the_run_of_another_container(trained):
    printed = trained.make("eval")
    assert re.search(r"^quickstart +search: nDCG@10 0\.\d+", printed, re.MULTILINE)
    assert (trained.folder / "models" / "quickstart" / "report" / "index.html").stat().st_uid == int(
        trained.user.split(":")[0]
    )


def test_tensorboard_that_was_there_before_any_run_lists_its_scalars(trained):
    address = trained.compose("port", "tensorboard", "6006")
    assert address.startswith("127.0.0.1:")

    def get(path):
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.read().decode()

    assert "TensorBoard" in get("/")
    deadline = time.monotonic() + 60  # it looks for new files every five seconds
    while "quickstart/logs" not in json.loads(get("/data/runs")):
        assert time.monotonic() < deadline
        time.sleep(1)
    tags = json.loads(get("/data/plugin/scalars/tags"))["quickstart/logs"]
    assert {"loss/total", "eval/search_ndcg@10", "speed/samples_per_second"} <= tags.keys()


def test_a_second_tensorboard_on_the_same_port_is_one_line(trained):
    port = trained.compose("port", "tensorboard", "6006").rpartition(":")[2]
    result = trained.run("make", "tensorboard", f"PORT={port}")
    assert f"Error: port {port} of 127.0.0.1 is taken" in result.stderr


def test_docker_stop_saves_a_checkpoint_and_resume_goes_on(project):
    process = project.start("docker", "compose", "run", "--rm", "-T", "train", "quickstart", "--name", "stopped")
    wait_for(project.folder / "models" / "stopped" / "checkpoints" / "checkpoint-100" / "complete.json", process)
    (container,) = project.container("train")
    begin = time.monotonic()
    docker("stop", container)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert process.returncode == 143, errors
    step = int(re.search(r"Stopped at step (\d+); everything up to it is saved\. To go on: ", errors)[1])
    assert project.manifest("stopped")["status"] == "stopped"
    arguments = ("quickstart", "--name", "stopped", "--resume", "--set", f"training.max_steps={step + 20}")
    printed = project.compose("run", "--rm", "-T", "train", *arguments)
    assert f"resuming from models/stopped/checkpoints/checkpoint-{step}" in printed
    assert project.manifest("stopped")["steps_done"] == step + 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_make_without_a_terminal_saves_a_checkpoint_and_leaves_no_container(project, number):
    shutil.rmtree(project.folder / "models" / "quickstart", ignore_errors=True)
    process = project.start("make", "train")
    wait_for(project.folder / "models" / "quickstart" / "checkpoints" / "checkpoint-100" / "complete.json", process)
    process.send_signal(number) if number == signal.SIGTERM else os.killpg(process.pid, number)  # as a terminal does
    out, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Stopped at step" in errors, out + errors
    assert "Error 143" in errors
    assert project.manifest()["status"] == "stopped"
    assert not project.container("train")


# ------------------------------------------------------------------------------------------- several containers
@pytest.fixture
def even(project):
    write_even_rows(project.folder / "data")
    config = EVEN.replace("SEARCH", "trainer/data/quickstart/search").replace("source: ", "source: data/")
    (project.folder / "configs" / "training_config_even.yaml").write_text(config)
    return project


def test_two_containers_give_the_loss_curve_of_one_process(even):
    even.make("train", "CONFIG=even")
    one = losses(even.folder, "even")
    (even.folder / "models" / "even").rename(even.folder / "models" / "one")
    printed = even.make("train", "CONFIG=even", "NODES=2", "SET=training.per_device_train_batch_size=8")
    assert printed.count("verdict") == 1
    assert losses(even.folder, "even") == pytest.approx(one, rel=1e-5)
    assert even.manifest("even")["processes"] == 2
    (even.folder / "models" / "even").rename(even.folder / "models" / "two")


def test_stopping_one_of_two_containers_saves_and_stops_both(even):
    settings = "SET=training.per_device_train_batch_size=8 training.max_steps=400"
    process = even.start("make", "train", "CONFIG=even", "NODES=2", settings)
    wait_for(even.folder / "models" / "even" / "checkpoints" / "checkpoint-8" / "complete.json", process)
    assert len(even.container("train")) == 2
    docker("stop", f"{even.name}-node-2")
    out, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Error 143" in errors
    assert (out + errors).count("Stopped at step") == 1
    assert even.manifest("even")["status"] == "stopped"
    step = even.manifest("even")["steps_done"]
    printed = even.make("resume", "CONFIG=even", "NODES=2", f"SET=training.max_steps={step + 8}")
    assert f"resuming from models/even/checkpoints/checkpoint-{step}" in printed
    assert even.manifest("even")["status"] == "finished"
