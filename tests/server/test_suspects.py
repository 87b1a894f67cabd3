from __future__ import annotations

from server.suspects import REFUSED_SECONDS, Suspects


def test_two_deaths_convict_and_time_acquits() -> None:
    suspects = Suspects()
    suspects.accuse([b"poison", b"poison", b"beside"], 0.0)
    assert not suspects.convict(b"poison", 1.0)
    suspects.accuse([b"poison", b"another"], 100.0)
    assert suspects.convict(b"poison", 100.0)
    assert not suspects.convict(b"beside", 100.0)
    assert not suspects.convict(b"another", 100.0)
    assert suspects.convict(b"poison", 99.0 + REFUSED_SECONDS)
    assert not suspects.convict(b"poison", 100.0 + REFUSED_SECONDS)
    suspects.accuse([b"poison"], 200.0 + REFUSED_SECONDS)
    assert not suspects.convict(b"poison", 200.0 + REFUSED_SECONDS)
