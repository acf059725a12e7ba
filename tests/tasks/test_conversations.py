"""Conversations: contexts, templates, what is refused, an endpoint of our own, and review."""

from __future__ import annotations

import contextlib
import csv
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edt_former.data import read_rows
from edt_former.tasks.conversations import (
    RUBRIC,
    Context,
    Endpoint,
    Turn,
    draw_sample,
    generate,
    objection,
    read_contexts,
    score_sample,
    template_turns,
    write_from_templates,
)
from edt_former.tasks.conversations.endpoint import parse_reply
from edt_former.tasks.questions import facts

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text(
        "CID\tSMILES\tdescription\n"
        "2244\tCC(=O)OC1=CC=CC=C1C(=O)O\tA salicylate  ester.\n"
        "9\tC1CC\tbroken\n"
        "702\tOCC\tAn alcohol.\n"
    )
    return path


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "iupac.csv"
    path.write_text("cid,smiles,iupac_name\n,OCC,ethanol\n2244,whatever,2-acetyloxybenzoic acid\n")
    return path


def test_captions_and_names_come_together_by_id_or_smiles(captions, names):
    found = list(read_contexts([captions], names=names))
    assert [c.key for c in found] == ["0:0", "0:1", "0:2"]
    assert found[0].smiles == ASPIRIN and found[0].caption == "A salicylate ester."
    assert [c.iupac for c in found] == ["2-acetyloxybenzoic acid", None, "ethanol"]
    assert found[1].reason == "unclosed ring" and not found[0].reason
    assert found[2].facts["hydroxyl group"] == "yes"


def context(smiles: str = ASPIRIN, **known) -> Context:
    from rdkit import Chem

    return Context("0:0", smiles=smiles, facts=facts(Chem.MolFromSmiles(smiles)), **known)


@pytest.mark.parametrize("smiles", [ASPIRIN, "C", "[Na+].[Cl-]", "OCC(O)C(O)=O", "c1ccc2ccccc2c1"])
def test_templates_say_nothing_that_is_refused(smiles):
    told = context(smiles, caption="A compound.", iupac="its name")
    for seed in range(12):
        turns = template_turns(told, turns=10, seed=seed)
        assert len(turns) == 10
        assert turns[0].answer == "A compound." and "its name" in turns[1].answer
        assert objection(told, turns) == ""
    assert template_turns(told, seed=1) == template_turns(told, seed=1)
    assert template_turns(told, seed=1) != template_turns(told, seed=2)
    assert len(template_turns(Context("0:3", smiles="C"), turns=3)) == 0


GOOD = Turn("What class of compound is it?", "It is an aromatic carboxylic acid.")
REFUSED = [
    pytest.param([], "0 turns, 1 to 10 are taken", id="nothing"),
    pytest.param([GOOD] * 11, "11 turns, 1 to 10 are taken", id="too-many"),
    pytest.param([GOOD, Turn("Why?", " ")], "answer 2 is empty", id="empty"),
    pytest.param(
        [Turn("Why?" * 200, "So.")], "question 1 is longer than 400 characters", id="long"
    ),
    pytest.param([Turn("What?", f"It is {ASPIRIN}.")], "answer 1 has the SMILES", id="smiles"),
    pytest.param(
        [Turn("What?", "According to the caption, an ester.")],
        "answer 1 speaks of its source: According to the caption",
        id="source",
    ),
    pytest.param([GOOD, GOOD], "a question is asked twice", id="twice"),
    pytest.param(
        [Turn("How many rings does it have?", "It has two rings.")],
        "contradicts RDKit: rings: 1, said: It has two rings.",
        id="wrong-count",
    ),
    pytest.param(
        [Turn("How many oxygen atoms are there?", "There are 3.")],
        "contradicts RDKit: oxygen atoms: 4, said: There are 3.",
        id="wrong-digit",
    ),
    pytest.param(
        [Turn("Does the molecule have an ester?", "No, it has none.")],
        "contradicts RDKit: ester: yes, said: No, it has none.",
        id="wrong-no",
    ),
    pytest.param(
        [Turn("Is there a nitrile?", "Yes, one.")],
        "contradicts RDKit: nitrile: no, said: Yes, one.",
        id="wrong-yes",
    ),
]


@pytest.mark.parametrize(("turns", "reason"), REFUSED)
def test_what_is_refused(turns, reason):
    assert objection(context(), turns) == reason


@pytest.mark.parametrize(
    "turn",
    [
        GOOD,
        Turn("How many rings does it have?", "One ring, with six carbon atoms."),
        Turn("How many stereocentres are there?", "None, it is achiral."),
        Turn("How many rings does it have?", "A benzene ring."),
        Turn("Does it contain an ester?", "Yes, an acetate."),
        Turn("Which numbers matter?", "It melts at 135 degrees."),
    ],
)
def test_what_is_right_or_cannot_be_judged_passes(turn):
    assert objection(context(), [turn]) == ""


def test_templates_are_written_and_read_by_prepare(captions, names, tmp_path):
    out = tmp_path / "out.jsonl"
    contexts = list(read_contexts([captions], names=names))
    written = write_from_templates(contexts[:2], out, turns=3)
    assert (written.kept, dict(written.dropped)) == (1, {"unclosed ring": 1})
    # A kill in the middle of a line: what is cut off is written again.
    first = out.read_text()
    out.write_text(first + '{"key": "0:2", "id"')
    written = write_from_templates(contexts, out, turns=3)
    assert written.kept == 2 and out.read_text().startswith(first)
    whole = tmp_path / "whole.jsonl"
    write_from_templates(contexts, whole, turns=3)
    assert whole.read_text() == out.read_text()
    rows = list(read_rows(out))
    assert [row.id for row in rows] == ["2244", "702"] and rows[0].molecules == (ASPIRIN,)
    assert [role for role, _ in rows[0].turns] == ["user", "assistant"] * 3
    with pytest.raises(ValueError, match="conversations of another run, which differs in turns"):
        write_from_templates(contexts, out, turns=2)
    with pytest.raises(ValueError, match=r"out must end in \.jsonl"):
        write_from_templates(contexts, tmp_path / "out.csv")


def reply(turns) -> str:
    return json.dumps({"turns": [t._asdict() for t in turns]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("I would say it is an acid.", "another schema: reply: Invalid JSON"),
        ('{"turns": "many"}', "another schema: turns: "),
        ('{"turns": [{"question": "What?"}]}', r"another schema: turns\.0\.answer: Field required"),
        ('{"turns": [{"question": 3, "answer": "x"}]}', r"turns\.0\.question: "),
        ('{"turns": [], "note": "x"}', "another schema: note: Extra inputs"),
    ],
)
def test_replies_of_another_schema(text, message):
    pytest.importorskip("pydantic", reason="replies are checked by pydantic")
    with pytest.raises(ValueError, match=message):
        parse_reply(text)


def test_a_code_fence_is_forgiven():
    pytest.importorskip("pydantic", reason="replies are checked by pydantic")
    assert parse_reply(f"```json\n{reply([GOOD])}\n```") == [GOOD]


class Server(ThreadingHTTPServer):
    """Speaks as an OpenAI-compatible endpoint; `answers` maps a SMILES to what it does.

    An answer is a text, a status, or a list of them, one per request.
    """

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {k: v if isinstance(v, list) else [v] for k, v in answers.items()}
        self.asked, self.starts, self.busy, self.most = [], [], 0, 0
        self.lock, self.pause = threading.Lock(), 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        smiles = content["messages"][1]["content"].splitlines()[0].removeprefix("SMILES: ")
        with server.lock:
            server.asked.append((smiles, self.path, content["model"], self.headers))
            server.starts.append(time.monotonic())
            server.busy += 1
            server.most = max(server.most, server.busy)
            left = server.answers[smiles]
            answer = left.pop(0) if len(left) > 1 else left[0]
        time.sleep(server.pause)
        with server.lock:
            server.busy -= 1
        if isinstance(answer, int):
            self.respond(answer, {"error": {"message": "not now"}})
            return
        finish = "length" if answer.endswith("...") else "stop"
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        self.respond(200, {**whole, "choices": [choice]})

    def respond(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After-Ms", "1")
        # A client whose patience has ended has closed the connection.
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    pytest.importorskip("openai", reason="endpoints need the conversations extra")
    servers = []

    def start(answers) -> Server:
        server = Server(answers)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def molecules(*smiles: str) -> list[Context]:
    return [Context(f"0:{i}", smiles=s, facts={"rings": "0"}) for i, s in enumerate(smiles)]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_endpoint_is_asked_retried_checked_and_asked_again(serve, tmp_path):
    wrong = Turn("How many rings does it have?", "Three rings.")
    server = serve(
        {
            "CCCCCO": reply([GOOD]),
            "CCCCCN": [429, 500, reply([GOOD, Turn("And?", "It is basic.")])],
            "CCCCCF": "no JSON at all",
            "CCCCCS": reply([wrong]),
            "CCCCCCl": "and so on...",
            "CCCCCBr": [500] * 3 + [reply([GOOD])],
        }
    )
    out = tmp_path / "out.jsonl"
    contexts = [*molecules(*server.answers), Context("0:9", reason="unclosed ring")]
    endpoint = Endpoint(server.url, "tiny-model", "secret", concurrency=3, retries=2)
    written = generate(contexts, out, endpoint)
    assert (written.kept, written.failed) == (2, 1)
    assert dict(written.dropped) == {
        **{"another schema": 1, "contradicts RDKit": 1, "cut off": 1, "unclosed ring": 1}
    }
    assert {line["smiles"] for line in lines(out)} == {"CCCCCO", "CCCCCN"}
    dropped = {line["key"]: line for line in lines(out.with_suffix(".dropped.jsonl"))}
    assert dropped["0:2"]["said"] == "no JSON at all" and "Invalid JSON" in dropped["0:2"]["reason"]
    assert dropped["0:3"]["said"] == [list(wrong)]
    _, path, model, headers = server.asked[0]
    assert (path, model) == ("/v1/chat/completions", "tiny-model")
    assert headers["Authorization"] == "Bearer secret"

    before = len(server.asked)
    written = generate(contexts, out, endpoint)
    assert [smiles for smiles, *_ in server.asked[before:]] == ["CCCCCBr"]
    assert (written.kept, written.failed, written.dropped.total()) == (3, 0, 4)
    assert generate(contexts, out, endpoint).kept == 3 and len(server.asked) == before + 1
    with pytest.raises(ValueError, match="differs in by"):
        generate(contexts, out, Endpoint(server.url, "another"))


def test_requests_are_no_more_at_a_time_and_begin_no_faster_than_told(serve, tmp_path):
    names = [f"{'C' * n}O" for n in range(5, 13)]
    server = serve(dict.fromkeys(names, reply([GOOD])))
    server.pause = 0.05
    endpoint = Endpoint(server.url, "m", concurrency=3)
    assert generate(molecules(*names), tmp_path / "a.jsonl", endpoint).kept == 8
    assert server.most == 3
    server.starts.clear()
    paced = Endpoint(server.url, "m", concurrency=8, per_minute=1200)
    assert generate(molecules(*names), tmp_path / "b.jsonl", paced).kept == 8
    assert max(server.starts) - min(server.starts) > 0.9 * 7 * 0.05


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_everything_ends_the_run(serve, tmp_path, status):
    server = serve(dict.fromkeys(("CCCCCO", "CCCCCN", "CCCCCF"), status))
    with pytest.raises(RuntimeError, match=rf"{server.url} refuses m: "):
        generate(
            molecules(*server.answers), tmp_path / "a.jsonl", Endpoint(server.url, "m", retries=0)
        )


def test_nobody_at_the_url_is_a_failure_of_every_row(tmp_path):
    pytest.importorskip("openai", reason="endpoints need the conversations extra")
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", retries=0)
    written = generate(molecules("CCCCCO", "CCCCCN"), tmp_path / "a.jsonl", endpoint)
    assert (written.kept, written.failed) == (0, 2)


def test_options_of_an_endpoint():
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        Endpoint("http://localhost", "m", concurrency=0)
    with pytest.raises(ValueError, match="per_minute must be positive, got -1"):
        Endpoint("http://localhost", "m", per_minute=-1)


@pytest.fixture
def sample(tmp_path):
    contexts = molecules(*("C" * n + "O" for n in range(1, 21)))
    write_from_templates(contexts, tmp_path / "all.jsonl", turns=2)
    assert draw_sample(tmp_path / "all.jsonl", tmp_path / "sample.csv", count=8, seed=1) == 8
    odd = {"id": "1", "smiles": "C", "messages": [{"role": "user", "content": "a\u2028b\x85c"}]}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd, ensure_ascii=False) + "\n", "utf-8")
    assert draw_sample(tmp_path / "odd.jsonl", tmp_path / "odd.csv", count=1) == 1
    return tmp_path / "sample.csv"


def fill(path, scores: list[str]) -> None:
    rows = list(csv.DictReader(path.open(newline="")))
    for row, given in zip(rows, scores, strict=False):
        row.update(zip(RUBRIC, given.split(), strict=False))
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def test_a_sample_is_drawn_and_scored_back(sample, tmp_path):
    rows = list(csv.DictReader(sample.open(newline="")))
    assert len(rows) == 8 and len({row["id"] for row in rows}) == 8
    assert list(rows[0]) == ["id", "smiles", "conversation", *RUBRIC, "comment"]
    assert rows[0]["conversation"].startswith("user: ")
    again = tmp_path / "again.csv"
    draw_sample(tmp_path / "all.jsonl", again, count=8, seed=1)
    assert again.read_bytes() == sample.read_bytes()
    fill(sample, ["2 2 2 2", "0 2 1 2", "2 2 2 2", "1 2 2 2"])
    found = score_sample(sample)
    assert (found.count, found.unscored) == (4, 4)
    assert [a.value for a in found.means.values()] == [0.625, 1.0, 0.875, 1.0]
    assert found.faultless.value == 0.5
    correct = found.means["correct"]
    assert 0 <= correct.low < 0.625 < correct.high <= 1


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["2 2 2 2", "2 3 2 2"], "row 2, grounded must be one of 0, 1, 2, got '3'"),
        (["2 2 2"], "row 1, fluent must be one of 0, 1, 2, got ''"),
        ([], "has no scores"),
    ],
)
def test_scores_that_are_none_are_named(sample, scores, message):
    fill(sample, scores)
    with pytest.raises(ValueError, match=message):
        score_sample(sample)


def test_tables_and_files_that_are_none(tmp_path):
    (tmp_path / "a.csv").write_text("id,correct\n1,2\n")
    with pytest.raises(ValueError, match="has no column 'grounded'"):
        score_sample(tmp_path / "a.csv")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="must have conversations, there are none"):
        draw_sample(tmp_path / "none.jsonl", tmp_path / "b.csv", count=1)
