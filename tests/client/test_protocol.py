"""``ClientProtocol``: which answer belongs to which request, without a socket."""

from __future__ import annotations

import pytest

from django_gearman.client.core import ClientProtocol, JobRequest
from django_gearman.exceptions import ProtocolError
from django_gearman.protocol.packets import PacketType, encode_request

P = PacketType


@pytest.fixture
def protocol() -> ClientProtocol:
    return ClientProtocol()


def submitted(protocol: ClientProtocol, handle: bytes = b"H:1", **options: object) -> JobRequest:
    request = JobRequest(function=b"reverse", **options)
    protocol.submit(request)
    protocol.receive((P.JOB_CREATED, [handle]))
    return request


class TestSubmissions:
    @pytest.mark.parametrize(
        ("priority", "background", "kind"),
        [
            ("high", False, P.SUBMIT_JOB_HIGH),
            ("normal", False, P.SUBMIT_JOB),
            ("low", False, P.SUBMIT_JOB_LOW),
            ("high", True, P.SUBMIT_JOB_HIGH_BG),
            ("normal", True, P.SUBMIT_JOB_BG),
            ("low", True, P.SUBMIT_JOB_LOW_BG),
        ],
    )
    def test_each_has_its_packet(
        self, protocol: ClientProtocol, priority: str, background: bool, kind: PacketType
    ) -> None:
        request = JobRequest(
            function=b"f", unique=b"u", workload=b"w\0w", priority=priority, background=background
        )
        assert protocol.submit(request) == encode_request(kind, b"f", b"u", b"w\0w")

    def test_a_job_for_later(self, protocol: ClientProtocol) -> None:
        """PROTOCOL 2: SUBMIT_JOB_EPOCH."""
        request = JobRequest(
            function=b"f", unique=b"u", workload=b"w\0w", background=True, epoch=1_800_000_000
        )
        assert protocol.submit(request) == encode_request(
            P.SUBMIT_JOB_EPOCH, b"f", b"u", b"1800000000", b"w\0w"
        )

    @pytest.mark.parametrize(
        ("background", "kind"),
        [(False, P.SUBMIT_REDUCE_JOB), (True, P.SUBMIT_REDUCE_JOB_BACKGROUND)],
    )
    def test_a_reduce_job(self, protocol: ClientProtocol, background: bool, kind: PacketType) -> None:
        """PROTOCOL 3, "Reduce jobs": gearmand wants the fourth argument that its document leaves out."""
        request = JobRequest(
            function=b"f", unique=b"u", workload=b"w\0w", background=background, reducer=b"r"
        )
        assert protocol.submit(request) == encode_request(kind, b"f", b"u", b"r", b"", b"w\0w")

    def test_answers_come_in_order(self, protocol: ClientProtocol) -> None:
        first, second = JobRequest(function=b"a"), JobRequest(function=b"b")
        protocol.submit(first)
        question, data = protocol.ask(P.ECHO_REQ, b"x", answers=P.ECHO_RES)
        protocol.submit(second)
        assert data == encode_request(P.ECHO_REQ, b"x")
        protocol.receive((P.JOB_CREATED, [b"H:1"]))
        protocol.receive((P.ECHO_RES, [b"x"]))
        protocol.receive((P.JOB_CREATED, [b"H:2"]))
        assert (first.handle, question.answer, second.handle) == (b"H:1", (P.ECHO_RES, [b"x"]), b"H:2")

    def test_a_refusal_is_of_one(self, protocol: ClientProtocol) -> None:
        refused, taken = JobRequest(function=b"a"), JobRequest(function=b"b")
        protocol.submit(refused)
        protocol.submit(taken)
        protocol.receive((P.ERROR, [b"CODE", b"text"]))
        protocol.receive((P.JOB_CREATED, [b"H:1"]))
        assert (refused.error, refused.handle, taken.handle) == ((b"CODE", b"text"), None, b"H:1")


class TestWork:
    @pytest.mark.parametrize(
        ("packet", "data"),
        [
            ((P.WORK_COMPLETE, [b"H:1", b"r"]), b"r"),
            ((P.WORK_FAIL, [b"H:1"]), b""),
            ((P.WORK_FAIL, [b"H:1\0"]), b""),
            ((P.WORK_EXCEPTION, [b"H:1", b"e"]), b"e"),
        ],
    )
    def test_an_end(
        self, protocol: ClientProtocol, packet: tuple[PacketType, list[bytes]], data: bytes
    ) -> None:
        request = submitted(protocol)
        protocol.receive(packet)
        assert (request.outcome, request.data) == (packet[0], data)

    def test_the_first_end_counts(self, protocol: ClientProtocol) -> None:
        request = submitted(protocol)
        protocol.receive((P.WORK_EXCEPTION, [b"H:1", b"e"]))
        protocol.receive((P.WORK_FAIL, [b"H:1"]))
        assert request.outcome == P.WORK_EXCEPTION

    def test_parts_go_to_the_callbacks(self, protocol: ClientProtocol) -> None:
        told: list[object] = []
        request = submitted(
            protocol,
            on_data=told.append,
            on_warning=told.append,
            on_status=lambda numerator, denominator: told.append((numerator, denominator)),
        )
        protocol.receive((P.WORK_DATA, [b"H:1", b"d"]))
        protocol.receive((P.WORK_WARNING, [b"H:1", b"w"]))
        protocol.receive((P.WORK_STATUS, [b"H:1", b"1", b"2"]))
        assert told == [b"d", b"w", (b"1", b"2")]
        assert request.outcome is None

    def test_parts_without_callbacks_are_dropped(self, protocol: ClientProtocol) -> None:
        submitted(protocol)
        protocol.receive((P.WORK_DATA, [b"H:1", b"d"]))
        protocol.receive((P.WORK_STATUS, [b"H:1", b"1", b"2"]))

    def test_two_requests_of_one_handle_hear_the_same(self, protocol: ClientProtocol) -> None:
        """The server sends each packet once per submission."""
        first_parts: list[bytes] = []
        second_parts: list[bytes] = []
        first = submitted(protocol, on_data=first_parts.append)
        second = submitted(protocol, on_data=second_parts.append)
        for part in (b"1", b"1", b"2", b"2"):
            protocol.receive((P.WORK_DATA, [b"H:1", part]))
        protocol.receive((P.WORK_COMPLETE, [b"H:1", b"r"]))
        assert (first.outcome is None) != (second.outcome is None)
        protocol.receive((P.WORK_COMPLETE, [b"H:1", b"r"]))
        assert first.data == second.data == b"r"
        assert first_parts == second_parts == [b"1", b"2"]

    def test_background_jobs_end_unheard(self, protocol: ClientProtocol) -> None:
        request = submitted(protocol, background=True)
        protocol.receive((P.WORK_COMPLETE, [b"H:1", b"r"]))
        assert request.outcome is None

    def test_unknown_handles_are_passed_over(self, protocol: ClientProtocol) -> None:
        protocol.receive((P.WORK_COMPLETE, [b"H:9", b"r"]))


class TestNonsense:
    def test_an_answer_to_nothing(self, protocol: ClientProtocol) -> None:
        with pytest.raises(ProtocolError, match="what was not asked"):
            protocol.receive((P.ECHO_RES, [b"x"]))

    def test_another_answer(self, protocol: ClientProtocol) -> None:
        protocol.ask(P.ECHO_REQ, b"x", answers=P.ECHO_RES)
        with pytest.raises(ProtocolError, match="another answer"):
            protocol.receive((P.JOB_CREATED, [b"H:1"]))

    def test_another_answer_to_a_job(self, protocol: ClientProtocol) -> None:
        protocol.submit(JobRequest(function=b"f"))
        with pytest.raises(ProtocolError, match="another answer than JOB_CREATED"):
            protocol.receive((P.ECHO_RES, [b"x"]))

    @pytest.mark.parametrize("number", [b"", b"abc", b"-1", b"9" * 5000])
    @pytest.mark.parametrize(
        ("asked", "answers", "after"),
        [(P.GET_STATUS, P.STATUS_RES, []), (P.GET_STATUS_UNIQUE, P.STATUS_RES_UNIQUE, [b"0"])],
    )
    def test_a_progress_that_is_no_number(
        self,
        protocol: ClientProtocol,
        asked: PacketType,
        answers: PacketType,
        after: list[bytes],
        number: bytes,
    ) -> None:
        protocol.ask(asked, b"H:1", answers=answers)
        with pytest.raises(ProtocolError, match="no numbers"):
            protocol.receive((answers, [b"H:1", b"1", b"1", b"1", number, *after]))

    def test_a_noop_is_nothing(self, protocol: ClientProtocol) -> None:
        protocol.receive((P.NOOP, []))
