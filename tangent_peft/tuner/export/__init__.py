"""θ(λ) for other software: as an ordinary model, or as a plain LoRA that stock PEFT and LoRA servers load.

What is written says what it is: rank, error, linearity gap, base. A folder is there whole or not at all.
"""
