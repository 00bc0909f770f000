"""The daemon: settings, and the only place that builds objects."""
