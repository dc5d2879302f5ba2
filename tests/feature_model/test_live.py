"""The live page's server, in process: who is answered, and what."""

import asyncio
import json
import threading

import pytest
from feature_models import PROMPT, random_feature_model, random_sae

from unbraid import Steer

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from unbraid.feature_model.live.server import ASSETS, LARGEST_BODY, build_app
from unbraid.feature_model.live.session import Session

PORT, TOKEN = 43817, "correct-horse"
SECRET = {"Authorization": f"Bearer {TOKEN}"}
SITE = "resid_post.0"


@pytest.fixture(scope="module")
def fm():
    saes = {SITE: random_sae(0), f"{SITE}_twin": random_sae(0)}
    return random_feature_model(saes=saes, sites={f"{SITE}_twin": SITE}, twins={SITE: f"{SITE}_twin"})


@pytest.fixture(scope="module")
def app(fm):
    return build_app(Session(fm, "runs/tiny"), PORT, TOKEN)


@pytest.fixture
def client(app):
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}")


def streamed(answer) -> list[dict]:
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ({"Host": "evil.example"}, "/"),
        ({"Host": "127.0.0.1"}, "/"),
        ({"Host": f"evil.example:{PORT}"}, "/api/about"),
        ({"Host": f"127.0.0.1:{PORT + 1}"}, "/"),
        ({"Origin": "http://evil.example"}, "/api/about"),
        ({"Origin": "null"}, "/api/about"),
        ({"Origin": f"http://localhost:{PORT}"}, "/api/about"),
        ({"Origin": f"https://127.0.0.1:{PORT}"}, "/api/about"),
        ({"Authorization": ""}, "/api/about"),
        ({"Authorization": "Bearer wrong"}, "/api/about"),
        ({"Authorization": f"Basic {TOKEN}"}, "/api/steer"),
        ({"Authorization": ""}, "/api"),
        ({"Authorization": "Bearer é"}, "/api/read"),
    ],
)
def test_other_hosts_other_origins_and_no_secret_get_403(client, headers, path):
    raw = {name: value.encode() for name, value in (SECRET | headers).items()}
    answer = client.post(path, json={}, headers=raw) if path != "/" else client.get(path, headers=raw)
    assert answer.status_code == 403 and "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("hosts", [[], [f"127.0.0.1:{PORT}"] * 2, [f"127.0.0.1:{PORT}", "evil.example"]])
def test_one_host_header_is_wanted(app, hosts):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host.encode()) for host in hosts]}
    asyncio.run(app(scope, None, send))
    assert sent[0]["status"] == 403


def test_the_pages_own_requests_are_answered_with_the_headers_of_safety(client):
    for host in (f"127.0.0.1:{PORT}", f"LOCALHOST:{PORT}"):
        answer = client.post("/api/about", json={}, headers=SECRET | {"Host": host, "Origin": f"http://{host.lower()}"})
        assert answer.status_code == 200 and answer.json()["dictionaries"][0]["twin"] == f"{SITE}_twin"
    for path in ASSETS:
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store" and answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers and "set-cookie" not in answer.headers
        assert TOKEN not in answer.text
    assert (
        client.get("/../../etc/passwd").status_code == 404
        and client.get("/api/about", headers=SECRET).status_code == 405
    )


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"x" * (LARGEST_BODY + 1), "application/json", 413),
        (b"{}", "text/plain", 415),
        (b"{", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "application/json", 400),
        (b'{"prompt": 3}', "application/json", 400),
        (b'{"prompt": ""}', "application/json", 400),
        (json.dumps({"prompt": "x" * 9000}).encode(), "application/json", 400),
        (json.dumps({"prompt": "x y " * 1500}).encode(), "application/json", 400),
    ],
)
def test_a_body_that_is_too_large_or_wrong_is_refused_in_words(client, body, kind, status):
    answer = client.post("/api/read", content=body, headers=SECRET | {"Content-Type": kind})
    assert (answer.status_code == status and "expected" in answer.json()["error"]) or status == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 100_000},
        {"tokens": True},
        {"edits": [{"feature": f"{SITE}/1", "by": 1.0}] * 17},
        {"edits": [{"feature": "nowhere/1", "by": 1.0}]},
        {"edits": ["x"]},
        {"edits": [{"feature": f"{SITE}/1", "by": "much"}]},
        {"temperature": -1.0},
    ],
)
def test_a_wrong_request_to_steer_ends_in_words(client, wrong):
    pieces = streamed(client.post("/api/steer", json={"prompt": PROMPT} | wrong, headers=SECRET))
    assert pieces[-1]["kind"] == "error" and "expected" in pieces[-1]["text"]


def test_reading_gives_every_token_with_its_features(client, fm):
    tokens = client.post("/api/read", json={"prompt": PROMPT}, headers=SECRET).json()["tokens"]
    assert [one["text"] for one in tokens] == fm.read(PROMPT).tokens[0]
    best = fm.read(PROMPT).of(SITE).top(1, at=3)[0]
    assert best["feature"] in [one["feature"] for one in tokens[3]["features"]] and not tokens[0]["features"]


def test_steering_streams_both_texts_then_the_partners(client, fm):
    feature = fm.read(PROMPT).of(SITE).top(1)[0]["feature"]
    body = {"prompt": PROMPT, "edits": [{"feature": feature, "by": 2.0}], "tokens": 8}
    pieces = streamed(client.post("/api/steer", json=body, headers=SECRET))
    texts = {kind: "".join(one["text"] for one in pieces if one["kind"] == kind) for kind in ("plain", "steered")}
    made = fm.generate(PROMPT, [Steer(feature, 2.0)], max_new_tokens=8, do_sample=False)
    assert texts == {"plain": made.plain, "steered": made.text} and pieces[-1]["kind"] == "done"
    effect = next(one for one in pieces if one["kind"] == "effect")
    assert effect["partners"] == json.loads(json.dumps(fm.run(PROMPT, [Steer(feature, 2.0)]).partners.rows))
    assert sum(row["plain"] for row in pieces[0]["rows"]) <= 1 and pieces[0]["kl"] > 0
    code = effect["python"].replace("unbraid.features('runs/tiny')", "opened")
    names = {"opened": fm}
    exec(code.replace("fm.generate", "text = fm.generate"), names)
    assert names["text"] == texts["steered"]


def test_steering_by_nothing_gives_the_plain_text(client):
    body = {"prompt": PROMPT, "edits": [{"feature": f"{SITE}/{i}", "by": 0.0} for i in _live(client)], "tokens": 8}
    for sampling in ({}, {"temperature": 1.0, "seed": 4}):
        pieces = streamed(client.post("/api/steer", json=body | sampling, headers=SECRET))
        texts = ["".join(one["text"] for one in pieces if one["kind"] == kind) for kind in ("plain", "steered")]
        assert texts[0] == texts[1] and pieces[0]["kl"] == 0


def _live(client) -> list[str]:
    tokens = client.post("/api/read", json={"prompt": PROMPT}, headers=SECRET).json()["tokens"]
    return [
        one["feature"].rpartition("/")[2] for one in tokens[-1]["features"] if one["feature"].startswith(f"{SITE}/")
    ][:2]


def test_attribution_comes_with_its_gap(client, fm):
    answer = client.post("/api/attribute", json={"prompt": PROMPT, "sae": SITE, "method": "ig"}, headers=SECRET).json()
    assert answer["sites"][SITE]["gap"] <= 0.01 and answer["contributions"] and "fm.attribute" in answer["python"]
    one = client.post("/api/feature", json={"feature": f"{SITE}/{_live(client)[0]}"}, headers=SECRET).json()
    assert one["counterpart"].startswith(f"{SITE}_twin/") and one["partners"] and one["contexts"]


def test_a_newer_request_stops_an_older_one_between_tokens(fm):
    session = Session(fm, "run")
    older, first = session.turns.take(), threading.Event()
    seen: list[dict] = []

    def work() -> None:
        with session.turns.held(older):
            for piece in session.steer({"prompt": PROMPT, "tokens": 256}, older):
                seen.append(piece)
                first.set()

    worker = threading.Thread(target=work)
    worker.start()
    assert first.wait(60)
    newer = session.turns.take()
    with session.turns.held(newer):
        assert len("".join(one.get("text", "") for one in seen)) < 3 * 256
    worker.join()
    assert all(one["kind"] != "effect" for one in seen) and not fm.blocks[0]._forward_hooks
