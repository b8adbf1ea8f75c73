"""What workers may ask of the core, and what becomes of their jobs."""

import pytest

from django_gearman.protocol.packets import PacketType
from django_gearman.server.options import FunctionOrder

from .harness import Caller, Wire, handle

P = PacketType
MISSING = b"Job does not exist on server"
NOT_FOUND = b"Job given in work result not found"
NO_EXCEPTION = b"An exception was received for a job that does not exist"


def submit(wire: Wire, *functions: bytes, kind: PacketType = P.SUBMIT_JOB_BG) -> None:
    client = wire.connect()
    for function in functions:
        client(kind, function, b"", b"")


class TestAbilities:
    """PROTOCOL section 3: CAN_DO, CANT_DO, RESET_ABILITIES."""

    def test_worker_gets_only_what_it_offers(self):
        wire = Wire()
        submit(wire, b"f")
        worker = wire.worker(b"g")
        assert worker.grabs() is None
        worker(P.CAN_DO, b"f")
        assert worker.grabs() == handle(1)

    def test_function_is_registered_once(self):
        wire = Wire()
        worker = wire.worker(b"f", b"f")
        assert worker.line(b"status") == b"f\t0\t0\t1\n.\n"
        assert worker.line(b"workers") == b"1 127.0.0.1 - : f\n.\n"

    def test_withdrawn_function_is_not_served(self):
        wire = Wire()
        worker = wire.worker(b"f", b"g")
        assert worker(P.CANT_DO, b"f") == []
        submit(wire, b"f", b"g")
        assert worker.grabs() == handle(2)
        assert worker.grabs() is None

    def test_withdrawing_what_was_not_offered_is_silent(self):
        assert Wire().connect()(P.CANT_DO, b"f") == []
        assert Wire().connect()(P.RESET_ABILITIES) == []

    def test_reset_withdraws_everything(self):
        wire = Wire()
        worker = wire.worker(b"f", b"g")
        worker(P.RESET_ABILITIES)
        submit(wire, b"f", b"g")
        assert worker.grabs() is None
        assert worker.line(b"status") == b"f\t1\t0\t0\ng\t1\t0\t0\n.\n"

    @pytest.mark.parametrize(("kind", "arguments"), [(P.CANT_DO, [b"f"]), (P.RESET_ABILITIES, [])])
    def test_withdrawing_gives_running_jobs_back(self, kind, arguments):
        wire = Wire()
        submit(wire, b"f", b"f")
        worker = wire.worker(b"f")
        assert [worker.grabs(), worker.grabs()] == [handle(1), handle(2)]
        assert worker(kind, *arguments) == []
        assert worker(P.WORK_COMPLETE, handle(1), b"") == [(P.ERROR, b"JOB_NOT_FOUND", NOT_FOUND)]
        other = wire.worker(b"f")
        assert [other.grabs(), other.grabs()] == [handle(1), handle(2)]

    def test_withdrawing_one_function_keeps_the_jobs_of_others(self):
        wire = Wire()
        submit(wire, b"f", b"g")
        worker = wire.worker(b"f", b"g")
        worker.grabs(), worker.grabs()
        worker(P.CANT_DO, b"f")
        assert worker(P.WORK_COMPLETE, handle(2), b"") == []


class TestGrabbing:
    """PROTOCOL section 3: GRAB_JOB, GRAB_JOB_UNIQ, GRAB_JOB_ALL."""

    @pytest.mark.parametrize("kind", [P.GRAB_JOB, P.GRAB_JOB_UNIQ, P.GRAB_JOB_ALL])
    def test_no_job(self, kind):
        assert Wire().worker(b"f")(kind) == [(P.NO_JOB,)]
        assert Wire().connect()(kind) == [(P.NO_JOB,)]

    @pytest.mark.parametrize(
        ("kind", "answer"),
        [
            (P.GRAB_JOB, (P.JOB_ASSIGN, handle(1), b"f", b"w\0")),
            (P.GRAB_JOB_UNIQ, (P.JOB_ASSIGN_UNIQ, handle(1), b"f", b"u", b"w\0")),
            (P.GRAB_JOB_ALL, (P.JOB_ASSIGN_UNIQ, handle(1), b"f", b"u", b"w\0")),
        ],
    )
    def test_assignment(self, kind, answer):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB, b"f", b"u", b"w\0")
        assert wire.worker(b"f")(kind) == [answer]

    def test_worker_may_hold_several_jobs_and_end_them_in_any_order(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        for _ in range(3):
            client(P.SUBMIT_JOB, b"f", b"", b"")
        client.hears()
        assert [worker.grabs() for _ in range(4)] == [handle(1), handle(2), handle(3), None]
        for number in (3, 1, 2):
            assert worker(P.WORK_COMPLETE, handle(number), b"") == []
        assert [heard[1] for heard in client.hears()] == [handle(3), handle(1), handle(2)]

    def test_connection_may_serve_its_own_jobs(self):
        both = Wire().worker(b"f")
        both(P.SUBMIT_JOB, b"f", b"", b"")
        assert both.grabs() == handle(1)
        assert both(P.WORK_COMPLETE, handle(1), b"r") == [(P.WORK_COMPLETE, handle(1), b"r")]


class TestOrder:
    """PROTOCOL section 5.3; priority counts across functions, which take turns, as in gearmand 2.0."""

    def test_high_before_normal_before_low_and_in_turn_within_each(self):
        wire = Wire()
        client = wire.connect()
        for kind in (P.SUBMIT_JOB_LOW_BG, P.SUBMIT_JOB, P.SUBMIT_JOB_HIGH_BG) * 2:
            client(kind, b"f", b"", b"")
        worker = wire.worker(b"f")
        assert [worker.grabs() for _ in range(6)] == [handle(n) for n in (3, 6, 2, 5, 1, 4)]

    def test_priority_counts_across_functions(self):
        wire = Wire()
        submit(wire, b"a", kind=P.SUBMIT_JOB_LOW)
        submit(wire, b"b", kind=P.SUBMIT_JOB)
        submit(wire, b"c", kind=P.SUBMIT_JOB_HIGH)
        for order in ((b"a", b"b", b"c"), (b"c", b"b", b"a")):
            worker = wire.worker(*order)
            (first,) = worker(P.GRAB_JOB)
            assert first[2] == b"c"
            worker.leaves()

    def test_functions_of_equal_priority_take_turns(self):
        wire = Wire()
        submit(wire, *[b"a"] * 3, *[b"b"] * 3, *[b"c"] * 3)
        worker = wire.worker(b"a", b"b", b"c")
        order = [worker(P.GRAB_JOB)[0][2] for _ in range(9)]
        assert sorted(order[:3]) == sorted(order[3:6]) == sorted(order[6:]) == [b"a", b"b", b"c"]

    def test_busy_function_does_not_starve_another(self):
        wire = Wire()
        submit(wire, *[b"a"] * 5)
        worker = wire.worker(b"a", b"b")
        worker.grabs(), worker.grabs()
        submit(wire, b"b")
        assert worker(P.GRAB_JOB)[0][2] == b"b"

    def test_few_ready_functions_among_many_offered(self):
        wire = Wire()
        worker = wire.worker(*[b"f%d" % number for number in range(50)])
        submit(wire, b"f33", b"f7", b"not offered")
        assert {worker(P.GRAB_JOB)[0][2], worker(P.GRAB_JOB)[0][2]} == {b"f33", b"f7"}
        assert worker.grabs() is None

    def test_jobs_of_a_lost_worker_go_to_the_front_in_their_old_order(self):
        wire = Wire()
        submit(wire, *[b"f"] * 4)
        submit(wire, b"f", kind=P.SUBMIT_JOB_HIGH_BG)
        lost = wire.worker(b"f")
        assert [lost.grabs() for _ in range(3)] == [handle(5), handle(1), handle(2)]
        lost.leaves()
        worker = wire.worker(b"f")
        assert [worker.grabs() for _ in range(6)] == [handle(n) for n in (5, 1, 2, 3, 4)] + [None]


class TestResults:
    """PROTOCOL section 3: WORK_STATUS, WORK_DATA, WORK_WARNING, WORK_COMPLETE, WORK_FAIL."""

    @pytest.fixture
    def wire(self):
        return Wire()

    @pytest.fixture
    def client(self, wire):
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"")
        return client

    @pytest.fixture
    def worker(self, wire, client):
        worker = wire.worker(b"f")
        worker.grabs()
        return worker

    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            (P.WORK_STATUS, [b"one", b"100"]),
            (P.WORK_DATA, [b"\0x\0"]),
            (P.WORK_WARNING, [b"oh\n"]),
            (P.WORK_COMPLETE, [b"\0\0"]),
            (P.WORK_FAIL, []),
        ],
    )
    def test_packet_is_passed_on_byte_for_byte(self, client, worker, kind, arguments):
        assert worker(kind, handle(1), *arguments) == []
        assert client.hears() == [(kind, handle(1), *arguments)]

    @pytest.mark.parametrize(("kind", "arguments"), [(P.WORK_COMPLETE, [b""]), (P.WORK_FAIL, [])])
    def test_final_packet_is_the_last(self, client, worker, kind, arguments):
        worker(kind, handle(1), *arguments)
        client.hears()
        refused = [(P.ERROR, b"JOB_NOT_FOUND", NOT_FOUND)]
        assert worker(P.WORK_COMPLETE, handle(1), b"") == refused
        assert worker(P.WORK_FAIL, handle(1)) == refused
        assert worker(P.WORK_STATUS, handle(1), b"1", b"2") == refused
        assert worker(P.WORK_DATA, handle(1), b"") == [(P.ERROR, b"JOB_NOT_FOUND", MISSING)]
        assert client.hears() == []

    def test_work_fail_with_a_nul_is_passed_on_without_it(self, client, worker):
        assert worker(P.WORK_FAIL, handle(1) + b"\0") == []
        assert client.takes() == b"\0RES\0\0\0\x0e\0\0\0" + bytes([len(handle(1))]) + handle(1)

    @pytest.mark.parametrize(
        ("kind", "arguments", "text"),
        [
            (P.WORK_DATA, [b"x"], MISSING),
            (P.WORK_WARNING, [b"x"], MISSING),
            (P.WORK_STATUS, [b"1", b"2"], NOT_FOUND),
            (P.WORK_COMPLETE, [b"x"], NOT_FOUND),
            (P.WORK_FAIL, [], NOT_FOUND),
            (P.WORK_EXCEPTION, [b"x"], NO_EXCEPTION),
        ],
    )
    def test_results_count_only_from_the_worker_that_holds_the_job(
        self, wire, client, worker, kind, arguments, text
    ):
        refused = [(P.ERROR, b"JOB_NOT_FOUND", text)]
        for stranger in (client, wire.worker(b"f")):
            assert stranger(kind, handle(1), *arguments) == refused
        for unknown in (b"H:no:1", b""):
            assert worker(kind, unknown, *arguments) == refused
        assert client.hears() == []
        assert worker(P.WORK_COMPLETE, handle(1), b"") == []


class TestExceptions:
    """PROTOCOL section 3, "WORK_EXCEPTION", and section 12 on Perl's workers."""

    def run(self, wire, client):
        worker = wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        assert worker(P.WORK_EXCEPTION, handle(1), b"boom\0") == []
        return worker

    def test_passed_on_to_who_asked(self):
        wire = Wire()
        client = wire.connect()
        client(P.OPTION_REQ, b"exceptions")
        self.run(wire, client)
        assert client.hears() == [(P.WORK_EXCEPTION, handle(1), b"boom\0")]

    def test_passed_on_to_all_when_the_server_is_told_to(self):
        wire = Wire(exceptions=True)
        client = wire.connect()
        self.run(wire, client)
        assert client.hears() == [(P.WORK_EXCEPTION, handle(1), b"boom\0")]

    def test_others_hear_work_fail_without_a_nul(self):
        wire = Wire()
        client = wire.connect()
        self.run(wire, client)
        assert client.hears() == [(P.WORK_FAIL, handle(1))]

    def test_work_fail_after_it_is_passed_over(self):
        wire = Wire()
        client = wire.connect()
        worker = self.run(wire, client)
        client.hears()
        assert worker(P.WORK_FAIL, handle(1)) == []
        assert client.hears() == []

    def test_other_results_after_it_are_not(self):
        wire = Wire()
        worker = self.run(wire, wire.connect())
        assert worker(P.WORK_COMPLETE, handle(1), b"") == [(P.ERROR, b"JOB_NOT_FOUND", NOT_FOUND)]
        assert wire.connect()(P.WORK_FAIL, handle(1)) == [(P.ERROR, b"JOB_NOT_FOUND", NOT_FOUND)]


class TestLostWorker:
    """PROTOCOL section 5.5."""

    @pytest.mark.parametrize("kind", [P.SUBMIT_JOB, P.SUBMIT_JOB_BG])
    def test_job_is_handed_out_again_and_clients_hear_nothing(self, kind):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(kind, b"f", b"", b"w")
        worker.grabs()
        worker.leaves()
        assert client.hears() == []
        assert wire.worker(b"f")(P.GRAB_JOB) == [(P.JOB_ASSIGN, handle(1), b"f", b"w")]

    @pytest.mark.parametrize("retries", [1, 2, 5])
    def test_job_fails_when_it_lost_as_many_workers_as_allowed(self, retries):
        wire = Wire(job_retries=retries)
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"")
        for _ in range(retries):
            assert client.hears() == []
            worker = wire.worker(b"f")
            assert worker.grabs() == handle(1)
            worker.leaves()
        assert client.hears() == [(P.WORK_FAIL, handle(1))]
        assert wire.worker(b"f").grabs() is None
        assert wire.core.jobs == {}

    def test_without_a_limit_it_goes_on(self):
        wire = Wire(job_retries=0)
        submit(wire, b"f")
        for _ in range(50):
            worker = wire.worker(b"f")
            assert worker.grabs() == handle(1)
            worker.leaves()

    def test_failure_that_a_worker_reports_is_never_tried_again(self):
        wire = Wire(job_retries=5)
        submit(wire, b"f")
        worker = wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_FAIL, handle(1))
        assert worker.grabs() is None

    def test_client_that_is_the_worker_too(self):
        wire = Wire()
        both = wire.worker(b"f")
        both(P.SUBMIT_JOB, b"f", b"", b"")
        both.grabs()
        both.leaves()
        assert wire.core.jobs == {}
        assert wire.core.peers == {}


class TestOrderOfGearmand:
    """PROTOCOL section 5.3 as gearmand 1.1 has it, for those who ask for it."""

    def fill(self, wire: Wire) -> None:
        client = wire.connect()
        for kind in (P.SUBMIT_JOB_LOW_BG, P.SUBMIT_JOB_BG, P.SUBMIT_JOB_HIGH_BG):
            for function in (b"a", b"b", b"c"):
                client(kind, function, b"", b"%d" % kind)

    def given(self, worker: Caller) -> list[bytes]:
        given = []
        while (heard := worker(P.GRAB_JOB)[0]) != (P.NO_JOB,):
            given.append(heard[2])
        return given

    def test_last_registered_first_whatever_the_priorities(self):
        wire = Wire(function_order=FunctionOrder.GEARMAND)
        self.fill(wire)
        worker = wire.worker(b"a", b"b", b"c")
        assert self.given(worker) == [b"c"] * 3 + [b"b"] * 3 + [b"a"] * 3

    def test_priority_counts_inside_a_function(self):
        wire = Wire(function_order=FunctionOrder.GEARMAND)
        self.fill(wire)
        worker = wire.worker(b"a")
        assert [worker(P.GRAB_JOB)[0][3] for _ in range(3)] == [b"32", b"18", b"34"]

    def test_round_robin_puts_behind_what_gave_a_job(self):
        wire = Wire(function_order=FunctionOrder.ROUND_ROBIN)
        self.fill(wire)
        worker = wire.worker(b"a", b"b", b"c")
        assert self.given(worker) == [b"c", b"b", b"a"] * 3
        assert worker.line(b"workers").splitlines()[1].endswith(b" c b a")

    def test_each_worker_has_a_round_of_its_own(self):
        wire = Wire(function_order=FunctionOrder.ROUND_ROBIN)
        self.fill(wire)
        one, other = wire.worker(b"a", b"b", b"c"), wire.worker(b"a", b"b", b"c")
        assert [one(P.GRAB_JOB)[0][2], other(P.GRAB_JOB)[0][2]] == [b"c", b"c"]
        assert [one(P.GRAB_JOB)[0][2], other(P.GRAB_JOB)[0][2]] == [b"b", b"b"]

    @pytest.mark.parametrize("order", [FunctionOrder.GEARMAND, FunctionOrder.ROUND_ROBIN])
    def test_jobs_of_a_lost_worker_go_to_the_end_the_last_grabbed_first(self, order):
        wire = Wire(function_order=order)
        client = wire.connect()
        for _ in range(4):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        worker = wire.worker(b"f")
        assert [worker.grabs(), worker.grabs()] == [handle(1), handle(2)]
        worker.leaves()
        other = wire.worker(b"f")
        assert [other.grabs() for _ in range(4)] == [handle(3), handle(4), handle(2), handle(1)]

    def test_ability_can_be_withdrawn_in_any_round(self):
        wire = Wire(function_order=FunctionOrder.ROUND_ROBIN)
        self.fill(wire)
        worker = wire.worker(b"a", b"b", b"c")
        assert worker(P.GRAB_JOB)[0][2] == b"c"
        worker(P.CANT_DO, b"b")
        assert self.given(worker) == [b"a", b"c", b"a", b"c", b"a"]
