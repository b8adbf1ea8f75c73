"""
How gunicorn serves the example site.

A file rather than options, because gunicorn ignores names that it does not
know here: ``control_socket_disable`` came with gunicorn 25, and older ones
run as well. GUNICORN_CMD_ARGS overrides everything below.
"""

import os

# Loopback, whatever $PORT says; the same variable tells `manage.py demo`.
# On a server nginx stands in front and this stays as it is.
bind = os.environ.get("WEB_ADDRESS", "127.0.0.1:8000")

workers = 2

# Threads, so that two long uploads do not keep the pages from everybody else.
worker_class = "gthread"
threads = 4

# Imported once and shared by the workers. Nothing opens a connection on import.
preload_app = True

max_requests = 2000
max_requests_jitter = 200

# What supervisord waits for is longer: see stopwaitsecs in deploy/supervisord.conf.
graceful_timeout = 30

# By default every gunicorn of a user shares one path in the home directory.
control_socket_disable = True
