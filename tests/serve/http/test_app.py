"""What the server answers, asked over HTTP."""

from __future__ import annotations

import http.client
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi")

from support.served import TEXTS, Said, Server, files_of, form

import ia3
from ia3.serve.http.refused import RefusedError, refusal


def test_a_fault_tells_nothing_of_itself() -> None:
    refused = refusal(RuntimeError("secret"))
    assert refused.status == 500
    assert "secret" not in str(refused)


def test_a_refusal_has_the_shape_of_openais_errors() -> None:
    body = RefusedError(429, "later", code="queue_full").body()
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "rate_limit_error"


def assert_refused(said: Said, status: int, words: str) -> None:
    assert said.status == status, said
    assert said.body["error"].keys() == {"message", "type", "param", "code"}
    assert words in said.body["error"]["message"], said.body
    assert "Traceback" not in str(said.body)


# -- classify


def test_texts_are_classified_as_their_classifiers_do(server: Server) -> None:
    names = ["tickets", "sorted", "later", "sorted"]
    said = server.post("/v1/classify", {"texts": TEXTS, "adapters": names})
    assert said.status == 200, said
    assert said.body["usage"] == {"texts": 4}
    for name, text, result in zip(names, TEXTS, said.body["results"], strict=True):
        classifier = ia3.FewShotClassifier.load(server.adapters / name)
        expected = classifier.predict_proba([text])[0]
        assert result["adapter"] == name
        found = {each["label"]: each["probability"] for each in result["probabilities"]}
        classes = classifier.classes_.tolist()
        assert [*found] == classes
        assert [*found.values()] == pytest.approx(expected.tolist(), abs=1e-4)
        assert result["label"] == classes[expected.argmax()]
        assert result["labels"] == [result["label"]]


def test_one_text_is_asked_of_many_adapters_or_of_all(server: Server) -> None:
    one = server.post("/v1/classify", {"texts": TEXTS[:1], "adapter": "sorted"}).body["results"][0]
    asked = {"text": TEXTS[0], "adapters": ["sorted", "later"]}
    several = server.post("/v1/classify", asked).body["results"]
    assert [each["adapter"] for each in several] == ["sorted", "later"]
    assert several[0]["probability"] == pytest.approx(one["probability"], abs=1e-6)
    every = server.post("/v1/classify", {"text": TEXTS[0], "adapters": "*"}).body["results"]
    assert [each["adapter"] for each in every] == ["later", "sorted", "tickets"]
    asked = {"text": {"text": TEXTS[0]}, "adapters": "*", "limit": 1}
    assert len(server.post("/v1/classify", asked).body["results"]) == 1


def test_a_long_text_is_not_read_by_many_adapters(server: Server) -> None:
    text = "the " * 25_000
    for asked in (text, {"text": text}):
        refused = server.post("/v1/classify", {"text": asked, "adapters": ["tickets"] * 100})
        assert_refused(refused, 400, "has 100,000 characters, for 100 adapters: at most 83,886")
    said = server.post("/v1/classify", {"text": text, "adapters": ["tickets"] * 2})
    assert said.status == 200


def test_an_adapter_that_cannot_answer_leaves_the_others_their_answers(server: Server) -> None:
    # A text that lacks the classifier's field is that text's fault alone.
    asked = {"texts": [TEXTS[0], {"other": "x"}], "adapters": ["sorted", "tickets"]}
    said = server.post("/v1/classify", asked)
    assert said.status == 200, said
    good, bad = said.body["results"]
    assert good["label"] in ("billing", "delivery")
    assert bad.keys() == {"adapter", "error"}
    assert "text" in bad["error"]["message"]


def test_an_adapter_that_fails_at_its_first_use_leaves_the_others_their_answers(server: Server):
    """Its values are looked at when it is first asked for, not before."""
    files = files_of(server.adapters / "later")
    weights = bytearray(files["adapter_model.safetensors"])
    weights[-1] ^= 1
    broken = server.adapters / "flipped"
    broken.mkdir()
    try:
        for name, content in {**files, "adapter_model.safetensors": bytes(weights)}.items():
            (broken / name).write_bytes(content)
        assert server.post("/v1/adapters/reload", None).body["added"] == ["flipped"]
        said = server.post("/v1/classify", {"text": TEXTS[0], "adapters": ["later", "flipped"]})
        assert said.status == 200
        good, bad = said.body["results"]
        assert good["label"] in ("billing", "delivery")
        assert "are not those that were saved" in bad["error"]["message"]
        assert str(server.adapters) not in str(said.body)
        listed = server.get("/v1/adapters").body["skipped"]
        assert "flipped" in [each["name"] for each in listed]
    finally:
        assert server.ask("DELETE", "/v1/adapters/flipped").status == 204
    assert not broken.exists()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"texts": ["x"], "adapter": "ticket"}, 404, "did you mean 'tickets'?"),
        ({"texts": ["x"], "adapter": "a" * 300}, 404, "no adapter"),
        ({"texts": ["x"], "adapter": "cut"}, 409, "not a whole safetensors file"),
        ({"texts": ["x"], "adapter": "stranger"}, 409, "its base model is"),
        ({"texts": ["x"], "adapter": "plain"}, 400, "is no classifier"),
        ({"texts": ["x"]}, 400, "give either 'adapter' or 'adapters'"),
        ({"texts": ["x"], "text": "x", "adapter": "tickets"}, 400, "either 'texts' or 'text'"),
        ({"texts": ["x"], "adapters": ["tickets", "later"]}, 400, "1 texts and 2 adapters"),
        ({"texts": [], "adapter": "tickets"}, 400, "texts is []"),
        ({"texts": "x", "adapter": "tickets"}, 400, "texts is 'x': expected a valid list"),
        ({"texts": [3], "adapter": "tickets"}, 400, "texts.0 is 3: expected a valid string, or a"),
        ({"texts": ["x"], "adapter": "tickets", "limits": 3}, 400, "limits means nothing here"),
        ({"texts": [{"text": float("nan")}], "adapter": "tickets"}, 400, "nan"),
        ({"texts": ["x" * 200_000], "adapter": "tickets"}, 400, "200,000 characters"),
        ({"texts": ["\ud800"], "adapter": "tickets"}, 400, "half of a surrogate pair"),
        ([], 400, "the body is no JSON object"),
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "parsing the body"),
        (b"[" * 100_000, 400, ""),
        (b'{"texts": ["x"], "limit": ' + b"9" * 5000 + b"}", 400, "parsing the body"),
    ],
)
def test_what_cannot_be_classified_is_refused_in_words(
    server: Server, body: object, status: int, words: str
) -> None:
    assert_refused(server.post("/v1/classify", body), status, words)


def test_addresses_and_methods_that_there_are_not(server: Server) -> None:
    assert_refused(server.get("/v2/classify"), 404, "Not Found")
    refused = server.get("/v1/classify")
    assert_refused(refused, 405, "Method Not Allowed")
    assert refused.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/healthz", "/", "/v1/models", "/v1/classify"])
def test_the_head_alone_is_what_comes_before_the_whole_answer(server: Server, path: str) -> None:
    whole = server.get(path)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("HEAD", path)
    head = connection.getresponse()
    assert (head.status, head.read()) == (whole.status, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    # The connection goes on: nothing of a body was sent.
    connection.request("GET", "/healthz")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()


# -- adapters


def test_adapters_are_listed_and_what_is_skipped_is_named(server: Server) -> None:
    said = server.get("/v1/adapters").body
    by_name = {each["name"]: each for each in said["adapters"]}
    assert [*by_name] == ["later", "plain", "sorted", "tickets"]
    assert by_name["sorted"]["engine"] == "encoder"
    assert by_name["tickets"]["engine"] == "language-model"
    assert by_name["plain"] | {"resident": None, "bytes": None} == {
        "name": "plain",
        "base": by_name["tickets"]["base"],
        "kind": "adapter",
        "engine": "language-model",
        "labels": None,
        "fields": None,
        "bytes": None,
        "resident": None,
    }
    assert by_name["tickets"]["labels"] == ["billing", "delivery"]
    assert by_name["tickets"]["fields"] == ["text"]
    skipped = {each["name"]: each["error"] for each in said["skipped"]}
    assert "not a whole safetensors file" in skipped["cut"]
    assert "its base model is" in skipped["stranger"]
    assert str(server.adapters) not in str(said)
    assert {record["adapter"] for record in server.log("adapter skipped")} >= {"cut", "stranger"}
    assert server.get("/v1/adapters/sorted").body["kind"] == "classifier"


def test_an_uploaded_adapter_answers_at_once_and_can_be_deleted(server: Server) -> None:
    body, headers = form(files_of(server.adapters / "later"))
    said = server.ask("PUT", "/v1/adapters/new", body, headers=headers)
    assert said.status == 200, said
    assert said.body["labels"] == ["billing", "delivery"]
    results = server.post("/v1/classify", {"text": TEXTS[0], "adapters": ["new", "later"]}).body
    new, later = results["results"]
    assert new | {"adapter": "later"} == later
    assert server.ask("DELETE", "/v1/adapters/new").status == 204
    assert not (server.adapters / "new").exists()
    refused = server.post("/v1/classify", {"text": TEXTS[0], "adapter": "new"})
    assert_refused(refused, 404, "no adapter 'new'")
    assert_refused(server.ask("DELETE", "/v1/adapters/new"), 404, "no adapter 'new'")


def test_an_upload_with_a_form_is_new(server: Server) -> None:
    files = files_of(server.adapters / "sorted")
    body, headers = form(files, {"name": "copied"})
    try:
        assert server.ask("POST", "/v1/adapters", body, headers=headers).status == 201
        again = server.ask("POST", "/v1/adapters", body, headers=headers)
        assert_refused(again, 409, "there is an adapter 'copied' already")
    finally:
        server.ask("DELETE", "/v1/adapters/copied")
    body, headers = form(files)
    assert_refused(server.ask("POST", "/v1/adapters", body, headers=headers), 400, "field 'name'")
    assert_refused(server.post("/v1/adapters", {}), 400, "expected multipart/form-data")
    body, headers = form({}, {"name": "x"})
    headers = {"Content-Type": f"{headers['Content-Type']}; charset=undefined"}
    refused = server.ask("POST", "/v1/adapters", body, headers=headers)
    assert_refused(refused, 400, "undefined encoding")


def test_replacing_an_adapter_changes_its_answers(server: Server) -> None:
    def asked() -> float:
        said = server.post("/v1/classify", {"text": TEXTS[0], "adapter": "changing"})
        return float(said.body["results"][0]["probability"])

    found = []
    for name in ("tickets", "later", "tickets", "sorted"):
        body, headers = form(files_of(server.adapters / name))
        assert server.ask("PUT", "/v1/adapters/changing", body, headers=headers).status == 200
        alone = server.post("/v1/classify", {"text": TEXTS[0], "adapter": name})
        assert asked() == pytest.approx(alone.body["results"][0]["probability"], abs=1e-6)
        found.append(asked())
    assert found[0] == found[2] != found[1]
    # The same values with another task.
    files = files_of(server.adapters / "tickets")
    server.ask("PUT", "/v1/adapters/changing", form(files)[0], headers=form(files)[1])
    before = asked()
    task = files["ia3_task.json"].replace(b'"temperature": 2.0', b'"temperature": 40.0')
    body, headers = form({**files, "ia3_task.json": task})
    assert server.ask("PUT", "/v1/adapters/changing", body, headers=headers).status == 200
    assert asked() < before
    assert server.ask("DELETE", "/v1/adapters/changing").status == 204


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/b", "must have no dot, slash or white space"),
        ("..", "must have no dot, slash or white space"),
        ("a.b", "must have no dot, slash or white space"),
        ("a\0b", "must have no dot, slash or white space"),
        ("a b", "must have no dot, slash or white space"),
        ("\x1b[2J", "cannot be printed"),
        ("\ufffd", "cannot be printed"),
        ("é" * 150, "expected at most 200 bytes"),
        ("__base__", "means the base model"),
    ],
)
def test_a_name_that_no_adapter_may_have_is_refused(server: Server, name: str, words: str) -> None:
    body, headers = form(files_of(server.adapters / "later"))
    path = f"/v1/adapters/{quote(name, safe='')}"
    assert_refused(server.ask("PUT", path, body, headers=headers), 400, words)
    assert server.ask("DELETE", path).status == 404
    assert server.get(path).status == 404
    assert server.post("/v1/classify", {"texts": ["x"], "adapter": name}).status == 404


def test_a_damaged_upload_changes_nothing(server: Server) -> None:
    good = files_of(server.adapters / "later")
    before = sorted(path.name for path in server.adapters.iterdir())
    weights, config = good["adapter_model.safetensors"], good["adapter_config.json"]
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    for files, words in (
        ({**good, "adapter_model.safetensors": weights[:-4]}, "not a whole safetensors file"),
        ({**good, "adapter_model.safetensors": flipped}, "are not those that were saved"),
        ({**good, "adapter_config.json": b"{"}, "is not JSON"),
        ({**good, "ia3_task.json": b"{}"}, "ia3_task.json"),
        ({"adapter_config.json": config}, "adapter_model.safetensors is missing"),
        ({**good, "run.py": b""}, "'run.py' is no file of an adapter"),
        ({**good, "adapter_config.json": config.replace(b"IA3", b"LORA")}, "peft_type is 'LORA'"),
        (files_of(server.adapters / "stranger"), "its base model is"),
    ):
        body, headers = form(files)
        refused = server.ask("PUT", "/v1/adapters/tickets", body, headers=headers)
        assert_refused(refused, 400, words)
        assert str(server.adapters) not in refused.body["error"]["message"]
    assert sorted(path.name for path in server.adapters.iterdir()) == before
    assert server.post("/v1/classify", {"texts": ["x"], "adapter": "tickets"}).status == 200
    refused = server.ask("PUT", "/v1/adapters/x", b"no form", headers=form({})[1])
    assert_refused(refused, 400, "the form")
    # A codec that decodes nothing.
    body, headers = form(good, {"name": "x"})
    headers["Content-Type"] += "; charset=undefined"
    refused = server.ask("POST", "/v1/adapters", body, headers=headers)
    assert_refused(refused, 400, "the form is malformed")


def test_a_reload_takes_up_what_has_changed_in_the_folder(server: Server) -> None:
    def reload() -> object:
        return server.post("/v1/adapters/reload", None).body

    skipped = {"cut", "stranger"}
    added, folder = server.adapters / "added", server.adapters
    said = reload()
    assert said["failed"].keys() == skipped
    assert {**said, "failed": {}} == {"added": [], "changed": [], "removed": [], "failed": {}}
    shutil.copytree(folder / "later", added)
    assert reload()["added"] == ["added"]
    asked = {"text": TEXTS[0], "adapters": ["added", "later"]}
    one, other = server.post("/v1/classify", asked).body["results"]
    assert one["probability"] == other["probability"]
    ia3.FewShotClassifier.load(folder / "tickets").save(added)
    assert reload()["changed"] == ["added"]
    asked = {"text": TEXTS[0], "adapters": ["added", "tickets"]}
    one, other = server.post("/v1/classify", asked).body["results"]
    assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)
    (added / "ia3_task.json").write_text("{")
    assert reload()["failed"].keys() == {"added", *skipped}
    assert_refused(server.post("/v1/classify", {"text": "x", "adapter": "added"}), 409, "not JSON")
    shutil.rmtree(added)
    assert reload()["failed"].keys() == skipped
    assert_refused(
        server.post("/v1/classify", {"text": "x", "adapter": "added"}), 404, "no adapter"
    )


def test_adapters_come_and_go_while_they_answer(server: Server) -> None:
    bodies = [form(files_of(server.adapters / name)) for name in ("tickets", "later")]
    server.ask("PUT", "/v1/adapters/restless", bodies[0][0], headers=bodies[0][1])
    statuses: set[int] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            said = server.post("/v1/classify", {"texts": TEXTS, "adapter": "restless"})
            statuses.add(said.status)

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for turn in range(10):
            body, headers = bodies[turn % 2]
            assert server.ask("PUT", "/v1/adapters/restless", body, headers=headers).status == 200
        assert statuses == {200}
        server.ask("DELETE", "/v1/adapters/restless")
        stop.set()
        for each in asking:
            each.result()
    assert statuses <= {200, 404}


# -- limits


def test_a_large_body_is_refused_before_it_is_read(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.putrequest("POST", "/v1/classify")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(100_000_000))
    connection.endheaders()
    # Not a byte of it was sent.
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"100000000 bytes" in answer.read()
    connection.close()
    # And a client that sends all of it before it listens has the answer too.
    assert_refused(server.post("/v1/classify", b" " * 100_000_000), 413, "8,388,608 are taken")


def test_a_body_of_no_known_length_is_counted_as_it_comes(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    chunks = (b" " * 1_000_000 for _ in range(20))
    connection.request(
        "POST", "/v1/classify", chunks, {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_a_client_that_goes_amid_its_upload_is_no_fault(server: Server) -> None:
    body, headers = form(files_of(server.adapters / "later"))
    head = "PUT /v1/adapters/halfway HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: {headers['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.address, timeout=30) as client:
        client.sendall(head.encode() + body[: len(body) // 2])
    server.logged("request", status=499, method="PUT")
    assert not server.log("a fault")
    assert server.get("/v1/adapters/halfway").status == 404
    assert not [path for path in server.adapters.iterdir() if "halfway" in path.name]


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x"])
def test_a_length_that_is_none_is_refused(server: Server, length: str) -> None:
    with socket.create_connection(server.address, timeout=30) as client:
        head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        client.sendall(head.encode())
        status = int(client.recv(1000).split()[1])
    assert status in (400, 413)
    assert server.get("/healthz").status == 200


def test_five_hundred_connections_at_once_are_all_answered(server: Server) -> None:
    request = (
        b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 35\r\n\r\n"
        b'{"texts":["the"],"adapter":"later"}'
    )
    clients = []
    try:
        for _ in range(500):
            clients.append(socket.create_connection(server.address, timeout=60))
        for client in clients:
            client.sendall(request)
        statuses = [int(client.recv(100).split()[1]) for client in clients]
    finally:
        for client in clients:
            client.close()
    assert len(statuses) == 500
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 100


# -- state


def test_metrics_count_requests_tokens_and_adapters(server: Server) -> None:
    server.post("/v1/classify", {"texts": TEXTS, "adapter": "later"})
    server.post("/v1/completions", {"model": "later", "prompt": "the", "max_tokens": 3})
    server.get("/a/path/of/a/client")
    text = server.get("/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['ia3_requests_total{method="POST",route="/v1/classify",status="200"}']) > 0
    assert float(values["ia3_texts_total"]) >= len(TEXTS)
    assert float(values['ia3_tokens_total{kind="generated"}']) > 0
    assert values["ia3_adapters"] == "4.0"
    assert "/a/path" not in text
    load = server.get("/v1/load").body
    assert load["adapters"] == 4
    assert load.keys() >= {"running", "waiting", "tokens_per_second", "texts_per_second"}


def test_logs_have_no_texts(server: Server) -> None:
    said = server.post("/v1/classify", {"texts": ["a secret word"], "adapter": "later"})
    record = server.logged("request", id=said.headers["x-request-id"])
    assert record["route"] == "/v1/classify"
    assert record["status"] == 200
    assert record["texts"] == 1
    assert "secret" not in "\n".join(server.lines)
    refused = server.post("/v1/classify", {"texts": ["secret"], "adapter": "x", "secret": 1})
    server.logged("request", id=refused.headers["x-request-id"])
    assert "secret" not in "\n".join(server.lines)


def test_the_description_names_every_route(server: Server) -> None:
    described = server.get("/openapi.json").body
    paths = described["paths"]
    assert {"/v1/classify", "/v1/completions", "/v1/chat/completions", "/v1/models"} <= paths.keys()
    assert not [
        path for path, of in paths.items() for each in of.values() if "422" in each["responses"]
    ]
    assert server.get("/healthz").body == {"status": "ok"}
    assert server.get("/readyz").body == {"status": "ready"}


def test_a_page_of_another_origin_may_not_call(server: Server) -> None:
    asked = {"texts": ["x"], "adapter": "later"}
    body, headers = form(files_of(server.adapters / "later"))
    for origin in ("http://example.com", "null", f"{server.url}.example.com"):
        said = server.ask("GET", "/healthz", headers={"Origin": origin})
        assert "access-control-allow-origin" not in said.headers
        refused = server.ask("POST", "/v1/classify", asked, headers={"Origin": origin})
        assert_refused(refused, 403, "--cors")
        sent = {**headers, "Origin": origin}
        assert server.ask("PUT", "/v1/adapters/new", body, headers=sent).status == 403
    own = {"Origin": server.url}
    assert server.ask("POST", "/v1/classify", asked, headers=own).status == 200


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com", "10.0.0.1:80", "[::2]"])
def test_a_name_that_only_leads_here_is_refused(server: Server, host: str) -> None:
    # As after a look-up that somebody has turned to this machine.
    assert_refused(server.ask("GET", "/v1/models", headers={"Host": host}), 421, "127.0.0.1")


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:1", "127.0.0.1", "127.1.2.3:4", "[::1]:5"]
)
def test_this_machines_names_are_taken(server: Server, host: str) -> None:
    assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 200


def test_the_page_and_what_it_asks_are_there(server: Server) -> None:
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert b"/page/page.js" in page.body
    assert server.get("/page/page.js").status == 200
    assert_refused(server.get("/page/none.js"), 404, "no file")
    assert server.get("/v1/adapters/later/vectors").status == 200
    assert_refused(server.get("/v1/learn/none"), 404, "")
