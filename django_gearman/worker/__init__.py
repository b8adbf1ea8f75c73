"""The hands: take jobs from job servers, run functions, report; and the processes that do so."""
