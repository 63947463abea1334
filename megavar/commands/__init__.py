"""The verbs beside `run` and `show`: each module's `run(args)` is one, and returns its exit status."""
