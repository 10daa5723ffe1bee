"""The parts of `train_step.py`.

What is measured (`variants`, `functorch`), by whom (`worker`), on what (`setting`), and how many floating-point
operations it ought to take (`formula`).
"""
