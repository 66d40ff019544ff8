"""Teachers: frozen models that answer and never train by accident."""
