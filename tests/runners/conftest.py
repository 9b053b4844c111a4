"""What many tests look at: one small search from the command line, and a small CIFAR-10."""

import getpass
import io
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.postgresql import free_port
from prunefront.runners.cli import main
from prunefront.runners.tasks.cifar_resnet import CifarResNet
from tests.services import missing

IMAGES = {"train": 150, "test": 12}
TINY = ["task.width=4", "task.epochs=2", "n_trials=6", "sampler=random"]


@pytest.fixture
def tiny() -> list[str]:
    return TINY


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A finished digits search with an offline W&B run. Read only."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["search", *TINY, f"run_dir={run_dir}", "tracker.mode=offline"]) == 0
    return run_dir


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> Path:
    """The files of the data folder with images of one colour each, and random weights. Read only."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("cifar")
    arrays = {"classes": np.array(["a"] * 10)}
    for split, count in IMAGES.items():
        files = []
        for index in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (index, 2 * index % 256, 100)).save(buffer, "JPEG", quality=95)
            files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        arrays[f"{split}_jpeg"] = np.concatenate(files)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, files)]).astype(np.int64)
        arrays[f"{split}_label"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(folder / "cifar10_jpeg.npz", **arrays)
    torch.manual_seed(0)
    save_file(CifarResNet(20).state_dict(), folder / "resnet20_cifar10.safetensors")
    return folder


@pytest.fixture(scope="session")
def sshd(tmp_path_factory):
    """A server on loopback with a key of its own; ``-F`` keeps the user's own configuration out."""
    binary = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(binary).exists() or shutil.which("ssh") is None:
        missing("openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile {folder}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        "AcceptEnv TMPDIR\n"
    )
    public = (folder / "host.pub").read_text().split()[:2]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {' '.join(public)}\n")
    (folder / "config").write_text(
        f"Host board\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {folder}/user\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {folder}/known\n StrictHostKeyChecking yes\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([binary, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield folder
    server.terminate()
    server.wait()
