"""Knowledge distillation for PyTorch: any teacher, any student, every method checked."""
