"""How an engine is reached: addresses, certificates, sockets, and their errors."""

from __future__ import annotations

import errno
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import Empty

import pytest

from aiflux.core.config.config import Config
from aiflux.engines.http import Client, ExchangeError, socket_url
from aiflux.errors import ConfigError, ExitCode
from aiflux.util import value_parsers
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working

VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True)
class Certificates:
    """A site's own CA and its certificates: for 127.0.0.1, for another host, and expired."""

    authority: Path
    server: tuple[str, str]
    other: tuple[str, str]
    expired: tuple[str, str]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("ca")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    def sign(name: str, alternative: str, days: int = 2) -> tuple[str, str]:
        openssl(
            "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        extensions = folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={alternative}\nauthorityKeyIdentifier=keyid\n"
            "subjectKeyIdentifier=hash\nbasicConstraints=CA:FALSE\n",
            encoding="utf-8",
        )
        given = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", extensions.name)
        signed = ("x509", "-req", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", *given)
        try:
            openssl(*signed, "-days", str(days))
        except subprocess.CalledProcessError:  # OpenSSL 3.5 has other options for the past
            openssl(*signed, "-not_before", "20200101000000Z", "-not_after", "20200102000000Z")
        return str(folder / f"{name}.pem"), str(folder / f"{name}.key")

    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=site",
            "-days", "2", "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    here = sign("server", "IP:127.0.0.1")
    elsewhere = sign("elsewhere", "DNS:elsewhere.example")
    return Certificates(folder / "ca.pem", here, elsewhere, sign("old", "IP:127.0.0.1", days=-1))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def refused_at_once(tmp_path: Path, url: str, **options: object) -> str:
    """Return the error of a run that must not wait."""
    working = Working(tmp_path, url, engine_wait=60, **options).prompts("a", "b")
    began = time.monotonic()
    assert working.run() is ExitCode.ENGINE
    assert time.monotonic() - began < 8
    assert not working.journal.exists() or not working.journal.read_bytes()
    return str(working.error)


# --- HTTPS ---------------------------------------------------------------------------------------


def test_a_certificate_of_an_unknown_ca_is_refused_with_the_reason(
    tmp_path: Path, certificates: Certificates
) -> None:
    with FaultyEngine(tls=certificates.server) as engine:
        text = refused_at_once(tmp_path, engine.url)
    assert "its certificate is not trusted" in text
    assert "unable to get local issuer certificate" in text or "self-signed" in text
    assert "--engine-ca FILE" in text


def test_a_given_ca_is_trusted(tmp_path: Path, certificates: Certificates) -> None:
    with FaultyEngine(tls=certificates.server) as engine:
        working = Working(tmp_path, engine.url, engine_ca=certificates.authority).prompts("a")
        assert working.run() is ExitCode.OK
        assert working.open().plan.options.engine_ca == str(certificates.authority)


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_usual_variables_are_used(
    tmp_path: Path, certificates: Certificates, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(certificates.authority))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with FaultyEngine(tls=certificates.server) as engine:
        working = Working(tmp_path, engine.url).prompts("a")
        assert working.run() is ExitCode.OK, "and proxies do not"


def test_a_certificate_for_another_host_is_refused(
    tmp_path: Path, certificates: Certificates
) -> None:
    with FaultyEngine(tls=certificates.other) as engine:
        text = refused_at_once(tmp_path, engine.url, engine_ca=certificates.authority)
    assert "127.0.0.1" in text
    assert "IP address mismatch" in text
    assert "use a name or address in --engine-url that the certificate contains" in text
    assert "--engine-ca" not in text


def test_an_expired_certificate_is_refused_with_advice(
    tmp_path: Path, certificates: Certificates
) -> None:
    with FaultyEngine(tls=certificates.expired) as engine:
        text = refused_at_once(tmp_path, engine.url, engine_ca=certificates.authority)
    assert "certificate has expired" in text
    assert "ask the server's operators to renew it; also check this machine's date" in text
    assert "--engine-ca" not in text


def test_missing_certificates_are_exit_2(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyEngine(tls=certificates.server) as engine:
        working = Working(tmp_path, engine.url, engine_ca="/nowhere/ca.pem").prompts("a")
        assert working.run() is ExitCode.USAGE
        assert "from /nowhere/ca.pem: No such file or directory" in str(working.error)
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with FaultyEngine(tls=certificates.server) as engine:
        working = Working(tmp_path, engine.url).prompts("a")
        assert working.run() is ExitCode.USAGE
        assert "SSL_CERT_FILE: no certificates can be read from /now" in str(working.error)
    with FaultyEngine() as engine:
        assert Working(tmp_path, engine.url).prompts("a").run() is ExitCode.OK, "no HTTPS"


def test_a_file_without_certificates_is_reported(
    tmp_path: Path, certificates: Certificates
) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate", encoding="utf-8")
    with FaultyEngine(tls=certificates.server) as engine:
        working = Working(tmp_path, engine.url, engine_ca=wrong).prompts("a")
        assert working.run() is ExitCode.USAGE
    assert f"--engine-ca: no certificates can be read from {wrong}" in str(working.error)


def test_http_on_a_port_of_https(tmp_path: Path, certificates: Certificates) -> None:
    with FaultyEngine(tls=certificates.server) as engine:
        plain = engine.url.replace("https:", "http:")
        text = refused_at_once(tmp_path, plain)
        assert "speaks HTTPS" in text
        assert f"--engine-url {engine.url}" in text


def test_https_on_a_port_of_http(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        text = refused_at_once(tmp_path, engine.url.replace("http:", "https:"))
    assert "speaks plain HTTP" in text
    assert "http://" in text


def test_a_server_of_another_protocol_is_named_on_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    connection.recv(1000)

        greeter = threading.Thread(target=greet)
        greeter.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        text = refused_at_once(tmp_path, url)
        server.shutdown(socket.SHUT_RDWR)
        greeter.join()
    assert f"{url} does not answer in HTTP, but with SSH-2.0-OpenSSH_9.2" in text
    assert "check the port in --engine-url" in text


# --- addresses -----------------------------------------------------------------------------------


def test_an_unknown_host_fails_without_waiting(tmp_path: Path) -> None:
    name = "no-such-host.invalid"
    try:
        socket.getaddrinfo(name, 80)
    except socket.gaierror as error:
        temporary = error.errno == socket.EAI_AGAIN
    if temporary:  # a machine without a name server: possibly temporary, so the worker waits
        working = Working(tmp_path, f"http://{name}:1", engine_wait=0.2).prompts("a")
        assert working.run() is ExitCode.ENGINE
        text = str(working.error)
    else:
        text = refused_at_once(tmp_path, f"http://{name}:1")
        assert "unknown host" in text
    assert name in text


def test_the_reason_of_a_refused_connection_is_shown_while_waiting(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        url = engine.url
    working = Working(tmp_path, url, engine_wait=0.3).prompts("x")
    assert working.run() is ExitCode.ENGINE
    assert "Connection refused" in str(working.error)
    assert any("Connection refused" in line and "--engine-wait" in line
               for line in working.reporter.messages)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("https://h/llm/v1", "https://h/llm"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_accepted_addresses(given: str, meant: str) -> None:
    assert value_parsers.url(given) == meant


@pytest.mark.parametrize(
    "endpoint",
    ["chat/completions", "completions", "embeddings", "models", "responses"],
)
@pytest.mark.parametrize("prefix", ["/v1/", "/llm/v1/", "/"])
def test_the_address_of_an_endpoint_is_refused_with_the_correct_one(
    prefix: str, endpoint: str
) -> None:
    base = "http://h:8000" + prefix.removesuffix("/").removesuffix("/v1")
    with pytest.raises(ValueError, match=f"without the endpoint: {base}$"):
        value_parsers.url(f"http://h:8000{prefix}{endpoint}/")


@pytest.mark.parametrize("address", ["https://h/llm/v1?api_key=x", "https://h/llm/v1/#x?y"])
def test_the_address_of_a_query_is_refused_with_the_correct_one(address: str) -> None:
    with pytest.raises(ValueError, match=r"without . and #: https://h/llm; set a key"):
        value_parsers.url(address)


@pytest.mark.parametrize("wrong", ["http://h:99999", "http://h:0", "http://h:x", "http://:80"])
def test_an_address_with_an_invalid_port_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="a port from 1 to 65535"):
        value_parsers.url(wrong)


@pytest.mark.parametrize(
    "secretive",
    [
        "http://me:hunter2@h:8000",
        "http://hunter2@h:8000/v1",
        "http://me:hun/hunter2@h:8000",
        "https://h/v1?api_key=hunter2",
        "https://h/v1#hunter2",
        "h?key=hunter2",
        "me:hunter2@h",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(
    secretive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        Config(arguments={"engine_url": secretive}).run_options()
    assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("AIFLUX_ENGINE_URL", secretive)
    with pytest.raises(ConfigError) as refused:
        Config().run_options()
    assert "hunter2" not in str(refused.value)


def test_an_answer_that_is_too_large_is_not_read_to_its_end() -> None:
    with FaultyEngine() as engine, closing(Client(engine.url, 10.0, 8, largest=4000)) as client:
        assert len(client.post("/v1/completions", b'{"prompt": "hi"}').body) < 4000
        with pytest.raises(ExchangeError, match="larger than 4,000 bytes") as caught:
            client.post("/v1/completions", b'{"prompt": "endless"}')
    assert caught.value.code == "connection"


def test_what_the_caller_was_handling_is_not_named_as_the_reason() -> None:
    with FaultyEngine() as engine, closing(Client(engine.url, 10.0, 8, largest=4000)) as client:
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError:
            with pytest.raises(ExchangeError, match="larger than 4,000 bytes"):
                client.post("/v1/completions", b'{"prompt": "endless"}')


@pytest.mark.parametrize("fault", ["hang", "drip", "closing", "headers"])
def test_an_abort_ends_every_exchange(fault: str) -> None:
    with FaultyEngine() as engine, closing(Client(engine.url, 60.0, 8)) as client:
        ending = threading.Timer(0.3, client.abort)
        ending.start()
        with pytest.raises(ExchangeError) as caught:
            client.post("/v1/completions", b'{"prompt": "%s"}' % fault.encode())
        assert caught.value.code == "aborted"
        ending.join()


def test_a_full_queue_of_a_unix_socket_is_waited_for(tmp_path: Path) -> None:
    """The kernel refuses further connections at once where it would let them wait on TCP."""
    path = tmp_path / "a b ?#%.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        time.sleep(0.3)  # meanwhile, its queue is full
        for _ in range(8):
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    threading.Thread(target=serve, daemon=True).start()
    client = Client(socket_url(path), 10.0, 8)
    with closing(client), ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: client.get("/health", 10.0), range(8))]
    listener.close()
    assert [answer.body for answer in answers] == [b"{}"] * 8


def test_a_unix_socket_without_a_server_refuses(tmp_path: Path) -> None:
    """The reason is also right while the caller handles another exception."""
    client = Client(socket_url(tmp_path / "none.sock"), 10.0, 8)

    def post() -> None:
        try:
            raise Empty
        except Empty:
            client.post("/v1/chat/completions", b"{}")

    with closing(client), pytest.raises(ExchangeError, match="No such file") as caught:
        post()
    assert caught.value.code == "refused"
