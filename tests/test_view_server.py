"""The server of the page of runs: what it reads, and what it answers to whom."""

import base64
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from made_up_run import made_up_run, question_rows, write_rollouts
from page_parts import part_of, unpacked

from fr3e_jax.config import ConfigError
from fr3e_jax.view.parts import PageParts
from fr3e_jax.view.runs import read_run
from fr3e_jax.view.server import PageServer


@pytest.fixture
def served(tmp_path):
    """A run, and the address of its page."""
    run = made_up_run(tmp_path / "run", steps=2, kept=(1,), questions=1)
    server = PageServer(0, lambda: PageParts([read_run(str(run), "run")]), "run")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield run, server.address
    server.shutdown()
    server.server_close()
    thread.join()


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return answer.read().decode()


def test_a_served_page_reads_the_run_again_when_it_is_opened(served):
    run, address = served
    assert part_of(get(address), "runs")[0]["runs"][0]["kept"] == [1]
    write_rollouts(run, 2, question_rows(np.random.default_rng(0), 2, 5, 0.5))
    assert part_of(get(address), "runs")[0]["runs"][0]["kept"] == [1, 2]
    code = get(f"{address}parts/0/2/0.js")
    assert unpacked(base64.b64decode(code.split('"')[3]))[0]["query"] == 5
    assert code in get(f"{address}parts/0/2/index.js")  # the step is small


@pytest.mark.parametrize("path", ["parts/0/9/0.js", "parts/1/1/0.js", "parts/0/1/7.js", "parts/../run", "x"])
def test_a_server_gives_nothing_but_the_page_and_its_parts(served, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(served[1] + path)


def test_a_server_answers_no_other_name(served):
    """So that a page of a site whose name is made to lead here reads nothing."""
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(served[1], Host="evil.example:8421")


def test_a_taken_port_is_a_mistake(served):
    port = int(served[1].rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match="choose another --port"):
        PageServer(port, lambda: None, "")
