"""What clients may ask of the core."""

import pytest

from django_gearman.protocol.packets import CLAIM, PacketType
from django_gearman.server.entries import StoredJob

from .harness import Wire, handle

P = PacketType
FOREGROUND = [P.SUBMIT_JOB, P.SUBMIT_JOB_HIGH, P.SUBMIT_JOB_LOW]
BACKGROUND = [P.SUBMIT_JOB_BG, P.SUBMIT_JOB_HIGH_BG, P.SUBMIT_JOB_LOW_BG]
NOT_FOUND = (P.ERROR, b"JOB_NOT_FOUND", b"Job given in work result not found")
UNEXPECTED = (P.ERROR, b"INVALID_COMMAND", b"Command not expected")


class TestSubmission:
    """PROTOCOL section 3, "SUBMIT_JOB family"."""

    @pytest.mark.parametrize("kind", FOREGROUND + BACKGROUND)
    def test_client_hears_the_handle(self, kind):
        client = Wire().connect()
        assert client(kind, b"reverse", b"u", b"abc") == [(P.JOB_CREATED, handle(1))]
        assert client(kind, b"reverse", b"v", b"abc") == [(P.JOB_CREATED, handle(2))]

    @pytest.mark.parametrize("kind", FOREGROUND + BACKGROUND)
    def test_job_reaches_a_worker_as_it_was_sent(self, kind):
        wire = Wire()
        wire.connect()(kind, b"reverse", b"u", b"\0a\0")
        worker = wire.worker(b"reverse")
        assert worker(P.GRAB_JOB_UNIQ) == [(P.JOB_ASSIGN_UNIQ, handle(1), b"reverse", b"u", b"\0a\0")]

    @pytest.mark.parametrize("kind", FOREGROUND)
    def test_foreground_client_hears_the_worker(self, kind):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(kind, b"f", b"", b"")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"cba")
        assert client.hears() == [(P.WORK_COMPLETE, handle(1), b"cba")]

    @pytest.mark.parametrize("kind", BACKGROUND)
    def test_background_client_hears_nothing_more(self, kind):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(kind, b"f", b"", b"")
        worker.grabs()
        worker(P.WORK_STATUS, handle(1), b"1", b"2")
        worker(P.WORK_COMPLETE, handle(1), b"cba")
        assert client.hears() == []

    def test_empty_function_and_unique_are_accepted(self):
        wire = Wire()
        assert wire.connect()(P.SUBMIT_JOB, b"", b"", b"") == [(P.JOB_CREATED, handle(1))]
        assert wire.worker(b"")(P.GRAB_JOB_UNIQ) == [(P.JOB_ASSIGN_UNIQ, handle(1), b"", b"", b"")]

    def test_longest_unique_is_kept_whole_and_a_longer_one_refused(self):
        wire = Wire(max_unique=64)
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u" * 64, b"")
        assert wire.worker(b"f")(P.GRAB_JOB_UNIQ)[0][3] == b"u" * 64
        refused = client(P.SUBMIT_JOB, b"f", b"u" * 65, b"")
        assert refused == [(P.ERROR, b"ARGUMENT_TOO_LARGE", b"Unique value too large")]

    def test_longest_function_name_is_kept_and_a_longer_one_refused(self):
        client = Wire(max_function=16).connect()
        assert client(P.SUBMIT_JOB, b"f" * 16, b"", b"")[0][0] == P.JOB_CREATED
        assert client(P.SUBMIT_JOB, b"f" * 17, b"", b"")[0][:2] == (P.ERROR, b"ARGUMENT_TOO_LARGE")
        assert client(P.CAN_DO, b"f" * 17)[0][:2] == (P.ERROR, b"ARGUMENT_TOO_LARGE")

    @pytest.mark.parametrize("name", [b"a\nb", b"a\tb", b"\x7f", b"\xff", "\x85".encode(), b"a\rb"])
    def test_function_name_that_would_forge_a_listing_is_refused(self, name):
        wire = Wire()
        client = wire.connect()
        assert client(P.SUBMIT_JOB, name, b"", b"")[0][:2] == (P.ERROR, b"INVALID_FUNCTION_NAME")
        assert client(P.CAN_DO, name)[0][:2] == (P.ERROR, b"INVALID_FUNCTION_NAME")
        assert client.line(b"status") == b".\n"

    def test_function_name_may_be_utf_8(self):
        assert Wire().connect()(P.SUBMIT_JOB, "größe 漢字".encode(), b"", b"")[0][0] == P.JOB_CREATED

    def test_refused_submission_leaves_the_state_as_it_was(self):
        wire = Wire(max_unique=4, durable=True)
        client = wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"12345", b"")
        assert wire.core.jobs == {}
        assert wire.entries() == []
        assert client.line(b"status") == b"f\t0\t0\t1\n.\n"

    def test_handles_of_two_epochs_differ(self):
        assert handle(1) == Wire().connect()(P.SUBMIT_JOB, b"f", b"", b"")[0][1]
        assert handle(1).startswith(b"H:test:1:7.")

    def test_handles_begin_as_the_server_is_told(self):
        """PROTOCOL section 7, --job-handle-prefix."""
        wire = Wire(handle_prefix="mine:3-7.")
        assert wire.connect()(P.SUBMIT_JOB, b"f", b"", b"") == [(P.JOB_CREATED, b"mine:3-7.1")]


class TestCoalescing:
    """PROTOCOL section 5.1."""

    @pytest.mark.parametrize("first", FOREGROUND + BACKGROUND)
    @pytest.mark.parametrize("second", [P.SUBMIT_JOB, P.SUBMIT_JOB_HIGH, P.SUBMIT_JOB_HIGH_BG])
    def test_same_unique_joins_the_waiting_job(self, first, second):
        wire = Wire()
        wire.connect()(first, b"f", b"u", b"first")
        assert wire.connect()(second, b"f", b"u", b"second") == [(P.JOB_CREATED, handle(1))]
        worker = wire.worker(b"f")
        assert worker(P.GRAB_JOB) == [(P.JOB_ASSIGN, handle(1), b"f", b"first")]
        assert worker(P.GRAB_JOB) == [(P.NO_JOB,)]

    def test_priority_of_the_second_is_ignored(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB_LOW, b"f", b"u", b"")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        client(P.SUBMIT_JOB_HIGH, b"f", b"u", b"")
        assert wire.worker(b"f").grabs() == handle(2)

    def test_same_unique_joins_the_running_job(self):
        wire = Wire()
        worker = wire.worker(b"f")
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        worker.grabs()
        late = wire.connect()
        assert late(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(1))]
        worker(P.WORK_COMPLETE, handle(1), b"done")
        assert late.hears() == [(P.WORK_COMPLETE, handle(1), b"done")]

    def test_other_function_makes_another_job(self):
        client = Wire().connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        assert client(P.SUBMIT_JOB, b"g", b"u", b"") == [(P.JOB_CREATED, handle(2))]

    def test_job_that_ended_is_not_joined(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"")
        assert client(P.SUBMIT_JOB_BG, b"f", b"u", b"") == [(P.JOB_CREATED, handle(2))]

    def test_every_client_hears_every_packet_and_twice_who_submitted_twice(self):
        wire = Wire()
        once, twice, worker = wire.connect(), wire.connect(), wire.worker(b"f")
        once(P.SUBMIT_JOB, b"f", b"u", b"")
        twice(P.SUBMIT_JOB, b"f", b"u", b"")
        twice(P.SUBMIT_JOB, b"f", b"u", b"")
        worker.grabs()
        worker(P.WORK_DATA, handle(1), b"part")
        worker(P.WORK_FAIL, handle(1))
        assert once.hears() == [(P.WORK_DATA, handle(1), b"part"), (P.WORK_FAIL, handle(1))]
        assert twice.hears() == [(P.WORK_DATA, handle(1), b"part")] * 2 + [(P.WORK_FAIL, handle(1))] * 2

    def test_late_client_does_not_get_earlier_parts(self):
        wire = Wire()
        worker = wire.worker(b"f")
        wire.connect()(P.SUBMIT_JOB, b"f", b"u", b"")
        worker.grabs()
        worker(P.WORK_DATA, handle(1), b"part")
        late = wire.connect()
        assert late(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(1))]

    def test_unique_dash_stands_for_the_workload(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"-", b"same")
        assert client(P.SUBMIT_JOB, b"f", b"-", b"same") == [(P.JOB_CREATED, handle(1))]
        assert client(P.SUBMIT_JOB, b"f", b"-", b"other") == [(P.JOB_CREATED, handle(2))]
        assert wire.worker(b"f")(P.GRAB_JOB_UNIQ) == [(P.JOB_ASSIGN_UNIQ, handle(1), b"f", b"-", b"same")]

    def test_workload_is_no_unique_for_those_that_send_one(self):
        client = Wire().connect()
        client(P.SUBMIT_JOB, b"f", b"-", b"u")
        assert client(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(2))]

    @pytest.mark.parametrize("unique", [b"", b"-"])
    def test_empty_unique_and_dash_with_empty_workload_never_join(self, unique):
        client = Wire().connect()
        client(P.SUBMIT_JOB, b"f", unique, b"")
        assert client(P.SUBMIT_JOB, b"f", unique, b"") == [(P.JOB_CREATED, handle(2))]

    def test_attaching_wakes_nobody(self):
        wire = Wire()
        worker = wire.worker(b"f").sleeps()
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        assert worker.hears() == [(P.NOOP,)]
        other = wire.connect()
        other(P.CAN_DO, b"f")
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        assert worker.hears() == []


class TestAbandonedJob:
    """PROTOCOL section 5.2, with the behaviour wanted where gearmand's is a bug."""

    def test_waiting_foreground_job_goes_with_its_last_client(self):
        wire = Wire()
        first, second = wire.connect(), wire.connect()
        first(P.SUBMIT_JOB, b"f", b"u", b"")
        second(P.SUBMIT_JOB, b"f", b"u", b"")
        first.leaves()
        watcher = wire.worker(b"f")
        assert watcher.line(b"status") == b"f\t1\t0\t1\n.\n"
        second.leaves()
        assert watcher.line(b"status") == b"f\t0\t0\t1\n.\n"
        assert watcher.grabs() is None

    def test_same_unique_after_that_is_a_new_job(self):
        wire = Wire()
        first = wire.connect()
        first(P.SUBMIT_JOB, b"f", b"u", b"")
        first.leaves()
        assert wire.connect()(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(2))]

    def test_background_job_stays_when_a_client_that_attached_leaves(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        attached = wire.connect()
        attached(P.SUBMIT_JOB, b"f", b"u", b"")
        attached.leaves()
        assert wire.worker(b"f").grabs() == handle(1)

    def test_background_submission_makes_a_foreground_job_permanent(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        client.leaves()
        assert wire.worker(b"f").grabs() == handle(1)

    def test_worker_of_a_job_that_nobody_waits_for_goes_on(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        client.leaves()
        assert worker(P.WORK_DATA, handle(1), b"x") == []
        assert worker(P.WORK_COMPLETE, handle(1), b"x") == []
        assert worker(P.WORK_COMPLETE, handle(1), b"x") == [NOT_FOUND]

    def test_job_whose_client_and_then_worker_left_is_dropped(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        client.leaves()
        worker.leaves()
        assert wire.worker(b"f").grabs() is None
        assert wire.core.jobs == {}

    def test_abandoned_jobs_do_not_keep_a_worker_awake(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"")
        client.leaves()
        assert wire.worker(b"f")(P.PRE_SLEEP) == []

    def test_abandoned_jobs_behind_a_waiting_one_take_no_memory(self):
        """Clients that come and go must not fill the server, though nobody takes the first job."""
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"stays")
        for kind in FOREGROUND * 2000:
            client = wire.connect()
            client(kind, b"f", b"", b"")
            client.leaves()
        wire.core.dirty.clear()
        function = wire.core.functions[b"f"]
        assert sum(len(level) for level in function.levels.values()) < 2500
        assert wire.worker(b"f").grabs() == handle(1)


class TestStatusQuery:
    """PROTOCOL section 3, GET_STATUS."""

    def test_unknown_handle(self):
        answer = Wire().connect()(P.GET_STATUS, b"H:no:1")
        assert answer == [(P.STATUS_RES, b"H:no:1", b"0", b"0", b"0", b"0")]

    def test_life_of_a_job(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")

        def status():
            ((kind, shown, *numbers),) = client(P.GET_STATUS, handle(1))
            assert (kind, shown) == (P.STATUS_RES, handle(1))
            return numbers

        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert status() == [b"1", b"0", b"0", b"0"]
        worker.grabs()
        assert status() == [b"1", b"1", b"0", b"0"]
        worker(P.WORK_STATUS, handle(1), b"3", b"10")
        assert status() == [b"1", b"1", b"3", b"10"]
        worker.leaves()
        assert status() == [b"1", b"0", b"0", b"0"]
        second = wire.worker(b"f")
        second.grabs()
        second(P.WORK_COMPLETE, handle(1), b"")
        assert status() == [b"0", b"0", b"0", b"0"]

    def test_trailing_nul_is_no_part_of_the_handle(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert client(P.GET_STATUS, handle(1) + b"\0")[0][:3] == (P.STATUS_RES, handle(1), b"1")

    @pytest.mark.parametrize(
        ("sent", "shown"),
        [
            (b"abc", b"0"),
            (b"50.5", b"50"),
            (b"-1", b"4294967295"),
            (b"", b"0"),
            (b" 7 ", b"7"),
            (b"+7", b"7"),
            (b"+-7", b"0"),
            (b"--7", b"0"),
            (b"-", b"0"),
            (b"4294967296", b"0"),
            (b"007", b"7"),
        ],
    )
    def test_numbers_are_read_as_atoi_reads_them(self, sent, shown):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        worker(P.WORK_STATUS, handle(1), sent, sent)
        assert client.hears() == [(P.WORK_STATUS, handle(1), sent, sent)]
        assert client(P.GET_STATUS, handle(1))[0][4:] == (shown, shown)

    def test_endless_number_costs_nothing(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        worker.grabs()
        worker(P.WORK_STATUS, handle(1), b"9" * 100_000, b"1")
        shown = client(P.GET_STATUS, handle(1))[0][4]
        assert 0 <= int(shown) < 2**32


class TestSmallRequests:
    """PROTOCOL section 3: ECHO_REQ, SET_CLIENT_ID, OPTION_REQ."""

    @pytest.mark.parametrize("data", [b"hello", b"a\0b", b"\0", b"\xff\n"])
    def test_echo_gives_back_the_same_bytes(self, data):
        client = Wire().connect()
        assert client(P.ECHO_REQ, data) == [(P.ECHO_RES, data)]

    def test_empty_echo(self):
        assert Wire().connect()(P.ECHO_REQ, b"") == [(P.ECHO_RES,)]

    @pytest.mark.parametrize(
        ("sent", "shown"),
        [
            (b"me", b"me"),
            (b"two words", b"two words"),
            (b"", b""),
            (b"x" * 200, b"x" * 127),
            (b"a\nb\t\x7f\0", b"a?b???"),
        ],
    )
    def test_client_id_is_shown_and_forges_nothing(self, sent, shown):
        client = Wire().connect()
        assert client(P.SET_CLIENT_ID, sent) == []
        assert client.line(b"workers") == b"1 127.0.0.1 " + shown + b" :\n.\n"

    @pytest.mark.parametrize("name", [b"exceptions", b"EXCEPTIONS", b"Exceptions\0"])
    def test_option_is_matched_without_case_and_echoed_as_sent(self, name):
        assert Wire().connect()(P.OPTION_REQ, name) == [(P.OPTION_RES, name)]

    @pytest.mark.parametrize("name", [b"", b"other", b"exception", b"exceptions "])
    def test_other_options_are_unknown(self, name):
        answer = Wire().connect()(P.OPTION_REQ, name)
        assert answer == [(P.ERROR, b"UNKNOWN_OPTION", b"Server does not recognize given option")]


class TestDatabaseDoor:
    """``gearman:claim`` and the jobs that a store hands over."""

    def test_claim_is_answered_at_once_and_asks_the_journal(self):
        wire = Wire(durable=True)
        ((kind, _),) = wire.connect()(P.SUBMIT_JOB_BG, CLAIM, b"", b"")
        assert kind == P.JOB_CREATED
        assert wire.core.claim_wanted
        assert wire.core.jobs == {}
        assert wire.entries() == []

    def test_nobody_can_serve_or_wait_for_it(self):
        wire = Wire(durable=True)
        assert wire.connect()(P.CAN_DO, CLAIM)[0][:2] == (P.ERROR, b"INVALID_FUNCTION_NAME")
        assert wire.connect()(P.SUBMIT_JOB, CLAIM, b"", b"")[0][:2] == (P.ERROR, b"INVALID_FUNCTION_NAME")
        assert not wire.core.claim_wanted

    def test_adopted_job_is_handed_out_like_any_other(self):
        wire = Wire(durable=True)
        worker = wire.worker(b"f").sleeps()
        wire.core.adopt([StoredJob(b"H:test:1:r1", b"f", b"u", b"w", 0, 2, None)])
        assert worker.hears() == [(P.NOOP,)]
        assert worker(P.GRAB_JOB_UNIQ) == [(P.JOB_ASSIGN_UNIQ, b"H:test:1:r1", b"f", b"u", b"w")]
        (started,) = wire.entries()
        assert started.attempts == 3
        assert wire.connect()(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, b"H:test:1:r1")]

    def test_job_is_adopted_once(self):
        wire = Wire(durable=True)
        stored = StoredJob(b"H:test:1:r1", b"f", b"", b"w", 0, 0, None)
        wire.core.adopt([stored, stored])
        wire.core.adopt([stored])
        worker = wire.worker(b"f")
        assert worker.grabs() == b"H:test:1:r1"
        assert worker.grabs() is None

    def test_two_rows_of_one_unique_both_run(self):
        wire = Wire(durable=True)
        wire.core.adopt(StoredJob(b"H:test:1:r%d" % n, b"f", b"u", b"w", 0, 0, None) for n in (1, 2))
        worker = wire.worker(b"f")
        assert worker.grabs() == b"H:test:1:r1"
        worker(P.WORK_COMPLETE, b"H:test:1:r1", b"")
        assert worker.grabs() == b"H:test:1:r2"

    def test_limit_of_the_job_itself_counts_before_the_servers(self):
        wire = Wire(durable=True, job_retries=5)
        wire.core.adopt([StoredJob(b"H:test:1:r1", b"f", b"", b"w", 0, 1, 2)])
        worker = wire.worker(b"f")
        worker.grabs()
        worker.leaves()
        assert wire.core.jobs == {}


class TestFunctionsThatAreNotUsed:
    """PROTOCOL section 6: a function stays listed; DESIGN section 6: but not without limit."""

    def test_idle_function_stays_listed(self):
        wire = Wire()
        worker = wire.worker(b"f")
        worker(P.CANT_DO, b"f")
        assert worker.line(b"status") == b"f\t0\t0\t0\n.\n"

    def test_longest_idle_ones_go_when_there_are_too_many(self):
        wire = Wire(max_idle_functions=3)
        keeper = wire.worker(b"served")
        wire.connect()(P.SUBMIT_JOB_BG, b"queued", b"", b"")
        for number in range(10):
            other = wire.worker(b"f%d" % number)
            other.leaves()
        names = [row.split(b"\t")[0] for row in keeper.line(b"status").splitlines()]
        assert names == [b"served", b"queued", b"f7", b"f8", b"f9", b"."]

    def test_abilities_of_one_connection_are_limited(self):
        wire = Wire(max_abilities=2)
        worker = wire.worker(b"a", b"b")
        assert worker(P.CAN_DO, b"c")[0][:2] == (P.ERROR, b"ARGUMENT_TOO_LARGE")
        assert worker(P.CAN_DO, b"a") == []
