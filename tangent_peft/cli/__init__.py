"""The command `tangent-peft`."""
