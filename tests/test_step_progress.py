"""Progress within a step: anew on a terminal, a line a minute elsewhere."""

from fr3e_jax.run.step_progress import StepProgress


class Watched:
    """A step's progress with a clock that is set by hand."""

    def __init__(self, terminal):
        self.now, self.said, self.shown = 0.0, [], []
        show = self.shown.append if terminal else None
        self.progress = StepProgress(self.said.append, show, clock=lambda: self.now)


def test_on_a_terminal_every_change_is_shown_and_no_line_is_left():
    watched = Watched(terminal=True)
    progress = watched.progress
    progress.begin(3, states=2, wanted=64)
    progress.round(1, most=16)
    progress.rows(running=80, rows=128, tokens=1_234)
    progress.states(40)
    progress.end()
    progress.rows(running=1, rows=2, tokens=3)  # of an evaluation
    states = "2 of 64 states that carry a gradient"
    assert watched.shown == [
        f"step 3, {states}",
        f"step 3, round 1 of at most 16, {states}",
        f"step 3, round 1 of at most 16, {states}, 80 of 128 rows running at token 1,234",
        "step 3, round 1 of at most 16, 40 of 64 states that carry a gradient, 80 of 128 rows running "
        "at token 1,234",
        "",
    ]
    assert watched.said == []


def test_elsewhere_there_is_a_line_a_minute():
    watched = Watched(terminal=False)
    progress = watched.progress
    progress.begin(1, 0, 8)
    progress.round(1, 4)
    for watched.now in range(0, 200, 10):
        progress.rows(5, 8, watched.now)
    assert [line.rpartition("token ")[2] for line in watched.said] == ["60", "120", "180"]
    progress.end()
    watched.now = 250
    progress.begin(2, 0, 8)  # a new step: its first minute is silent
    progress.round(1, 4)
    watched.now = 305
    progress.rows(5, 8, 1)
    assert len(watched.said) == 3


def test_a_long_search_is_told_round_by_round_on_both():
    for terminal in (True, False):
        watched = Watched(terminal)
        watched.progress.begin(7, 0, 64)
        for number in range(1, 7):
            watched.progress.round(number, 16)
            watched.progress.rows(1, 2, 3)
            watched.progress.states(number)
        assert watched.said == [
            f"step 7, round {number} of at most 16, {number} of 64 states that carry a gradient"
            for number in (4, 5, 6)
        ]
