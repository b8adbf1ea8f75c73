"""
The job server's promises, tried in worlds that a seed decides.

``python -m tests.simulation`` plays them by hand; the tests beside it play
new ones in every run.
"""
