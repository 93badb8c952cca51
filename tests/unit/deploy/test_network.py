"""What deploy/hospital says of proxies and of TLS inspection, tried on FLARE's own drivers' sockets."""

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context

from tests.kits import write_kit

LONGEST = 60  # seconds; reached only when something hangs
# what FLARE's gRPC driver does to connect, in a process of its own, as gRPC reads the environment once
GRPC = """
import sys, grpc
from nvflare.fuel.f3.drivers.grpc.utils import get_grpc_client_credentials
from nvflare.fuel.f3.drivers.grpc_driver import GRPC_DEFAULT_OPTIONS
kit, address = sys.argv[1:]
params = {"ca_cert": f"{kit}/client.crt", "client_cert": f"{kit}/client.crt", "client_key": f"{kit}/client.key"}
channel = grpc.secure_channel(address, options=GRPC_DEFAULT_OPTIONS, credentials=get_grpc_client_credentials(params))
try:
    grpc.channel_ready_future(channel).result(timeout=2)
except grpc.FutureTimeoutError:
    pass
"""
# the same of its TCP driver, which is that of deploy/provision
TCP = """
import sys, threading
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver
host, _, port = sys.argv[2].partition(":")
params = {"scheme": "tcp", "host": host, "port": port}
try:
    TcpDriver().connect(ConnectorInfo("h", None, params, Mode.ACTIVE, 1, 1, False, threading.Event()))
except CommError:  # connected, and nobody to hand the connection to
    pass
"""


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port of this machine; every connection to it gets the answer, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(LONGEST)


def ways_taken(code: str, kit: Path) -> set[str]:
    """How a client that every usual name tells of a proxy comes to the server: what it asks the proxy, or directly."""
    ways: set[str] = set()

    def note(connection: socket.socket) -> None:
        ways.add(connection.recv(4096).decode().partition("\r\n")[0])

    with listener(note) as port:
        proxy = f"http://127.0.0.1:{port}"
        names = ("grpc_proxy", "https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)} | dict.fromkeys(names, proxy)
        with listener(lambda _: ways.add("directly")) as server:
            address = f"localhost:{server}"
            command = [sys.executable, "-W", "ignore", "-c", code, str(kit), address]
            done = subprocess.run(command, env=environment, capture_output=True, timeout=LONGEST, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return {way.replace(f":{server}", ":PORT") for way in ways}


def test_grpc_asks_a_proxy_for_a_tunnel(tmp_path: Path) -> None:
    write_kit(tmp_path, "hospital-a")
    assert ways_taken(GRPC, tmp_path) == {"CONNECT localhost:PORT HTTP/1.1"}


def test_tcp_which_deploy_has_knows_no_proxy(tmp_path: Path) -> None:
    assert ways_taken(TCP, tmp_path) == {"directly"}


@pytest.mark.parametrize("inspected", [False, True], ids=["the server itself", "a box that inspects"])
def test_a_box_that_inspects_tls_is_refused_by_the_site(inspected: bool, tmp_path: Path) -> None:
    """The box has a certificate for the server's name that the machine's own store would trust; FLARE asks its root."""
    write_kit(tmp_path, "fl.example.org")
    box = tmp_path / "box"
    write_kit(box, "fl.example.org")
    front = box if inspected else tmp_path
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(front / "client.crt", front / "client.key")

    def answer(connection: socket.socket) -> None:
        with served.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)

    names = (DriverParams.CA_CERT, DriverParams.CLIENT_CERT, DriverParams.CLIENT_KEY)
    files = (tmp_path / "client.crt", tmp_path / "client.crt", tmp_path / "client.key")
    params = {"scheme": "stcp", "secure": True, **{n.value: str(f) for n, f in zip(names, files, strict=True)}}
    context = get_ssl_context(params, ssl_server=False)
    assert context is not None
    with listener(answer) as port, socket.create_connection(("127.0.0.1", port)) as plain:
        if inspected:
            with pytest.raises(ssl.SSLCertVerificationError):
                context.wrap_socket(plain)
        else:
            context.wrap_socket(plain).close()
