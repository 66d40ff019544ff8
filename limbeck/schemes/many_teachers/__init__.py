"""Several teachers: averaged, weighed, chosen, routed, or specialists of their own tasks."""
