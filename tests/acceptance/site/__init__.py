"""A small site that enqueues and runs jobs from its views, as an app with jobs of its own."""
