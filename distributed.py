"""The processes of a run, and what they say to each other."""

import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mesh import AXES, Mesh
from words import first_line

# In the processes' common store: which of them was the first to fail, how many have asked, the last one's address.
FAILED, ASKED, ADDRESS = "nanoforge/failed", "nanoforge/asked", "nanoforge/address"
MEETING = timedelta(minutes=5)  # that all processes, which torchrun starts together, may take until they are connected
ASKING_SECONDS = 5.0  # for the others, before the store goes with the process that keeps it
PATIENCE = timedelta(days=1)  # with rank 0, which may prepare a dataset meanwhile; one that ends is noticed at once


class Ranks:
    """The processes torchrun started; without torchrun, a group of one, for which every method does nothing.

    `reader` is which of the mesh's `readers` shares of the batch a process has. Those of one tp group have the same.
    """

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.main = self.rank == 0
        self.mesh, self.reader, self.tp_rank = Mesh(dp=self.size), self.rank, 0
        self.grid: DeviceMesh | None = None
        if self.size > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            self._meet(backend)

    def _meet(self, backend: str) -> None:
        """Connect the processes. Raises OSError, with what may help, if one cannot be reached."""
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=MEETING))
            if int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) < self.size:
                announce_reachable_address(store, self.rank == self.size - 1)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=MEETING)
        except RuntimeError as error:  # dist.DistError is one
            raise OSError(
                f"rank {self.rank} of {self.size} does not reach the others ({first_line(error)}): --master_addr or "
                "--rdzv_endpoint must be an address that all machines reach, and GLOO_SOCKET_IFNAME can name the "
                "network interface that leads to them"
            ) from None
        dist.distributed_c10d._set_pg_timeout(PATIENCE)

    def arrange(self, mesh: Mesh, device_type: str) -> None:
        """Give every process its place in the mesh, which has as many places as there are processes."""
        assert mesh.devices == self.size
        self.mesh = mesh
        self.reader, self.tp_rank = divmod(self.rank, mesh.tp)
        if self.size > 1:
            sizes = tuple(getattr(mesh, axis) for axis in AXES)
            self.grid = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one in this axis alone."""
        return self.grid.get_group(axis)

    def mean(self, number: Tensor) -> float:
        """Of a number that every process has, in a tensor, which is lost."""
        if self.size > 1:
            dist.all_reduce(number)
        return number.item() / self.size

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def main_alone(self, work: Callable[[], Any]) -> None:
        """Let rank 0 do `work` while the others wait. Its ValueError or OSError is everyone's."""
        error = None
        try:
            if self.main:
                work()
        except (ValueError, OSError) as problem:
            error = problem
        sentence = self.agree(str(error) if error else None)
        if error:
            raise error
        if sentence:
            raise OSError(sentence)

    def is_first_to_fail(self) -> bool:
        """Whether it is for this process to say why the run ends: the first that asks, so that only one does.

        It asks before its connections close, so that those who notice these come later. Rank 0, which holds the
        store unless torchrun does, waits until all have asked or ASKING_SECONDS are over.
        """
        if self.size == 1:
            return True
        try:
            store = dist.distributed_c10d._get_default_store()
            first = store.compare_set(FAILED, "", str(self.rank)) == str(self.rank).encode()
            asked, deadline = store.add(ASKED, 1), time.monotonic() + ASKING_SECONDS
            while self.main and asked < self.size and time.monotonic() < deadline:
                time.sleep(0.01)
                asked = store.add(ASKED, 0)
            return first
        except Exception:  # the store is gone with the process that kept it: rather two messages than none
            return True

    @property
    def name(self) -> str:
        """For a message: which process speaks, where there are several."""
        return f"rank {self.rank} of {self.size}: " if self.size > 1 else ""

    def close(self) -> None:
        """Part in order: a process that ends while another still talks to it aborts that one."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def announce_reachable_address(store: dist.Store, last: bool) -> None:
    """Have gloo tell other machines an address at which they reach this one, by way of GLOO_SOCKET_IFNAME.

    It tells them that of this machine's name, which Debian's /etc/hosts and others make 127.0.1.1. The interface that
    leads to MASTER_ADDR serves; on the machine whose name that is, the one that leads to the `last` process's.
    """
    address = address_towards(os.environ["MASTER_ADDR"])
    if last:
        store.set(ADDRESS, address)
    if "GLOO_SOCKET_IFNAME" in os.environ or not is_loopback(address_towards(socket.gethostname())):
        return
    if is_loopback(address):
        address = address_towards(store.get(ADDRESS).decode())
    if not is_loopback(address) and (interface := interface_with(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def address_towards(host: str) -> str:
    """This machine's IPv4 address on the way to a host, "127.0.0.1" if none is known; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((host, 9))
            return way.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def interface_with(address: str) -> str | None:
    """The network interface that has an IPv4 address, where the system is Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex() if fcntl and sys.platform == "linux" else ():
            try:
                answer = fcntl.ioctl(asked, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    One of several skips Python's shutdown: a thread of gloo's that frees a tensor meanwhile cannot get the interpreter
    any more and aborts the process. destroy_process_group waits for these threads only if nothing holds a group any
    longer, and DTensor keeps those that it has met.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error means that another process has ended, rather than that something is wrong here."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in words for word in ("gloo", "nccl", "connection", "peer"))
