"""Knowledge in what the teacher computes on the way: features."""
