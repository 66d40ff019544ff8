"""Knowledge in what the teacher answers: logits and probabilities."""
