"""The caller: submits jobs to a job server and hears what becomes of them."""
