"""``python -m django_gearman.health``: as ``manage.py gearman_health``, without Django."""

from .management.health import main

if __name__ == "__main__":
    main()
