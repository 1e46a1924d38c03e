"""A Ray cluster of several nodes on one Linux machine: each node is a network namespace.

                  a bridge, in a namespace of its own
                  │            │            │
              10.77.0.1    10.77.0.2    10.77.0.3      eth0 of each node, and its own lo
              node 0       node 1       node 2         own raylet, temp folder, object store, CPUs
              head, jobs

Nothing of it is on an interface of the machine, and nothing in it reaches the network. The files
are the machine's, as on a cluster with a shared file system, but for one folder (`local`), of which
each node has its own. Needs root, iproute2 and veth.

    python recipes/cluster/namespaces.py --nodes 3 -- ray status    # runs a command at the head
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent
PREFIX = "grl"
FOLDERS = Path("/tmp")  # short: paths of Ray's sockets have 107 characters at most
NETWORK = "10.77.0"
START_LIMIT_S = 180.0
END_LIMIT_S = 20.0
# Ray's default is 200 MB at least, of shared memory that three nodes of one machine have together
OBJECT_STORE_BYTES = 100_000_000
WAIT_FOR_NODES = (
    "import time, ray; ray.init(log_to_driver=False)\n"
    "while sum(node['Alive'] for node in ray.nodes()) < {count}: time.sleep(0.2)"
)


class Unavailable(Exception):
    """Namespaces cannot be made here; the text says why."""


def check_available() -> None:
    """Raises `Unavailable` where no namespaces can be made and joined."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if shutil.which("ip") is None:
        raise Unavailable("there is no ip command (iproute2)")
    name = f"{PREFIX}-{os.getpid()}-try"
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        raise Unavailable(f"ip netns add: {made.stderr.strip()}")
    peer = ("type", "veth", "peer", "name", "b0")
    linked = _ip("-n", name, "link", "add", "a0", *peer, check=False)
    _ip("netns", "del", name)
    if linked.returncode != 0:
        raise Unavailable(f"ip link add: {linked.stderr.strip()}")


class NamespaceCluster:
    """Nodes that are up between `with` and its end, however that comes.

    Args:
        cpus: logical CPUs of each node; the first one is the head.
        settings: environment of all nodes' Ray, beside its token.

    Attributes:
        folder: of the nodes' own files; removed with all in it.
        local: a folder of which each node has its own.
    """

    def __init__(self, cpus: list[int], settings: dict[str, str] | None = None):
        self.cpus = cpus
        self.folder = FOLDERS / f"{PREFIX}-{os.getpid()}"
        self.local = self.folder / "local"
        self.addresses = [f"{NETWORK}.{i + 1}" for i in range(len(cpus))]
        self._namespaces = [f"{PREFIX}-{os.getpid()}-{i}" for i in range(len(cpus))]
        self._switch = f"{PREFIX}-{os.getpid()}-sw"
        self._raylets: list[subprocess.Popen] = []
        self._settings = settings or {}

    def __enter__(self) -> NamespaceCluster:
        check_available()
        remove_abandoned()
        self.folder.mkdir(mode=0o700)
        try:
            self._lay_cables()
            self.local.mkdir()
            token = self.folder / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            for node in range(len(self.cpus)):
                self._start_ray(node)
                if node == 0:  # the others look for it
                    self._wait(self._has_head, "the head")
            self._wait(self._takes_jobs, "the cluster")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # ---- what a user of it does -----------------------------------------------------------------

    def popen(self, node: int, command: list[str], **options) -> subprocess.Popen:
        """A command on a node, with the cluster's token and, at the head, its job server."""
        return subprocess.Popen(self._within(node, command), **options)

    def run(self, node: int, command: list[str], **options) -> subprocess.CompletedProcess:
        return subprocess.run(self._within(node, command), **options)

    def ray(self, *arguments: str, node: int = 0) -> subprocess.CompletedProcess:
        """A command of Ray's, with what it prints."""
        return self.run(node, [_script("ray"), *arguments], capture_output=True, text=True)

    def pids(self, node: int) -> list[int]:
        """Of all processes of a node."""
        listed = _ip("netns", "pids", self._namespaces[node], check=False).stdout
        return [int(pid) for pid in listed.split()]

    def kill(self, node: int) -> None:
        """Ends every process of a node at once, as a machine that loses power."""
        for pid in self.pids(node):
            _signal(pid, signal.SIGKILL)

    def unplug(self, node: int) -> None:
        """Cuts a node's cable: its processes go on, and nobody hears of them."""
        _ip("-n", self._switch, "link", "set", f"port{node}", "down")

    def listeners(self, node: int) -> list[tuple[str, int, str]]:
        """Who listens on which address of a node: (process, pid, address), once a socket."""
        lines = self.run(node, ["ss", "-Hltnp"], capture_output=True, text=True).stdout
        found = []
        for line in lines.splitlines():
            address = line.split()[3].rpartition(":")[0].strip("[]").removeprefix("::ffff:")
            owner = re.search(r'users:\(\("([^"]+)",pid=(\d+)', line)
            assert owner is not None, "root sees the owner of each socket"
            found.append((owner.group(1), int(owner.group(2)), address))
        return found

    def stop(self) -> None:
        """Ends all processes of all nodes, and removes namespaces and files; idempotent."""
        deadline = time.monotonic() + END_LIMIT_S
        nodes = range(len(self.cpus))
        while any(self.pids(node) for node in nodes) and time.monotonic() < deadline:
            for node in nodes:
                self.kill(node)
            time.sleep(0.2)
        for raylet in self._raylets:
            raylet.wait()
        for name in (*self._namespaces, self._switch):
            _ip("netns", "del", name, check=False)  # with its interfaces
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- how it is made -------------------------------------------------------------------------

    def _lay_cables(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for i, name in enumerate(self._namespaces):
            _ip("netns", "add", name)
            ends = ("type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "add", f"port{i}", *ends)
            _ip("-n", self._switch, "link", "set", f"port{i}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _within(self, node: int, command: list[str]) -> list[str]:
        """A command in a node's namespaces: its network, its `local` folder, its name."""
        own = self.folder / f"node{node}"
        (own / "local").mkdir(parents=True, exist_ok=True)
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
            **self._settings,
        }
        variables = [f"{name}={value}" for name, value in settings.items()]
        inside = f'mount --bind {own}/local {self.local} && hostname node{node} && exec "$@"'
        enter = ["ip", "netns", "exec", self._namespaces[node], "unshare", "--uts"]
        return [*enter, "env", *variables, "sh", "-c", inside, "sh", *command]

    def _start_ray(self, node: int) -> None:
        script = ["bash", str(HERE / "start.sh"), *(["head"] if node == 0 else ["node"])]
        script += [self.addresses[node], *([self.addresses[0]] if node else [])]
        script += [f"--num-cpus={self.cpus[node]}", "--num-gpus=0", "--block"]
        script += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        script += [f"--temp-dir={self.folder / f'node{node}' / 'ray'}"]
        command = self._within(node, script)
        (self.folder / f"node{node}" / "ray").mkdir(exist_ok=True)
        path = os.pathsep.join([str(Path(_script("ray")).parent), os.environ["PATH"]])
        with open(self.folder / f"node{node}" / "start.log", "wb") as log:
            self._raylets.append(
                subprocess.Popen(
                    command,
                    env=os.environ | {"PATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _has_head(self) -> bool:
        """Whether the head's table of nodes can be reached."""
        knock = ["bash", "-c", f"exec 3<> /dev/tcp/{self.addresses[0]}/6379"]
        return self.run(0, knock, stderr=subprocess.DEVNULL).returncode == 0

    def _takes_jobs(self) -> bool:
        """Whether a job runs, once it sees all nodes."""
        seen = WAIT_FOR_NODES.format(count=len(self.cpus))
        return self.ray("job", "submit", "--", sys.executable, "-c", seen).returncode == 0

    def _wait(self, holds, what: str) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not holds():
            ended = [raylet for raylet in self._raylets if raylet.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [path.read_text()[-2000:] for path in self.folder.glob("node*/start.log")]
                raise RuntimeError(f"{what} did not come up:\n" + "\n".join(logs))
            time.sleep(0.5)


def remove_abandoned() -> None:
    """Removes what processes that were killed have left: namespaces, what runs in them, files."""
    for line in _ip("netns", "list").stdout.splitlines():
        name = line.split()[0]
        owner = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", name)
        if owner is None or Path("/proc", owner.group(1)).exists():
            continue
        for pid in _ip("netns", "pids", name).stdout.split():
            _signal(int(pid), signal.SIGKILL)
        _ip("netns", "del", name)
        shutil.rmtree(FOLDERS / f"{PREFIX}-{owner.group(1)}", ignore_errors=True)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done


def _script(name: str) -> str:
    """A command of the environment that this runs in."""
    return str(Path(sys.executable).parent / name)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=8, help="logical ones, of each node")
    parser.add_argument("command", nargs="+", help="runs at the head; then all is removed")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # all is removed
    try:
        with NamespaceCluster([asked.cpus] * asked.nodes) as cluster:
            print(f"nodes {' '.join(cluster.addresses)}", flush=True)
            return cluster.run(0, asked.command).returncode
    except Unavailable as reason:
        print(f"no local cluster: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
