"""The picture of a match's course."""

from __future__ import annotations

from c2m3_fl.cli.convergence import draw_convergence
from c2m3_fl.core.match import match
from tests.core.networks import mlp, planted


def test_the_course_of_a_match_becomes_a_picture(tmp_path):
    spec = mlp(6, 8, 8, 3)
    steps = []
    match(spec, planted(spec, 3, 0.5, seed=0)[0], callback=steps.append)
    draw_convergence(steps, tmp_path / "course.png")
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")
