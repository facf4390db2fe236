"""Several servers: which one is asked, what a fault does to it, and that nothing is left behind."""

import asyncio
import re
import signal
import threading

import pytest

from prune_opd_hf.errors import ConfigError, ServingError
from prune_opd_hf.serving import servers
from prune_opd_hf.serving.client import GENERATE, Client, TransientError, httpx, run
from prune_opd_hf.serving.servers import ServerPool, Servers

ONE, TWO = "http://127.0.0.1:1", "http://127.0.0.1:2"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(servers, "POLL_SECONDS", 0.01)


def pool(recover, timeout=5.0):
    return ServerPool(Servers((ONE, TWO), timeout), Client(timeout), recover)


async def well(client, url):
    pass


def test_a_request_goes_to_its_home_and_to_the_next_server_while_that_recovers():
    allowed = asyncio.Event()

    async def recover(client, url):
        if url == ONE and started:
            await allowed.wait()

    async def ask():
        nonlocal started
        async with pool(recover) as several:
            homes = [(await several.available(home)).url for home in range(4)]
            started = True
            several.mark_unavailable(several.servers[0], "is made to fail")
            meanwhile = [(await several.available(home)).url for home in range(4)]
            allowed.set()
            await several.servers[0].ready.wait()
            return homes, meanwhile, (await several.available(0)).url

    started = False
    homes, meanwhile, afterwards = run(ask())
    assert homes == [ONE, TWO, ONE, TWO]
    assert meanwhile == [TWO] * 4
    assert afterwards == ONE


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_a_server_that_is_away_from_the_beginning_is_not_waited_for_where_another_is_there(fault, monkeypatch):
    monkeypatch.setattr(servers, "FIRST_ANSWER_SECONDS", 0.05 if fault == "hangs" else 3600.0)

    async def recover(client, url):
        if url == ONE and fault == "hangs":
            await asyncio.Event().wait()
        if url == ONE:
            raise TransientError("is away")

    async def ask():
        async with pool(recover, timeout=3600.0) as several:
            chosen = [(await several.available(home)).url for home in range(4)]
        return chosen, several.servers[0].recovery.cancelled()

    assert run(asyncio.wait_for(ask(), 20)) == ([TWO] * 4, True)


def test_where_every_server_is_given_up_the_first_fault_is_raised():
    async def recover(client, url):
        raise TransientError(f"is away ({url[-1]})")

    async def ask():
        async with pool(recover, timeout=0.05) as several:
            await several.available(1)

    with pytest.raises(ServingError, match=r"at http://127.0.0.1:2 is away \(2\), and was waited for 0.05 s"):
        run(ask())


def test_who_waits_for_a_server_and_is_cancelled_leaves_no_task():
    started = asyncio.Event()

    async def recover(client, url):
        await started.wait()

    async def ask():
        started.set()
        async with pool(recover) as several:
            started.clear()
            for server in several.servers:
                await server.ready.wait()
                several.mark_unavailable(server, "is made to fail")
            before = asyncio.all_tasks()
            waiting = asyncio.create_task(several.available(0))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
            left = asyncio.all_tasks() - before
            started.set()
            return left, (await several.available(0)).url

    assert run(ask()) == (set(), ONE)


def test_a_server_that_is_silent_until_the_time_out_is_gone_while_another_is_left():
    silent = {ONE}

    async def ask(client, url):
        if url in silent:
            raise TransientError("is away")
        return url

    both, gone = Servers((ONE, TWO), 0.05), set()
    assert run(both.ask_each(ask, gone)) == {TWO: TWO}
    assert gone == {ONE}
    assert run(both.ask_each(lambda client, url: well(client, url), gone)) == {TWO: None}
    silent.add(TWO)
    for known in (gone, None):
        with pytest.raises(ServingError, match=r"is away, and was waited for 0.05 s"):
            run(both.ask_each(ask, known))


@pytest.mark.parametrize(
    ("status", "content", "path", "message"),
    [
        (308, {}, "/health", "answered 308 to /health .https://moved.example/health.: name the address"),
        (403, {"error": "policy"}, "/v1/models", "answered 403 .*policy.*or a proxy before it, refuses.*VLLM_API_KEY"),
        (
            400,
            {"detail": "Out of range float values are not JSON compliant"},
            GENERATE,
            "logits .* are NaN or infinite",
        ),
        (404, {"error": "No adapter found for <path>"}, "/v1/load_lora_adapter", "common folder in vllm_weights_dir"),
        (404, {"detail": "Not Found"}, "/v1/load_lora_adapter", "start it with --enable-lora"),
        (500, {"error": "Repo id must be in the form"}, "/collective_rpc", "common folder in vllm_weights_dir"),
    ],
)
def test_what_a_server_refuses_names_its_remedy(status, content, path, message):
    answer = httpx.Response(status, json=content, headers={"location": "https://moved.example/health"})
    with pytest.raises(ServingError, match=message):
        Client(5.0)._check(answer, ONE, path)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (httpx.ConnectTimeout(""), TransientError, "did not accept a connection within 5 s"),
        (httpx.ReadTimeout(""), TransientError, "gave no answer within 5 s"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), TransientError, "reached .*Name or service not"),
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"),
            ServingError,
            "self-signed.*SSL_CERT_FILE",
        ),
        (httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version"), ServingError, "does it answer to http://"),
    ],
)
def test_why_a_request_has_no_answer_is_told_and_what_does_not_pass_is_not_waited_for(error, kind, message):
    fault = Client(5.0)._fault(error, ONE)
    assert type(fault) is kind
    assert re.search(message, str(fault))


def test_where_one_server_refuses_the_others_are_told_what_they_have_to_be():
    """As a server that is paused for its new weights, which goes on."""
    told = []

    async def ask(client, url):
        if url == ONE:
            raise ServingError("refuses")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            told.append(client._http.is_closed)

    with pytest.raises(ServingError, match="refuses"):
        run(Servers((ONE, TWO), 5.0).ask_each(ask))
    assert told == [False]


def test_who_interrupts_a_wait_ends_what_runs():
    """Ctrl-C reaches the thread that waits, and not the one that asks."""
    met = []

    async def ask_for_long():
        interrupter.start()
        try:
            met.append(await asyncio.sleep(60, "an answer"))
        except asyncio.CancelledError:
            met.append("an end")
            raise

    interrupter = threading.Timer(0.2, signal.pthread_kill, args=(threading.main_thread().ident, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(ask_for_long())
    finally:
        signal.signal(signal.SIGINT, before)
    assert met == ["an end"]


@pytest.mark.parametrize(
    ("urls", "timeout", "message"),
    [
        ((), 5.0, "teacher_model_server_url must name at least one server"),
        (("127.0.0.1:8000",), 5.0, "teacher_model_server_url must be http://HOST:PORT"),
        (("http://HOST:PORT",), 5.0, "teacher_model_server_url must be http://HOST:PORT.*; got 'http://HOST:PORT'"),
        (("http://host:65536",), 5.0, "teacher_model_server_url must be http://HOST:PORT"),
        (("http://:8000",), 5.0, "teacher_model_server_url must be http://HOST:PORT"),
        (("http://host:-1",), 5.0, "teacher_model_server_url must be http://HOST:PORT"),
        (("http://host:80?x=1",), 5.0, "teacher_model_server_url must be http://HOST:PORT"),
        (("http://me:secret@host",), 5.0, "without a user or a key .*; got 'host'"),
        ((ONE,), float("inf"), "teacher_timeout must be a number of seconds above 0, got inf"),
    ],
)
def test_what_cannot_be_a_server_is_refused_by_its_setting(urls, timeout, message):
    with pytest.raises(ConfigError, match=message) as raised:
        Servers(urls, timeout, "teacher_model_server_url", "teacher_timeout")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["open\nsesame", "öffne dich"])
def test_what_cannot_be_a_key_is_refused_by_its_variable_and_not_repeated(key, monkeypatch):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ConfigError, match="SOME_KEY in the environment is no API key") as raised:
        Client(5.0, "SOME_KEY")
    assert not any(word in str(raised.value) for word in key.split())
