"""What was transferred: fidelity, calibration, similarity of layers, controls."""
